// The loops of cross_entropy with vectors along the classes of a row. No include guard, like the
// other files of kernels.

// `count` elements side by side: where they lie, or else copied into `buffer`, filled up to a
// vector with `pad`.
template <class T>
static const T* side_by_side(const T* from, int64_t stride, int64_t count, T pad, T* buffer) {
  if (stride == 1 && count >= kLanes<T>) return from;
  for (int64_t i = 0; i < count; ++i) buffer[i] = from[i * stride];
  for (int64_t i = count; i < kLanes<T>; ++i) buffer[i] = pad;
  return buffer;
}

template <class T>
FASTNET_INLINE T narrowed(acc_t<T> value) {
  T result;
  narrow(value, &result);
  return result;
}

// count >= kLanes, here and below; a last vector reaches back over elements already seen.
template <class T>
FASTNET_INLINE acc_t<T> block_maximum(const T* x, int64_t count) {
  using A = acc_t<T>;
  constexpr int kStep = kLanes<T>;
  Vec<A> most = load(x + count - kStep);
  int64_t c = 0;
  if (count >= 4 * kStep) {
    Vec<A> m[4] = {most, most, most, most};
    for (; c + 4 * kStep <= count; c += 4 * kStep) {
      for (int v = 0; v < 4; ++v) m[v] = maximum<A>(m[v], load(x + c + v * kStep));
    }
    most = maximum<A>(maximum<A>(m[0], m[1]), maximum<A>(m[2], m[3]));
  }
  for (; c + kStep <= count; c += kStep) most = maximum<A>(most, load(x + c));
  return reduce_max<A>(most);
}

// Σ exp(x - shift); with kStores the exponentials go to `out`, too, which is not x. What comes to
// be read later, `ahead` elements further on, and to be written, `out_ahead`, is asked for: where a
// page ends the processor's own foresight does, too. What is read is better asked for two blocks
// before its turn: at the next one it may still be on its way from memory.
template <class T, bool kStores = false>
FASTNET_INLINE acc_t<T> block_exp_sum(const T* x, int64_t count, int64_t ahead, acc_t<T> shift,
                                      T* out = nullptr, int64_t out_ahead = 0) {
  using A = acc_t<T>;
  constexpr int kStep = kLanes<T>;
  const auto add = [&](int64_t c, auto& exps, Vec<A>* sums) {
    constexpr int kCount = sizeof(exps) / sizeof(exps[0]);
    FASTNET_UNROLL for (int v = 0; v < kCount; ++v) {
      exps[v] = load(x + c + v * kStep) - splat(shift);
    }
    exp_each(exps);
    FASTNET_UNROLL for (int v = 0; v < kCount; ++v) {
      if constexpr (kStores) store(out + c + v * kStep, exps[v]);
      sums[v] += exps[v];
    }
  };
  Vec<A> sums[4] = {}, four[4], one[1];
  int64_t c = 0;
  for (; c + 4 * kStep <= count; c += 4 * kStep) {
    FASTNET_UNROLL for (int at = 0; at < 4 * kStep; at += 64 / static_cast<int>(sizeof(T))) {
      __builtin_prefetch(x + ahead + c + at);
      if constexpr (kStores) __builtin_prefetch(out + out_ahead + c + at, 1);
    }
    add(c, four, sums);
  }
  for (; c + kStep <= count; c += kStep) add(c, one, sums);
  if (c < count) {
    Vec<A> last[1] = {};
    add(count - kStep, one, last);
    const auto is_new = lane_index<A>() >= splat(static_cast<A>(kStep - (count - c)));
    sums[1] += is_new ? last[0] : Vec<A>{};
  }
  return reduce_add<A>((sums[0] + sums[1]) + (sums[2] + sums[3]));
}

// count >= kLanes; the last vector reaches back, but is scaled once.
template <class T>
FASTNET_INLINE void scale_block(T* x, int64_t count, acc_t<T> factor) {
  using A = acc_t<T>;
  constexpr int kStep = kLanes<T>;
  const Vec<A> by = splat(factor), last = load(x + count - kStep);
  for (int64_t c = 0; c + kStep <= count; c += kStep) store(x + c, load(x + c) * by);
  store(x + count - kStep, last * by);
}

// Adds a block's Σ q and Σ q (x - shift).
template <class T>
static void block_dot(const CrossEntropyCall<T>& call, const T* x, const T* probabilities,
                      const acc_t<T>* weight, int64_t count, Sums<acc_t<T>>& sums) {
  using A = acc_t<T>;
  constexpr int kStep = kLanes<T>;
  const A shift = shift_of(sums.maximum);
  Vec<A> q_sum = {}, dot = {};
  for (int64_t c = 0; c < count; c += kStep) {
    Vec<A> q = weighted_target(call, probabilities, weight, c < count - kStep ? c : count - kStep);
    Vec<A> term = q * (load(x + (c < count - kStep ? c : count - kStep)) - splat(shift));
    if (c > count - kStep) {
      const auto is_new = lane_index<A>() >= splat(static_cast<A>(kStep - (count - c)));
      q = is_new ? q : Vec<A>{};
      term = is_new ? term : Vec<A>{};
    }
    q_sum += q;
    dot += term;
  }
  sums.q += reduce_add<A>(q_sum);
  sums.dot += reduce_add<A>(dot);
}

