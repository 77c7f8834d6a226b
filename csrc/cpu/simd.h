// Vectors of one instruction set, in the compiler's portable vector types. No include guard:
// foreach_isa.h includes this once per instruction set, inside a namespace of its own that has
// already fixed kVectorBytes and kRegisters.

#define FASTNET_INLINE static inline __attribute__((always_inline))

// Before a loop over an array that is to live in registers. Unrolled late, or set to zero as a
// whole (= {}), such an array passes through memory, which cost a quarter of a product's time.
#define FASTNET_UNROLL _Pragma("GCC unroll 32")

template <class Element, int kBytes = kVectorBytes>
struct VectorType {
  typedef Element type __attribute__((vector_size(kBytes)));
  typedef Element unaligned
      __attribute__((vector_size(kBytes), aligned(alignof(Element)), may_alias));
};
template <class Element>
using Vec = typename VectorType<Element>::type;
template <class Element>
using UnalignedVec = typename VectorType<Element>::unaligned;

// Whether comparisons give masks of their own, with which a choice costs nothing.
inline constexpr bool kHasMasks = kVectorBytes == 64;

template <class T>
inline constexpr int kLanes = kVectorBytes / sizeof(acc_t<T>);

// ---------------------------------------------------------------------------------------------
// Loads and stores: memory holds T, registers hold acc_t<T>

FASTNET_INLINE float widen(float value) {
  return value;
}
FASTNET_INLINE double widen(double value) {
  return value;
}
FASTNET_INLINE float widen(bfloat16 value) {
  const uint32_t bits = static_cast<uint32_t>(value.bits) << 16;
  float result;
  __builtin_memcpy(&result, &bits, sizeof result);
  return result;
}

FASTNET_INLINE void narrow(float value, float* to) {
  *to = value;
}
FASTNET_INLINE void narrow(double value, double* to) {
  *to = value;
}
FASTNET_INLINE void narrow(float value, bfloat16* to) {
  uint32_t bits;
  __builtin_memcpy(&bits, &value, sizeof bits);
  // Round to nearest, ties to even; a NaN must not round to infinity.
  const uint32_t rounded = (bits + 0x7fff + ((bits >> 16) & 1)) >> 16;
  to->bits = static_cast<uint16_t>(value != value ? 0x7fc0 : rounded);
}

FASTNET_INLINE Vec<float> load(const float* from) {
  return *reinterpret_cast<const UnalignedVec<float>*>(from);
}
FASTNET_INLINE Vec<double> load(const double* from) {
  return *reinterpret_cast<const UnalignedVec<double>*>(from);
}
FASTNET_INLINE Vec<int32_t> load(const int32_t* from) {
  return *reinterpret_cast<const UnalignedVec<int32_t>*>(from);
}
FASTNET_INLINE Vec<float> load(const bfloat16* from) {
  using Half = typename VectorType<uint16_t, kVectorBytes / 2>::unaligned;
  const Half bits = *reinterpret_cast<const Half*>(from);
  return (Vec<float>)(__builtin_convertvector(bits, Vec<uint32_t>) << 16);
}

// Bytes, each in a lane as an integer.
FASTNET_INLINE Vec<int32_t> load_bytes(const uint8_t* from) {
  using Bytes = typename VectorType<uint8_t, kLanes<float>>::unaligned;
  const Bytes* const bytes = reinterpret_cast<const Bytes*>(from);
  Vec<int32_t> numbers;
#if defined(__x86_64__)
  if constexpr (kVectorBytes > 16) {
    // Said as a conversion, GCC makes it one byte at a time.
    __asm__("vpmovzxbd %1, %0" : "=v"(numbers) : "m"(*bytes));
  } else {
    numbers = __builtin_convertvector(*bytes, Vec<int32_t>);
  }
#else
  numbers = __builtin_convertvector(*bytes, Vec<int32_t>);
#endif
  return numbers;
}

