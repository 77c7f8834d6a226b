// What becomes of the four outputs in a pooling window.
#pragma once

#include "../conv_relu_pool.h"
#include "common.cuh"

namespace fastnet {
namespace {

// The four outputs of a window, in the order 2·dy + dx, to the pooled one and its code.
template <class T, class A>
__device__ __forceinline__ void write_window(const A* y, T* output, uint8_t* code) {
  A most = y[0];
  int winner = 0;
#pragma unroll
  for (int i = 1; i < 4; ++i) {
    if (y[i] > most || y[i] != y[i]) {
      most = y[i];
      winner = i;
    }
  }
  const bool dead = most <= A(0);
  narrow(dead ? A(0) : most, output);
  *code = static_cast<uint8_t>(dead ? kDead : winner);
}

}  // namespace
}  // namespace fastnet
