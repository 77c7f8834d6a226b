// cross_entropy on CUDA; the formulae stand in ../cross_entropy.h. Nothing of this has been
// measured on a card yet.
//
// Forward reads the logits once, in one of three ways:
//   few classes, side by side     a warp per row, the row in registers
//   many classes, side by side    a block per row, or several where rows are few
//   classes far apart, (N, C, d)  a thread per position, neighbours reading neighbours
// Backward is elementwise, given the rows' statistics. Of logits that no cache holds, where a row
// fits into shared memory, the forward pass of a training has the gradient made there, too.

#include "cross_entropy_gradient_kernels.cuh"

namespace fastnet {
namespace {

// ---------------------------------------------------------------------------------------------
// Launchers

// Rows for which the card is full with one block each; below, several share one.
inline constexpr int64_t kFullRows = 256;
inline constexpr int64_t kWarpRowClasses = 1024;
// Logits up to which one block, and so one launch, is quicker than a full card and a second launch.
inline constexpr int64_t kAloneLogits = 16'384;

// Whether kCount elements can be moved together everywhere in the rows.
template <class T>
bool is_packed(const void* pointer, const ClassStrides& at, int64_t C, int64_t D) {
  constexpr int64_t kCount = kVectorBytes / sizeof(T);
  return at.cls == 1 && C % kCount == 0 && at.outer % kCount == 0 &&
         (D == 1 || at.inner % kCount == 0) &&
         reinterpret_cast<uintptr_t>(pointer) % kVectorBytes == 0;
}

// Classes per block, a multiple of `unit`, so that rows times shares fill the card.
int64_t share_of(int64_t C, int64_t rows, int64_t unit, int64_t full) {
  const int64_t blocks = std::max<int64_t>(1, full / std::max<int64_t>(1, rows));
  const int64_t share = (C + blocks - 1) / blocks;
  return (share + unit - 1) / unit * unit;
}

template <class T, int kPerLane = 1>
void launch_warp_rows(const CrossEntropyCall<T>& call, cudaStream_t stream) {
  if constexpr (kPerLane * kWarp < kWarpRowClasses) {
    if (kPerLane * kWarp < call.C) return launch_warp_rows<T, 2 * kPerLane>(call, stream);
  }
  const int warps = call.loss ? kRowWarpsAlone<T, kPerLane> : kRowWarps;
  launch(warp_row_kernel<T, kPerLane>, dim3(call.loss ? 1 : blocks_for(call.rows, warps)),
         dim3(kWarp, warps), 0, stream, call);
}

// The tensors of a call, kept alive while the kernels are launched, and the call itself.
template <class T>
struct Operands {
  using D = device_t<T>;
  using A = acc_t<D>;
  Tensor logits, target;
  std::optional<Tensor> weight;
  CrossEntropyCall<D> call{};