FASTNET_INLINE void store(float* to, Vec<float> value) {
  *reinterpret_cast<UnalignedVec<float>*>(to) = value;
}
FASTNET_INLINE void store(double* to, Vec<double> value) {
  *reinterpret_cast<UnalignedVec<double>*>(to) = value;
}
FASTNET_INLINE void store(int32_t* to, Vec<int32_t> value) {
  *reinterpret_cast<UnalignedVec<int32_t>*>(to) = value;
}
FASTNET_INLINE void store(bfloat16* to, Vec<float> value) {
  using Half = typename VectorType<uint16_t, kVectorBytes / 2>::unaligned;
  const Vec<uint32_t> bits = (Vec<uint32_t>)value;
  Vec<uint32_t> rounded = (bits + 0x7fff + ((bits >> 16) & 1)) >> 16;
  rounded = value != value ? Vec<uint32_t>{} + 0x7fc0 : rounded;
  *reinterpret_cast<Half*>(to) = __builtin_convertvector(rounded, Half);
}

// The same value, of which the compiler no longer knows that it came from memory: it would load it
// anew for every use, which saves it a register, but loads are the bottleneck of some loops.
template <class V>
FASTNET_INLINE V in_register(V value) {
#if defined(__x86_64__)
  __asm__("" : "+v"(value));
#elif defined(__aarch64__)
  __asm__("" : "+w"(value));
#endif
  return value;
}

// Four elements, whatever the width of a vector.
template <class A>
using Vec4 = typename VectorType<A, 4 * sizeof(A)>::type;

template <class T>
FASTNET_INLINE Vec4<acc_t<T>> load_4(const T* from) {
  if constexpr (std::is_same_v<T, acc_t<T>>) {
    return *reinterpret_cast<const typename VectorType<T, 4 * sizeof(T)>::unaligned*>(from);
  } else {
    return Vec4<acc_t<T>>{widen(from[0]), widen(from[1]), widen(from[2]), widen(from[3])};
  }
}
template <class T>
FASTNET_INLINE void store_4(T* to, Vec4<acc_t<T>> value) {
  if constexpr (std::is_same_v<T, acc_t<T>>) {
    *reinterpret_cast<typename VectorType<T, 4 * sizeof(T)>::unaligned*>(to) = value;
  } else {
    for (int i = 0; i < 4; ++i) narrow(value[i], to + i);
  }
}

template <class A>
FASTNET_INLINE Vec<A> splat(A value) {
  return value - Vec<A>{};  // x - 0 is x, bit for bit, which the compiler knows; x + 0 is not
}

// 0, 1, 2, ...
template <class A>
FASTNET_INLINE Vec<A> lane_index() {
  Vec<A> lane;
  for (int i = 0; i < kVectorBytes / static_cast<int>(sizeof(A)); ++i) lane[i] = static_cast<A>(i);
  return lane;
}

// ---------------------------------------------------------------------------------------------
// Sums across lanes

template <int... kLane>
struct LaneList {};
template <int kCount, int... kLane>
struct MakeLanes : MakeLanes<kCount - 1, kCount - 1, kLane...> {};
template <int... kLane>
struct MakeLanes<0, kLane...> {
  using type = LaneList<kLane...>;
};

// Two vectors as the halves of one.
template <class Half, int... kLane>
FASTNET_INLINE auto join(Half low, Half high, LaneList<kLane...>) {
  return __builtin_shufflevector(low, high, kLane...);
}

// Sums the two halves of every 2 * kGroup lanes, of a into the lower kGroup lanes of the result's,
// of b into the upper.
template <int kGroup, class V, int... kLane>
FASTNET_INLINE V add_halves(V a, V b, LaneList<kLane...>) {
  constexpr int kBlock = 2 * kGroup, kCount = sizeof...(kLane);
  return __builtin_shufflevector(
             a, b,
             (kLane / kBlock * kBlock + kLane % kGroup + kLane % kBlock / kGroup * kCount)...) +
         __builtin_shufflevector(a, b,
                                 (kLane / kBlock * kBlock + kLane % kGroup + kGroup +
                                  kLane % kBlock / kGroup * kCount)...);
}

