// What every row of cross_entropy begins and ends with, whichever way its classes lie. No include
// guard: the files of kernels are compiled once per instruction set.

inline constexpr int64_t kRowBlock = 2048, kColumnBlock = 32;
inline constexpr int kWideColumns = 4;

template <class A>
inline constexpr A kInfinity = __builtin_huge_val();

// What the maximum is subtracted as: exp(-inf - -inf) must not be NaN while a row may yet hold
// something finite.
template <class A>
FASTNET_INLINE A shift_of(A maximum) {
  return maximum == -kInfinity<A> ? A(0) : maximum;
}
template <class A>
FASTNET_INLINE Vec<A> shift_of(Vec<A> maximum) {
  return maximum == splat(-kInfinity<A>) ? Vec<A>{} : maximum;
}

template <class A>
FASTNET_INLINE A exp_of(A x) {
  return exp(splat(x))[0];
}

// q at classes c, c + 1, ...: probabilities, smoothed, times the weights. Without probabilities
// the weights alone, which is what smoothing spreads.
template <class T>
FASTNET_INLINE Vec<acc_t<T>> weighted_target(const CrossEntropyCall<T>& call,
                                             const T* probabilities, const acc_t<T>* weight,
                                             int64_t c) {
  using A = acc_t<T>;
  Vec<A> q = splat(A(1));
  if (probabilities) q = load(probabilities + c) * call.keep + call.spread;
  return weight ? q * load(weight + c) : q;
}

// A row's sums, or kLanes rows' (A a vector then): Σ exp(x - shift), Σ q, Σ q (x - shift).
template <class A>
struct Sums {
  A maximum, exps, q, dot;
};

// The end of every row: its statistics and its loss. Adds what it counts in the mean to `divisor`.
template <class T>
FASTNET_INLINE acc_t<T> finish_row(const CrossEntropyCall<T>& call, int64_t row,
                                   const Sums<acc_t<T>>& sums, acc_t<T> log_sum, const T* logits,
                                   int64_t logits_cls, double& divisor) {
  using A = acc_t<T>;
  call.maximum[row] = sums.maximum;
  call.log_sum[row] = log_sum;
  const A smooth = sums.q * log_sum - sums.dot;
  if (call.needs_dot) call.target_sum[row] = sums.q;
  if (!call.classes) {
    divisor += 1;
    return smooth;
  }
  const int64_t y = call.classes[row];
  if (y == call.ignore_index) return 0;
  const A w = call.weight ? call.weight[y] : A(1);
  divisor += w;
  const A loss = w * ((sums.maximum - widen(logits[y * logits_cls])) + log_sum);
  return call.needs_dot ? call.keep * loss + call.spread * smooth : loss;
}

// A row's gradient is slope · softmax - offset · q, less `hit` at its class.
template <class A>
struct Slopes {
  A slope, offset, hit;
};

template <class T>
FASTNET_INLINE Slopes<acc_t<T>> slopes_of(const CrossEntropyCall<T>& call, int64_t row) {
  using A = acc_t<T>;
  const A scale = call.grad_loss[call.per_row ? row : 0] * call.grad_scale;
  if (!call.classes) return {scale * call.target_sum[row], scale, 0};
  const int64_t y = call.classes[row];
  if (y == call.ignore_index) return {0, 0, 0};
  const A hit = scale * call.keep * (call.weight ? call.weight[y] : A(1));
  const A offset = scale * call.spread;
  return {call.needs_dot ? hit + offset * call.target_sum[row] : hit, offset, hit};
}

// The logit at a row's class; 0 where it has none.
template <class T>
FASTNET_INLINE acc_t<T> logit_at_class(const CrossEntropyCall<T>& call, int64_t row,
                                       const T* logits, int64_t logits_cls) {
  if (!call.classes || call.classes[row] == call.ignore_index) return 0;
  return widen(logits[call.classes[row] * logits_cls]);
}

// Takes `hit` off the gradient at a row's class. Half types compute that element anew, from its
// logit x: what was stored is rounded, and 1 - p of a confident row would be lost.
template <class T>
FASTNET_INLINE void hit_class(const CrossEntropyCall<T>& call, int64_t row, acc_t<T> x, T* gradient,
                              int64_t gradient_cls, const Slopes<acc_t<T>>& slopes) {
  using A = acc_t<T>;
  if (!call.classes || call.classes[row] == call.ignore_index) return;
  const int64_t y = call.classes[row];
  T* const at = gradient + y * gradient_cls;
  A value = widen(*at);
  if constexpr (sizeof(T) != sizeof(A)) {
    value = slopes.slope * exp_of((x - call.maximum[row]) - call.log_sum[row]);
    if (call.needs_dot) value -= slopes.offset * (call.weight ? call.weight[y] : A(1));
  }
  narrow(value - slopes.hit, at);
}
