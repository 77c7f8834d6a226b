// What conv_relu_pool's forms share: how large operands are, what becomes of the four elements of a
// pooling window, and the pooled gradients and codes of windows, gathered. No include guard, like
// the other files of kernels.

FASTNET_INLINE Magnitude larger(Magnitude a, Magnitude b) {
  return a < b ? b : a;
}

// The largest of some magnitudes. A NaN counts as infinite.
template <class A>
struct LargestOf {
  A largest = 0;
  bool is_number = true;
  void add(A value) {
    const A size = value < 0 ? -value : value;
    largest = largest < size ? size : largest;
    is_number &= value == value;
  }
  void add_all(const A* values, int64_t count) {
    constexpr int kStep = kVectorBytes / sizeof(A);
    Vec<A> most = {};
    auto are_numbers = Vec<A>{} == Vec<A>{};
    const int64_t whole = count / kStep * kStep;
    for (int64_t i = 0; i < whole; i += kStep) {
      const Vec<A> value = load(values + i), size = value < Vec<A>{} ? -value : value;
      most = maximum<A>(most, size);
      are_numbers &= value == value;
    }
    for (int lane = 0; lane < kStep; ++lane) {
      add(most[lane]);
      is_number &= are_numbers[lane] != 0;
    }
    for (int64_t i = whole; i < count; ++i) add(values[i]);
  }
  Magnitude magnitude(float small = kLargest) const {
    if (!is_number || largest - largest != 0) return Magnitude::infinite;
    return largest < static_cast<A>(small) ? Magnitude::small : Magnitude::finite;
  }
};

// ---------------------------------------------------------------------------------------------
// Windows

template <class A>
using Index = std::conditional_t<sizeof(A) == 4, int32_t, int64_t>;

// The lowest byte of every lane, in two steps: side by side within 16 bytes, and then across those.
// (As a conversion of vectors this takes an instruction a lane and more.)
template <class I, int... kByte, int... kUnit>
FASTNET_INLINE void store_bytes(uint8_t* to, Vec<I> codes, LaneList<kByte...>, LaneList<kUnit...>) {
  constexpr int kSize = sizeof(I), kNear = 16 / kSize;
  constexpr int kUnits = sizeof...(kUnit), kNext = 16 / kNear;  // of kNear bytes
  using Unit = std::conditional_t<kNear == 4, uint32_t, uint16_t>;
  const Vec<uint8_t> all = (Vec<uint8_t>)codes;
  const Vec<Unit> near =
      (Vec<Unit>)__builtin_shufflevector(all, all, (kByte / 16 * 16 + kByte % kNear * kSize)...);
  const Vec<Unit> bytes = __builtin_shufflevector(near, near, (kUnit * kNext % kUnits)...);
  __builtin_memcpy(to, &bytes, kVectorBytes / kSize);
}
template <class A>
FASTNET_INLINE void store_codes(uint8_t* to, Vec<Index<A>> codes) {
#if defined(__x86_64__)
  if constexpr (kVectorBytes == 32 && sizeof(A) == sizeof(float)) {
    Vec4<int32_t> bytes = __builtin_shufflevector(codes, codes, 0, 1, 2, 3);
    const Vec4<int32_t> upper = __builtin_shufflevector(codes, codes, 4, 5, 6, 7);
    __asm__("vpackssdw %1, %0, %0\n\tvpackuswb %0, %0, %0" : "+x"(bytes) : "x"(upper));
    __builtin_memcpy(to, &bytes, 8);
    return;
  }
#endif
  store_bytes<Index<A>>(to, codes, AllLanes<kVectorBytes>{},
                        AllLanes<kVectorBytes * sizeof(A) / 16>{});
}

// The maximum of the four elements of each window, in the order 2·dy + dx, and which one it is. Of
// several vectors step by step, for each step waits for the one before. Where no NaN can be among
// them, fewer comparisons do.
template <bool kMayBeNaN, class A, int kCount>
FASTNET_INLINE void window_maxima(const Vec<A> (&y)[kCount][4], Vec<A> (&most)[kCount],
                                  Vec<Index<A>> (&code)[kCount]) {
  using I = Vec<Index<A>>;
  if constexpr (kMayBeNaN) {
    FASTNET_UNROLL for (int n = 0; n < kCount; ++n) {
      most[n] = y[n][0];
      code[n] = I{};
      FASTNET_UNROLL for (int i = 1; i < 4; ++i) {
        const I wins = (most[n] < y[n][i]) | (y[n][i] != y[n][i]);
        most[n] = wins ? y[n][i] : most[n];
        code[n] = wins ? I{} + i : code[n];
      }
    }
  } else {
    Vec<A> lower[kCount];
    I lower_code[kCount];
    FASTNET_UNROLL for (int n = 0; n < kCount; ++n) {
      const I right = y[n][0] < y[n][1], lower_right = y[n][2] < y[n][3];
      most[n] = maximum<A>(y[n][0], y[n][1]);
      lower[n] = maximum<A>(y[n][2], y[n][3]);
      code[n] = right & 1;
      lower_code[n] = 2 - lower_right;
    }
    FASTNET_UNROLL for (int n = 0; n < kCount; ++n) {
      const I down = most[n] < lower[n];
      most[n] = maximum<A>(most[n], lower[n]);
      code[n] = down ? lower_code[n] : code[n];
    }
  }
}