// Adds the upper half of a vector onto the lower until kBytes are left.
template <class A, int kBytes, int kFrom = kVectorBytes>
FASTNET_INLINE typename VectorType<A, kBytes>::type fold(
    typename VectorType<A, kFrom>::type value) {
  if constexpr (kFrom == kBytes) {
    return value;
  } else {
    using Half = typename VectorType<A, kFrom / 2>::type;
    Half low, high;
    __builtin_memcpy(&low, &value, kFrom / 2);
    __builtin_memcpy(&high, reinterpret_cast<const char*>(&value) + kFrom / 2, kFrom / 2);
    return fold<A, kBytes, kFrom / 2>(low + high);
  }
}

// The sums of four vectors: 7 shuffles where one at a time takes 12.
template <class A>
FASTNET_INLINE Vec4<A> reduce_add_4(Vec<A> v0, Vec<A> v1, Vec<A> v2, Vec<A> v3) {
  constexpr int kCount = kVectorBytes / sizeof(A);
  constexpr typename MakeLanes<kCount>::type lanes{};
  const Vec<A> low = add_halves<1>(v0, v1, lanes), high = add_halves<1>(v2, v3, lanes);
  if constexpr (kCount == 2) {
    return Vec4<A>{low[0], low[1], high[0], high[1]};
  } else {
    return fold<A, 4 * sizeof(A)>(add_halves<2>(low, high, lanes));
  }
}

template <class A>
FASTNET_INLINE A reduce_add(Vec<A> value) {
  const auto pair = fold<A, 2 * sizeof(A)>(value);
  return pair[0] + pair[1];
}

template <class A>
FASTNET_INLINE Vec<A> maximum(Vec<A> a, Vec<A> b) {
#if defined(__x86_64__)
  // The compiler makes it a comparison and a choice, not knowing that of NaN and of two zeros the
  // instruction takes `a`, too.
  if constexpr (kVectorBytes > 16 && sizeof(A) == sizeof(float)) {
    Vec<A> most;
    __asm__("vmaxps %2, %1, %0" : "=v"(most) : "v"(b), "v"(a));
    return most;
  }
#endif
  return a < b ? b : a;
}

template <class A, int kFrom = kVectorBytes>
FASTNET_INLINE A reduce_max(typename VectorType<A, kFrom>::type value) {
  if constexpr (kFrom == 2 * sizeof(A)) {
    return value[0] < value[1] ? value[1] : value[0];
  } else {
    using Half = typename VectorType<A, kFrom / 2>::type;
    Half low, high;
    __builtin_memcpy(&low, &value, kFrom / 2);
    __builtin_memcpy(&high, reinterpret_cast<const char*>(&value) + kFrom / 2, kFrom / 2);
    return reduce_max<A, kFrom / 2>(low < high ? high : low);
  }
}

// ---------------------------------------------------------------------------------------------
// Picking

#if defined(__x86_64__)
// Which bits of a byte are set, from the lowest on, a byte each.
struct SetBits {
  uint64_t of[256] = {};
  constexpr SetBits() {
    for (int byte = 0; byte < 256; ++byte) {
      for (int bit = 0, count = 0; bit < 8; ++bit) {
        if (byte >> bit & 1) of[byte] |= static_cast<uint64_t>(bit) << 8 * count++;
      }
    }
  }
};
#endif

