// linear_relu, and linear alone, on the CPU. Own kernels for the skinny shapes of small networks,
// where the library is far from its peak; the library's product, with one fused pass around it,
// elsewhere.

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

// A matrix (rows, columns) cut into blocks for threads to share.
struct Block {
  int64_t row, row_end, column, column_end;
};

struct Blocks {
  int64_t rows, columns, block_rows, row_blocks, column_blocks, count;

  Blocks(int64_t rows, int64_t columns, int64_t shares) : rows(rows), columns(columns) {
    constexpr int64_t kRows = 96, kTile = 24;                  // a multiple of every tile's height
    column_blocks = std::max<int64_t>(1, columns / kColumns);  // the last one takes the rest
    row_blocks = std::max<int64_t>(1, divide_up(rows, kRows));
    int64_t tile = kTile;
    if (row_blocks * column_blocks < shares) {  // or there is nothing for some thread
      row_blocks = divide_up(shares, column_blocks);
      tile = kLeastRows;
    }
    block_rows = divide_up(divide_up(rows, row_blocks), tile) * tile;
    row_blocks = rows > 0 ? divide_up(rows, block_rows) : 0;
    count = row_blocks * column_blocks;
  }

  // Calls body(block) for the shares [begin, end) of `shares`.
  template <class Body>
  void for_share(int64_t begin, int64_t end, int64_t shares, const Body& body) const {
    for (int64_t index = begin * count / shares; index < end * count / shares; ++index) {
      const int64_t row = index % row_blocks * block_rows;
      const int64_t column = index / row_blocks * kColumns;
      const bool last = index / row_blocks + 1 == column_blocks;
      body(
          Block{row, std::min(rows, row + block_rows), column, last ? columns : column + kColumns});
    }
  }

 private:
  static constexpr int64_t kColumns = 48;   // a multiple of every tile's width
  static constexpr int64_t kLeastRows = 8;  // the tallest tile's
};

// Whether torch has a better product than that of its operator.
bool is_for_onednn(ScalarType dtype) {
  return dtype == ScalarType::Float && cpu_prefers_onednn() && aoti_torch_cpu__linear_pointwise;
}

// Up to where the kernels here are faster than the library's product, which is at its peak for
// large matrices. The forward kernel also saves the passes over the output.
struct Limits {
  int64_t forward, backward;  // multiply-adds
  // Rows for which a weight that comes from memory is read in good order by the forward kernel, and
  // elements of a weight up to which the backward kernel reads it so.
  int64_t forward_rows, backward_weight;
};
// Measured on two AVX2 cores, and on two of Zen 5, where the kernels have oneDNN's rate backward,
// and large gradients lie in huge pages, which those that oneDNN makes do not.
constexpr Limits kMklLimits = {64'000'000, 16'000'000, 16, 3'500'000};
constexpr Limits kOnednnLimits = {32'000'000, 10'000'000'000, 4, 1'000'000'000};
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
  const Limits& limits = by_onednn ? kOnednnLimits : kMklLimits;
  const bool is_skinny = std::min(M, N) <= (K * N > kCachedWeight ? limits.forward_rows : kSkinny);
  return library_is_better(shape, &weight, weight.scalar_type(), M * K * N <= limits.forward,
                           is_skinny);
}

