// linear_relu, and linear alone, on the CPU. Own kernels up to where the library's product is the
// faster one, which is then taken, with one fused pass around it.

#include "../linear_relu.h"

#include "common.h"
#include "ops.h"

#define FASTNET_KERNELS "linear_relu_kernels.h"
#include "foreach_isa.h"

// oneDNN's product, x · wᵀ + bias, of torch's C interface. A torch that was built without oneDNN
// has none, and the name is null.
extern "C" __attribute__((weak)) AOTITorchError aoti_torch_cpu__linear_pointwise(
    AtenTensorHandle x, AtenTensorHandle weight, AtenTensorHandle* bias, const char* activation,
    const double** scalars, int64_t scalar_count, const char** algorithm, AtenTensorHandle* result);

namespace fastnet {
namespace {

// A thread's part of a matrix.
struct Share {
  int64_t row, row_end, column, column_end;
  bool is_empty() const { return row >= row_end || column >= column_end; }
};

// Where a part of some columns begins: in whole vectors, but that the last part takes the rest. Of
// less than a vector there is none, except of all.
int64_t column_of_part(int64_t part, int64_t parts, int64_t columns) {
  return part == parts ? columns : columns / kWidestVector * part / parts * kWidestVector;
}

// A product's result (rows, columns) cut into shares for threads, as large as each other as can be,
// so that little is read twice. A share's columns of the one factor are brought side by side.
class Shares {
 public:
  Shares(int64_t rows, int64_t columns, int64_t shares) : rows_(rows), columns_(columns) {
    double least = 0;
    for (int64_t high = 1; high <= shares; ++high) {
      if (shares % high != 0) continue;
      const int64_t wide = shares / high;
      const double height = static_cast<double>(divide_up(divide_up(rows, kTile), high) * kTile);
      const double width =
          static_cast<double>(divide_up(divide_up(columns, kWidestVector), wide) * kWidestVector);
      // What that takes, in multiplications; and for a row's factors.
      constexpr double kPerColumn = 12, kPerRow = 6;
      const double cost = height * width + kPerColumn * width + kPerRow * height;
      if (high > 1 && cost >= least) continue;
      least = cost;
      high_ = high;
      wide_ = wide;
    }
  }

  Share operator[](int64_t share) const {
    const int64_t row = share % high_, column = share / high_;
    const int64_t tiles = divide_up(rows_, kTile);
    return {std::min(rows_, tiles * row / high_ * kTile),
            std::min(rows_, tiles * (row + 1) / high_ * kTile),
            column_of_part(column, wide_, columns_), column_of_part(column + 1, wide_, columns_)};
  }

