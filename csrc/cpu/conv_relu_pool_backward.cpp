// conv_relu_pool on the CPU, backward: from the pooled gradient and the codes alone where the
// kernels of our own take the shape, by torch's library on the expanded gradient elsewhere.

#include "conv_relu_pool.h"

#include <torch/csrc/inductor/aoti_torch/generated/c_shim_cpu.h>

#include <atomic>

#include "ops.h"

#define FASTNET_KERNELS "conv_relu_pool_backward_kernels.h"
#include "foreach_isa.h"

namespace fastnet {
namespace {

struct Gradients {
  Tensor input, weight, bias;  // undefined where not wanted
};

// Returns false where an image is too large to keep at hand, or where an operand is not finite:
// what these kernels leave out would then be NaN.
template <class T>
bool run(ConvBackward<element_t<T>> call, const Tensor& weight, Gradients& gradients) {
  using A = acc_t<T>;
  std::atomic<bool> fits = true;
  const int64_t scratch = FASTNET_BEST_ISA(backward_scratch(call));
  if (scratch > most_scratch<A>()) return false;
  const int64_t elements = FASTNET_BEST_ISA(patch_elements(call));
  const int64_t filter_elements = FASTNET_BEST_ISA(filter_elements(call));
  const int64_t blocks = FASTNET_BEST_ISA(channel_blocks(call));
  // A multiply-add for every live window and position of the filter, at most.
  const int64_t work = call.N * call.K * call.P * call.Q * call.C * call.kernel * call.kernel *
                       (call.needs_weight + (call.grad_input != nullptr));
  const int64_t threads = work < kWorkPerThread ? 1 : torch::stable::get_num_threads();
  // Threads share out the images, in as many shares on any few threads, so that the sums are the
  // same; where images are few, the filters of grad_weight and the channels of grad_input.
  constexpr int64_t kMostSums = 1 << 20, kTooManySums = 1 << 24;
  const int64_t few_shares = call.by_tiles ? 4 : 8;  // that a share is worth its sums
  const int64_t weight_elements = call.needs_weight ? elements : 0;
  const bool by_image =
      threads == 1 || (call.N >= threads && threads * weight_elements <= kTooManySums);
  const int64_t wanted =
      few_shares * weight_elements <= kMostSums ? std::max(few_shares, threads) : threads;
  const int64_t shares =
      by_image ? std::min(call.N, wanted) : std::min(threads, std::max(call.K, blocks));
  const int64_t sums = by_image ? shares : 1;
  const int64_t sum_elements = sums * (weight_elements + call.K);
  const int64_t shared_elements = sum_elements + (call.grad_input ? filter_elements : 0);
  std::unique_ptr<A[]> shared_memory;
  if (shared_elements > most_scratch<A>()) shared_memory.reset(new A[shared_elements]);
  A* const weight_sums =
      shared_memory ? shared_memory.get() : thread_scratch<A, 1>(shared_elements);
  A* const bias_sums = weight_sums + sums * weight_elements;
  A* const filters = weight_sums + sum_elements;
  if (call.grad_input) {
    call.filters = filters;
    parallel(blocks, 2 * filter_elements / blocks, [&](int64_t begin, int64_t end) {
      if (!FASTNET_BEST_ISA(arrange_backward_filters_kernel(
              call, data<T>(weight), strides_of(weight), filters, begin, end))) {
        fits = false;
      }
    });
    if (!fits) return false;
  }

  const auto body = [&](int64_t begin, int64_t end) {
    for (int64_t share = begin; share < end; ++share) {
      A* const memory = thread_scratch<A>(scratch);
      const int64_t n_begin = by_image ? share * call.N / shares : 0;
      const int64_t n_end = by_image ? (share + 1) * call.N / shares : call.N;
      const int64_t k_begin = by_image ? 0 : share * call.K / shares;
      const int64_t k_end = by_image ? call.K : (share + 1) * call.K / shares;
      const int64_t sum = by_image ? share : 0;
      A* const weight_sum = weight_sums + sum * weight_elements;
      A* const bias_sum = bias_sums + sum * call.K;
      std::fill(bias_sum + k_begin, bias_sum + k_end, A(0));
      const int64_t block_begin = by_image ? 0 : share * blocks / shares;
      const int64_t block_end = by_image ? blocks : (share + 1) * blocks / shares;
      const int64_t per_filter = weight_elements / call.K;
      std::fill(weight_sum + k_begin * per_filter, weight_sum + k_end * per_filter, A(0));
      if (call.by_tiles) {
        if (!FASTNET_BEST_ISA(conv_backward_tiles_kernel(call, n_begin, n_end, k_begin, k_end,
                                                         block_begin, block_end, weight_sum,
                                                         bias_sum, memory))) {
          fits = false;
          return;
        }
        continue;
      }
      if ((call.needs_weight || call.needs_bias) && k_begin < k_end) {
        if (!FASTNET_BEST_ISA(conv_backward_weight_kernel(call, n_begin, n_end, k_begin, k_end,
                                                          weight_sum, bias_sum, memory))) {
          fits = false;
          return;
        }
      }
      if (call.grad_input && block_begin < block_end) {
        FASTNET_BEST_ISA(
            conv_backward_input_kernel(call, n_begin, n_end, block_begin, block_end, memory));
      }
    }
  };
  parallel_in_turns(shares, work / shares, body);
  if (!fits) return false;

  auto* grad_weight = call.needs_weight ? mutable_data<T>(gradients.weight) : nullptr;
  auto* grad_bias = call.needs_bias ? mutable_data<T>(gradients.bias) : nullptr;
  const Strides4 weight_at = call.needs_weight ? strides_of(gradients.weight) : Strides4{};
  if (grad_weight || grad_bias) {
    parallel(call.K, 4 * sums * weight_elements / call.K, [&](int64_t begin, int64_t end) {
      FASTNET_BEST_ISA(collect_weight_kernel(call, weight_sums, bias_sums, sums, grad_weight,
                                             weight_at, grad_bias, begin, end));
    });
  }
  return true;
}

}  // namespace

std::tuple<Tensor, Tensor, Tensor> cpu::conv_relu_pool_backward(
    const Tensor& grad_output, const Tensor& codes, const Tensor& input, const Tensor& weight,
    const std::vector<int64_t>& stride, const std::vector<int64_t>& padding,
    const std::vector<int64_t>& dilation, int64_t groups, bool needs_input, bool needs_weight,
    bool needs_bias) {
  const ConvReluPoolShape shape =
      check_conv_relu_pool(input, weight, std::nullopt, stride, padding, dilation, groups);
  check_conv_relu_pool_backward(shape, grad_output, codes, input);
  Gradients gradients;
  bool done = false;
  if (has_own_kernels(shape, input.scalar_type()) && shape.N > 0) {
    if (needs_input) gradients.input = in_huge_pages(torch::stable::empty_like(input));
    if (needs_weight) gradients.weight = torch::stable::empty_like(weight);
    if (needs_bias) gradients.bias = allocate(weight, {shape.K});
    dispatch_float("conv_relu_pool_backward", input.scalar_type(), [&](auto type) {
      using T = decltype(type);
      ConvBackward<element_t<T>> call{conv_call<T>(shape, input),
                                      data<T>(grad_output),
                                      strides_of(grad_output),
                                      static_cast<const uint8_t*>(codes.const_data_ptr()),
                                      strides_of(codes),
                                      needs_weight,
                                      needs_bias,
                                      needs_input ? mutable_data<T>(gradients.input) : nullptr,
                                      needs_input ? strides_of(gradients.input) : Strides4{},
                                      nullptr,
                                      /*by_tiles=*/false};
      call.by_tiles = FASTNET_BEST_ISA(takes_tiles(call));
      done = run<T>(call, weight, gradients);
      if (!done && call.by_tiles) {
        call.by_tiles = false;
        done = run<T>(call, weight, gradients);
      }
    });
  }
  if (!done) {
    Tensor grad_z = in_huge_pages(allocate_image(input, shape, shape.z_height(), shape.z_width()));
    if (grad_z.numel() > 0) {
      dispatch_float("conv_relu_pool_backward", input.scalar_type(), [&](auto type) {
        using T = decltype(type);
        const auto* code = static_cast<const uint8_t*>(codes.const_data_ptr());
        auto* z = mutable_data<T>(grad_z);
        const int64_t rows = shape.N * shape.z_height();
        parallel(rows, 2 * grad_z.numel() / rows, [&](int64_t begin, int64_t end) {
          FASTNET_BEST_ISA(expand_kernel(data<T>(grad_output), strides_of(grad_output), code,
                                         strides_of(codes), z, strides_of(grad_z), shape.K, shape.P,
                                         shape.Q, shape.z_height(), shape.z_width(), begin, end));
        });
      });
    }
    return library_convolution_backward(aoti_torch_cpu_convolution_backward, grad_z, input, weight,
                                        shape, needs_input, needs_weight, needs_bias);
  }
  return {gradients.input, gradients.weight, gradients.bias};
}

STABLE_TORCH_LIBRARY_IMPL(fastnet, CPU, library) {
  library.impl("conv_relu_pool_backward", TORCH_BOX(&cpu::conv_relu_pool_backward));
}

}  // namespace fastnet
