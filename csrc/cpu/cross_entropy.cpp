// cross_entropy on the CPU, rows over threads: one pass over the logits forward and one backward,
// or one for both.

#include "../cross_entropy.h"

#include "common.h"
#include "ops.h"

namespace fastnet {
namespace {

// One call, as the kernels see it. Row r is (n, d) = (r / D, r % D).
template <class T>
struct CrossEntropyCall {
  int64_t C, D;
  bool by_columns;  // whether vectors lie along d
  const T* logits;
  ClassStrides logits_at;
  const int64_t* classes;  // (N, D), or null, and then:
  const T* probabilities;
  ClassStrides target_at;
  const acc_t<T>* weight;  // (C) or null
  acc_t<T> keep, spread;   // 1 - ε, ε / C
  bool needs_dot;          // probabilities or smoothing
  int64_t ignore_index;
  acc_t<T>*maximum, *log_sum, *target_sum;  // the statistics, a value per row each

  acc_t<T>* losses;  // forward, for reduction none

  T* gradient;  // backward
  ClassStrides gradient_at;
  const acc_t<T>* grad_loss;
  bool per_row;         // whether grad_loss is
  acc_t<T> grad_scale;  // the mean's
};

struct ChunkSums {
  double loss = 0, divisor = 0;

  double reduced(int64_t reduction) const {
    return static_cast<Reduction>(reduction) == Reduction::mean ? loss / divisor : loss;
  }

  // Nothing for reduction none.
  void reduce(int64_t reduction, Tensor& result) const {
    if (static_cast<Reduction>(reduction) == Reduction::none) return;
    const double value = reduced(reduction);
    if (result.scalar_type() == ScalarType::Double) {
      *static_cast<double*>(result.mutable_data_ptr()) = value;
    } else {
      *static_cast<float*>(result.mutable_data_ptr()) = static_cast<float>(value);
    }
  }
};

}  // namespace
}  // namespace fastnet

#define FASTNET_KERNELS "cross_entropy_kernels.h"
#include "foreach_isa.h"

namespace fastnet {
namespace {

// Rows cut into chunks, by the shape alone: sums come out the same on any number of threads.
struct Chunks {
  int64_t rows, D, chunk_rows, per_n, count;

  Chunks(const CrossEntropyShape& shape, bool by_columns) : rows(shape.rows()), D(shape.D) {
    chunk_rows = std::clamp<int64_t>(8192 / shape.C, 1, 64);
    if (by_columns) chunk_rows = 64;  // a multiple of what the kernels take at once
    // By columns a chunk lies within one n, and the last one there takes the rest.
    per_n = by_columns ? std::max<int64_t>(1, D / chunk_rows) : 0;
    count = by_columns ? shape.N * per_n : divide_up(rows, chunk_rows);
  }

