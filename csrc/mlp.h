// Native training of fully connected networks: rules for every device.
#pragma once

#include <algorithm>

#include "common.h"
#include "optimizer.h"

namespace fastnet {

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
    const int64_t given = layers.empty() ? in : layers.back().out;
    check(in == given, "mlp: layer ", l, " takes ", in, " features, but layer ", l - 1, " gives ",
          given);
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

inline OptimizerKind mlp_optimizer(int64_t number) {
  check(number >= 0 && number <= 2, "mlp: there is no optimizer ", number);
  return static_cast<OptimizerKind>(number);
}

// All that a call of mlp_train takes, but for the values in targets and order. Returns the layers
// with the optimizer's states; *batch_size becomes no more than there are images.
inline std::vector<MlpLayer> check_mlp_training(
    const Tensor& images, const Tensor& targets, const Tensor& order, int64_t* batch_size,
    const Tensor& scale, const Tensor& shift, std::vector<Tensor>& weights,
    std::vector<Tensor>& biases, const std::vector<bool>& relu, std::vector<Tensor>& first,
    std::vector<Tensor>& second, std::vector<Tensor>& steps, OptimizerKind optimizer) {
  std::vector<MlpLayer> layers = check_mlp_layers(weights, biases, relu);
  check_mlp_images(images, scale, shift, layers.front());
  const int64_t n = images.size(0);
  check(targets.scalar_type() == ScalarType::Long && targets.dim() == 1 && targets.size(0) == n &&
            targets.is_contiguous(),
        "mlp: targets must be (", n, "), int64 and contiguous, but are ", ShapeOf{targets}, " of ",
        targets.scalar_type());
  check(order.scalar_type() == ScalarType::Long && order.dim() == 1 && order.is_contiguous(),
        "mlp: order must be int64, of one dimension and contiguous");
  check(*batch_size > 0, "mlp: batch_size must be at least 1, not ", *batch_size);
  *batch_size = std::min(*batch_size, std::max<int64_t>(1, n));
  // What is written to must be no copy-on-write view of somebody else's.
  for (std::vector<Tensor>* tensors : {&weights, &biases, &first, &second, &steps}) {
    for (Tensor& tensor : *tensors) {
      if (tensor.numel() > 0) tensor.mutable_data_ptr();
    }
  }
  const auto add_state = [&](const std::vector<Tensor>& states, Tensor MlpLayer::* weight,
                             Tensor MlpLayer::* bias) {
    check(states.size() == 2 * layers.size(), "mlp: a state for every weight and bias is needed");
    for (size_t l = 0; l < layers.size(); ++l) {
      const Tensor &of_weight = states[2 * l], &of_bias = states[2 * l + 1];
      check(of_weight.scalar_type() == ScalarType::Float && of_weight.is_contiguous() &&
                of_weight.numel() == layers[l].weight.numel() &&
                of_bias.scalar_type() == ScalarType::Float && of_bias.is_contiguous() &&
                of_bias.numel() == layers[l].bias.numel(),
            "mlp: the optimizer's state of layer ", l, " does not fit");
      layers[l].*weight = of_weight;
      layers[l].*bias = of_bias;
    }
  };
  if (optimizer != OptimizerKind::sgd) {
    add_state(first, &MlpLayer::weight_first, &MlpLayer::bias_first);
  }
  if (optimizer == OptimizerKind::adam) {
    check(!steps.empty(), "mlp: Adam needs to know how many steps it has taken");
    add_state(second, &MlpLayer::weight_second, &MlpLayer::bias_second);
  }
  check(steps.size() <= 2 * layers.size(), "mlp: ", steps.size(), " steps of ", layers.size(),
        " layers' parameters");
  for (const Tensor& step : steps) {
    check(step.scalar_type() == ScalarType::Float && step.numel() == 1, "mlp: a step is a float32");
  }
  return layers;
}

}  // namespace fastnet
