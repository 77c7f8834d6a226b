// Native training of fully connected networks on the CPU: all batches in one region of threads.
//
// Threads share out the units of each layer, not the rows of a batch, so that weights and the
// optimizer's state stay with their core. The last layer is shared out by its inputs, the units of
// the layer before: each thread has a part of every logit. With P threads and L layers a step has
//   L - 2 barriers    after each hidden layer but the last, whose units the next layer needs all
//   1                 after the parts of the logits
//   L - 2             after the parts of each hidden layer's gradient
// that is, one for up to two layers.
//
// Of images that are 0 for the most part the first layer takes lists of what is not. Each thread
// makes its own, which is quicker than to have another core's.
//
// A batch that does not stay in the cache goes through in blocks of rows, with these barriers for
// each; gradients add up, and the last block's pass applies the optimizer.

#include "../mlp.h"

#include "common.h"

#define FASTNET_KERNELS "mlp_kernels.h"
#include "foreach_isa.h"
#include "mlp_training.h"  // on those kernels

namespace fastnet {
namespace {

// Multiply-adds of a step below which another thread costs more than it brings.
constexpr int64_t kStepPerThread = 200'000;

int64_t choose_threads(const std::vector<MlpLayer>& layers, int64_t rows) {
  int64_t products = 0, narrowest = layers.back().in;
  for (const MlpLayer& layer : layers) {
    products += 3 * rows * layer.in * layer.out;
    if (&layer != &layers.back()) narrowest = std::min(narrowest, layer.out);
  }
  const int64_t threads = torch::stable::get_num_threads();
  return std::max<int64_t>(1, std::min({threads, products / kStepPerThread, narrowest / 2}));
}

// Rows of a batch that go through at a time: what stays in a core's second-level cache, where the
// gradients do that are added up meanwhile.
int64_t choose_block(const std::vector<MlpLayer>& layers, int64_t rows) {
  constexpr int64_t kCachedRows = 1024 * 1024, kCachedGradients = 512 * 1024;  // bytes
  int64_t row = 0, parameters = 0;
  for (const MlpLayer& layer : layers) {
    row += layer.in * static_cast<int64_t>(sizeof(float));
    parameters += layer.weight.numel() * static_cast<int64_t>(sizeof(float));
  }
  const int64_t most = std::max(kWidestVector * 4, kCachedRows / row);
  if (parameters > kCachedGradients || rows <= most + most / 2) return rows;
  const int64_t blocks = divide_up(rows, most);
  return in_whole_vectors(divide_up(rows, blocks));
}

// Whether the images are 0 for so great a part that the first layer passes over it: some of them
// tell, the same ones in every call. And whether a thread's units leave few lanes idle, and are not
// so many that it takes long to rearrange them for a call.
bool are_sparse(const Tensor& images, const std::vector<MlpLayer>& layers, int64_t threads) {
  constexpr int64_t kSampled = 64, kMostWeights = 1 << 19;
  constexpr double kMostNonzero = 0.25;
  if (layers.size() == 1) return false;                // whose weight is shared out by columns
  const int64_t units = layers.front().out / threads;  // and one more for some
  const int64_t width = in_whole_vectors(units);
  if (3 * units < 2 * width || width * layers.front().in > kMostWeights) return false;
  const int64_t n = images.size(0), K = images.size(1), sampled = std::min(n, kSampled);
  int64_t nonzero = 0;
  with_pixels(images, [&](const auto* pixels) {
    for (int64_t i = 0; i < sampled; ++i) {
      const auto* const image = pixels + i * n / sampled * K;
      nonzero += K - std::count(image, image + K, 0);
    }
  });
  return static_cast<double>(nonzero) < kMostNonzero * static_cast<double>(sampled * K);
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
  const int64_t n = images.size(0);
  const auto* const classes = static_cast<const int64_t*>(targets.const_data_ptr());
  const auto* const chosen = static_cast<const int64_t*>(order.const_data_ptr());
  for (int64_t i = 0; i < order.size(0); ++i) {
    check(chosen[i] >= 0 && chosen[i] < n, "mlp: order names image ", chosen[i], " of ", n);
    const int64_t target = classes[chosen[i]];
    check(target >= 0 && target < layers.back().out, "mlp: target ", target, " is no class of ",
          layers.back().out);
  }
  double steps_before = 0;
  for (const Tensor& step : steps) {
    const float value = *floats(step);
    check(&step == &steps.front() || value == steps_before, "mlp: the optimizer has taken ",
          steps_before, " steps with one parameter and ", value, " with another");
    steps_before = value;
  }

  // By a whole batch, also where this call has a smaller one only: what comes out depends on blocks
  // and on how many threads there are, and must not on how batches fall into calls.
  const int64_t rows = choose_block(layers, batch_size);
  const int64_t threads = choose_threads(layers, batch_size);
  const int64_t stride = in_whole_vectors(rows);
  Training training{.images = images,
                    .targets = classes,
                    .order = chosen,
                    .count = order.size(0),
                    .batch_size = batch_size,
                    .scale = floats(scale),
                    .shift = floats(shift),
                    .layers = layers,
                    .optimizer = kind,
                    .lr = lr,
                    .beta1 = beta1,
                    .beta2 = beta2,
                    .eps = eps,
                    .weight_decay = weight_decay,
                    .first_step = static_cast<int64_t>(steps_before) + 1,
                    .block_rows = rows,
                    .row_stride = stride,
                    .threads = threads,
                    .barrier = SpinBarrier(static_cast<int>(threads)),
                    .logits = {},
                    .hidden = {},
                    .hidden_grads = {},
                    .is_sparse = are_sparse(images, layers, threads)};
  for (int64_t i = 0; i < 2 * threads; ++i) {
    training.logits.emplace_back(stride * layers.back().out);
  }
  for (size_t l = 0; l + 2 < layers.size(); ++l) {
    training.hidden.emplace_back(rows * layers[l].out);
    for (int64_t p = 0; p < threads; ++p) training.hidden_grads.emplace_back(rows * layers[l].out);
  }
  std::vector<Workspace> spaces;
  for (int64_t thread = 0; thread < threads; ++thread) spaces.emplace_back(training, thread);
  const auto run = [&](int64_t thread) {
    switch (kind) {
      case OptimizerKind::sgd:
        return training.run<OptimizerKind::sgd>(thread, spaces[thread]);
      case OptimizerKind::momentum:
        return training.run<OptimizerKind::momentum>(thread, spaces[thread]);
      case OptimizerKind::adam:
        return training.run<OptimizerKind::adam>(thread, spaces[thread]);
    }
  };
  // One of torch's threads for each. They wait for each other, so where torch has fewer, being
  // inside a parallel region already, the others are made here.
  torch::stable::parallel_for(0, threads, 1, [&](int64_t begin, int64_t end) {
    std::vector<std::thread> others;
    enum { kNotYet, kAll, kNone };  // run: where one cannot be made the others would wait for it
    std::atomic<int> which = kNotYet;
    const auto begin_all = [&](int now) {
      which = now;
      which.notify_all();
    };
    const auto join_all = [&] {
      for (std::thread& other : others) other.join();
    };
    try {
      for (int64_t thread = begin + 1; thread < end; ++thread) {
        others.emplace_back([&, thread] {
          which.wait(kNotYet);
          if (which == kAll) run(thread);
        });
      }
    } catch (...) {
      begin_all(kNone);
      join_all();
      throw;
    }
    begin_all(kAll);
    run(begin);
    join_all();
  });
  // Here, and not by the caller, whom an interrupt may keep from it.
  for (const Tensor& step : steps) {
    *floats(step) = static_cast<float>(steps_before + divide_up(order.size(0), batch_size));
  }

  Tensor result = torch::stable::new_empty(images, {2}, ScalarType::Double);
  auto* const values = static_cast<double*>(result.mutable_data_ptr());
  values[0] = training.loss;
  values[1] = static_cast<double>(training.right);
  return result;
}

// ---------------------------------------------------------------------------------------------

Tensor mlp_forward(const Tensor& images, const Tensor& scale, const Tensor& shift,
                   std::vector<Tensor> weights, std::vector<Tensor> biases,
                   std::vector<bool> relu) {
  const std::vector<MlpLayer> layers = check_mlp_layers(weights, biases, relu);
  const int64_t n = check_mlp_images(images, scale, shift, layers.front());
  const int64_t C = layers.back().out, K = layers.front().in;
  Tensor result = torch::stable::new_empty(images, {n, C}, ScalarType::Float);
  auto* const logits = static_cast<float*>(result.mutable_data_ptr());
  int64_t widest = K, products = 0;
  for (const MlpLayer& layer : layers) {
    widest = std::max(widest, layer.out);
    products += layer.in * layer.out;
  }
  constexpr int64_t kRows = 48;  // a multiple of every tile's height
  parallel(divide_up(n, kRows), kRows * products, [&](int64_t begin, int64_t end) {
    const Floats one(kRows * widest), other(kRows * widest);
    int64_t order[kRows];
    for (int64_t block = begin; block < end; ++block) {
      const int64_t from = block * kRows, rows = std::min(kRows, n - from);
      for (int64_t i = 0; i < rows; ++i) order[i] = from + i;
      float *x = one, *y = other;
      with_pixels(images, [&](const auto* pixels) {
        FASTNET_BEST_ISA(
            mlp_gather_kernel(pixels, order, floats(scale), floats(shift), x, rows, K, 0, K));
      });
      for (const MlpLayer& layer : layers) {
        float* const out = &layer == &layers.back() ? logits + from * C : y;
        const float* const bias = layer.bias.numel() > 0 ? floats(layer.bias) : nullptr;
        const auto forward = [&](auto relu) {
          FASTNET_BEST_ISA(forward_kernel<float, relu.value>(
              x, floats(layer.weight), bias, out, layer.in, layer.out, 0, rows, 0, layer.out));
        };
        layer.relu ? forward(std::true_type{}) : forward(std::false_type{});
        std::swap(x, y);
      }
    }
  });
  return result;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(fastnet, CPU, library) {
  library.impl("mlp_train", TORCH_BOX(&mlp_train));
  library.impl("mlp_forward", TORCH_BOX(&mlp_forward));
}

}  // namespace fastnet
