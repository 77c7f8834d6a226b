// The table of contents: every op's schema.
//
// Those that write to memory at hand are for this package alone: they write below autograd, which
// does not count it as a new version, and expect that it overlaps neither itself nor, where nothing
// else is said, what they read.
#pragma once

#include <torch/csrc/stable/library.h>

namespace fastnet {

// A template, since what STABLE_TORCH_LIBRARY hands over has no public name.
template <class Library>
void define_schemas(Library& library) {
  library.def("linear_relu_forward(Tensor input, Tensor weight, Tensor? bias) -> Tensor");
  // The gradients of input, weight and bias, undefined where not asked for: that of the input takes
  // the weight, that of the weight takes the input, and a factor that is not given is not needed.
  library.def(
      "linear_relu_backward(Tensor grad_output, Tensor output, Tensor? input, Tensor? weight, "
      "bool needs_bias) -> (Tensor, Tensor, Tensor)");

  // The same without the ReLU, on the CPU alone, where it is quicker than torch's own.
  library.def("linear_forward(Tensor input, Tensor weight, Tensor? bias) -> Tensor");
  library.def(
      "linear_backward(Tensor grad_output, Tensor? input, Tensor? weight, bool needs_bias) "
      "-> (Tensor, Tensor, Tensor)");

  // The same into memory at hand, in float32, by the kernels whatever the size. To the weight's
  // gradient its new part is added.
  library.def(
      "linear_forward.out(Tensor input, Tensor weight, Tensor? bias, *, Tensor(a!) out) -> ()");
  library.def(
      "linear_backward.out(Tensor grad_output, Tensor input, Tensor weight, *, "
      "Tensor(a!)? grad_input, Tensor(b!)? grad_weight) -> ()");

  // The loss, and what the backward needs to know of the rows (see cross_entropy.h).
  library.def(
      "cross_entropy_forward(Tensor logits, Tensor target, Tensor? weight, int reduction, "
      "int ignore_index, float label_smoothing) -> (Tensor, Tensor)");
  library.def(
      "cross_entropy_backward(Tensor grad_loss, Tensor logits, Tensor target, Tensor? weight, "
      "Tensor statistics, int reduction, int ignore_index, float label_smoothing) -> Tensor");
  // The same into memory at hand, which may be that of the logits.
  library.def(
      "cross_entropy_backward.out(Tensor grad_loss, Tensor logits, Tensor target, Tensor? weight, "
      "Tensor statistics, int reduction, int ignore_index, float label_smoothing, *, "
      "Tensor(a!) out) -> ()");
  // The loss and its gradient (not for reduction none) at once, and the same with the gradient in
  // memory at hand, apart from the logits, which is the CPU's alone.
  library.def(
      "cross_entropy_with_gradient(Tensor logits, Tensor target, Tensor? weight, int reduction, "
      "int ignore_index, float label_smoothing) -> (Tensor, Tensor)");
  library.def(
      "cross_entropy_with_gradient.out(Tensor logits, Tensor target, Tensor? weight, "
      "int reduction, int ignore_index, float label_smoothing, *, Tensor(a!) out) -> Tensor");

  // Whether on a CUDA device the two at once are quicker than one after the other.
  library.def(
      "cross_entropy_reads_once(Tensor logits, Tensor target, float label_smoothing) -> bool");
  // There, that gradient (of a row for each class index) times the loss's own, which may be 1.
  library.def(
      "cross_entropy_scale(Tensor(a!) gradient, Tensor factor, Tensor target, int ignore_index) "
      "-> ()");

  // The pooled activations, and which position of each window won (see conv_relu_pool.h).
  library.def(
      "conv_relu_pool_forward(Tensor input, Tensor weight, Tensor? bias, int[] stride, "
      "int[] padding, int[] dilation, int groups) -> (Tensor, Tensor)");
  // The activations alone, where no gradient will be asked for.
  library.def(
      "conv_relu_pool_inference(Tensor input, Tensor weight, Tensor? bias, int[] stride, "
      "int[] padding, int[] dilation, int groups) -> Tensor");
  // The gradients of input, weight and bias, undefined where not asked for.
  library.def(
      "conv_relu_pool_backward(Tensor grad_output, Tensor codes, Tensor input, Tensor weight, "
      "int[] stride, int[] padding, int[] dilation, int groups, bool needs_input, "
      "bool needs_weight, bool needs_bias) -> (Tensor, Tensor, Tensor)");

  // Pictures of a set, all or those that `order` names, each byte as the table has it for its
  // channel (see gather_pictures.h).
  library.def("gather_pictures(Tensor pictures, Tensor? order, Tensor table) -> Tensor");

  // Batches of training a fully connected network (see mlp.h); returns the sum of the losses and
  // how many were right. An empty tensor stands for a bias or a state that is not there.
  library.def(
      "mlp_train(Tensor images, Tensor targets, Tensor order, int batch_size, Tensor scale, "
      "Tensor shift, Tensor(a!)[] weights, Tensor(b!)[] biases, bool[] relu, "
      "Tensor(c!)[] first, Tensor(d!)[] second, Tensor(e!)[] steps, int optimizer, float lr, "
      "float beta1, float beta2, float eps, float weight_decay) -> Tensor");
  // How many blocks of a CUDA device train a network of these widths together; 0: it does not fit.
  library.def("mlp_cluster(Tensor images, int[] widths, int batch_size, int optimizer) -> int");
  // Its logits.
  library.def(
      "mlp_forward(Tensor images, Tensor scale, Tensor shift, Tensor[] weights, Tensor[] biases, "
      "bool[] relu) -> Tensor");
}

}  // namespace fastnet