// The same for a block narrower than a vector.
template <class T>
static void narrow_block_dot(const CrossEntropyCall<T>& call, const T* x, const T* probabilities,
                             const acc_t<T>* weight, int64_t count, Sums<acc_t<T>>& sums) {
  using A = acc_t<T>;
  for (int64_t c = 0; c < count; ++c) {
    A q = probabilities ? widen(probabilities[c]) * call.keep + call.spread : A(1);
    if (weight) q *= weight[c];
    sums.q += q;
    sums.dot += q * (widen(x[c]) - shift_of(sums.maximum));
  }
}

template <class T>
static Sums<acc_t<T>> row_sums(const CrossEntropyCall<T>& call, const T* logits,
                               const T* probabilities) {
  using A = acc_t<T>;
  T logits_buffer[kRowBlock], target_buffer[kRowBlock];
  Sums<A> sums{-kInfinity<A>, 0, 0, 0};
  for (int64_t first = 0; first < call.C; first += kRowBlock) {
    const int64_t count = call.C - first < kRowBlock ? call.C - first : kRowBlock;
    const int64_t padded = count < kLanes<T> ? kLanes<T> : count;
    const T* const x = side_by_side(logits + first * call.logits_at.cls, call.logits_at.cls, count,
                                    narrowed<T>(-kInfinity<A>), logits_buffer);
    const A most = block_maximum(x, padded);
    if (sums.maximum < most) {
      const A fall = shift_of(sums.maximum) - shift_of(most);
      if (sums.maximum != -kInfinity<A>) sums.exps *= exp_of(fall);
      if (first > 0) sums.dot += sums.q * fall;
      sums.maximum = most;
    }
    sums.exps += block_exp_sum(x, padded, 2 * padded, shift_of(sums.maximum));
    if (!call.needs_dot) continue;
    const T* const t = probabilities
                           ? side_by_side(probabilities + first * call.target_at.cls,
                                          call.target_at.cls, count, narrowed<T>(0), target_buffer)
                           : nullptr;
    const A* const w = call.weight ? call.weight + first : nullptr;
    if (count < kLanes<T>) {
      narrow_block_dot(call, x, t, w, count, sums);
    } else {
      block_dot(call, x, t, w, count, sums);
    }
  }
  return sums;
}

template <class T, bool kOffset>
static void row_gradient(const CrossEntropyCall<T>& call, int64_t row, const T* logits,
                         const T* probabilities, T* gradient, const Slopes<acc_t<T>>& slopes) {
  using A = acc_t<T>;
  constexpr int kStep = kLanes<T>;
  T logits_buffer[kRowBlock], target_buffer[kRowBlock], gradient_buffer[kRowBlock];
  A weight_buffer[kStep];
  const Vec<A> most = splat(call.maximum[row]), log_sum = splat(call.log_sum[row]);
  const Vec<A> slope = splat(slopes.slope), offset = splat(slopes.offset);
  const A x_of_class = logit_at_class(call, row, logits, call.logits_at.cls);
  for (int64_t first = 0; first < call.C; first += kRowBlock) {
    const int64_t count = call.C - first < kRowBlock ? call.C - first : kRowBlock;
    const T* const x = side_by_side(logits + first * call.logits_at.cls, call.logits_at.cls, count,
                                    narrowed<T>(0), logits_buffer);
    const T* t = nullptr;
    const A* w = nullptr;
    if constexpr (kOffset) {
      if (probabilities) {
        t = side_by_side(probabilities + first * call.target_at.cls, call.target_at.cls, count,
                         narrowed<T>(0), target_buffer);
      }
      if (call.weight) w = call.weight + first;
      if (w && count < kStep) {
        for (int64_t c = 0; c < count; ++c) weight_buffer[c] = w[c];
        for (int64_t c = count; c < kStep; ++c) weight_buffer[c] = 0;
        w = weight_buffer;
      }
    }
    const bool in_place = call.gradient_at.cls == 1 && count >= kStep;
    T* const g = in_place ? gradient + first : gradient_buffer;
    const int64_t padded = count < kStep ? kStep : count;
    const auto differentiate = [&](int64_t c, auto& values) {
      constexpr int kCount = sizeof(values) / sizeof(values[0]);
      FASTNET_UNROLL for (int v = 0; v < kCount; ++v) values[v] = (values[v] - most) - log_sum;
      exp_each(values);
      FASTNET_UNROLL for (int v = 0; v < kCount; ++v) {
        values[v] *= slope;
        if constexpr (kOffset) values[v] -= offset * weighted_target(call, t, w, c + v * kStep);
        store(g + c + v * kStep, values[v]);
      }
    };
    // The last vector reaches back over what is written by then, maybe in the logits' own place.
    Vec<A> last[1] = {load(x + padded - kStep)}, one[1], four[4];
    int64_t c = 0;
    for (; c + 4 * kStep <= padded; c += 4 * kStep) {
      FASTNET_UNROLL for (int v = 0; v < 4; ++v) four[v] = load(x + c + v * kStep);
      differentiate(c, four);
    }
    for (; c + kStep <= padded; c += kStep) {
      one[0] = load(x + c);
      differentiate(c, one);
    }
    if (c < padded) differentiate(padded - kStep, last);
    if (!in_place) {
      for (int64_t c = 0; c < count; ++c) gradient[(first + c) * call.gradient_at.cls] = g[c];
    }
  }
  hit_class(call, row, x_of_class, gradient, call.gradient_at.cls, slopes);
}