  std::pair<int64_t, int64_t> operator[](int64_t chunk) const {
    if (per_n == 0) return {chunk * chunk_rows, std::min(rows, (chunk + 1) * chunk_rows)};
    const int64_t first = chunk / per_n * D, index = chunk % per_n;
    return {first + index * chunk_rows,
            index + 1 == per_n ? first + D : first + (index + 1) * chunk_rows};
  }
};

// An exponential takes about as long as so many multiply-adds.
constexpr int64_t kWorkPerLogit = 16;

template <class Body>
void for_chunks(const Chunks& chunks, const CrossEntropyShape& shape, const Body& body) {
  const int64_t rows_each = divide_up(shape.rows(), std::max<int64_t>(1, chunks.count));
  parallel(chunks.count, rows_each * shape.C * kWorkPerLogit, [&](int64_t begin, int64_t end) {
    for (int64_t chunk = begin; chunk < end; ++chunk) body(chunk);
  });
}

// Sums up what body(rows, sums) adds for each chunk, in the chunks' order.
template <class Body>
ChunkSums sum_of_chunks(const CrossEntropyShape& shape, bool by_columns, const Body& body) {
  const Chunks chunks(shape, by_columns);
  std::array<ChunkSums, 16> few;
  std::vector<ChunkSums> many(chunks.count > 16 ? chunks.count : 0);
  ChunkSums* const sums = many.empty() ? few.data() : many.data();
  for_chunks(chunks, shape, [&](int64_t chunk) { body(chunks[chunk], sums[chunk]); });
  ChunkSums total;
  for (int64_t chunk = 0; chunk < chunks.count; ++chunk) {
    total.loss += sums[chunk].loss;
    total.divisor += sums[chunk].divisor;
  }
  return total;
}

// Returns how many are not ignored.
int64_t check_classes(const int64_t* classes, int64_t rows, int64_t C, int64_t ignore_index) {
  const auto is_out = [=](int64_t y) {
    return (static_cast<uint64_t>(y) >= static_cast<uint64_t>(C)) & (y != ignore_index);
  };
  std::atomic<int64_t> counted = 0;
  std::atomic<bool> any_is_out = false;
  parallel(rows, 1, [&](int64_t begin, int64_t end) {
    int64_t count = 0;
    bool any = false;
    for (int64_t row = begin; row < end; ++row) {
      count += classes[row] != ignore_index;
      any |= is_out(classes[row]);
    }
    counted += count;
    if (any) any_is_out = true;
  });
  for (int64_t row = 0; any_is_out && row < rows; ++row) {
    const int64_t y = classes[row];
    if (is_out(y)) {
      throw std::out_of_range(text("cross_entropy: target ", y, " at position ", row,
                                   " is out of bounds: logits have ", C, " classes"));
    }
  }
  return counted;
}

// From so many bytes on a gradient lies in huge pages: less than elsewhere, as csrc/autograd keeps
// the memory of the last one, and with it the pages.
constexpr int64_t kHugePagesFrom = int64_t{4} << 20;

// The tensors of a call, kept alive while the kernels use them.
template <class T>
struct Operands {
  Tensor logits, target;
  std::optional<Tensor> weight;
  CrossEntropyCall<element_t<T>> call{};
  int64_t counted;  // rows that are not ignored

  Operands(const CrossEntropyShape& shape, const Tensor& given_logits, const Tensor& given_target,
           const std::optional<Tensor>& given_weight, acc_t<T>* statistics, int64_t ignore_index,
           double label_smoothing)
      : logits(with_class_strides(given_logits)),
        target(shape.has_probabilities ? with_class_strides(given_target) : dense(given_target)),
        counted(shape.rows()) {
    using A = acc_t<T>;
    call.C = shape.C;
    call.D = shape.D;
    call.logits = data<T>(logits);
    call.logits_at = *class_strides(logits);
    call.needs_dot = shape.needs_dot;
    call.keep = static_cast<A>(1 - label_smoothing);
    call.spread = static_cast<A>(label_smoothing / static_cast<double>(shape.C));
    call.ignore_index = ignore_index;
    if (shape.has_probabilities) {
      call.probabilities = data<T>(target);
      call.target_at = *class_strides(target);
    } else {
      call.classes = static_cast<const int64_t*>(target.const_data_ptr());
      counted = check_classes(call.classes, shape.rows(), shape.C, ignore_index);
    }
    if (given_weight) {
      weight = dense(*given_weight);
      call.weight = static_cast<const A*>(weight->const_data_ptr());
    }
    call.maximum = statistics;
    call.log_sum = call.maximum + shape.rows();
    call.target_sum = call.log_sum + shape.rows();
    call.by_columns = shape.D >= kWidestVector && call.logits_at.inner == 1 &&
                      (!call.probabilities || call.target_at.inner == 1);
  }

  // What the mean divides by, before any row is gone through.
  double divisor() const {
    if (!call.classes || !call.weight) return static_cast<double>(counted);
    double sum = 0;
    for (int64_t row = 0; row < target.numel(); ++row) {
      const int64_t y = call.classes[row];
      if (y != call.ignore_index) sum += call.weight[y];
    }
    return sum;
  }

  // Where its own layout has no class strides, the gradient is made in a dense one, and copied at
  // the end.
  std::optional<Tensor> dense_gradient;

