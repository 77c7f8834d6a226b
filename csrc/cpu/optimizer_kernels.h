// The optimizers, on vectors of gradients. No include guard, like the other files of kernels.

// Said as sqrt of each element, it is computed of each element.
FASTNET_INLINE Vec<float> square_root(Vec<float> x) {
  Vec<float> root;
#if defined(__x86_64__)
  if constexpr (kVectorBytes == 16) {
    __asm__("sqrtps %1, %0" : "=x"(root) : "x"(x));
  } else {
    __asm__("vsqrtps %1, %0" : "=v"(root) : "v"(x));
  }
#else
  for (int i = 0; i < kLanes<float>; ++i) root[i] = __builtin_sqrtf(x[i]);
#endif
  return root;
}

// As torch.optim's; `first` and `second` are exp_avg and exp_avg_sq, or momentum_buffer and unused.
// Without kDecays the gradient has its part of the weight already.
template <OptimizerKind kOptimizer, bool kDecays = true>
FASTNET_INLINE Vec<float> updated(Vec<float> w, Vec<float> gradient, Vec<float>& first,
                                  Vec<float>& second, const OptimizerStep& step) {
  if constexpr (kDecays) gradient += w * splat(step.weight_decay);
  if constexpr (kOptimizer == OptimizerKind::sgd) {
    return w - splat(step.lr) * gradient;
  } else if constexpr (kOptimizer == OptimizerKind::momentum) {
    first = first * splat(step.beta1) + gradient;
    return w - splat(step.lr) * first;
  } else {
    // Of the two ways to go from one to the other, that which keeps the nearer.
    const Vec<float> way = gradient - first;
    first = step.beta1_rest < 0.5f ? first + way * splat(step.beta1_rest)
                                   : gradient - way * splat(step.beta1);
    // In this order, as the square alone may be more than there are numbers for.
    second = second * splat(step.beta2) + (gradient * splat(step.beta2_rest)) * gradient;
    const Vec<float> deviation = square_root(second) * splat(step.second_scale) + splat(step.eps);
    return w - (first * splat(step.lr)) / deviation;
  }
}

// In memory: `skip` lanes, and those from `end` on, stay as they are.
template <OptimizerKind kOptimizer>
FASTNET_INLINE void update(float* w, float* first, float* second, Vec<float> gradient,
                           const OptimizerStep& step, int64_t skip, int64_t end = kLanes<float>) {
  constexpr int kStep = kLanes<float>;
  const bool whole = skip == 0 && end == kStep;
  Vec<float> a = {}, b = {}, value = {};
  const auto read = [&](const float* from, Vec<float>& to) {
    if (whole) {
      to = load(from);
    } else {
      for (int64_t i = skip; i < end; ++i) to[i] = from[i];
    }
  };
  const auto write = [&](float* to, Vec<float> from) {
    if (whole) {
      store(to, from);
    } else {
      for (int64_t i = skip; i < end; ++i) to[i] = from[i];
    }
  };
  read(w, value);
  if constexpr (kOptimizer != OptimizerKind::sgd) read(first, a);
  if constexpr (kOptimizer == OptimizerKind::adam) read(second, b);
  write(w, updated<kOptimizer>(value, gradient, a, b, step));
  if constexpr (kOptimizer != OptimizerKind::sgd) write(first, a);
  if constexpr (kOptimizer == OptimizerKind::adam) write(second, b);
}

// ---------------------------------------------------------------------------------------------
// Elements of a tensor, with their gradients where autograd has left them

template <OptimizerKind kOptimizer>
FASTNET_INLINE void apply_vector(const OptimizedTensor& t, float* weight, const float* gradient,
                                 float* first, float* second) {
  Vec<float> w = load(weight), g = load(gradient), a = {}, b = {};
  if constexpr (kOptimizer != OptimizerKind::sgd) a = load(first);
  if constexpr (kOptimizer == OptimizerKind::adam) b = load(second);
  w *= splat(t.shrink);
  if (t.step.weight_decay != 0) g += w * splat(t.step.weight_decay);  // infinity times 0 is NaN
  const Vec<float> next = updated<kOptimizer, false>(w, g, a, b, t.step);
  // Nesterov's step goes on from where momentum's would.
  w = t.is_nesterov ? w - splat(t.step.lr) * (g + a * splat(t.step.beta1)) : next;
  store(weight, w);
  if constexpr (kOptimizer != OptimizerKind::sgd) store(first, a);
  if constexpr (kOptimizer == OptimizerKind::adam) store(second, b);
}

template <OptimizerKind kOptimizer>
void apply_optimizer_kernel(const OptimizedTensor& t, int64_t begin, int64_t end) {
  constexpr int kStep = kLanes<float>;
  int64_t i = begin;
  for (; i + kStep <= end; i += kStep) {
    apply_vector<kOptimizer>(t, t.weight + i, t.gradient + i, t.first + i, t.second + i);
  }
  if (i == end) return;
  float rest[4][kStep] = {};  // weights, gradients, states
  float* const kept[4] = {t.weight, const_cast<float*>(t.gradient), t.first, t.second};
  const auto is_there = [](int k) {
    return k < 2 || (k == 2 && kOptimizer != OptimizerKind::sgd) ||
           kOptimizer == OptimizerKind::adam;
  };
  for (int k = 0; k < 4; ++k) {
    for (int64_t j = i; is_there(k) && j < end; ++j) rest[k][j - i] = kept[k][j];
  }
  apply_vector<kOptimizer>(t, rest[0], rest[1], rest[2], rest[3]);
  for (int k = 0; k < 4; ++k) {
    for (int64_t j = i; k != 1 && is_there(k) && j < end; ++j) kept[k][j] = rest[k][j - i];
  }
}