#if defined(__x86_64__)
// A bit for every lane in which a < b.
FASTNET_INLINE uint16_t mask_of_less(Vec<float> a, Vec<float> b) {
  uint16_t mask;
  __asm__("vcmpltps %2, %1, %0" : "=Yk"(mask) : "v"(a), "v"(b));
  return mask;
}
using CodeBytes = typename VectorType<uint8_t, 16>::type;
FASTNET_INLINE CodeBytes choose(uint16_t mask, CodeBytes set, CodeBytes clear) {
  CodeBytes result;
  __asm__("vpblendmb %2, %1, %0%{%3%}" : "=v"(result) : "v"(clear), "v"(set), "Yk"(mask));
  return result;
}

// finish_windows where comparisons give masks: these choose among codes of a byte each, and none
// has to be narrowed.
template <class T, int kCount>
FASTNET_INLINE void finish_windows_by_masks(const Vec<float> (&y)[kCount][4],
                                            const Vec<float>* bias, T* const (&pooled)[kCount],
                                            uint8_t* const (&codes)[kCount]) {
  const Vec<float> zero = {};
  const CodeBytes none = {};
  FASTNET_UNROLL for (int n = 0; n < kCount; ++n) {
    const Vec<float> upper = maximum<float>(y[n][0], y[n][1]);
    const Vec<float> lower = maximum<float>(y[n][2], y[n][3]);
    Vec<float> most = maximum<float>(upper, lower);
    const CodeBytes upper_code = choose(mask_of_less(y[n][0], y[n][1]), none + 1, none);
    const CodeBytes lower_code = choose(mask_of_less(y[n][2], y[n][3]), none + 3, none + 2);
    const CodeBytes code = choose(mask_of_less(upper, lower), lower_code, upper_code);
    if (bias) most += bias[n];
    store(pooled[n], maximum<float>(zero, most));
    const CodeBytes bytes = choose(mask_of_less(zero, most), code, none + kDead);
    __builtin_memcpy(codes[n], &bytes, sizeof bytes);
  }
}
#endif

// Where the codes are that stand `by` further on; null where none are wanted.
FASTNET_INLINE uint8_t* codes_at(uint8_t* codes, int64_t by) {
  return codes ? codes + by : nullptr;
}

// Of the elements y of windows the maximum, with the bias, which moves all four alike and may be
// null, and the ReLU; and, where they are wanted, the codes: kDead where the ReLU passes nothing.
template <bool kMayBeNaN, class A, class T, int kCount>
FASTNET_INLINE void finish_windows(const Vec<A> (&y)[kCount][4], const Vec<A>* bias,
                                   T* const (&pooled)[kCount], uint8_t* const (&codes)[kCount]) {
  using I = Vec<Index<A>>;
  const Vec<A> zero = {};
  Vec<A> most[kCount];
  I code[kCount];
  if (!codes[0]) {
    window_maxima<kMayBeNaN, A>(y, most, code);  // of which the compiler leaves out the codes
    FASTNET_UNROLL for (int n = 0; n < kCount; ++n) {
      if (bias) most[n] += bias[n];
      store(pooled[n], kMayBeNaN ? (most[n] <= zero ? zero : most[n]) : maximum<A>(zero, most[n]));
    }
    return;
  }
#if defined(__x86_64__)
  if constexpr (kHasMasks && !kMayBeNaN && sizeof(A) == sizeof(float)) {
    finish_windows_by_masks(y, bias, pooled, codes);
    return;
  }
#endif
  window_maxima<kMayBeNaN, A>(y, most, code);
  FASTNET_UNROLL for (int n = 0; n < kCount; ++n) {
    if (bias) most[n] += bias[n];
    if constexpr (kMayBeNaN) {
      const I dead = most[n] <= zero;
      store(pooled[n], dead ? zero : most[n]);
      store_codes<A>(codes[n], dead ? I{} + kDead : code[n]);
    } else {
      const Vec<A> alive = maximum<A>(zero, most[n]);
      const I dead = (I)alive == I{};
      store(pooled[n], alive);
      store_codes<A>(codes[n], dead ? I{} + kDead : code[n]);
    }
  }
}

// Pooled gradients, or codes, of windows [first, last), counted through images, and filters
// [k_begin, k_end): to[window][filter], `next` from one window to the next.
template <class T, class From, class To>
static void gather_windows(const ConvCall<T>& call, int64_t first, int64_t last, int64_t k_begin,
                           int64_t k_end, const From* from, Strides4 at, To* to, int64_t next) {
  const int64_t image = call.P * call.Q, count = k_end - k_begin;
  for (int64_t window = first; window < last;) {
    const int64_t n = window / image, begin = window % image;
    const int64_t in_image = least(last - window, image - begin);
    const From* const x = from + n * at.n + k_begin * at.c;
    if (at.x == 1 && at.y == call.Q) {
      transpose(x + begin, at.c, to, next, count, in_image);
    } else {
      for (int64_t i = 0; i < in_image; ++i) {
        const From* const y = x + (begin + i) / call.Q * at.y + (begin + i) % call.Q * at.x;
        if (std::is_same_v<From, To> && at.c == 1) {
          __builtin_memcpy(to + i * next, y, static_cast<size_t>(count) * sizeof(To));
          continue;
        }
        for (int64_t k = 0; k < count; ++k) {
          if constexpr (std::is_same_v<From, To>) {
            to[i * next + k] = y[k * at.c];
          } else {
            to[i * next + k] = widen(y[k * at.c]);
          }
        }
      }
    }
    to += in_image * next;
    window += in_image;
  }
}
