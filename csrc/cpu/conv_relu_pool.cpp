// conv_relu_pool on the CPU, forward: 3 x 3 and 5 x 5 filters in kernels of our own, other
// convolutions by torch's library with one fused pass after it.

#include "conv_relu_pool.h"

#include <torch/csrc/inductor/aoti_torch/generated/c_shim_cpu.h>

#include <atomic>

#include "ops.h"

#define FASTNET_KERNELS "conv_relu_pool_forward_kernels.h"
#include "foreach_isa.h"

namespace fastnet {
namespace {

// Channels, filters, and the product of both, from which patches of 6 x 6 are worth being
// transformed.
constexpr int64_t kManyChannels = 5, kManyFilters = 6;
constexpr int64_t kManyProducts3 = 64, kManyProducts5 = 96;
// Windows up to which rearranging the filters, let alone transforming them, takes longer than it
// saves: the direct form takes them as they are.
constexpr int64_t kFewTiles = 32;

ConvForm form_of(const ConvReluPoolShape& shape) {
  if (shape.C >= kManyChannels && shape.K >= kManyFilters && shape.Q <= kMostTileWindows &&
      shape.C * shape.K >= (shape.R == 3 ? kManyProducts3 : kManyProducts5)) {
    return ConvForm::patches_of_6;
  }
  if (shape.R != 3 || shape.C > 4) return ConvForm::direct;
  return ConvForm::patches_of_4;
}

// Returns what stood in its way: filters or an input that the form asked for cannot take, or as
// `infinite` too large an image.
template <class T>
Magnitude run(ConvForward<element_t<T>> call, const Tensor& input) {
  using A = acc_t<T>;
  const int64_t threads = torch::stable::get_num_threads();
  const int64_t units = FASTNET_BEST_ISA(forward_units(call));
  call.most_units = divide_up(units, 8 * threads);
  const int64_t scratch = FASTNET_BEST_ISA(forward_scratch(call));
  if (scratch > most_scratch<A>()) return Magnitude::infinite;
  std::atomic<Magnitude> met = Magnitude::small;
  const auto meet = [&](Magnitude magnitude) {
    Magnitude before = met;
    while (before < magnitude && !met.compare_exchange_weak(before, magnitude)) {
    }
  };
  const int64_t in_block = FASTNET_BEST_ISA(block_units(call));
  const int64_t blocks = divide_up(units, in_block);
  const int64_t windows = divide_up(call.N * call.P * call.Q, blocks);
  const auto calculate = [&](int64_t begin, int64_t end, int64_t part_begin, int64_t part_end) {
    A* const memory = thread_scratch<A>(scratch);
    if (!FASTNET_BEST_ISA(conv_forward_kernel(call, begin, end, part_begin, part_end, memory))) {
      meet(Magnitude::finite);
    }
  };

  const int64_t parts = FASTNET_BEST_ISA(filter_parts(call));
  // Many filters are rearranged some at a time, for which memory can be kept.
  const int64_t at_once = FASTNET_BEST_ISA(filter_parts_at_once(call));
  const int64_t filters = FASTNET_BEST_ISA(filter_count(call));
  Tensor memory;
  if (!call.is_arranged) {
    call.filters = reinterpret_cast<const A*>(call.weight);
  } else {
    if (filters <= most_filters<A>()) {
      call.arranged_filters = thread_scratch<A, 1>(filters);
    } else {
      memory = allocate(input, {filters * static_cast<int64_t>(sizeof(A) / sizeof(element_t<T>))});
      call.arranged_filters = static_cast<A*>(memory.mutable_data_ptr());
    }
    call.filters = call.arranged_filters;
  }
  for (int64_t first = 0; first < parts; first += at_once) {
    const int64_t last = std::min(parts, first + at_once), count = last - first;
    call.first_part = first;
    const int64_t arrange_work = call.is_arranged ? 4 * filters : filters / 8;
    parallel(count, arrange_work / std::min(parts, at_once), [&](int64_t begin, int64_t end) {
      meet(FASTNET_BEST_ISA(arrange_filters_kernel(call, first + begin, first + end)));
    });
    if (met == Magnitude::infinite || (call.form != ConvForm::direct && met != Magnitude::small)) {
      return met;
    }
    call.filters_are_small = met == Magnitude::small;

    const int64_t work = 4 * call.kernel * call.kernel * call.C * call.K * windows * count / parts;
    if (blocks >= 2 * threads || count < threads) {
      parallel_in_turns(blocks, work, [&](int64_t begin, int64_t end) {
        calculate(begin * in_block, std::min(units, end * in_block), first, last);
      });
    } else {
      // Few images: threads share out the filters.
      parallel(count, blocks * work / count, [&](int64_t begin, int64_t end) {
        calculate(0, units, first + begin, first + end);
      });
    }
  }
  return call.form != ConvForm::direct ? met.load() : Magnitude::small;
}

// The output, and the codes where `codes` is not null.
Tensor calculate(const ConvReluPoolShape& shape, const Tensor& input, const Tensor& weight,
                 const std::optional<Tensor>& bias, uint8_t* codes) {
  Tensor output = in_huge_pages(allocate_image(input, shape, shape.P, shape.Q));
  if (output.numel() == 0) return output;
  const std::optional<Tensor> b = bias ? std::optional(dense(*bias)) : std::nullopt;

  dispatch_float("conv_relu_pool", input.scalar_type(), [&](auto type) {
    using T = decltype(type);
    const auto* bias_data = b ? data<T>(*b) : nullptr;
    if (has_own_kernels(shape, input.scalar_type())) {
      const bool is_arranged = sizeof(acc_t<T>) != sizeof(element_t<T>) ||
                               !weight.is_contiguous() || shape.N * shape.P * shape.Q > kFewTiles;
      const ConvForm form =
          is_arranged && sizeof(acc_t<T>) == sizeof(float) ? form_of(shape) : ConvForm::direct;
      ConvForward<element_t<T>> call{conv_call<T>(shape, input),
                                     data<T>(weight),
                                     strides_of(weight),
                                     bias_data,
                                     mutable_data<T>(output),
                                     codes,
                                     strides_of(output),
                                     /*most_units=*/0,
                                     form,
                                     nullptr,
                                     nullptr,
                                     is_arranged,
                                     /*first_part=*/0,
                                     false};
      Magnitude met = run<T>(call, input);
      if (call.form != ConvForm::direct && met == Magnitude::finite) {
        call.form = ConvForm::direct;
        met = run<T>(call, input);
      }
      if (met == Magnitude::small) return;
    }
    // The bias costs nothing there, and what is rounded to a half type is what torch rounds.
    Tensor z = library_convolution(aoti_torch_cpu_convolution, input, weight, bias, shape);
    if (!shape.channels_last || !is_channels_last(z)) z = dense(z);
    const bool channels_last = !z.is_contiguous();
    check(channels_last == shape.channels_last || shape.K == 1,
          "conv_relu_pool: torch's convolution came in an unexpected memory format");
    const int64_t rows = shape.N * shape.P * (channels_last ? 1 : shape.K);
    auto* out = mutable_data<T>(output);
    parallel(rows, 8 * output.numel() / rows, [&](int64_t begin, int64_t end) {
      FASTNET_BEST_ISA(relu_pool_kernel(data<T>(z), strides_of(z), out, codes, strides_of(output),
                                        shape.K, shape.P, shape.Q, channels_last, begin, end));
    });
  });
  return output;
}

}  // namespace

std::tuple<Tensor, Tensor> cpu::conv_relu_pool_forward(const Tensor& input, const Tensor& weight,
                                                       const std::optional<Tensor>& bias,
                                                       const std::vector<int64_t>& stride,
                                                       const std::vector<int64_t>& padding,
                                                       const std::vector<int64_t>& dilation,
                                                       int64_t groups) {
  const ConvReluPoolShape shape =
      check_conv_relu_pool(input, weight, bias, stride, padding, dilation, groups);
  Tensor codes = in_huge_pages(allocate_image(input, shape, shape.P, shape.Q, ScalarType::Byte));
  return {calculate(shape, input, weight, bias, static_cast<uint8_t*>(codes.mutable_data_ptr())),
          codes};
}

Tensor cpu::conv_relu_pool_inference(const Tensor& input, const Tensor& weight,
                                     const std::optional<Tensor>& bias,
                                     const std::vector<int64_t>& stride,
                                     const std::vector<int64_t>& padding,
                                     const std::vector<int64_t>& dilation, int64_t groups) {
  const ConvReluPoolShape shape =
      check_conv_relu_pool(input, weight, bias, stride, padding, dilation, groups);
  return calculate(shape, input, weight, bias, nullptr);
}

STABLE_TORCH_LIBRARY_IMPL(fastnet, CPU, library) {
  library.impl("conv_relu_pool_forward", TORCH_BOX(&cpu::conv_relu_pool_forward));
  library.impl("conv_relu_pool_inference", TORCH_BOX(&cpu::conv_relu_pool_inference));
}

}  // namespace fastnet
