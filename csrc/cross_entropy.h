// cross_entropy: loss = -log softmax(logits)[target], in all of F.cross_entropy's varieties
//
//   logits (C), (N, C) or (N, C, d1, ...)
//   target class indices: logits' shape without C, int64
//          or probabilities: logits' shape, logits' dtype
//   weight (C), of the accumulate type; may be absent, and is then 1
//   loss   target's shape as indices for reduction none, else a scalar; of the accumulate type
//
// With q the row's target distribution times the weights, lse = log Σ_c exp(x_c), and ε the label
// smoothing, a row's loss is
//
//   class y:        (1 - ε) w_y (lse - x_y) + ε / C Σ_c w_c (lse - x_c), or 0 where y is ignored
//   probabilities:  Σ_c q_c (lse - x_c),   q_c = w_c ((1 - ε) t_c + ε / C)
//
// and the mean divides the rows' sum by Σ_rows w_y, or by the number of rows.
//
// What forward hands to backward is one vector of the accumulate type, `statistics`: every row's
// maximum m; every row's log Σ exp(x - m); with probabilities or smoothing every row's Σ q (then
// q = w for classes); and last the mean's divisor. m and the logarithm stay apart, since their sum
// would round away what exp(x - lse) needs: logits of 1e4 would have gradients good to three digits
// only.
//
// On the CPU, where exponentials are most of the work, a training's forward pass has the gradient
// made, too: of class indices without smoothing the kernel writes the exponentials of a row where
// that belongs, and divides them by their sum while they are near. On CUDA so it is of logits that
// no cache holds until the backward pass.
#pragma once

#include "common.h"

namespace fastnet {

enum class Reduction : int64_t { none = 0, mean = 1, sum = 2 };  // as in torch

struct CrossEntropyShape {
  int64_t N, C, D;  // D: the product of the dimensions behind the classes
  bool has_probabilities;
  bool needs_dot;  // whether a row's loss has Σ q x in it: probabilities or smoothing