// Brings the lanes in which `is_wanted` is all ones side by side, in both vectors. Returns how many
// there are; what the others hold then has no meaning.
FASTNET_INLINE int pick(Vec<int32_t> is_wanted, Vec<float>* value, Vec<int32_t>* place) {
#if defined(__x86_64__)
  if constexpr (kVectorBytes == 64) {
    uint16_t mask;
    __asm__("vpmovd2m %1, %0" : "=Yk"(mask) : "v"(is_wanted));
    __asm__("vcompressps %1, %0%{%2%}%{z%}" : "=v"(*value) : "v"(*value), "Yk"(mask));
    __asm__("vpcompressd %1, %0%{%2%}%{z%}" : "=v"(*place) : "v"(*place), "Yk"(mask));
    return __builtin_popcount(mask);
  }
  if constexpr (kVectorBytes == 32) {
    static constexpr SetBits kSetBits;
    uint32_t mask;
    __asm__("vmovmskps %1, %0" : "=r"(mask) : "x"(is_wanted));
    const Vec<int32_t> lanes = load_bytes(reinterpret_cast<const uint8_t*>(kSetBits.of + mask));
    __asm__("vpermps %1, %2, %0" : "=x"(*value) : "x"(*value), "x"(lanes));
    __asm__("vpermd %1, %2, %0" : "=x"(*place) : "x"(*place), "x"(lanes));
    return __builtin_popcount(mask);
  }
#endif
  int count = 0;
  for (int lane = 0; lane < kLanes<float>; ++lane) {
    (*value)[count] = (*value)[lane];
    (*place)[count] = (*place)[lane];
    count += is_wanted[lane] != 0;
  }
  return count;
}

// ---------------------------------------------------------------------------------------------
// Transposing

// Four elements of kVectorBytes / 16 places, `next` apart, side by side in one vector, and back.
template <int kBytes = kVectorBytes>
FASTNET_INLINE typename VectorType<float, kBytes>::type load_fours(const float* from,
                                                                   int64_t next) {
  if constexpr (kBytes == 16) {
    return load_4(from);
  } else {
    constexpr typename MakeLanes<kBytes / 4>::type lanes{};
    return join(load_fours<kBytes / 2>(from, next),
                load_fours<kBytes / 2>(from + kBytes / 32 * next, next), lanes);
  }
}
template <int kBytes = kVectorBytes>
FASTNET_INLINE void store_fours(float* to, int64_t next,
                                typename VectorType<float, kBytes>::type value) {
  if constexpr (kBytes == 16) {
    store_4(to, value);
  } else {
    typename VectorType<float, kBytes / 2>::type low, high;
    __builtin_memcpy(&low, &value, sizeof low);
    __builtin_memcpy(&high, reinterpret_cast<const char*>(&value) + sizeof low, sizeof high);
    store_fours<kBytes / 2>(to, next, low);
    store_fours<kBytes / 2>(to + kBytes / 32 * next, next, high);
  }
}

// Four vectors of 4 x 4 elements each per 16 bytes, of which every 4 x 4 is transposed.
template <class V, int... kLane>
FASTNET_INLINE void transpose_fours(V (&x)[4], LaneList<kLane...>) {
  constexpr int kCount = sizeof...(kLane);
  const auto interleave = [](V a, V b, auto first) {
    constexpr int kFirst = decltype(first)::value;
    return __builtin_shufflevector(
        a, b, (kLane / 4 * 4 + kFirst + kLane % 4 / 2 + kLane % 2 * kCount)...);
  };
  const auto join_pairs = [](V a, V b, auto first) {
    constexpr int kFirst = decltype(first)::value;
    return __builtin_shufflevector(
        a, b, (kLane / 4 * 4 + kFirst + kLane % 2 + kLane % 4 / 2 * kCount)...);
  };
  using Low = std::integral_constant<int, 0>;
  using High = std::integral_constant<int, 2>;
  const V ab_low = interleave(x[0], x[1], Low{}), ab_high = interleave(x[0], x[1], High{});
  const V cd_low = interleave(x[2], x[3], Low{}), cd_high = interleave(x[2], x[3], High{});
  x[0] = join_pairs(ab_low, cd_low, Low{});
  x[1] = join_pairs(ab_low, cd_low, High{});
  x[2] = join_pairs(ab_high, cd_high, Low{});
  x[3] = join_pairs(ab_high, cd_high, High{});
}

