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

FASTNET_INLINE int64_t least(int64_t a, int64_t b) {
  return a < b ? a : b;
}

// Calls body with `count`, of 1 to kMost, as a constant.
template <int kMost, class Body>
FASTNET_INLINE void with_constant(int64_t count, const Body& body) {
  if constexpr (kMost > 1) {
    if (count < kMost) return with_constant<kMost - 1>(count, body);
  }
  body(std::integral_constant<int, kMost>{});
}

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
#if defined(__x86_64__)
  // Said as a conversion, GCC makes it one byte at a time.
  if constexpr (kVectorBytes > 16) {
    Vec<int32_t> numbers;
    __asm__("vpmovzxbd %1, %0" : "=v"(numbers) : "m"(*bytes));
    return numbers;
  }
#endif
  return __builtin_convertvector(*bytes, Vec<int32_t>);
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

// The numbers of all lanes, for what is done with constants: 0, 1, 2, ...
template <int... kLane>
using LaneList = std::integer_sequence<int, kLane...>;
template <int kCount>
using AllLanes = std::make_integer_sequence<int, kCount>;

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

// The halves of a vector. (Copied out of it byte by byte, the vector would live in memory.)
template <class V, int... kLane>
FASTNET_INLINE auto lower_half(V value, LaneList<kLane...>) {
  return __builtin_shufflevector(value, value, kLane...);
}
template <class V, int... kLane>
FASTNET_INLINE auto upper_half(V value, LaneList<kLane...>) {
  return __builtin_shufflevector(value, value, (sizeof...(kLane) + kLane)...);
}

// Adds the upper half of a vector onto the lower until kBytes are left.
template <class A, int kBytes, int kFrom = kVectorBytes>
FASTNET_INLINE typename VectorType<A, kBytes>::type fold(
    typename VectorType<A, kFrom>::type value) {
  if constexpr (kFrom == kBytes) {
    return value;
  } else {
    constexpr AllLanes<kFrom / 2 / sizeof(A)> lanes{};
    return fold<A, kBytes, kFrom / 2>(lower_half(value, lanes) + upper_half(value, lanes));
  }
}

// The sums of four vectors: 7 shuffles where one at a time takes 12.
template <class A>
FASTNET_INLINE Vec4<A> reduce_add_4(Vec<A> v0, Vec<A> v1, Vec<A> v2, Vec<A> v3) {
  constexpr int kCount = kVectorBytes / sizeof(A);
  constexpr AllLanes<kCount> lanes{};
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
    constexpr AllLanes<kFrom / 2 / sizeof(A)> lanes{};
    const auto low = lower_half(value, lanes), high = upper_half(value, lanes);
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

#include "simd_math.h"
#include "simd_transpose.h"
