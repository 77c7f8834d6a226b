// conv_relu_pool's passes around the library's convolution. A thread has a window, of kCount
// filters where these lie side by side; windows are in the order of the output's memory. A count of
// windows that fits 32 bits is an unsigned one, which divides in a fifth of the time.
#pragma once

#include "conv_relu_pool_window.cuh"

namespace fastnet {
namespace {

template <class Index>
struct Position {
  Index n, k, y, x;
};

template <class Index>
__device__ __forceinline__ Position<Index> position_of(Index index, Index K, Index height,
                                                       Index width, bool channels_last) {
  if (channels_last) {
    const Index pixel = index / K;
    return {pixel / (height * width), index % K, pixel / width % height, pixel % width};
  }
  const Index row = index / width, image = row / height;
  return {image / K, image % K, row % height, index % width};
}

template <class T, class Index, int kCount>
__global__ void relu_pool_kernel(const T* z, Strides4 z_at, const T* bias, T* output,
                                 uint8_t* codes, Index K, Index P, Index Q, bool channels_last,
                                 Index count) {
  using A = acc_t<T>;
  const Index index = static_cast<Index>(blockIdx.x) * blockDim.x + threadIdx.x;
  if (index >= count) return;
  const Position<Index> at = position_of<Index>(index, K / kCount, P, Q, channels_last);
  const int64_t k = static_cast<int64_t>(at.k) * kCount;
  const T* const from = z + at.n * z_at.n + k * z_at.c + 2 * at.y * z_at.y + 2 * at.x * z_at.x;
  Pack<T, kCount> window[4];
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    window[i] = *reinterpret_cast<const Pack<T, kCount>*>(from + i / 2 * z_at.y + i % 2 * z_at.x);
  }
  Pack<T, kCount> most;
  Pack<uint8_t, kCount> winners;
#pragma unroll
  for (int c = 0; c < kCount; ++c) {
    const A shift = bias ? widen(bias[k + c]) : A(0);
    A y[4];
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      // Rounded before they are compared, as by torch: what is equal then is equal here.
      narrow(widen(window[i].elements[c]) + shift, &window[i].elements[c]);
      y[i] = widen(window[i].elements[c]);
    }
    write_window<T, A>(y, &most.elements[c], &winners.elements[c]);
  }
  const int64_t to = static_cast<int64_t>(index) * kCount;
  *reinterpret_cast<Pack<T, kCount>*>(output + to) = most;
  *reinterpret_cast<Pack<uint8_t, kCount>*>(codes + to) = winners;
}

// Over P x Q windows as above, but of all of grad_z, whose last row and column may be in none.
template <class T, class Index, int kCount>
__global__ void expand_kernel(const T* grad_output, Strides4 grad_output_at, const uint8_t* codes,
                              Strides4 codes_at, T* grad_z, Strides4 grad_z_at, Index K, Index P,
                              Index Q, Index height, Index width, bool channels_last, Index count) {
  const Index index = static_cast<Index>(blockIdx.x) * blockDim.x + threadIdx.x;
  if (index >= count) return;
  const Position<Index> at =
      position_of<Index>(index, K / kCount, (height + 1) / 2, (width + 1) / 2, channels_last);
  const int64_t k = static_cast<int64_t>(at.k) * kCount;
  Pack<T, kCount> grads;
  Pack<uint8_t, kCount> winners;
#pragma unroll
  for (int c = 0; c < kCount; ++c) {
    narrow(acc_t<T>(0), &grads.elements[c]);
    winners.elements[c] = kDead;
  }
  if (at.y < P && at.x < Q) {
    winners = *reinterpret_cast<const Pack<uint8_t, kCount>*>(
        codes + at.n * codes_at.n + k * codes_at.c + at.y * codes_at.y + at.x * codes_at.x);
    const T* const from = grad_output + at.n * grad_output_at.n + k * grad_output_at.c +
                          at.y * grad_output_at.y + at.x * grad_output_at.x;
#pragma unroll
    for (int c = 0; c < kCount; ++c) grads.elements[c] = from[c * grad_output_at.c];
  }
  T* const to = grad_z + at.n * grad_z_at.n + k * grad_z_at.c + 2 * at.y * grad_z_at.y +
                2 * at.x * grad_z_at.x;
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    if (2 * at.y + i / 2 >= height || 2 * at.x + i % 2 >= width) continue;
    Pack<T, kCount> expanded;
#pragma unroll
    for (int c = 0; c < kCount; ++c) {
      if (winners.elements[c] == i) {
        expanded.elements[c] = grads.elements[c];
      } else {
        narrow(acc_t<T>(0), &expanded.elements[c]);
      }
    }
    *reinterpret_cast<Pack<T, kCount>*>(to + i / 2 * grad_z_at.y + i % 2 * grad_z_at.x) = expanded;
  }
}

}  // namespace
}  // namespace fastnet