// to[column · to_row + row] = from[row · from_row + column]. Four columns of as many rows as a
// vector has lanes at a time, or four rows of as many columns, or four of four. The last four reach
// back over what is done already.
template <class From, class To>
FASTNET_INLINE void transpose(const From* from, int64_t from_row, To* to, int64_t to_row,
                              int64_t rows, int64_t columns) {
  using V = Vec4<acc_t<From>>;
  constexpr bool kByVectors =
      std::is_same_v<From, float> && std::is_same_v<To, float> && kVectorBytes > 16;
  constexpr int kStep = kLanes<float>;
  constexpr typename MakeLanes<kStep>::type lanes{};
  constexpr typename MakeLanes<4>::type four{};
  if (rows < 4 || columns < 4) {
    for (int64_t row = 0; row < rows; ++row) {
      for (int64_t column = 0; column < columns; ++column) {
        narrow(widen(from[row * from_row + column]), to + column * to_row + row);
      }
    }
    return;
  }
  const auto last_four = [](int64_t index, int64_t count) {
    return index < count - 4 ? index : count - 4;
  };
  int64_t row = 0;
  if constexpr (kByVectors) {
    for (; row + kStep <= rows; row += kStep) {
      for (int64_t column = 0; column < columns; column += 4) {
        const int64_t at = last_four(column, columns);
        const float* const x = from + row * from_row + at;
        float* const y = to + at * to_row + row;
        Vec<float> block[4];
        FASTNET_UNROLL for (int i = 0; i < 4; ++i) {
          block[i] = load_fours(x + i * from_row, 4 * from_row);
        }
        transpose_fours(block, lanes);
        FASTNET_UNROLL for (int i = 0; i < 4; ++i) store(y + i * to_row, block[i]);
      }
    }
  }
  for (; row < rows; row += 4) {
    const From* const x = from + last_four(row, rows) * from_row;
    To* const y = to + last_four(row, rows);
    int64_t column = 0;
    if constexpr (kByVectors) {
      for (; column + kStep <= columns; column += kStep) {
        Vec<float> block[4];
        FASTNET_UNROLL for (int i = 0; i < 4; ++i) block[i] = load(x + i * from_row + column);
        transpose_fours(block, lanes);
        FASTNET_UNROLL for (int i = 0; i < 4; ++i) {
          store_fours(y + (column + i) * to_row, 4 * to_row, block[i]);
        }
      }
    }
    for (; column < columns; column += 4) {
      const int64_t at = last_four(column, columns);
      V block[4];
      FASTNET_UNROLL for (int i = 0; i < 4; ++i) block[i] = load_4(x + i * from_row + at);
      transpose_fours(block, four);
      FASTNET_UNROLL for (int i = 0; i < 4; ++i) store_4(y + (at + i) * to_row, block[i]);
    }
  }
}

