// Native training of fully connected networks: rules for every device.
#pragma once

#include "common.h"

namespace fastnet {

enum class MlpOptimizer : int64_t { sgd = 0, momentum = 1, adam = 2 };

// One step of an optimizer, as its formula needs it.
//   sgd:       w -= lr · g
//   momentum:  first = beta1 · first + g;  w -= lr · first
//   adam:      first += (1 - beta1) (g - first);  second = beta2 · second + (1 - beta2) g²
//              w -= lr · first / (second_scale · √second + eps)
// with g the gradient plus weight_decay · w; Adam's lr and second_scale hold the corrections of the
// averages for their start from zero.
struct MlpStep {
  float lr, beta1, beta2, eps, weight_decay, second_scale;
  float beta1_rest, beta2_rest;  // 1 - beta, of which float32 would lose half the digits
};

// A layer: weight (out, in), bias (out) or empty, and the optimizer's state of both.
struct MlpLayer {
  Tensor weight, bias;
  Tensor weight_first, bias_first, weight_second, bias_second;
  int64_t in, out;
  bool relu;
};

inline bool is_float_vector(const Tensor& tensor, int64_t size) {
  return tensor.scalar_type() == ScalarType::Float && tensor.dim() == 1 && tensor.size(0) == size &&
         tensor.is_contiguous();
}

inline std::vector<MlpLayer> check_mlp_layers(const std::vector<Tensor>& weights,
                                              const std::vector<Tensor>& biases,
                                              const std::vector<bool>& relu) {
  check(!weights.empty(), "mlp: there is no layer");
  check(biases.size() == weights.size() && relu.size() == weights.size(), "mlp: ", weights.size(),
        " weights, ", biases.size(), " biases and ", relu.size(), " activations");
  std::vector<MlpLayer> layers;
  for (size_t l = 0; l < weights.size(); ++l) {
    const Tensor& weight = weights[l];
    check(weight.scalar_type() == ScalarType::Float && weight.dim() == 2 &&
              weight.is_contiguous() && weight.numel() > 0,
          "mlp: weight ", l, " must be (out, in), float32, contiguous and not empty, but is ",
          ShapeOf{weight}, " of ", weight.scalar_type());
    const int64_t out = weight.size(0), in = weight.size(1);
    check(l == 0 || in == layers.back().out, "mlp: layer ", l, " takes ", in,
          " features, but layer ", l - 1, " gives ", layers.back().out);
    check(biases[l].numel() == 0 || is_float_vector(biases[l], out), "mlp: bias ", l, " must be (",
          out, "), float32 and contiguous, but is ", ShapeOf{biases[l]});
    layers.push_back({weight, biases[l], weight, biases[l], weight, biases[l], in, out, relu[l]});
  }
  check(!layers.back().relu, "mlp: the last layer's results are logits, without ReLU");
  return layers;
}

// Images as rows (n, K), uint8 or float32; and what makes them the network's input.
inline int64_t check_mlp_images(const Tensor& images, const Tensor& scale, const Tensor& shift,
                                const MlpLayer& first) {
  const bool known =
      images.scalar_type() == ScalarType::Byte || images.scalar_type() == ScalarType::Float;
  check(known && images.dim() == 2 && images.is_contiguous() && images.size(1) == first.in,
        "mlp: images must be (n, ", first.in, "), uint8 or float32, and contiguous, but are ",
        ShapeOf{images}, " of ", images.scalar_type());
  check(is_float_vector(scale, first.in) && is_float_vector(shift, first.in),
        "mlp: scale and shift must be (", first.in, "), float32");
  return images.size(0);
}

}  // namespace fastnet
