// Native training of fully connected networks on CUDA: all batches in one kernel, by one cluster of
// blocks that keep weights and optimizer state in their shared memory. Nothing of this has been
// measured on a card yet.
//
// Each layer is shared out between the blocks in one of three ways:
//   inputs  each block has columns of the weight and needs those features only; its part of every
//           unit is added to those of the others
//   units   each block has rows of the weight: it needs all features and gives some of the units
//   none    each block does all of it, and comes to the same bits as the others
// The first layer is shared by inputs, so that each block gathers its own pixels of a batch. Then
// comes units, whose results are the next one's inputs, and so on in turns; a last layer that would
// be shared by units is not shared. So a step waits for the cluster twice for each layer shared by
// inputs and for each shared by units: before the parts are added, and after.
//
// Where all of that is too much, the optimizer's states of the shared-out weights stay in global
// memory: each element is one thread's alone.
//
// In shared memory rows lie in whole quads of floats, an odd number of them: eight rows one below
// the other are in different banks. What lies behind the last feature or unit is always zero.

#include "mlp_kernel.cuh"

namespace fastnet {
namespace {

struct ClusterSize {
  int blocks;         // 0: there is none
  bool keeps_states;  // in shared memory
};

// How a network is shared out: of the call, all that shapes decide.
ClusterCall plan_cluster(const std::vector<int64_t>& widths, int64_t batch_size,
                         OptimizerKind optimizer, ClusterSize size) {
  ClusterCall call{};
  const int blocks = call.blocks = size.blocks;
  const int states = static_cast<int>(optimizer);  // 0, 1 or 2 for each parameter
  call.layer_count = static_cast<int>(widths.size()) - 1;
  const int rows = static_cast<int>(batch_size);
  int at = 0;
  const auto take = [&](int floats) {
    at += floats;
    return at - floats;
  };
  const auto width = [&](int64_t features, bool split) {
    const int quads = static_cast<int>((features + 3) / 4);
    return 4 * (split ? (quads + blocks - 1) / blocks : quads);
  };
  const auto stride = [](int width) { return width % 8 == 4 ? width : width + 4; };
  bool is_split = true;  // whether each block has its own features: the images' columns, at first
  for (int l = 0; l < call.layer_count; ++l) {
    ClusterLayer& layer = call.layers[l];
    layer.in = static_cast<int>(widths[l]);
    layer.units = static_cast<int>(widths[l + 1]);
    layer.split = is_split ? Split::inputs : l + 1 == call.layer_count ? Split::none : Split::units;
    is_split = layer.split == Split::units;
    layer.in_width = width(layer.in, layer.split == Split::inputs);
    layer.units_width = width(layer.units, is_split);
    layer.in_stride = stride(layer.in_width);
    layer.units_stride = stride(layer.units_width);
    layer.weight_size = layer.units_width * layer.in_stride;
    layer.keeps_states = size.keeps_states || layer.split == Split::none;
    layer.weight_at = take((layer.keeps_states ? 1 + states : 1) * layer.weight_size);
    layer.bias_at = take((1 + states) * layer.units_stride);
    layer.input_at = take(rows * layer.in_stride);
    layer.grad_at = take(rows * layer.units_stride);
    // Hidden units are added before there is a gradient; where the sum goes must be elsewhere.
    const bool is_hidden = l + 1 < call.layer_count;
    layer.part_at = layer.split == Split::units  ? take(rows * layer.in_stride)
                    : layer.split == Split::none ? 0
                    : is_hidden                  ? layer.grad_at
                                                 : take(rows * layer.units_stride);
  }
  call.scale_at = take(call.layers[0].in_width);
  call.shift_at = take(call.layers[0].in_width);
  call.floats = at;
  return call;
}

size_t shared_bytes(const ClusterCall& call) {
  return sizeof(ClusterHeader) + call.floats * sizeof(float);
}

// As many blocks as find work, and more where the network needs their memory. Fewer only where the
// device has no room for as many side by side.
ClusterSize choose_cluster(const Tensor& images, const std::vector<int64_t>& widths,
                           int64_t batch_size, OptimizerKind optimizer) {
  constexpr int64_t kColumnsPerBlock = 32;
  // Beyond this no network fits, and sizes would not fit an int.
  constexpr int64_t kWidest = 1 << 16, kMostParameters = 1 << 24;
  int64_t parameters = 0;
  for (size_t l = 0; l + 1 < widths.size(); ++l) {
    if (widths[l] > kWidest || widths[l + 1] > kWidest) return {};
    parameters += widths[l] * widths[l + 1];
  }
  if (parameters > kMostParameters || batch_size > kMlpThreads || widths.size() > kMaxLayers + 1) {
    return {};
  }
  // One stands for all: they differ in nothing that a launch asks for.
  auto* const kernel = mlp_cluster_kernel<OptimizerKind::adam, uint8_t>;
  const size_t most_shared = cluster_shared_bytes(images, kernel);
  int wanted = 1;
  while (wanted < kMaxCluster && widths[0] >= 2 * wanted * kColumnsPerBlock) wanted *= 2;
  const auto choose = [&](int least, int most) -> ClusterSize {
    for (const bool keeps_states : {true, false}) {
      for (int blocks = least; blocks <= most; blocks *= 2) {
        const ClusterSize size{blocks, keeps_states};
        const size_t bytes = shared_bytes(plan_cluster(widths, batch_size, optimizer, size));
        if (bytes <= most_shared &&
            cluster_fits(images, kernel, blocks, dim3(kMlpThreads), bytes)) {
          return size;
        }
      }
    }
    return {};
  };
  ClusterSize size = choose(wanted, kMaxCluster);
  while (size.blocks == 0 && wanted > 1) {
    wanted /= 2;
    size = choose(wanted, wanted);
  }
  return size;
}

int64_t mlp_cluster(const Tensor& images, std::vector<int64_t> widths, int64_t batch_size,
                    int64_t optimizer) {
  const OptimizerKind kind = mlp_optimizer(optimizer);
  return choose_cluster(images, widths, batch_size, kind).blocks;
}

Tensor mlp_train(const Tensor& images, const Tensor& targets, const Tensor& order,
                 int64_t batch_size, const Tensor& scale, const Tensor& shift,
                 std::vector<Tensor> weights, std::vector<Tensor> biases, std::vector<bool> relu,
                 std::vector<Tensor> first, std::vector<Tensor> second, std::vector<Tensor> steps,
                 int64_t optimizer, double lr, double beta1, double beta2, double eps,
                 double weight_decay) {
  const OptimizerKind kind = mlp_optimizer(optimizer);
  const std::vector<MlpLayer> layers =
      check_mlp_training(images, targets, order, &batch_size, scale, shift, weights, biases, relu,
                         first, second, steps, kind);
  std::vector<int64_t> widths{layers.front().in};
  for (const MlpLayer& layer : layers) widths.push_back(layer.out);
  const ClusterSize size = choose_cluster(images, widths, batch_size, kind);
  check(size.blocks > 0, "mlp: the network, with batches of ", batch_size,
        ", does not fit into the shared memory of a cluster of this device");

  ClusterCall call = plan_cluster(widths, batch_size, kind, size);
  for (size_t l = 0; l < layers.size(); ++l) {
    const MlpLayer& layer = layers[l];
    ClusterLayer& to = call.layers[l];
    to.relu = layer.relu;
    const Tensor* const of_weight[] = {&layer.weight, &layer.weight_first, &layer.weight_second};
    const Tensor* const of_bias[] = {&layer.bias, &layer.bias_first, &layer.bias_second};
    for (int s = 0; s < 3; ++s) {
      to.weight[s] = mutable_data<float>(*of_weight[s]);
      to.bias[s] = layer.bias.numel() > 0 ? mutable_data<float>(*of_bias[s]) : nullptr;
    }
  }
  const bool is_uint8 = images.scalar_type() == ScalarType::Byte;
  call.images = images.const_data_ptr();
  call.in_quads = layers.front().in % 4 == 0 &&
                  reinterpret_cast<uintptr_t>(call.images) % (is_uint8 ? 4 : 16) == 0;
  call.targets = data<int64_t>(targets);
  call.order = data<int64_t>(order);
  call.image_count = images.size(0);
  call.count = order.size(0);
  call.batch_size = static_cast<int>(batch_size);
  call.scale = data<float>(scale);
  call.shift = data<float>(shift);
  call.lr = lr;
  call.beta1 = beta1;
  call.beta2 = beta2;
  call.step = uncorrected_step(lr, beta1, beta2, eps, weight_decay);
  // torch.optim keeps its counters on the device, or on the host, which need not wait to read them.
  std::vector<float*> on_host;
  for (const Tensor& step : steps) {
    float* const counter = static_cast<float*>(step.mutable_data_ptr());
    if (step.is_cpu() && !images.is_cpu()) {
      on_host.push_back(counter);
      call.steps_before = *counter;
    } else {
      call.steps[call.step_count++] = counter;
    }
  }
  check(on_host.empty() || call.step_count == 0,
        "mlp: the optimizer's steps must be all on the host or all on the device");
  Tensor result = torch::stable::new_empty(images, {2}, ScalarType::Double);
  call.result = mutable_data<double>(result);

  const OnDeviceOf device(images);
  const auto launch_with = [&](auto optimizer, auto pixel) {
    launch_cluster(mlp_cluster_kernel<optimizer.value, decltype(pixel)>, size.blocks,
                   dim3(kMlpThreads), shared_bytes(call), device.stream(), call);
  };
  const auto launch_for = [&](auto optimizer) {
    is_uint8 ? launch_with(optimizer, uint8_t{}) : launch_with(optimizer, float{});
  };
  switch (kind) {
    case OptimizerKind::sgd:
      launch_for(std::integral_constant<OptimizerKind, OptimizerKind::sgd>{});
      break;
    case OptimizerKind::momentum:
      launch_for(std::integral_constant<OptimizerKind, OptimizerKind::momentum>{});
      break;
    case OptimizerKind::adam:
      launch_for(std::integral_constant<OptimizerKind, OptimizerKind::adam>{});
      break;
  }
  for (float* counter : on_host) {
    *counter += static_cast<float>((call.count + batch_size - 1) / batch_size);
  }
  return result;
}

}  // namespace

FASTNET_CUDA_LIBRARY(library) {
  library.impl("mlp_train", TORCH_BOX(&mlp_train));
  library.impl("mlp_cluster", TORCH_BOX(&mlp_cluster));
}

}  // namespace fastnet
