// linear_relu on CUDA. One own kernel for each step at the skinny shapes of small networks, where
// a library call is mostly launch and tail; elsewhere cuBLASLt, with bias and ReLU in its epilogue
// (torch's _addmm_activation). The routing has not been measured on a card yet.

#include "../linear_relu.h"
#include "common.cuh"
#include "library_calls.cuh"

namespace fastnet {
namespace {

// ---------------------------------------------------------------------------------------------
// Kernels. x (M, K), w (N, K), out and grad_z (M, N), all dense and row-major.

// NaN is not below zero, and stays.
template <class A>
__device__ __forceinline__ A relu(A z) {
  return z < A(0) ? A(0) : z;
}

// out = relu(x · wᵀ + bias). One warp makes kCols neighbouring outputs of one row: its lanes go
// along K side by side, so that loads coalesce, and x is read once for all kCols.
template <class T, int kCols>
__global__ void linear_relu_forward_kernel(const T* __restrict__ x, const T* __restrict__ w,
                                           const T* __restrict__ bias, T* __restrict__ out,
                                           int64_t M, int64_t K, int64_t N) {
  using A = acc_t<T>;
  const int lane = threadIdx.x;
  const int64_t column_tiles = (N + kCols - 1) / kCols;
  const int64_t m = blockIdx.x / column_tiles * blockDim.y + threadIdx.y;
  const int64_t n = blockIdx.x % column_tiles * kCols;
  if (m >= M) return;  // the whole warp leaves
  const int cols = static_cast<int>(N - n < kCols ? N - n : kCols);

  A sum[kCols] = {};
  for (int64_t k = lane; k < K; k += kWarp) {
    const A a = widen(x[m * K + k]);
#pragma unroll
    for (int c = 0; c < kCols; ++c) {
      // Past the last column the last one is read again, which costs no branch.
      sum[c] += a * widen(w[(n + (c < cols ? c : cols - 1)) * K + k]);
    }
  }
#pragma unroll
  for (int c = 0; c < kCols; ++c) sum[c] = warp_sum(sum[c]);
#pragma unroll
  for (int c = 0; c < kCols; ++c) {
    if (lane == c && c < cols) {
      const A z = sum[c] + (bias ? widen(bias[n + c]) : A(0));
      narrow(relu(z), out + m * N + n + c);
    }
  }
}

// out = relu(out) in place, for a product without bias, which a library computed.
template <class T>
__global__ void relu_kernel(T* __restrict__ out, int64_t count) {
  const int64_t stride = static_cast<int64_t>(gridDim.x) * blockDim.x;
  for (int64_t i = static_cast<int64_t>(blockIdx.x) * blockDim.x + threadIdx.x; i < count;
       i += stride) {
    narrow(relu(widen(out[i])), out + i);
  }
}

// grad_z = grad_out where out > 0 (or NaN), and the column sums of each chunk of rows, in one
// pass: to chunk_sums (chunks, N), or to grad_bias where there is one chunk; both null where nobody
// asks. A block is kWarp columns wide; its kMaskRows warps take every kMaskRows-th row.
inline constexpr int kMaskRows = 8;

template <class T>
__global__ void masked_grad_kernel(const T* __restrict__ grad_out, const T* __restrict__ out,
                                   T* __restrict__ grad_z, acc_t<T>* __restrict__ chunk_sums,
                                   T* __restrict__ grad_bias, int64_t M, int64_t N,
                                   int64_t chunk_rows) {
  using A = acc_t<T>;
  __shared__ A sums[kMaskRows][kWarp];
  const int64_t n = static_cast<int64_t>(blockIdx.x) * kWarp + threadIdx.x;
  const int64_t first = static_cast<int64_t>(blockIdx.y) * chunk_rows;
  const int64_t last = first + chunk_rows < M ? first + chunk_rows : M;
  A sum = 0;
  if (n < N) {
    for (int64_t m = first + threadIdx.y; m < last; m += kMaskRows) {
      const A masked = widen(out[m * N + n]) <= A(0) ? A(0) : widen(grad_out[m * N + n]);
      narrow(masked, grad_z + m * N + n);
      sum += masked;
    }
  }
  if (!chunk_sums && !grad_bias) return;  // the same for every thread, so none waits below
  sums[threadIdx.y][threadIdx.x] = sum;
  __syncthreads();  // the first warp reads what the others have written
  if (threadIdx.y == 0 && n < N) {
    for (int r = 1; r < kMaskRows; ++r) sum += sums[r][threadIdx.x];
    if (chunk_sums) {
      chunk_sums[static_cast<int64_t>(blockIdx.y) * N + n] = sum;
    } else {
      narrow(sum, grad_bias + n);
    }
  }
}

// grad_bias (N) = the sum of chunk_sums (chunks, N) over its rows, in an order that their number
// decides. A block is as above.
template <class T>
__global__ void bias_grad_kernel(const acc_t<T>* __restrict__ chunk_sums, T* __restrict__ grad_bias,
                                 int64_t chunks, int64_t N) {
  using A = acc_t<T>;
  __shared__ A sums[kMaskRows][kWarp];
  const int64_t n = static_cast<int64_t>(blockIdx.x) * kWarp + threadIdx.x;
  A sum = 0;
  if (n < N) {
    for (int64_t c = threadIdx.y; c < chunks; c += kMaskRows) sum += chunk_sums[c * N + n];
  }
  sums[threadIdx.y][threadIdx.x] = sum;
  __syncthreads();  // the first warp reads what the others have written
  if (threadIdx.y != 0 || n >= N) return;
  for (int r = 1; r < kMaskRows; ++r) sum += sums[r][threadIdx.x];
  narrow(sum, grad_bias + n);
}

// c (I, K) = Σ_j a[i, j] · b (J, K)[j, :], which serves both gradients:
//   grad_weight (N, K) = grad_zᵀ · x    i = n, j = m, a[i, j] = grad_z[j, i]
//   grad_input  (M, K) = grad_z · w     i = m, j = n, a[i, j] = grad_z[i, j]
// A thread makes kRows outputs of one column, so b is read once for all of them.
template <class T, int kRows>
__global__ void product_kernel(const T* __restrict__ a, int64_t a_row, int64_t a_step,
                               const T* __restrict__ b, T* __restrict__ c, int64_t I, int64_t J,
                               int64_t K) {
  using A = acc_t<T>;
  const int64_t row_tiles = (I + kRows - 1) / kRows;
  const int64_t k = blockIdx.x / row_tiles * blockDim.x + threadIdx.x;
  const int64_t i = blockIdx.x % row_tiles * kRows;
  if (k >= K) return;
  const int rows = static_cast<int>(I - i < kRows ? I - i : kRows);
  A sum[kRows] = {};
  for (int64_t j = 0; j < J; ++j) {
    const A column = widen(b[j * K + k]);
#pragma unroll
    for (int r = 0; r < kRows; ++r) {
      sum[r] += widen(a[(i + (r < rows ? r : rows - 1)) * a_row + j * a_step]) * column;
    }
  }
#pragma unroll
  for (int r = 0; r < kRows; ++r) {
    if (r < rows) narrow(sum[r], c + (i + r) * K + k);
  }
}

// ---------------------------------------------------------------------------------------------
// Launchers

inline constexpr int kForwardCols = 4, kForwardWarps = 4;
inline constexpr int kProductRows = 4, kProductThreads = 128;

// Terms of one result that our kernels add at most, a warp in the forward pass, one thread in the
// backward: longer sums are for the library, which splits them, however small all else is.
inline constexpr int64_t kForwardTerms = 4096, kProductTerms = 256;

// Multiply-adds up to which launch and tail outweigh the arithmetic.
bool prefers_own_kernel(const LinearReluShape& shape, int64_t terms, int64_t most_terms) {
  return terms <= most_terms &&
         shape.rows * shape.in_features * shape.out_features <= (int64_t{1} << 22);
}

template <class T>
void launch_product(const T* a, int64_t a_row, int64_t a_step, const T* b, T* c, int64_t I,
                    int64_t J, int64_t K, cudaStream_t stream) {
  launch(product_kernel<T, kProductRows>,
         dim3(blocks_for(K, kProductThreads) * blocks_for(I, kProductRows)), dim3(kProductThreads),
         0, stream, a, a_row, a_step, b, c, I, J, K);
}

// Rows up to which one chunk is quicker than several and the launch that adds them.
inline constexpr int64_t kOneChunkRows = 128;
// Blocks that fill a card: two for each multiprocessor of the largest.
inline constexpr int64_t kFullBlocks = 2 * 132;

// Rows to a chunk, so that the chunks fill the card where there are rows enough, each with at least
// one for every warp; of very many rows more, for 256 chunks or a little over. The shape alone
// decides, so the sums come out the same, bit by bit.
int64_t chunk_rows_of(int64_t M, int64_t N) {
  if (M <= kOneChunkRows) return M;
  const int64_t across = (N + kWarp - 1) / kWarp;
  const int64_t chunks = (kFullBlocks + across - 1) / across;
  const int64_t most = std::max<int64_t>(256, (M + 255) / 256);
  return std::clamp<int64_t>(M / chunks / kMaskRows * kMaskRows, kMaskRows, most);
}

// grad_z, and grad_bias where it is defined.
template <class T>
void launch_masked_grad(const Tensor& grad_output, const Tensor& output, Tensor& grad_z,
                        Tensor& grad_bias, int64_t M, int64_t N, cudaStream_t stream) {
  using E = device_t<T>;
  const int64_t chunk_rows = chunk_rows_of(M, N);
  const int64_t chunks = (M + chunk_rows - 1) / chunk_rows;
  E* const bias = grad_bias.defined() ? mutable_data<T>(grad_bias) : nullptr;
  Tensor sums;
  acc_t<E>* chunk_sums = nullptr;
  if (bias && chunks > 1) {
    const auto dtype = std::is_same_v<T, double> ? ScalarType::Double : ScalarType::Float;
    sums = allocate(grad_bias, std::array{chunks, N}, dtype);
    chunk_sums = static_cast<acc_t<E>*>(sums.mutable_data_ptr());
  }
  const unsigned across = blocks_for(N, kWarp);
  const dim3 block(kWarp, kMaskRows);
  launch(masked_grad_kernel<E>, dim3(across, static_cast<unsigned>(chunks)), block, 0, stream,
         data<T>(grad_output), data<T>(output), mutable_data<T>(grad_z), chunk_sums, bias, M, N,
         chunk_rows);
  if (chunk_sums) {
    launch(bias_grad_kernel<E>, dim3(across), block, 0, stream, chunk_sums, bias, chunks, N);
  }
}

// ---------------------------------------------------------------------------------------------
// Host functions

// The two products of the backward by torch's own operator, for shapes where a library is at its
// peak:
//   grad_weight (N, K) = grad_zᵀ · input       where input is given
//   grad_input  (M, K) = grad_z · weight       where weight is given
void library_products(const Tensor& grad_z, const std::optional<Tensor>& input,
                      const std::optional<Tensor>& weight, Tensor& grad_weight,
                      Tensor& grad_input) {
  const int64_t M = grad_z.size(0);
  if (input) {
    call_native("aten::mm", "out", torch::stable::transpose(grad_z, 0, 1),
                torch::stable::reshape(*input, {M, grad_weight.size(1)}), grad_weight);
  }
  if (weight) {
    const Tensor rows = torch::stable::view(grad_input, {M, weight->size(1)});
    call_native("aten::mm", "out", grad_z, *weight, rows);
  }
}

Tensor linear_relu_forward(const Tensor& input, const Tensor& weight,
                           const std::optional<Tensor>& bias) {
  const auto [M, K, N] = check_linear_relu(input, weight, bias);
  const OnDeviceOf on_device(input);
  const std::vector<int64_t> output_shape = with_last(input, N);
  if (M * N == 0) return allocate(input, output_shape);

  // A transposed weight would have to be copied first.
  if (!weight.is_contiguous() || !prefers_own_kernel({M, K, N}, K, kForwardTerms)) {
    const Tensor rows = torch::stable::reshape(input, {M, K});
    const Tensor weight_t = torch::stable::transpose(weight, 0, 1);
    if (bias) {
      return with_leading(addmm_relu(*bias, rows, weight_t), output_shape);
    }
    const Tensor output = allocate(input, output_shape);
    Tensor product = torch::stable::view(output, {M, N});
    call_native("aten::mm", "out", rows, weight_t, product);
    dispatch_float_and_half("linear_relu", input.scalar_type(), [&](auto type) {
      using T = decltype(type);
      const int64_t count = output.numel();
      launch(relu_kernel<device_t<T>>, dim3(std::min(blocks_for(count, 256), 4096u)), dim3(256), 0,
             on_device.stream(), mutable_data<T>(output), count);
    });
    return output;
  }

  const Tensor output = allocate(input, output_shape);
  const Tensor x = dense(input);
  const std::optional<Tensor> b = bias ? std::optional(dense(*bias)) : std::nullopt;
  dispatch_float_and_half("linear_relu", input.scalar_type(), [&, M = M, K = K, N = N](auto type) {
    using T = decltype(type);
    launch(linear_relu_forward_kernel<device_t<T>, kForwardCols>,
           dim3(blocks_for(N, kForwardCols) * blocks_for(M, kForwardWarps)),
           dim3(kWarp, kForwardWarps), 0, on_device.stream(), data<T>(x), data<T>(weight),
           b ? data<T>(*b) : nullptr, mutable_data<T>(output), M, K, N);
  });
  return output;
}

std::tuple<Tensor, Tensor, Tensor> linear_relu_backward(const Tensor& grad_output,
                                                        const Tensor& output,
                                                        const std::optional<Tensor>& input,
                                                        const std::optional<Tensor>& weight,
                                                        bool needs_bias) {
  const auto [M, K, N] = check_linear_relu_backward(grad_output, output, input, weight);
  const OnDeviceOf on_device(output);
  Tensor grad_input, grad_weight, grad_bias;
  if (weight) grad_input = allocate(output, with_last(output, K));
  if (input) grad_weight = allocate(output, {N, K});
  if (needs_bias) grad_bias = allocate(output, {N});
  if (M * N == 0) {  // sums over nothing, and no kernel runs on nothing
    for (Tensor* gradient : {&grad_input, &grad_weight, &grad_bias}) {
      if (gradient->defined()) torch::stable::zero_(*gradient);
    }
    return {grad_input, grad_weight, grad_bias};
  }

  const Tensor g = dense(grad_output), out = dense(output);
  Tensor grad_z = allocate(output, {M, N});
  dispatch_float_and_half(
      "linear_relu_backward", output.scalar_type(), [&, M = M, N = N](auto type) {
        launch_masked_grad<decltype(type)>(g, out, grad_z, grad_bias, M, N, on_device.stream());
      });
  if (K == 0) return {grad_input, grad_weight, grad_bias};

  // Each product as its own sums are: over the rows, or over the output's features.
  const bool owns_weight = input && prefers_own_kernel({M, K, N}, M, kProductTerms);
  const bool owns_input =
      weight && weight->is_contiguous() && prefers_own_kernel({M, K, N}, N, kProductTerms);
  library_products(grad_z, owns_weight ? std::nullopt : input, owns_input ? std::nullopt : weight,
                   grad_weight, grad_input);
  const std::optional<Tensor> x = owns_weight ? std::optional(dense(*input)) : std::nullopt;
  dispatch_float_and_half(
      "linear_relu_backward", output.scalar_type(), [&, M = M, K = K, N = N](auto type) {
        using T = decltype(type);
        if (owns_weight) {
          launch_product(data<T>(grad_z), 1, N, data<T>(*x), mutable_data<T>(grad_weight), N, M, K,
                         on_device.stream());
        }
        if (owns_input) {
          launch_product(data<T>(grad_z), N, 1, data<T>(*weight), mutable_data<T>(grad_input), M, N,
                         K, on_device.stream());
        }
      });
  return {grad_input, grad_weight, grad_bias};
}

}  // namespace

FASTNET_CUDA_LIBRARY(library) {
  library.impl("linear_relu_forward", TORCH_BOX(&linear_relu_forward));
  library.impl("linear_relu_backward", TORCH_BOX(&linear_relu_backward));
}

}  // namespace fastnet