// The same of bytes.
FASTNET_INLINE void transpose(const uint8_t* from, int64_t from_row, uint8_t* to, int64_t to_row,
                              int64_t rows, int64_t columns) {
  using Bytes = typename VectorType<uint8_t, 16>::type;
  using Pairs = typename VectorType<uint16_t, 16>::type;
  const auto at = [](const uint8_t* bytes) {
    return *reinterpret_cast<const typename VectorType<uint8_t, 16>::unaligned*>(bytes);
  };
  int64_t row = 0;
  for (; row + 4 <= rows; row += 4) {
    const uint8_t* const x = from + row * from_row;
    uint8_t* const y = to + row;
    int64_t column = 0;
    for (; column + 16 <= columns; column += 16) {
      const Bytes a = at(x + column), b = at(x + from_row + column);
      const Bytes c = at(x + 2 * from_row + column), d = at(x + 3 * from_row + column);
      const auto four = [&](Bytes ab, Bytes cd, int64_t first) {
        const Pairs low = __builtin_shufflevector((Pairs)ab, (Pairs)cd, 0, 8, 1, 9, 2, 10, 3, 11);
        const Pairs high =
            __builtin_shufflevector((Pairs)ab, (Pairs)cd, 4, 12, 5, 13, 6, 14, 7, 15);
        for (int i = 0; i < 4; ++i) {
          const uint32_t one = ((Vec4<uint32_t>)low)[i], other = ((Vec4<uint32_t>)high)[i];
          __builtin_memcpy(y + (first + i) * to_row, &one, 4);
          __builtin_memcpy(y + (first + 4 + i) * to_row, &other, 4);
        }
      };
      four(__builtin_shufflevector(a, b, 0, 16, 1, 17, 2, 18, 3, 19, 4, 20, 5, 21, 6, 22, 7, 23),
           __builtin_shufflevector(c, d, 0, 16, 1, 17, 2, 18, 3, 19, 4, 20, 5, 21, 6, 22, 7, 23),
           column);
      four(__builtin_shufflevector(a, b, 8, 24, 9, 25, 10, 26, 11, 27, 12, 28, 13, 29, 14, 30, 15,
                                   31),
           __builtin_shufflevector(c, d, 8, 24, 9, 25, 10, 26, 11, 27, 12, 28, 13, 29, 14, 30, 15,
                                   31),
           column + 8);
    }
    for (; column < columns; ++column) {
      for (int i = 0; i < 4; ++i) y[column * to_row + i] = x[i * from_row + column];
    }
  }
  for (; row < rows; ++row) {
    for (int64_t column = 0; column < columns; ++column) {
      to[column * to_row + row] = from[row * from_row + column];
    }
  }
}

// ---------------------------------------------------------------------------------------------
// exp(x) for x up to 88 (float) or 709 (double), to 2 ulp. Where the result would be subnormal it
// may be 0, at -infinity it is; NaN stays NaN.
//
// exp(x) = 2^n · exp(r) with n = round(x / ln 2) and |r| <= ln 2 / 2. Adding 1.5 · 2^(digits)
// rounds to an integer, and leaves n in the lowest bits, from where it is shifted into the
// exponent. ln 2 is subtracted in two parts, of which the first times n is exact.

// Of several vectors step by step: each step waits for the one before, and a processor looks too
// few instructions ahead to begin with the next vector meanwhile. The exponent's bias is added with
// what rounds, and n is never below -127, whose power is 0: no comparison, no addition of integers.
template <int kCount>
FASTNET_INLINE void exp_each(Vec<float> (&x)[kCount]) {
  using V = Vec<float>;
  constexpr float kRounds = 12582912.0f + 127.0f;
  V shifted[kCount], r[kCount], q[kCount];
  FASTNET_UNROLL for (int i = 0; i < kCount; ++i) x[i] = maximum<float>(x[i], splat(-88.0f));
  FASTNET_UNROLL for (int i = 0; i < kCount; ++i) shifted[i] = x[i] * 1.44269504f + kRounds;
  FASTNET_UNROLL for (int i = 0; i < kCount; ++i) {
    const V n = shifted[i] - kRounds;
    r[i] = (x[i] - n * 0.693359375f) + n * 2.12194440e-4f;
  }
  // exp(r) = 1 + r + r² q(r), q the polynomial of least relative error (3e-9)
  FASTNET_UNROLL for (int i = 0; i < kCount; ++i) {
    q[i] = r[i] * 1.381459878757596e-3f + 8.368716575205326e-3f;
  }
  FASTNET_UNROLL for (int i = 0; i < kCount; ++i) q[i] = q[i] * r[i] + 4.166838899254799e-2f;
  FASTNET_UNROLL for (int i = 0; i < kCount; ++i) q[i] = q[i] * r[i] + 1.666652113199234e-1f;
  FASTNET_UNROLL for (int i = 0; i < kCount; ++i) q[i] = q[i] * r[i] + 4.999999403953552e-1f;
  FASTNET_UNROLL for (int i = 0; i < kCount; ++i) q[i] = q[i] * r[i] + 1.0f;
  FASTNET_UNROLL for (int i = 0; i < kCount; ++i) {
    x[i] = (q[i] * r[i] + 1.0f) * (V)((Vec<uint32_t>)shifted[i] << 23);
  }
}

