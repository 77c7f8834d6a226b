// The node that a call leaves in autograd's graph.
//
// torch::autograd::Function would make one of a forward and a backward function. Of the 73 µs that
// a small loss took both ways with it, it and boxed calls (op.h) were 15, for what these calls do
// without: options in a table by name, a name made anew at every call, outputs of any kind and
// number.
#pragma once

#include <torch/csrc/autograd/functions/utils.h>
#include <torch/csrc/autograd/saved_variable.h>
#include <torch/csrc/dynamo/compiled_autograd.h>
#include <torch/version.h>

#include <array>
#include <memory>
#include <mutex>
#include <string>
#include <tuple>
#include <type_traits>
#include <vector>

#include "op.h"

namespace fastnet::autograd {

using torch::autograd::variable_list;

// A call has
//   kName, of its node;
//   kSaved, the number of tensors that it saves, undefined ones among them;
//   Options, a tuple of numbers and lists of numbers;
//   backward(grad_output, saved, options, needs), which gives the gradients of the inputs, of which
//   `needs` says whether they are wanted. saved[i] is a tensor, or an error where it was written to
//   since: only what is read is asked for.
template <class Call>
class Node final : public torch::autograd::Node {
 public:
  using Options = typename Call::Options;

  // The output's node is to be this one already.
  void save(std::array<Tensor, Call::kSaved> tensors, Options options) {
    for (size_t index = 0; index < tensors.size(); ++index) {
      const bool is_output = tensors[index].defined() && tensors[index].grad_fn().get() == this;
      saved_[index] = torch::autograd::SavedVariable(tensors[index], is_output);
    }
    options_ = std::move(options);
  }

  variable_list apply(variable_list&& grad_outputs) override {
    const std::lock_guard<std::mutex> lock(mutex_);
    if (!grad_outputs[0].defined()) return variable_list(num_outputs());
    return Call::backward(grad_outputs[0], Saved{*this}, options_, needs());
  }

  std::string name() const override { return Call::kName; }

  void release_variables() override {
    const std::lock_guard<std::mutex> lock(mutex_);
    for (auto& each : saved_) each.reset_data();
  }

  // For compiled autograd: what is not an input of the code that it makes is a part of its key.
  void compiled_args(torch::dynamo::autograd::CompiledNodeArgs& args) const override {
    args.collect(std::string(Call::kName));
    for (const auto& each : saved_) args.collect(each, /*is_output=*/true);
    std::apply([&](const auto&... option) { (args.collect(option), ...); }, options_);
  }

  // And has `apply` called from there, by its arguments alone.
  variable_list apply_with_saved(const variable_list& grad_outputs,
                                 torch::dynamo::autograd::SwapSavedVariables& swap) override {
    using namespace torch::dynamo::autograd;
    for (auto& each : saved_) swap.before(each);
    PackedArgs packed;
    variable_list tensors;
    for (size_t index = 0; index < saved_.size(); ++index) tensors.push_back(Saved{*this}[index]);
    packed.pack(tensors);
    packed.pack(needs());
    std::apply([&](const auto&... option) { (packed.pack(option), ...); }, options_);
    const std::vector<at::IValue> args = std::move(packed).vec();
    std::vector<at::TypePtr> types;
    for (const auto& arg : args) types.push_back(arg.type());
    const auto outputs =
        IValuePacker<std::vector<std::optional<torch::autograd::InputMetadata>>>::pack(
            get_input_metadata(next_edges()));
    const auto& interface = getPyCompilerInterface();
    const std::string function =
        interface->bind_function(swap.get_py_compiler(), Call::kName, &call_packed, types,
                                 /*is_custom_function=*/true, /*is_traceable=*/true);
    variable_list gradients = interface->call_function(swap.get_py_compiler(), "apply_functional",
                                                       function, grad_outputs, args, outputs);
    for (auto& each : saved_) swap.after(each);
    return gradients;
  }

 private:
  struct Saved {
    Node& node;
    Tensor operator[](size_t index) const { return node.saved_[index].unpack(node.getptr()); }
  };

  std::vector<bool> needs() const {
    std::vector<bool> wanted(num_outputs());
    for (size_t input = 0; input < wanted.size(); ++input) {
      wanted[input] = task_should_compute_output(input);
    }
    return wanted;
  }

  static variable_list call_packed(const variable_list& grad_outputs,
                                   const std::vector<at::IValue>& args) {
    torch::dynamo::autograd::PackedArgs packed(args);
    const auto saved = packed.unpack<variable_list>();
    const auto needs = packed.unpack<std::vector<bool>>();
    Options options;
    std::apply(
        [&](auto&... option) { ((option = packed.unpack<std::decay_t<decltype(option)>>()), ...); },
        options);
    return Call::backward(grad_outputs[0], saved, options, needs);
  }

  std::array<torch::autograd::SavedVariable, Call::kSaved> saved_;
  Options options_;
};

inline bool wants_gradient(const Tensor& tensor) {
  return tensor.requires_grad();
}
inline bool wants_gradient(const OptionalTensor& tensor) {
  return tensor && tensor->requires_grad();
}

// Whether there has to be a node. In inference mode there is none, also where gradients are enabled
// again.
template <class... Inputs>
bool is_trained(const Inputs&... inputs) {
  return c10::GradMode::is_enabled() && !c10::InferenceMode::is_enabled() &&
         (wants_gradient(inputs) || ...);
}

// Which counts its owners itself in newer versions of torch, and does not in older ones.
template <class Pointer, class Call>
Pointer owned(Node<Call>* node) {
  if constexpr (std::is_same_v<Pointer, std::shared_ptr<torch::autograd::Node>>) {
    return Pointer(node, [](auto* each) { deleteNode(each); });
  } else {
    return Pointer::unsafe_steal_from_new(node);
  }
}

// Makes the output the result of a node between it and the inputs. `save(node)` is what it saves.
template <class Call, class Save, class... Inputs>
void record(const Tensor& output, const Save& save, const Inputs&... inputs) {
  auto* const node = new Node<Call>();
  const auto pointer = owned<decltype(node->getptr())>(node);
  node->set_next_edges(torch::autograd::collect_next_edges(inputs...));
  torch::autograd::set_history(output, pointer);
  save(*node);
#if TORCH_VERSION_MAJOR > 2 || TORCH_VERSION_MINOR >= 14
  torch::autograd::fire_node_creation_hooks(pointer);
#endif
}

}  // namespace fastnet::autograd
