// What one step of an optimizer is, on every device.
#pragma once

#include <cmath>
#include <cstdint>

namespace fastnet {

enum class OptimizerKind : int64_t { sgd = 0, momentum = 1, adam = 2 };

// A step, as its formula needs it.
//   sgd:       w -= lr · g
//   momentum:  first = beta1 · first + g;  w -= lr · first
//   adam:      first += (1 - beta1) (g - first);  second = beta2 · second + (1 - beta2) g²
//              w -= lr · first / (second_scale · √second + eps)
// with g the gradient plus weight_decay · w; Adam's lr and second_scale hold the corrections of the
// averages for their start from zero.
struct OptimizerStep {
  float lr, beta1, beta2, eps, weight_decay, second_scale;
  float beta1_rest, beta2_rest;  // 1 - beta, of which float32 would lose half the digits
};

// What all steps have in common, with the corrections still to come.
inline OptimizerStep uncorrected_step(double lr, double beta1, double beta2, double eps,
                                      double weight_decay) {
  return {.lr = static_cast<float>(lr),
          .beta1 = static_cast<float>(beta1),
          .beta2 = static_cast<float>(beta2),
          .eps = static_cast<float>(eps),
          .weight_decay = static_cast<float>(weight_decay),
          .second_scale = 1,
          .beta1_rest = static_cast<float>(1 - beta1),
          .beta2_rest = static_cast<float>(1 - beta2)};
}

// Step number `t`, from 1 on.
inline OptimizerStep corrected_step(OptimizerKind kind, double lr, double beta1, double beta2,
                                    double eps, double weight_decay, double t) {
  OptimizerStep step = uncorrected_step(lr, beta1, beta2, eps, weight_decay);
  if (kind == OptimizerKind::adam) {
    step.lr = static_cast<float>(lr / (1 - std::pow(beta1, t)));
    step.second_scale = static_cast<float>(1 / std::sqrt(1 - std::pow(beta2, t)));
  }
  return step;
}

// One of the tensors that an optimizer steps, its gradient and its state: `first` of momentum and
// Adam, `second` of Adam. All dense, and none in another's memory.
struct OptimizedTensor {
  OptimizerKind kind;
  OptimizerStep step;
  float shrink;      // of AdamW: what a weight is multiplied by before; else 1
  bool is_nesterov;  // of momentum
  float* weight;
  const float* gradient;
  float *first, *second;
  int64_t count;
};

}  // namespace fastnet