  Operands(const CrossEntropyShape& shape, const Tensor& given_logits, const Tensor& given_target,
           const std::optional<Tensor>& given_weight, const Tensor& statistics, int64_t reduction,
           int64_t ignore_index, double label_smoothing)
      : logits(with_class_strides(given_logits)),
        target(shape.has_probabilities ? with_class_strides(given_target) : dense(given_target)) {
    call.rows = shape.rows();
    call.C = shape.C;
    call.D = shape.D;
    call.logits = data<T>(logits);
    call.logits_at = *class_strides(logits);
    if (shape.has_probabilities) {
      call.probabilities = data<T>(target);
      call.target_at = *class_strides(target);
    } else {
      call.classes = static_cast<const int64_t*>(target.const_data_ptr());
    }
    if (given_weight) {
      weight = dense(*given_weight);
      call.weight = static_cast<const A*>(weight->const_data_ptr());
    }
    call.keep = static_cast<A>(1 - label_smoothing);
    call.spread = static_cast<A>(label_smoothing / static_cast<double>(shape.C));
    call.needs_dot = shape.needs_dot;
    call.ignore_index = ignore_index;
    call.is_mean = static_cast<Reduction>(reduction) == Reduction::mean;
    call.maximum = static_cast<A*>(statistics.mutable_data_ptr());
    call.log_sum = call.maximum + shape.rows();
    call.target_sum = call.log_sum + shape.rows();
    call.divisor = call.maximum + shape.statistics() - 1;
  }
};

// ---------------------------------------------------------------------------------------------
// Host functions

std::tuple<Tensor, Tensor> cross_entropy_forward(const Tensor& logits, const Tensor& target,
                                                 const std::optional<Tensor>& weight,
                                                 int64_t reduction, int64_t ignore_index,
                                                 double label_smoothing) {
  const CrossEntropyShape shape =
      check_cross_entropy(logits, target, weight, reduction, label_smoothing);
  const OnDeviceOf on_device(logits);
  const ScalarType wide = accumulate_type(logits);
  const bool per_row = static_cast<Reduction>(reduction) == Reduction::none;
  const int64_t rows = shape.rows();
  const Tensor loss = allocate_loss(logits, reduction);
  const Tensor statistics = allocate(logits, std::array{shape.statistics()}, wide);

  dispatch_float_and_half("cross_entropy", logits.scalar_type(), [&](auto type) {
    using T = decltype(type);
    using E = device_t<T>;
    using A = acc_t<E>;
    const cudaStream_t stream = on_device.stream();
    Operands<T> operands(shape, logits, target, weight, statistics, reduction, ignore_index,
                         label_smoothing);
    auto& call = operands.call;
    A* const result = static_cast<A*>(loss.mutable_data_ptr());
    const bool by_position = shape.D > 1 && call.logits_at.cls != 1;
    const bool by_warp = !by_position && shape.C <= kWarpRowClasses;

    if (by_warp && !per_row && rows * shape.C <= kAloneLogits) {
      call.loss = result;
      launch_warp_rows(call, stream);
      return;
    }
    // (2, rows): losses, where they are not the result, and counts
    const Tensor scratch = allocate(logits, std::array{2 * rows}, wide);
    A* const scratch_data = static_cast<A*>(scratch.mutable_data_ptr());
    call.losses = per_row ? result : scratch_data;
    call.counts = scratch_data + rows;
    if (rows == 0) {
      // Nothing to launch for; the sum below writes 0, or 0 / 0.
    } else if (by_position) {
      launch(position_kernel<E>, dim3(blocks_for(rows, kPositionThreads)), dim3(kPositionThreads),
             0, stream, call);
    } else if (by_warp) {
      launch_warp_rows(call, stream);
    } else {
      constexpr int kCount = kVectorBytes / sizeof(E);
      const bool packed = is_packed<E>(call.logits, call.logits_at, shape.C, shape.D);
      const int64_t share = share_of(shape.C, rows, int64_t{kRowThreads} * kCount, kFullRows);
      const int64_t shares = (shape.C + share - 1) / share;
      Tensor parts;
      Sums<A>* part = nullptr;
      if (shares > 1) {
        parts = allocate(logits, std::array{4 * rows * shares}, wide);
        part = static_cast<Sums<A>*>(parts.mutable_data_ptr());
      }
      const auto kernel =
          call.needs_dot
              ? (packed ? block_row_kernel<E, kCount, true> : block_row_kernel<E, 1, true>)
              : (packed ? block_row_kernel<E, kCount, false> : block_row_kernel<E, 1, false>);
      // The grid's second dimension holds 65,535 rows.
      constexpr int64_t kGridRows = 65'535;
      for (int64_t first = 0; first < rows; first += kGridRows) {
        const auto count = static_cast<unsigned>(std::min(kGridRows, rows - first));
        const dim3 grid(static_cast<unsigned>(shares), count);
        launch(kernel, grid, dim3(kRowThreads), 0, stream, call, part, share, first);
      }
      if (part) {
        launch(finish_rows_kernel<E>, dim3(blocks_for(rows, kFinishThreads / kWarp)),
               dim3(kFinishThreads), 0, stream, call, part, shares);
      }
    }
    launch(sum_losses_kernel<A>, dim3(1), dim3(kSumThreads), 0, stream, call.losses, call.counts,
           rows, per_row ? nullptr : result, call.divisor, call.is_mean);
  });
  return {loss, statistics};
}

void cross_entropy_backward_out(const Tensor& grad_loss, const Tensor& logits, const Tensor& target,
                                const std::optional<Tensor>& weight, const Tensor& statistics,
                                int64_t reduction, int64_t ignore_index, double label_smoothing,
                                Tensor gradient) {
  const CrossEntropyShape shape =
      check_cross_entropy(logits, target, weight, reduction, label_smoothing);
  check_cross_entropy_backward(shape, grad_loss, logits, statistics, reduction, gradient);
  const OnDeviceOf on_device(logits);
  const int64_t rows = shape.rows();
  if (rows == 0) return;

  dispatch_float_and_half("cross_entropy_backward", logits.scalar_type(), [&](auto type) {
    using T = decltype(type);
    using E = device_t<T>;
    using A = acc_t<E>;
    const cudaStream_t stream = on_device.stream();
    const Tensor stats = dense(statistics), g = dense(grad_loss);
    // Where the gradient's own layout has no class strides, it is made in a dense one.
    const bool has_strides = class_strides(gradient).has_value();
    const Tensor written = has_strides ? gradient : allocate(logits, logits.sizes());
    Operands<T> operands(shape, logits, target, weight, stats, reduction, ignore_index,
                         label_smoothing);
    auto& call = operands.call;
    call.gradient = mutable_data<T>(written);
    call.gradient_at = *class_strides(written);
    call.grad_loss = static_cast<const A*>(g.const_data_ptr());
    call.per_row = static_cast<Reduction>(reduction) == Reduction::none;

    constexpr int64_t kFullBlocks = 4 * kFullRows;
    if (shape.D > 1 && call.logits_at.cls != 1) {
      const unsigned blocks = blocks_for(rows, kPositionThreads);
      const int64_t share = share_of(shape.C, blocks, 16, kFullBlocks);
      launch(position_gradient_kernel<E>, dim3(blocks, blocks_for(shape.C, share)),
             dim3(kPositionThreads), 0, stream, call, share);
    } else {
      constexpr int kCount = kVectorBytes / sizeof(E);
      const bool packed = is_packed<E>(call.logits, call.logits_at, shape.C, shape.D) &&
                          is_packed<E>(call.gradient, call.gradient_at, shape.C, shape.D);
      const int64_t steps = packed ? shape.C / kCount : shape.C;  // a thread's, per row
      int width = kWarp;
      while (width < kRowThreads && width < steps) width *= 2;
      const int height = kRowThreads / width;
      const unsigned blocks = blocks_for(rows, height);
      const int64_t unit = static_cast<int64_t>(width) * (packed ? kCount : 1);
      const int64_t share = share_of(shape.C, blocks, 4 * unit, kFullBlocks);
      const dim3 grid(blocks, blocks_for(shape.C, share)), block(width, height);
      const auto kernel =
          call.needs_dot
              ? (packed ? row_gradient_kernel<E, kCount, true> : row_gradient_kernel<E, 1, true>)
              : (packed ? row_gradient_kernel<E, kCount, false> : row_gradient_kernel<E, 1, false>);
      launch(kernel, grid, block, 0, stream, call, share);
    }
    if (!has_strides) {
      Tensor to = gradient;
      torch::stable::copy_(to, written);
    }
  });
}

Tensor cross_entropy_backward(const Tensor& grad_loss, const Tensor& logits, const Tensor& target,
                              const std::optional<Tensor>& weight, const Tensor& statistics,
                              int64_t reduction, int64_t ignore_index, double label_smoothing) {
  const Tensor gradient = allocate_like(logits);
  cross_entropy_backward_out(grad_loss, logits, target, weight, statistics, reduction, ignore_index,
                             label_smoothing, gradient);
  return gradient;
}

// Whether the gradient can be made of rows in shared memory.
template <class T>
bool has_whole_rows(const CrossEntropyShape& shape, const Tensor& logits,
                    const OnDeviceOf& device) {
  const std::optional<ClassStrides> at = class_strides(logits);
  return !shape.needs_dot && shape.D == 1 && shape.rows() > 0 && at &&
         is_packed<T>(logits.const_data_ptr(), *at, shape.C, shape.D) &&
         static_cast<size_t>(shape.C) * sizeof(T) <= shared_bytes_of(kWholeRows, device);
}

// Whether that is how cross_entropy_with_gradient makes it, and better than in a pass of its own:
// where the logits are more than a cache holds from one pass to the next. float16 is left out,
// since a factor that keeps its gradients from vanishing (torch.amp.GradScaler's) would come too
// late.
bool cross_entropy_reads_once(const Tensor& logits, const Tensor& target, double label_smoothing) {
  constexpr int64_t kLeastBytes = int64_t{128} << 20;
  const ScalarType dtype = logits.scalar_type();
  const int64_t size = dtype == ScalarType::Float ? 4 : 2;
  if ((dtype != ScalarType::Float && dtype != ScalarType::BFloat16) || logits.dim() != 2 ||
      logits.numel() * size < kLeastBytes) {
    return false;
  }
  const CrossEntropyShape shape =
      check_cross_entropy(logits, target, std::nullopt, 1, label_smoothing);
  const OnDeviceOf on_device(logits);
  return dtype == ScalarType::Float ? has_whole_rows<float>(shape, logits, on_device)
                                    : has_whole_rows<__nv_bfloat16>(shape, logits, on_device);
}

std::tuple<Tensor, Tensor> cross_entropy_with_gradient(const Tensor& logits, const Tensor& target,
                                                       const std::optional<Tensor>& weight,
                                                       int64_t reduction, int64_t ignore_index,
                                                       double label_smoothing) {
  const CrossEntropyShape shape =
      check_cross_entropy(logits, target, weight, reduction, label_smoothing);
  check(static_cast<Reduction>(reduction) != Reduction::none,
        "cross_entropy_with_gradient: reduction must be 1 (mean) or 2 (sum), but is ", reduction);
  const OnDeviceOf on_device(logits);
  const cudaStream_t stream = on_device.stream();
  const ScalarType wide = accumulate_type(logits);
  bool is_done = false;
  Tensor loss, gradient;
  dispatch_float_and_half("cross_entropy", logits.scalar_type(), [&](auto type) {
    using T = decltype(type);
    using E = device_t<T>;
    using A = acc_t<E>;
    if (!has_whole_rows<E>(shape, logits, on_device)) return;
    loss = allocate_loss(logits, reduction);
    gradient = allocate(logits, logits.sizes());
    const int64_t rows = shape.rows();
    const Tensor statistics = allocate(logits, std::array{shape.statistics()}, wide);
    const Tensor scratch = allocate(logits, std::array{2 * rows}, wide);  // losses, counts
    Operands<T> operands(shape, logits, target, weight, statistics, reduction, ignore_index,
                         label_smoothing);
    auto& call = operands.call;
    call.losses = static_cast<A*>(scratch.mutable_data_ptr());
    call.counts = call.losses + rows;
    call.gradient = mutable_data<T>(gradient);
    call.gradient_at = *class_strides(gradient);
    constexpr int kCount = kVectorBytes / sizeof(E);
    const size_t row_bytes = static_cast<size_t>(shape.C) * sizeof(E);
    const auto kernel = row_with_gradient_kernel<E, kCount>;
    allow_shared_bytes(kernel, row_bytes);
    if (call.is_mean) launch(divisor_kernel<E>, dim3(1), dim3(kSumThreads), 0, stream, call);
    launch(kernel, dim3(static_cast<unsigned>(rows)), dim3(kRowThreads), row_bytes, stream, call);
    launch(sum_losses_kernel<A>, dim3(1), dim3(kSumThreads), 0, stream, call.losses, call.counts,
           rows, static_cast<A*>(loss.mutable_data_ptr()), call.divisor, call.is_mean);
    is_done = true;
  });
  if (is_done) return {loss, gradient};
  Tensor statistics;
  std::tie(loss, statistics) =
      cross_entropy_forward(logits, target, weight, reduction, ignore_index, label_smoothing);
  Tensor one = allocate(loss, {});
  torch::stable::fill_(one, 1);
  return {loss, cross_entropy_backward(one, logits, target, weight, statistics, reduction,
                                       ignore_index, label_smoothing)};
}

void cross_entropy_scale(Tensor gradient, const Tensor& factor, const Tensor& target,
                         int64_t ignore_index) {
  check(gradient.dim() == 2 && gradient.is_contiguous() &&
            target.scalar_type() == ScalarType::Long && target.dim() == 1 &&
            target.size(0) == gradient.size(0),
        "cross_entropy_scale: gradient ", ShapeOf{gradient},
        " must be dense, of a row for each of the classes ", ShapeOf{target});
  check(factor.numel() == 1 && factor.scalar_type() == accumulate_type(gradient),
        "cross_entropy_scale: the factor must be one ", accumulate_type(gradient));
  check(factor.device() == gradient.device() && target.device() == gradient.device(),
        "cross_entropy_scale: the arguments are on different devices");
  if (gradient.numel() == 0) return;
  const OnDeviceOf on_device(gradient);
  const Tensor classes = dense(target);
  dispatch_float_and_half("cross_entropy_scale", gradient.scalar_type(), [&](auto type) {
    using T = decltype(type);
    using E = device_t<T>;
    constexpr int kCount = kVectorBytes / sizeof(E);
    const int64_t C = gradient.size(1);
    const bool packed = is_packed<E>(gradient.const_data_ptr(), *class_strides(gradient), C, 1);
    const int64_t count = gradient.numel() / (packed ? kCount : 1);
    constexpr unsigned kMostBlocks = 2048;
    launch(packed ? scale_gradient_kernel<E, kCount> : scale_gradient_kernel<E, 1>,
           dim3(std::min(blocks_for(count, kRowThreads), kMostBlocks)), dim3(kRowThreads), 0,
           on_device.stream(), mutable_data<T>(gradient),
           static_cast<const acc_t<E>*>(factor.const_data_ptr()),
           static_cast<const int64_t*>(classes.const_data_ptr()), ignore_index, C, count);
  });
}

}  // namespace

FASTNET_CUDA_LIBRARY(library) {
  library.impl("cross_entropy_forward", TORCH_BOX(&cross_entropy_forward));
  library.impl("cross_entropy_backward", TORCH_BOX(&cross_entropy_backward));
  library.impl("cross_entropy_backward.out", TORCH_BOX(&cross_entropy_backward_out));
  library.impl("cross_entropy_with_gradient", TORCH_BOX(&cross_entropy_with_gradient));
  library.impl("cross_entropy_reads_once", TORCH_BOX(&cross_entropy_reads_once));
  library.impl("cross_entropy_scale", TORCH_BOX(&cross_entropy_scale));
}

}  // namespace fastnet