  int64_t rows() const { return N * D; }
  int64_t statistics() const { return (needs_dot ? 3 : 2) * rows() + 1; }
};

inline ScalarType accumulate_type(const Tensor& tensor) {
  return tensor.scalar_type() == ScalarType::Double ? ScalarType::Double : ScalarType::Float;
}

inline CrossEntropyShape check_cross_entropy(const Tensor& logits, const Tensor& target,
                                             const std::optional<Tensor>& weight, int64_t reduction,
                                             double label_smoothing) {
  check(logits.dim() >= 1, "cross_entropy: logits must have at least one dimension");
  const int64_t class_dim = logits.dim() == 1 ? 0 : 1;
  CrossEntropyShape shape{class_dim == 0 ? 1 : logits.size(0), logits.size(class_dim), 1,
                          target.scalar_type() != ScalarType::Long, label_smoothing > 0};
  shape.needs_dot |= shape.has_probabilities;
  check(shape.C > 0, "cross_entropy: logits ", ShapeOf{logits}, " have no classes");
  for (int64_t d = 2; d < logits.dim(); ++d) shape.D *= logits.size(d);

  if (shape.has_probabilities) {
    check(target.scalar_type() == logits.scalar_type(),
          "cross_entropy: target must be class indices (Long) or probabilities of logits' dtype ",
          logits.scalar_type(), ", but is ", target.scalar_type());
  }
  bool fits = target.dim() == logits.dim() - (shape.has_probabilities ? 0 : 1);
  for (int64_t d = 0, t = 0; fits && d < logits.dim(); ++d) {
    if (d == class_dim && !shape.has_probabilities) continue;
    fits = target.size(t++) == logits.size(d);
  }
  check(fits, "cross_entropy: target ", ShapeOf{target}, " does not fit logits ", ShapeOf{logits});
  check(target.device() == logits.device(),
        "cross_entropy: logits and target are on different devices");
  if (weight) {
    check(weight->dim() == 1 && weight->size(0) == shape.C, "cross_entropy: weight must be (",
          shape.C, "), one value per class, but is ", ShapeOf{*weight});
    check(weight->scalar_type() == accumulate_type(logits), "cross_entropy: weight is ",
          weight->scalar_type(), ", but must be ", accumulate_type(logits));
    check(weight->device() == logits.device(),
          "cross_entropy: logits and weight are on different devices");
  }
  check(reduction >= 0 && reduction <= 2,
        "cross_entropy: reduction must be 0 (none), 1 (mean) or 2 (sum), but is ", reduction);
  check(label_smoothing >= 0 && label_smoothing <= 1,
        "cross_entropy: label_smoothing must be between 0 and 1, but is ", label_smoothing);
  return shape;
}

inline void check_cross_entropy_gradient(const Tensor& logits, const Tensor& gradient) {
  check(gradient.dim() == logits.dim() && gradient.scalar_type() == logits.scalar_type(),
        "cross_entropy: out is ", gradient.scalar_type(), " ", ShapeOf{gradient},
        ", but logits are ", logits.scalar_type(), " ", ShapeOf{logits});
  for (int64_t d = 0; d < logits.dim(); ++d) {
    check(gradient.size(d) == logits.size(d), "cross_entropy: out ", ShapeOf{gradient},
          " does not fit logits ", ShapeOf{logits});
  }
  check(gradient.device() == logits.device(),
        "cross_entropy: logits and out are on different devices");
}

inline void check_cross_entropy_backward(const CrossEntropyShape& shape, const Tensor& grad_loss,
                                         const Tensor& logits, const Tensor& statistics,
                                         int64_t reduction, const Tensor& gradient) {
  const int64_t wanted = static_cast<Reduction>(reduction) == Reduction::none ? shape.rows() : 1;
  check(grad_loss.numel() == wanted, "cross_entropy_backward: grad_loss ", ShapeOf{grad_loss},
        " must have ", wanted, " values");
  check(statistics.dim() == 1 && statistics.size(0) == shape.statistics(),
        "cross_entropy_backward: statistics ", ShapeOf{statistics}, " must have ",
        shape.statistics(), " values for logits ", ShapeOf{logits});
  check_cross_entropy_gradient(logits, gradient);
  for (const Tensor* tensor : {&grad_loss, &statistics}) {
    check(tensor->device() == logits.device(),
          "cross_entropy_backward: the arguments are on different devices");
  }
  for (const Tensor* tensor : {&grad_loss, &statistics}) {
    check(tensor->scalar_type() == accumulate_type(logits),
          "cross_entropy_backward: ", "grad_loss and statistics must be ", accumulate_type(logits),
          ", but one is ", tensor->scalar_type());
  }
}

// Where element (n, c, d) lies: n * outer + c * cls + d * inner elements from the first.
struct ClassStrides {
  int64_t outer, cls, inner;
};

// Empty where the dimensions behind the classes cannot be counted through with one stride.
inline std::optional<ClassStrides> class_strides(const Tensor& tensor) {
  const int64_t dims = tensor.dim();
  if (dims == 1) return ClassStrides{0, tensor.stride(0), 0};
  int64_t inner = 0, size = 1;
  for (int64_t d = dims; d-- > 2;) {
    if (tensor.size(d) == 1) continue;
    if (size == 1) {
      inner = tensor.stride(d);
    } else if (tensor.stride(d) != inner * size) {
      return std::nullopt;
    }
    size *= tensor.size(d);
  }
  return ClassStrides{tensor.stride(0), tensor.stride(1), inner};
}

// A tensor as it is where it has class strides, else a dense copy.
inline Tensor with_class_strides(const Tensor& tensor) {
  return class_strides(tensor) ? tensor : torch::stable::contiguous(tensor);
}

// One loss per row, or a scalar.
inline Tensor allocate_loss(const Tensor& logits, int64_t reduction) {
  std::vector<int64_t> sizes;
  if (static_cast<Reduction>(reduction) == Reduction::none) {
    for (int64_t d = 0; d < logits.dim(); ++d) {
      if (d != (logits.dim() == 1 ? 0 : 1)) sizes.push_back(logits.size(d));
    }
  }
  return allocate(logits, sizes, accumulate_type(logits));
}

}  // namespace fastnet