 private:
  // Rows that stay together: two of the tallest tiles', and a vector of what is masked for them.
  static constexpr int64_t kTile = 16;
  int64_t rows_, columns_, high_ = 1, wide_ = 1;
};

// Whether torch has a better product than that of its operator.
bool is_for_onednn(ScalarType dtype) {
  return dtype == ScalarType::Float && cpu_prefers_onednn() && aoti_torch_cpu__linear_pointwise;
}

// Up to where the kernels here are faster than the library's product, which is at its peak for
// large matrices. The forward kernel also saves the passes over the output.
struct Limits {
  int64_t forward, backward;  // multiply-adds
  // The same where the forward kernel takes panels, of so many inputs; and elements of the input up
  // to which it is at hand all the while, and there is no limit.
  int64_t forward_by_panels, panel_inputs, forward_input;
  // Rows for which a weight that comes from memory is read in good order by the forward kernel.
  int64_t forward_rows;
  // Elements of a weight up to which the backward kernels read and write it so, and of few rows.
  int64_t backward_weight, few_rows_weight;
};
// Measured on two cores of an Intel Xeon, and on two of Zen 5, where the kernels have oneDNN's rate
// backward, and large gradients lie in huge pages, which those that oneDNN makes do not.
constexpr Limits kMklLimits = {.forward = 64'000'000,
                               .backward = 64'000'000,
                               .forward_by_panels = 300'000'000,
                               .panel_inputs = 1024,
                               .forward_input = 300'000,
                               .forward_rows = 16,
                               .backward_weight = 2'000'000,
                               .few_rows_weight = 400'000};
constexpr Limits kOnednnLimits = {.forward = 32'000'000,
                                  .backward = 10'000'000'000,
                                  .forward_by_panels = 32'000'000,
                                  .panel_inputs = 1024,
                                  .forward_input = 0,
                                  .forward_rows = 4,
                                  .backward_weight = 1'000'000'000,
                                  .few_rows_weight = 1'000'000'000};
const Limits& limits_of(ScalarType dtype) {
  return is_for_onednn(dtype) ? kOnednnLimits : kMklLimits;
}
constexpr int64_t kCachedWeight = 3'500'000;  // elements; larger ones come from memory
constexpr int64_t kSkinny = 32;               // rows, or outputs

// Where the processor multiplies bfloat16 itself, oneDNN uses that, and these kernels do not: up to
// so many multiply-adds they have less to begin with. Measured on Zen 5, which has no unit for
// matrices of it.
constexpr int64_t kSmallForOnednn = 1 << 21;

bool library_is_better(const LinearReluShape& shape, const Tensor* weight, ScalarType dtype,
                       bool is_small, bool is_skinny) {
  // A transposed weight would have to be copied first; the library takes it as it is.
  if (weight && !weight->is_contiguous()) return true;
  if (dtype == ScalarType::BFloat16) {
    const auto [M, K, N] = shape;
    const bool is_tiny = M * K * N <= kSmallForOnednn && !cpu_has_bfloat16_tiles();
    return cpu_has_bfloat16() && !is_tiny && !(is_small && is_skinny);
  }
  return !is_small && !is_skinny;
}

bool prefers_library_forward(const LinearReluShape& shape, const Tensor& weight) {
  const auto [M, K, N] = shape;
  const bool by_onednn = is_for_onednn(weight.scalar_type());
  // The result that it makes lies in no huge pages. Up to so many inputs those are worth more.
  constexpr int64_t kFewInputs = 512;
  const bool is_fresh = M * N * static_cast<int64_t>(sizeof(float)) >= kFreshBytes;
  if (by_onednn && is_fresh && K <= kFewInputs && weight.is_contiguous()) return false;
  const Limits& limits = limits_of(weight.scalar_type());
  const bool is_skinny = std::min(M, N) <= (K * N > kCachedWeight ? limits.forward_rows : kSkinny);
  const bool by_panels =
      weight.scalar_type() == ScalarType::Float && FASTNET_BEST_ISA(takes_panels(M, K, N));
  const bool is_at_hand = by_panels && M * K <= limits.forward_input;
  const int64_t most =
      by_panels && K <= limits.panel_inputs ? limits.forward_by_panels : limits.forward;
  const bool is_small = is_at_hand || M * K * N <= most;
  return library_is_better(shape, &weight, weight.scalar_type(), is_small, is_skinny);
}

bool prefers_library_backward(const LinearReluShape& shape, const Tensor* weight,
                              ScalarType dtype) {
  const auto [M, K, N] = shape;
  const Limits& limits = limits_of(dtype);
  constexpr int64_t kFewRows = 16;
  const bool is_cached = K * N <= (M <= kFewRows ? limits.few_rows_weight : limits.backward_weight);
  return library_is_better(shape, weight, dtype, is_cached && M * K * N <= limits.backward,
                           is_cached && std::min(M, N) <= kSkinny);
}

// What the products of a grad_z take that are made of its elements that are not zero, where a
// product of all of them takes 1: measured, per element of grad_z.
struct SparseCosts {
  double each;     // of an element that is not zero: it is loaded for one row, not for several
  double packing;  // over the rows that what is packed is multiplied by
  double listing;  // over the columns that an element is multiplied by
};
constexpr SparseCosts kSparseCosts = {1.15, 4, 32};     // AVX2, and AVX-512 in two passes
constexpr SparseCosts kWideSparseCosts = {1.5, 4, 64};  // AVX-512 at once
constexpr SparseCosts kBaselineSparseCosts = {1.15, 4, 48};

bool sparse_is_better(const LinearReluShape& shape, int64_t not_zero, bool by_library,
                      const std::optional<Tensor>& input, const std::optional<Tensor>& weight) {
  const auto [M, K, N] = shape;
  const int products = input.has_value() + weight.has_value();
  constexpr int64_t kFewest = 32;  // rows, and outputs: of few the products are bound by memory
  if (std::min(M, N) < kFewest || K * products == 0) return false;
  if (input && K * N > limits_of(ScalarType::Float).backward_weight) return false;
  if (weight && !weight->is_contiguous()) return false;
  const bool is_baseline = cpu_isa() == Isa::baseline;
  if (by_library && is_baseline) return false;  // the library's vectors may be wider
  const auto [each, packing, listing] = is_baseline             ? kBaselineSparseCosts
                                        : cpu_multiplies_wide() ? kWideSparseCosts
                                                                : kSparseCosts;
  const double share = static_cast<double>(not_zero) / static_cast<double>(M * N);
  const double packings = (input ? packing / N : 0.0) + (weight ? packing / M : 0.0);
  return each * share + packings / products + listing / K < 1;
}

// grad_z and grad_bias in one pass over grad_out and out; either may be null.
template <bool kRelu, class T>
void masked_grad(const element_t<T>* grad_out, const element_t<T>* out, element_t<T>* grad_z,
                 Tensor* grad_bias, int64_t M, int64_t N) {
  if (!grad_z && !grad_bias) return;
  using A = acc_t<T>;
  // Fixed chunks of rows, whatever the number of threads: the sums come out the same, bit by bit.
  const int64_t chunk = std::max<int64_t>(64, 32768 / std::max<int64_t>(1, N));
  constexpr int64_t kColumns = 256;
  const int64_t chunks = divide_up(M, chunk), parts = divide_up(N, kColumns);
  std::unique_ptr<A[]> sums;
  if (grad_bias) {
    sums.reset(new A[std::max<int64_t>(1, chunks) * N]);
    std::fill_n(sums.get(), N, A(0));
  }
  parallel(chunks * parts, 4 * chunk * std::min(N, kColumns), [&](int64_t begin, int64_t end) {
    for (int64_t part = begin; part < end; ++part) {
      const int64_t c = part / parts, n = part % parts * kColumns;
      const int64_t first = c * chunk * N + n;
      FASTNET_BEST_ISA(masked_grad_kernel<kRelu>(
          grad_out + first, kRelu ? out + first : nullptr, grad_z ? grad_z + first : nullptr,
          sums ? sums.get() + c * N + n : nullptr, std::min(chunk, M - c * chunk),
          std::min(kColumns, N - n), N, N));
    }
  });
  if (!grad_bias) return;
  for (int64_t c = 1; c < chunks; ++c) {
    for (int64_t n = 0; n < N; ++n) sums[n] += sums[c * N + n];
  }
  T* bias = static_cast<T*>(grad_bias->mutable_data_ptr());
  for (int64_t n = 0; n < N; ++n) bias[n] = static_cast<T>(sums[n]);
}

// out (M, N) = x (M, K) · w (N, K)ᵀ + bias, by the kernels here, of which the shape alone decides,
// that sums do not depend on the threads. Of dot products threads share out the longer side, so
// that each reads a part of the larger matrix only.
template <bool kRelu, class E>
void own_forward(const E* x, const E* w, const E* bias, E* out, int64_t M, int64_t K, int64_t N) {
  if constexpr (std::is_same_v<E, float>) {
    if (FASTNET_BEST_ISA(takes_panels(M, K, N))) {
      const int64_t work = M * K * N;
      const int64_t count = work < kWorkPerThread ? 1 : torch::stable::get_num_threads();
      const Shares shares(M, N, count);
      parallel(count, work, [&](int64_t begin, int64_t end) {
        for (int64_t index = begin; index < end; ++index) {
          const Share share = shares[index];
          if (share.is_empty()) continue;
          FASTNET_BEST_ISA(forward_by_panels_kernel<kRelu>(
              x, w, bias, out, K, N, share.row, share.row_end, share.column, share.column_end));
        }
      });
      return;
    }
  }
  constexpr int64_t kUnit = 4;  // small, for equal shares; a tile's width
  if (N > M) {
    parallel(divide_up(N, kUnit), kUnit * M * K, [&](int64_t begin, int64_t end) {
      FASTNET_BEST_ISA(forward_kernel<E, kRelu>(x, w, bias, out, K, N, 0, M, begin * kUnit,
                                                std::min(N, end * kUnit)));
    });
  } else {
    parallel(divide_up(M, kUnit), kUnit * N * K, [&](int64_t begin, int64_t end) {
      FASTNET_BEST_ISA(forward_kernel<E, kRelu>(x, w, bias, out, K, N, begin * kUnit,
                                                std::min(M, end * kUnit), 0, N));
    });
  }
}

// The shares of a product that passes zeros over: columns, of which each thread lists all that is
// not zero for itself; or rows, where that would take a good part of the time.
Share sparse_share(int64_t rows, int64_t columns, int64_t index, int64_t shares) {
  if (columns < std::max(8 * rows, shares * kWidestVector)) {
    return {index * rows / shares, (index + 1) * rows / shares, 0, columns};
  }
  return {0, rows, column_of_part(index, shares, columns),
          column_of_part(index + 1, shares, columns)};
}

// A backward pass by the kernels here. What is null is not wanted, or not there.
template <class T>
struct OwnBackward {
  int64_t M, K, N;
  const element_t<T>*grad_out, *out, *x, *w;
  element_t<T>*grad_weight, *grad_input;
  acc_t<T>* bias_sums;
  bool adds;       // to what grad_weight has
  bool is_sparse;  // grad_z is zero for a good part: float32 with a ReLU
};

// Every thread makes what it needs of grad_z for itself, some rows at a time, which stay near: to
// fetch it from another takes longer than to mask it again.
template <bool kRelu, class T>
void own_backward(const OwnBackward<T>& call) {
  using E = element_t<T>;
  using A = acc_t<T>;
  constexpr bool kHasZ = kRelu || !std::is_same_v<E, A>;  // or it is grad_out
  const int64_t M = call.M, K = call.K, N = call.N;
  const int64_t work = M * N * K * ((call.grad_weight != nullptr) + (call.grad_input != nullptr));
  const int64_t count = work < kWorkPerThread ? 1 : torch::stable::get_num_threads();
  const Shares of_weight(call.grad_weight ? N : 0, K, count);
  const Shares of_input(call.grad_input ? M : 0, K, count);
  // By the shape alone, so that sums do not depend on the threads. Those of half types must not
  // pass through memory, and go in one, of some outputs at a time.
  constexpr bool kIsHalf = sizeof(E) < sizeof(A);
  constexpr int64_t kNear = 1 << 17, kRows = 128, kLow = 32;  // elements, rows, rows of a result
  const int64_t near = std::max(kRows, kNear / std::max<int64_t>(1, N) / kRows * kRows);
  const int64_t chunk = kIsHalf ? std::max<int64_t>(1, M) : std::min(M, near);
  const int64_t outputs = kIsHalf ? std::max(kWidestVector, most_scratch<A>() / chunk) : N;

  struct Rows {
    const A* first;
    int64_t next;
  };
  // Rows [first, first + rows) of grad_z, columns [n, n + columns), and their sums if those are
  // wanted.
  const auto masked = [&](A* z, int64_t first, int64_t rows, int64_t n, int64_t columns, A* sums) {
    const E* const g = call.grad_out + first * N + n;
    const E* const out = kRelu ? call.out + first * N + n : nullptr;
    if (kHasZ || sums) {
      FASTNET_BEST_ISA(
          masked_grad_kernel<kRelu>(g, out, kHasZ ? z : nullptr, sums, rows, columns, N, columns));
    }
    if constexpr (kHasZ)
      return Rows{z, columns};
    else
      return Rows{g, N};
  };
  const auto product = [&](const A* a, int64_t a_row, int64_t a_step, const E* b, E* c, int64_t J,
                           int64_t rows, const Share& share, bool adds, bool is_low) {
    if constexpr (kRelu && std::is_same_v<T, float>) {
      if (call.is_sparse) {
        FASTNET_BEST_ISA(sparse_product_kernel(a, a_row, a_step, b, c, J, K, 0, rows, share.column,
                                               share.column_end, adds));
        return;
      }
    }
    FASTNET_BEST_ISA(product_kernel(a, a_row, a_step, b, c, J, K, 0, rows, share.column,
                                    share.column_end, adds, is_low));
  };
  const auto weight_part = [&](const Share& share, A* z, A* sums) {
    if (!call.bias_sums || share.column > 0) sums = nullptr;
    for (int64_t n = share.row; n < share.row_end; n += outputs) {
      const int64_t width = std::min(outputs, share.row_end - n);
      E* const c = call.grad_weight + n * K;
      int64_t first = 0;
      do {  // also without rows, whose sums are 0
        const int64_t rows = std::min(chunk, M - first);
        const Rows made = masked(z, first, rows, n, width, sums);
        for (int64_t i = 0; sums && i < width; ++i) call.bias_sums[n + i] += sums[i];
        if (kHasZ) {
          product(made.first, 1, made.next, call.x + first * K, c, rows, width, share,
                  call.adds || first > 0, N < kLow);
        }
        first += rows;
      } while (first < M);
      if (kHasZ) continue;
      const Rows all = masked(z, 0, M, n, width, nullptr);
      product(all.first, 1, all.next, call.x, c, M, width, share, call.adds, N < kLow);
    }
  };
  const auto input_part = [&](const Share& share, A* z, bool is_made) {
    const int64_t at_once = is_made || !kHasZ ? share.row_end - share.row : near;
    for (int64_t first = share.row; first < share.row_end; first += at_once) {
      const int64_t rows = std::min(at_once, share.row_end - first);
      const Rows made = is_made ? Rows{z + first * N, N} : masked(z, first, rows, 0, N, nullptr);
      product(made.first, made.next, 1, call.w, call.grad_input + first * K, N, rows, share, false,
              M < kLow);
    }
  };
  parallel(count, work, [&](int64_t begin, int64_t end) {
    for (int64_t index = begin; index < end; ++index) {
      const Share of_w =
          call.is_sparse && call.grad_weight ? sparse_share(N, K, index, count) : of_weight[index];
      const Share of_x =
          call.is_sparse && call.grad_input ? sparse_share(M, K, index, count) : of_input[index];
      const bool has_w = !of_w.is_empty(), has_x = !of_x.is_empty();
      const int64_t width = has_w ? std::min(outputs, of_w.row_end - of_w.row) : 0;
      const bool is_made = kHasZ && width == N && chunk >= M;
      const int64_t at_once = has_x && !is_made ? std::min(near, of_x.row_end - of_x.row) : 0;
      const int64_t made = kHasZ ? std::max(chunk * width, at_once * N) : 0;
      std::unique_ptr<A[]> large;
      if (made + width > most_scratch<A>()) large.reset(new A[made + width]);
      A* const z = large ? large.get() : thread_scratch<A>(made + width);
      if (has_w) weight_part(of_w, z, z + made);
      if (has_x) input_part(of_x, z, is_made);
    }
  });
}

// How many elements of grad_z are not zero, by some of its rows.
int64_t estimated_not_zero(const OwnBackward<float>& call) {
  constexpr int64_t kElements = 4096, kFewest = 8;
  const int64_t rows = std::clamp<int64_t>(kElements / call.N, std::min(kFewest, call.M), call.M);
  const int64_t not_zero = FASTNET_BEST_ISA(
      not_zero_kernel(call.grad_out, call.out, rows, call.N, call.M / rows * call.N));
  return not_zero * call.M / rows;
}

// a (I, J) · b (J, K) by the library that is the fastest here.
Tensor library_product(const Tensor& a, const Tensor& b) {
  if (is_for_onednn(a.scalar_type()) && a.numel() > 0 && b.numel() > 0) {
    NoGrad no_grad;
    const Tensor transposed = torch::stable::transpose(b, 0, 1);
    AtenTensorHandle product = nullptr;
    check_torch(aoti_torch_cpu__linear_pointwise(a.get(), transposed.get(), nullptr, "none",
                                                 nullptr, 0, nullptr, &product),
                "linear_relu: oneDNN's product of ", ShapeOf{a}, " and ", ShapeOf{b}, " failed");
    return Tensor(product);
  }
  Tensor product = in_huge_pages(allocate(a, {a.size(0), b.size(1)}));
  call_native("aten::mm", "out", a, b, product);
  return product;
}

// ---------------------------------------------------------------------------------------------

template <bool kRelu>
Tensor forward(const Tensor& input, const Tensor& weight, const std::optional<Tensor>& bias) {
  const auto [M, K, N] = check_linear_relu(input, weight, bias);
  if (M * N == 0) return allocate(input, with_last(input, N));
  const Tensor x = dense(input);
  const std::optional<Tensor> b = bias ? std::optional(dense(*bias)) : std::nullopt;

  if (prefers_library_forward({M, K, N}, weight)) {
    const Tensor rows = torch::stable::view(x, {M, K});
    // Sums of a half type are rounded once, with the bias among them, as torch rounds them.
    const bool has_added = b && input.scalar_type() == ScalarType::BFloat16;
    Tensor output;
    if (has_added) {
      output = in_huge_pages(allocate(input, {M, N}));
      call_native("aten::linear", "out", rows, weight, b, output);
    } else {
      output = library_product(rows, torch::stable::transpose(weight, 0, 1));
    }
    output = with_leading(output, with_last(input, N));
    if (!kRelu && (!b || has_added)) return output;
    dispatch_float("linear_relu", input.scalar_type(), [&, N = N](auto type) {
      using T = decltype(type);
      const auto* bias_data = b && !has_added ? data<T>(*b) : nullptr;
      auto* out = mutable_data<T>(output);
      parallel(M, N, [&](int64_t begin, int64_t end) {
        FASTNET_BEST_ISA(
            bias_relu_kernel<element_t<T>, kRelu>(out + begin * N, bias_data, end - begin, N));
      });
    });
    return output;
  }

  Tensor output = in_huge_pages(allocate(input, with_last(input, N)));
  dispatch_float("linear_relu", input.scalar_type(), [&, M = M, K = K, N = N](auto type) {
    using T = decltype(type);
    const auto* bias_data = b ? data<T>(*b) : nullptr;
    own_forward<kRelu>(data<T>(x), data<T>(weight), bias_data, mutable_data<T>(output), M, K, N);
  });
  return output;
}

// Without kRelu the output is not read, and may be anything of its shape.
template <bool kRelu>
std::tuple<Tensor, Tensor, Tensor> backward(const Tensor& grad_output, const Tensor& output,
                                            const std::optional<Tensor>& input,
                                            const std::optional<Tensor>& weight, bool needs_bias) {
  const auto [M, K, N] = check_linear_relu_backward(grad_output, output, input, weight);
  Tensor grad_input, grad_weight, grad_bias;
  if (needs_bias) grad_bias = allocate(output, {N});
  const Tensor g = dense(grad_output), out = kRelu ? dense(output) : output;

  const bool by_library =
      prefers_library_backward({M, K, N}, weight ? &*weight : nullptr, output.scalar_type());
  Tensor grad_z;  // for the library
  bool is_done = false;
  dispatch_float("linear_relu_backward", output.scalar_type(), [&, M = M, K = K, N = N](auto type) {
    using T = decltype(type);
    OwnBackward<T> call{M, K, N, data<T>(g), kRelu ? data<T>(out) : nullptr};
    if constexpr (kRelu && std::is_same_v<T, float>) {
      call.is_sparse =
          sparse_is_better({M, K, N}, 0, by_library, input, weight) &&
          sparse_is_better({M, K, N}, estimated_not_zero(call), by_library, input, weight);
    }
    if (by_library && !call.is_sparse) {
      if (kRelu) grad_z = allocate(output, {M, N});
      masked_grad<kRelu, T>(call.grad_out, call.out, kRelu ? mutable_data<T>(grad_z) : nullptr,
                            needs_bias ? &grad_bias : nullptr, M, N);
      if (!kRelu) grad_z = torch::stable::view(g, {M, N});
      return;
    }
    is_done = true;
    const Tensor x = input ? dense(*input) : Tensor();
    if (input) {
      grad_weight = in_huge_pages(allocate(output, {N, K}));
      call.x = data<T>(x);
      call.grad_weight = mutable_data<T>(grad_weight);
    }
    const bool sums_along = input && K > 0;  // with the weight's gradient
    if (needs_bias && !sums_along) {
      masked_grad<kRelu, T>(call.grad_out, call.out, nullptr, &grad_bias, M, N);
    }
    if (weight) {
      grad_input = in_huge_pages(allocate(output, with_last(output, K)));
      call.w = data<T>(*weight);
      call.grad_input = mutable_data<T>(grad_input);
    }
    std::unique_ptr<acc_t<T>[]> sums;
    if (needs_bias && sums_along) sums.reset(new acc_t<T>[N]());
    call.bias_sums = sums.get();
    own_backward<kRelu>(call);
    T* const bias = sums ? static_cast<T*>(grad_bias.mutable_data_ptr()) : nullptr;
    for (int64_t n = 0; bias && n < N; ++n) bias[n] = static_cast<T>(sums[n]);
  });
  if (is_done) return {grad_input, grad_weight, grad_bias};

  if (input) {
    grad_weight = library_product(torch::stable::transpose(grad_z, 0, 1),
                                  torch::stable::reshape(*input, {M, K}));
  }
  if (weight) {
    grad_input = with_leading(library_product(grad_z, *weight), with_last(output, K));
  }
  return {grad_input, grad_weight, grad_bias};
}

}  // namespace

Tensor cpu::linear_relu_forward(const Tensor& input, const Tensor& weight,
                                const std::optional<Tensor>& bias) {
  return forward<true>(input, weight, bias);
}

std::tuple<Tensor, Tensor, Tensor> cpu::linear_relu_backward(const Tensor& grad_output,
                                                             const Tensor& output,
                                                             const std::optional<Tensor>& input,
                                                             const std::optional<Tensor>& weight,
                                                             bool needs_bias) {
  return backward<true>(grad_output, output, input, weight, needs_bias);
}

Tensor cpu::linear_forward(const Tensor& input, const Tensor& weight,
                           const std::optional<Tensor>& bias) {
  return forward<false>(input, weight, bias);
}

std::tuple<Tensor, Tensor, Tensor> cpu::linear_backward(const Tensor& grad_output,
                                                        const std::optional<Tensor>& input,
                                                        const std::optional<Tensor>& weight,
                                                        bool needs_bias) {
  return backward<false>(grad_output, grad_output, input, weight, needs_bias);
}

static void linear_forward_out(const Tensor& input, const Tensor& weight,
                               const std::optional<Tensor>& bias, Tensor out) {
  const auto [M, K, N] = check_linear_relu(input, weight, bias);
  check(input.scalar_type() == ScalarType::Float, "linear_forward.out: only for float32, not ",
        input.scalar_type());
  check(out.dim() == 2 && out.size(0) == M && out.size(1) == N && out.is_contiguous() &&
            out.scalar_type() == ScalarType::Float,
        "linear_forward.out: out must be a dense float32 ", M, "x", N, ", but is ", ShapeOf{out});
  const Tensor x = dense(input), w = dense(weight), b = bias ? dense(*bias) : Tensor();
  own_forward<false>(data<float>(x), data<float>(w), bias ? data<float>(b) : nullptr,
                     mutable_data<float>(out), M, K, N);
}

static void linear_backward_out(const Tensor& grad_output, const Tensor& input,
                                const Tensor& weight, std::optional<Tensor> grad_input,
                                std::optional<Tensor> grad_weight) {
  const auto [M, K, N] = check_linear_relu_backward(grad_output, grad_output, input, weight);
  check(grad_output.scalar_type() == ScalarType::Float,
        "linear_backward.out: only for float32, not ", grad_output.scalar_type());
  const auto memory = [](std::optional<Tensor>& gradient, int64_t rows, int64_t columns) {
    if (!gradient) return static_cast<float*>(nullptr);
    check(gradient->dim() == 2 && gradient->size(0) == rows && gradient->size(1) == columns &&
              gradient->is_contiguous() && gradient->scalar_type() == ScalarType::Float,
          "linear_backward.out: a gradient must be a dense float32 ", rows, "x", columns,
          ", but is ", ShapeOf{*gradient});
    return mutable_data<float>(*gradient);
  };
  const Tensor g = dense(grad_output), x = dense(input), w = dense(weight);
  OwnBackward<float> call{M, K, N, data<float>(g), nullptr, data<float>(x), data<float>(w)};
  call.grad_weight = memory(grad_weight, N, K);
  call.grad_input = memory(grad_input, M, K);
  call.adds = true;
  own_backward<false>(call);
}

bool cpu::prefers_linear(int64_t rows, int64_t in_features, int64_t out_features,
                         ScalarType dtype) {
  constexpr int64_t kSmall = 16'000'000;  // multiply-adds, of other types than float32
  // Elements of a weight whose gradient is fresh memory at every step, which lies in huge pages.
  constexpr int64_t kFreshWeight = 8 << 20;
  const int64_t weight = in_features * out_features;
  if (dtype == ScalarType::BFloat16) {
    return rows * weight <= kSmall && std::min(rows, out_features) <= kSkinny;
  }
  if (dtype != ScalarType::Float) return rows * weight <= kSmall;
  return is_for_onednn(dtype) || weight >= kFreshWeight || rows * weight <= kMklLimits.backward;
}

STABLE_TORCH_LIBRARY_IMPL(fastnet, CPU, library) {
  library.impl("linear_relu_forward", TORCH_BOX(&cpu::linear_relu_forward));
  library.impl("linear_relu_backward", TORCH_BOX(&cpu::linear_relu_backward));
  library.impl("linear_forward", TORCH_BOX(&cpu::linear_forward));
  library.impl("linear_backward", TORCH_BOX(&cpu::linear_backward));
  library.impl("linear_forward.out", TORCH_BOX(&linear_forward_out));
  library.impl("linear_backward.out", TORCH_BOX(&linear_backward_out));
}

}  // namespace fastnet