FASTNET_INLINE Vec<float> exp(Vec<float> x) {
  Vec<float> one[1] = {x};
  exp_each(one);
  return one[0];
}

FASTNET_INLINE Vec<double> exp(Vec<double> x) {
  const Vec<double> shifted = x * 1.4426950408889634 + 6755399441055744.0;
  const Vec<double> n = shifted - 6755399441055744.0;
  const Vec<double> r = (x - n * 0.693147180369123816490) - n * 1.90821492927058770002e-10;
  // The Taylor series up to r¹³ / 13!, whose rest is below 4e-18.
  constexpr double kInverseFactorials[] = {1 / 6227020800.0,
                                           1 / 479001600.0,
                                           1 / 39916800.0,
                                           1 / 3628800.0,
                                           1 / 362880.0,
                                           1 / 40320.0,
                                           1 / 5040.0,
                                           1 / 720.0,
                                           1 / 120.0,
                                           1 / 24.0,
                                           1 / 6.0,
                                           1 / 2.0,
                                           1.0,
                                           1.0};
  Vec<double> sum = splat(kInverseFactorials[0]);
#pragma GCC unroll 13
  for (int k = 1; k < 14; ++k) sum = sum * r + kInverseFactorials[k];
  const Vec<double> power = (Vec<double>)(((Vec<uint64_t>)shifted << 52) + 0x3ff0000000000000u);
  return x < -708.396418532264 ? Vec<double>{} : sum * power;
}

template <int kCount>
FASTNET_INLINE void exp_each(Vec<double> (&x)[kCount]) {
  for (int i = 0; i < kCount; ++i) x[i] = exp(x[i]);
}

// ---------------------------------------------------------------------------------------------
// log(x), to 2 ulp, for x = 0, normal x > 0 and NaN.
//
// x = 2^n · m with m in [√½, √2), and log m = 2 artanh(s) = 2 (s + s³/3 + s⁵/5 + ...) with
// s = (m - 1) / (m + 1), |s| < 0.172.

template <class A, class Bits, int kTerms>
FASTNET_INLINE Vec<A> log_by_series(Vec<A> x, Bits bits_of_sqrt_half, int digits, A ln2_high,
                                    A ln2_low) {
  const Vec<Bits> exponent = ((Vec<Bits>)x - bits_of_sqrt_half) >> digits;
  const Vec<A> m = (Vec<A>)((Vec<Bits>)x - (exponent << digits));
  const Vec<A> n = __builtin_convertvector(exponent, Vec<A>);
  const Vec<A> s = (m - A(1)) / (m + A(1)), square = s * s;
  Vec<A> series = splat(A(2) / (2 * kTerms + 1));
#pragma GCC unroll 12
  for (int k = kTerms - 1; k > 0; --k) series = series * square + A(2) / (2 * k + 1);
  const Vec<A> log_m = (series * square) * s + A(2) * s;
  const Vec<A> result = n * ln2_high + (n * ln2_low + log_m);
  const Vec<A> infinite = splat(static_cast<A>(-__builtin_huge_val()));
  return x > Vec<A>{} ? result : (x == Vec<A>{} ? infinite : x);
}

FASTNET_INLINE Vec<float> log(Vec<float> x) {
  return log_by_series<float, int32_t, 4>(x, 0x3f3504f3, 23, 0.693359375f, -2.12194440e-4f);
}
FASTNET_INLINE Vec<double> log(Vec<double> x) {
  return log_by_series<double, int64_t, 11>(x, 0x3fe6a09e667f3bcd, 52, 0.693147180369123816490,
                                            1.90821492927058770002e-10);
}