  void write_to(Tensor& gradient) {
    if (!class_strides(gradient)) dense_gradient = allocate(logits, logits.sizes());
    Tensor& written = dense_gradient ? *dense_gradient : gradient;
    call.gradient = mutable_data<T>(written);
    call.gradient_at = *class_strides(written);
    // In the logits' own place only by rows: columns would be read again after they are written.
    call.by_columns =
        call.by_columns && call.gradient_at.inner == 1 && call.gradient != call.logits;
  }
  void finish(Tensor& gradient) const {
    if (dense_gradient) torch::stable::copy_(gradient, *dense_gradient);
  }
};

// Loss and gradient of a call that has all else; the mean divides by `divisor`.
template <class T>
ChunkSums sums_with_gradient(const CrossEntropyShape& shape, CrossEntropyCall<T>& call,
                             double divisor, int64_t reduction) {
  using A = acc_t<T>;
  const A one = 1;
  call.grad_loss = &one;
  call.grad_scale =
      static_cast<Reduction>(reduction) == Reduction::mean ? static_cast<A>(1 / divisor) : A(1);
  ChunkSums total = sum_of_chunks(shape, call.by_columns, [&](auto rows, ChunkSums& sums) {
    FASTNET_BEST_ISA(cross_entropy_with_gradient_kernel(call, rows.first, rows.second, sums));
  });
  total.divisor = divisor;
  return total;
}

}  // namespace

std::tuple<Tensor, Tensor> cpu::cross_entropy_forward(const Tensor& logits, const Tensor& target,
                                                      const std::optional<Tensor>& weight,
                                                      int64_t reduction, int64_t ignore_index,
                                                      double label_smoothing) {
  const CrossEntropyShape shape =
      check_cross_entropy(logits, target, weight, reduction, label_smoothing);
  Tensor loss = allocate_loss(logits, reduction);
  Tensor statistics = allocate(logits, std::array{shape.statistics()}, accumulate_type(logits));

  dispatch_float("cross_entropy", logits.scalar_type(), [&](auto type) {
    using T = decltype(type);
    using A = acc_t<T>;
    Operands<T> operands(shape, logits, target, weight,
                         static_cast<A*>(statistics.mutable_data_ptr()), ignore_index,
                         label_smoothing);
    auto& call = operands.call;
    if (static_cast<Reduction>(reduction) == Reduction::none) {
      call.losses = static_cast<A*>(loss.mutable_data_ptr());
    }
    const ChunkSums total = sum_of_chunks(shape, call.by_columns, [&](auto rows, ChunkSums& sums) {
      FASTNET_BEST_ISA(cross_entropy_forward_kernel(call, rows.first, rows.second, sums));
    });
    call.maximum[shape.statistics() - 1] = static_cast<A>(total.divisor);
    total.reduce(reduction, loss);
  });
  return {loss, statistics};
}

void cpu::cross_entropy_backward_out(const Tensor& grad_loss, const Tensor& logits,
                                     const Tensor& target, const std::optional<Tensor>& weight,
                                     const Tensor& statistics, int64_t reduction,
                                     int64_t ignore_index, double label_smoothing,
                                     Tensor gradient) {
  const CrossEntropyShape shape =
      check_cross_entropy(logits, target, weight, reduction, label_smoothing);
  check_cross_entropy_backward(shape, grad_loss, logits, statistics, reduction, gradient);
  if (gradient.numel() == 0) return;

  dispatch_float("cross_entropy_backward", logits.scalar_type(), [&](auto type) {
    using T = decltype(type);
    using A = acc_t<T>;
    Tensor stats = dense(statistics);
    const Tensor g = dense(grad_loss);
    Operands<T> operands(shape, logits, target, weight, static_cast<A*>(stats.mutable_data_ptr()),
                         ignore_index, label_smoothing);
    operands.write_to(gradient);
    auto& call = operands.call;
    call.grad_loss = static_cast<const A*>(g.const_data_ptr());
    call.per_row = static_cast<Reduction>(reduction) == Reduction::none;
    call.grad_scale = static_cast<Reduction>(reduction) == Reduction::mean
                          ? 1 / call.maximum[shape.statistics() - 1]
                          : A(1);
    const Chunks chunks(shape, call.by_columns);
    for_chunks(chunks, shape, [&](int64_t chunk) {
      const auto [begin, end] = chunks[chunk];
      FASTNET_BEST_ISA(cross_entropy_backward_kernel(call, begin, end));
    });
    operands.finish(gradient);
  });
}

Tensor cpu::cross_entropy_backward(const Tensor& grad_loss, const Tensor& logits,
                                   const Tensor& target, const std::optional<Tensor>& weight,
                                   const Tensor& statistics, int64_t reduction,
                                   int64_t ignore_index, double label_smoothing) {
  Tensor gradient = in_huge_pages(allocate_like(logits), kHugePagesFrom);
  cross_entropy_backward_out(grad_loss, logits, target, weight, statistics, reduction, ignore_index,
                             label_smoothing, gradient);
  return gradient;
}

Tensor cpu::cross_entropy_with_gradient_out(const Tensor& logits, const Tensor& target,
                                            const std::optional<Tensor>& weight, int64_t reduction,
                                            int64_t ignore_index, double label_smoothing,
                                            Tensor gradient) {
  const CrossEntropyShape shape =
      check_cross_entropy(logits, target, weight, reduction, label_smoothing);
  check(static_cast<Reduction>(reduction) != Reduction::none,
        "cross_entropy_with_gradient: reduction must be 1 (mean) or 2 (sum), but is ", reduction);
  Tensor loss = allocate_loss(logits, reduction);
  check_cross_entropy_gradient(logits, gradient);
  check(logits.numel() == 0 || gradient.const_data_ptr() != logits.const_data_ptr(),
        "cross_entropy_with_gradient: the gradient is in the logits' place");

  dispatch_float("cross_entropy_with_gradient", logits.scalar_type(), [&](auto type) {
    using T = decltype(type);
    using A = acc_t<T>;
    const std::unique_ptr<A[]> statistics(new A[shape.statistics()]);
    Operands<T> operands(shape, logits, target, weight, statistics.get(), ignore_index,
                         label_smoothing);
    operands.write_to(gradient);
    const ChunkSums total = sums_with_gradient(shape, operands.call, operands.divisor(), reduction);
    total.reduce(reduction, loss);
    operands.finish(gradient);
  });
  return loss;
}

std::tuple<Tensor, Tensor> cpu::cross_entropy_with_gradient(const Tensor& logits,
                                                            const Tensor& target,
                                                            const std::optional<Tensor>& weight,
                                                            int64_t reduction, int64_t ignore_index,
                                                            double label_smoothing) {
  Tensor gradient = in_huge_pages(allocate_like(logits), kHugePagesFrom);
  Tensor loss = cross_entropy_with_gradient_out(logits, target, weight, reduction, ignore_index,
                                                label_smoothing, gradient);
  return {loss, gradient};
}

void cpu::cross_entropy_rows(const float* logits, const int64_t* target, int64_t N, int64_t C,
                             int64_t reduction, int64_t ignore_index, float* loss,
                             float* gradient) {
  const CrossEntropyShape shape{N, C, 1, false, false};
  CrossEntropyCall<float> call{};
  call.C = C;
  call.D = 1;
  call.logits = logits;
  call.gradient = gradient;
  call.logits_at = call.gradient_at = {C, 1, 0};
  call.classes = target;
  call.keep = 1;
  call.ignore_index = ignore_index;
  constexpr int64_t kFew = 512;
  float few[kFew];
  const std::unique_ptr<float[]> many(shape.statistics() > kFew ? new float[shape.statistics()]
                                                                : nullptr);
  call.maximum = many ? many.get() : few;
  call.log_sum = call.maximum + N;
  const auto counted = static_cast<double>(check_classes(target, N, C, ignore_index));
  *loss =
      static_cast<float>(sums_with_gradient(shape, call, counted, reduction).reduced(reduction));
}

STABLE_TORCH_LIBRARY_IMPL(fastnet, CPU, library) {
  library.impl("cross_entropy_forward", TORCH_BOX(&cpu::cross_entropy_forward));
  library.impl("cross_entropy_backward", TORCH_BOX(&cpu::cross_entropy_backward));
  library.impl("cross_entropy_backward.out", TORCH_BOX(&cpu::cross_entropy_backward_out));
  library.impl("cross_entropy_with_gradient", TORCH_BOX(&cpu::cross_entropy_with_gradient));
  library.impl("cross_entropy_with_gradient.out", TORCH_BOX(&cpu::cross_entropy_with_gradient_out));
}

}  // namespace fastnet