bool prefers_library_backward(const LinearReluShape& shape, const Tensor* weight,
                              ScalarType dtype) {
  const auto [M, K, N] = shape;
  const Limits& limits = is_for_onednn(dtype) ? kOnednnLimits : kMklLimits;
  const bool is_cached = K * N <= limits.backward_weight;
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
constexpr SparseCosts kSparseCosts = {1.15, 4, 16};      // AVX2, and AVX-512 in two passes
constexpr SparseCosts kWideSparseCosts = {1.75, 4, 16};  // AVX-512 at once
constexpr SparseCosts kBaselineSparseCosts = {1.15, 4, 48};

bool sparse_is_better(const LinearReluShape& shape, int64_t not_zero, bool by_library,
                      const std::optional<Tensor>& input, const std::optional<Tensor>& weight) {
  const auto [M, K, N] = shape;
  const int products = input.has_value() + weight.has_value();
  if (M * K * N * products == 0 || (weight && !weight->is_contiguous())) return false;
  const bool is_baseline = cpu_isa() == Isa::baseline;
  if (by_library && is_baseline) return false;  // the library's vectors may be wider
  const auto [each, packing, listing] = is_baseline             ? kBaselineSparseCosts
                                        : cpu_multiplies_wide() ? kWideSparseCosts
                                                                : kSparseCosts;
  const double share = static_cast<double>(not_zero) / static_cast<double>(M * N);
  const double packings = (input ? packing / N : 0.0) + (weight ? packing / M : 0.0);
  return each * share + packings / products + listing / K < 1;
}

// grad_z and grad_bias, or with `adds` more of that, in one pass over grad_out and out; either may
// be null. Returns how many elements of grad_z are not zero.
template <bool kRelu, class T, class Z>
int64_t masked_grad(const element_t<T>* grad_out, const element_t<T>* out, Z* grad_z,
                    Tensor* grad_bias, int64_t M, int64_t N, bool adds = false) {
  if (!grad_z && !grad_bias) return 0;
  using A = acc_t<T>;
  // Fixed chunks of rows, whatever the number of threads: the sums come out the same, bit by bit.
  const int64_t chunk = std::max<int64_t>(64, 32768 / std::max<int64_t>(1, N));
  constexpr int64_t kColumns = 1024;
  const int64_t chunks = divide_up(M, chunk), parts = divide_up(N, kColumns);
  std::unique_ptr<A[]> sums;
  if (grad_bias) {
    sums.reset(new A[std::max<int64_t>(1, chunks) * N]);
    std::fill_n(sums.get(), N, A(0));
  }
  std::atomic<int64_t> not_zero = 0;
  parallel(chunks * parts, 4 * chunk * std::min(N, kColumns), [&](int64_t begin, int64_t end) {
    for (int64_t part = begin; part < end; ++part) {
      const int64_t c = part / parts, n = part % parts * kColumns;
      const int64_t first = c * chunk * N + n;
      not_zero += FASTNET_BEST_ISA(masked_grad_kernel<kRelu>(
          grad_out + first, kRelu ? out + first : nullptr, grad_z ? grad_z + first : nullptr,
          sums ? sums.get() + c * N + n : nullptr, std::min(chunk, M - c * chunk),
          std::min(kColumns, N - n), N));
    }
  });
  if (!grad_bias) return not_zero;
  for (int64_t c = 1; c < chunks; ++c) {
    for (int64_t n = 0; n < N; ++n) sums[n] += sums[c * N + n];
  }
  T* bias = static_cast<T*>(grad_bias->mutable_data_ptr());
  for (int64_t n = 0; n < N; ++n) {
    bias[n] = static_cast<T>(adds ? static_cast<A>(bias[n]) + sums[n] : sums[n]);
  }
  return not_zero;
}

// out (M, N) = x (M, K) · w (N, K)ᵀ + bias, by the kernel here. Threads share out the longer side,
// so that each reads a part of the larger matrix only.
template <bool kRelu, class E>
void own_forward(const E* x, const E* w, const E* bias, E* out, int64_t M, int64_t K, int64_t N) {
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

// grad_weight (N, K) = grad_zᵀ (N, M) · x (M, K), or with `adds` more of it, and
// grad_input (M, K) = grad_z · w (N, K), by the kernel here; either may be null. Both in one
// parallel region, of which every thread gets an equal share of each.
template <class E, class A>
void own_products(const A* grad_z, const E* x, const E* w, E* grad_weight, E* grad_input, int64_t M,
                  int64_t K, int64_t N, bool adds = false) {
  const int64_t work = (grad_weight || grad_input) * M * N * K;
  const int64_t shares = work < kWorkPerThread ? 1 : torch::stable::get_num_threads();
  const Blocks weight_blocks(grad_weight ? N : 0, K, shares);
  const Blocks input_blocks(grad_input ? M : 0, K, shares);
  parallel(shares, work, [&](int64_t begin, int64_t end) {
    weight_blocks.for_share(begin, end, shares, [&](const Block& block) {
      FASTNET_BEST_ISA(product_kernel(grad_z, 1, N, x, grad_weight, M, K, block.row, block.row_end,
                                      block.column, block.column_end, adds));
    });
    input_blocks.for_share(begin, end, shares, [&](const Block& block) {
      FASTNET_BEST_ISA(product_kernel(grad_z, N, 1, w, grad_input, N, K, block.row, block.row_end,
                                      block.column, block.column_end));
    });
  });
}

// The same of a grad_z that is zero for a good part. Threads share out the columns, and each lists
// all that is not zero for itself; or, where that would take a good part of the time, the rows.
void own_sparse_products(const float* grad_z, const float* x, const float* w, float* grad_weight,
                         float* grad_input, int64_t M, int64_t K, int64_t N, bool adds) {
  const int64_t work = M * N * K * ((grad_weight != nullptr) + (grad_input != nullptr));
  const int64_t shares = work < kWorkPerThread ? 1 : torch::stable::get_num_threads();
  const auto product = [&](const float* a, int64_t a_row, int64_t a_step, const float* b, float* c,
                           int64_t I, int64_t J, int64_t begin, int64_t end, bool is_more) {
    constexpr int64_t kUnit = kWidestVector;
    const bool by_columns = K >= std::max(8 * I, shares * kUnit);
    const int64_t units = by_columns ? K / kUnit : I;
    const int64_t first = begin * units / shares, last = end * units / shares;
    if (first == last) return;
    if (by_columns) {
      FASTNET_BEST_ISA(sparse_product_kernel(a, a_row, a_step, b, c, J, K, 0, I, first * kUnit,
                                             last == units ? K : last * kUnit, is_more));
    } else {
      FASTNET_BEST_ISA(
          sparse_product_kernel(a, a_row, a_step, b, c, J, K, first, last, 0, K, is_more));
    }
  };
  parallel(shares, work, [&](int64_t begin, int64_t end) {
    if (grad_weight) product(grad_z, 1, N, x, grad_weight, N, M, begin, end, adds);
    if (grad_input) product(grad_z, N, 1, w, grad_input, M, N, begin, end, false);
  });
}

// Rows whose grad_z is in memory at once: of one that is no longer near when it is multiplied, so
// many that it is. Sums of half types must not pass through memory, and go in one.
template <class T>
int64_t rows_at_once(int64_t M, int64_t N) {
  constexpr int64_t kNear = 8 << 20, kChunk = 1 << 20, kLeast = 1024;  // bytes, bytes, rows
  const int64_t row = N * static_cast<int64_t>(sizeof(acc_t<T>));
  const bool goes_in_one = sizeof(T) < sizeof(acc_t<T>) || M * row <= kNear;
  return goes_in_one ? M : std::min(M, std::max(kLeast, kChunk / row));
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

  Tensor* const wanted_bias = needs_bias ? &grad_bias : nullptr;
  const bool by_library =
      prefers_library_backward({M, K, N}, weight ? &*weight : nullptr, output.scalar_type());
  Tensor grad_z;  // for the library
  if (by_library) grad_z = kRelu ? allocate(output, {M, N}) : torch::stable::view(g, {M, N});
  bool is_done = false;
  dispatch_float("linear_relu_backward", output.scalar_type(), [&, M = M, K = K, N = N](auto type) {
    using T = decltype(type);
    using A = acc_t<T>;
    constexpr bool kMayBeSparse = kRelu && std::is_same_v<T, float>;
    const auto masked = [&](auto* z, int64_t first, int64_t rows) {
      return masked_grad<kRelu, T>(data<T>(g) + first * N,
                                   kRelu ? data<T>(out) + first * N : nullptr, z, wanted_bias, rows,
                                   N, first > 0);
    };
    const auto is_sparse = [&](int64_t not_zero, int64_t rows) {
      return kMayBeSparse && sparse_is_better({rows, K, N}, not_zero, by_library, input, weight);
    };
    Tensor x;
    const auto multiply = [&](const A* z, int64_t first, int64_t rows, bool sparse) {
      if (!is_done) {
        if (weight) grad_input = in_huge_pages(allocate(output, with_last(output, K)));
        if (input) grad_weight = in_huge_pages(allocate(output, {N, K}));
        if (input) x = dense(*input);
        is_done = true;
      }
      const auto* const x_data = input ? data<T>(x) + first * K : nullptr;
      const auto* const w_data = weight ? data<T>(*weight) : nullptr;
      auto* const grad_w = input ? mutable_data<T>(grad_weight) : nullptr;
      auto* const grad_x = weight ? mutable_data<T>(grad_input) + first * K : nullptr;
      const bool adds = first > 0;
      if constexpr (kMayBeSparse) {
        if (sparse) {
          return own_sparse_products(z, x_data, w_data, grad_w, grad_x, rows, K, N, adds);
        }
      }
      own_products(z, x_data, w_data, grad_w, grad_x, rows, K, N, adds);
    };
    if (by_library) {
      auto* const z = kRelu ? mutable_data<T>(grad_z) : nullptr;
      const int64_t not_zero = masked(z, 0, M);
      if constexpr (kMayBeSparse) {
        if (is_sparse(not_zero, M)) multiply(z, 0, M, true);
      }
    } else if (!input && !weight) {
      masked(static_cast<A*>(nullptr), 0, M);
      is_done = true;
    } else if (kRelu || sizeof(T) != sizeof(A)) {
      const int64_t at_once = rows_at_once<T>(M, N);
      const std::unique_ptr<A[]> z(new A[std::max<int64_t>(1, at_once * N)]);
      int64_t first = 0;
      do {  // also without rows, whose sums are 0
        const int64_t rows = std::min(at_once, M - first);
        const int64_t not_zero = masked(z.get(), first, rows);
        multiply(z.get(), first, rows, is_sparse(not_zero, rows));
        first += rows;
      } while (first < M);
    } else {  // without a ReLU the gradient is taken as it is, but that half types are widened
      masked(static_cast<A*>(nullptr), 0, M);
      multiply(static_cast<const A*>(g.const_data_ptr()), 0, M, false);
    }
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
  own_products(data<float>(g), data<float>(x), data<float>(w), memory(grad_weight, N, K),
               memory(grad_input, M, K), M, K, N, /*adds=*/true);
}

bool cpu::prefers_linear(int64_t rows, int64_t in_features, int64_t out_features,
                         ScalarType dtype) {
  constexpr int64_t kSmall = 16'000'000;  // multiply-adds
  // Elements of a weight whose gradient is fresh memory at every step, which lies in huge pages.
  constexpr int64_t kFreshWeight = 8 << 20;
  const int64_t weight = in_features * out_features;
  if (dtype == ScalarType::BFloat16) {
    return rows * weight <= kSmall && std::min(rows, out_features) <= kSkinny;
  }
  return rows * weight <= kSmall ||
         (dtype == ScalarType::Float && (weight >= kFreshWeight || is_for_onednn(dtype)));
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
