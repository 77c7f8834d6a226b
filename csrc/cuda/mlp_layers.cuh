// A network that a cluster of blocks trains: how it lies in memory, the optimizers and the
// products.
#pragma once

#include "../mlp.h"
#include "cluster.cuh"

namespace fastnet {
namespace {

inline constexpr int kMlpThreads = 256;  // also the largest batch: a thread looks up each row
inline constexpr int kMlpWarps = kMlpThreads / kWarp;
inline constexpr int kMaxLayers = 8;

struct alignas(16) Quad {
  float of[4];
};

enum class Split { inputs, units, none };

struct ClusterLayer {
  float *weight[3], *bias[3];  // in global memory, with the optimizer's states; null where none is
  int in, units;
  bool relu;
  Split split;
  // In shared memory: columns and rows of a block's part, those of the widest block, and where what
  // lies, in floats.
  int in_width, in_stride, units_width, units_stride;
  int weight_at, weight_size;  // its states follow, where `keeps_states`
  int bias_at;                 // its states follow
  int input_at;                // (rows, in_stride)
  int grad_at;  // (rows, units_stride): the gradient before ReLU; of the last layer, first logits
  int part_at;  // what is to be added to the other blocks' parts: units, or the input's gradient
  bool keeps_states;
};

struct ClusterCall {
  ClusterLayer layers[kMaxLayers];
  int layer_count, blocks;
  const void* images;
  bool in_quads;  // whether every four pixels lie aligned
  const int64_t *targets, *order;
  int64_t image_count, count;
  int batch_size;
  const float *scale, *shift;
  double lr, beta1, beta2;
  OptimizerStep step;            // without what changes from step to step
  float* steps[2 * kMaxLayers];  // the optimizer's counters on the device
  int step_count;
  double steps_before;  // where step_count is 0
  int scale_at, shift_at, floats;
  double* result;
};

// What lies before the floats.
struct ClusterHeader {
  OptimizerStep step;
  double sums[2][kMlpWarps];
  int64_t rows[kMlpThreads];
  int targets[kMlpThreads];
};

static_assert(sizeof(ClusterHeader) % sizeof(Quad) == 0);

// A block's features, or units, from `begin` on.
struct Share {
  int begin, size;
};

__device__ __forceinline__ Share share_of(int features, bool split, int rank, int blocks) {
  if (!split) return {0, features};
  const int quads = (features + 3) / 4;
  const int begin = rank * quads / blocks * 4, end = (rank + 1) * quads / blocks * 4;
  return {begin, (end < features ? end : features) - begin};
}

__device__ __forceinline__ Quad load_quad(const float* from) {
  return *reinterpret_cast<const Quad*>(from);
}
__device__ __forceinline__ void store_quad(float* to, const Quad& quad) {
  *reinterpret_cast<Quad*>(to) = quad;
}

// ---------------------------------------------------------------------------------------------
// The optimizers, as ../cpu/mlp_kernels.h has them

template <OptimizerKind kOptimizer>
inline constexpr int kStates = kOptimizer == OptimizerKind::adam       ? 2
                               : kOptimizer == OptimizerKind::momentum ? 1
                                                                       : 0;

// One parameter with its states.
template <OptimizerKind kOptimizer>
__device__ __forceinline__ void update(float* w, float* first_at, float* second_at, float gradient,
                                       const OptimizerStep& step) {
  gradient += *w * step.weight_decay;
  if constexpr (kOptimizer == OptimizerKind::sgd) {
    *w -= step.lr * gradient;
  } else if constexpr (kOptimizer == OptimizerKind::momentum) {
    const float first = *first_at * step.beta1 + gradient;
    *first_at = first;
    *w -= step.lr * first;
  } else {
    // Of the two ways to go from one to the other, that which keeps the nearer.
    const float old = *first_at, way = gradient - old;
    const float first =
        step.beta1_rest < 0.5f ? old + way * step.beta1_rest : gradient - way * step.beta1;
    const float second = *second_at * step.beta2 + (gradient * step.beta2_rest) * gradient;
    *first_at = first;
    *second_at = second;
    *w -= (first * step.lr) / (sqrtf(second) * step.second_scale + step.eps);
  }
}

// ---------------------------------------------------------------------------------------------
// Products, by all threads of a block

// out (rows, units) = x (rows, in) · wᵀ + bias, with or without ReLU; bias may be null.
template <int kRows, int kUnits>
__device__ __forceinline__ void forward_tiles(const ClusterLayer& layer, const float* x,
                                              const float* w, const float* bias, bool relu,
                                              float* out, int out_stride, int rows) {
  // Rows of a tile are far apart, and neighbouring threads' side by side: in different banks.
  const int row_tiles = (rows + kRows - 1) / kRows, tiles = row_tiles * layer.units_width / kUnits;
  for (int tile = threadIdx.x; tile < tiles; tile += kMlpThreads) {
    const int first = tile % row_tiles, unit = tile / row_tiles * kUnits;
    const float* from[kRows];
#pragma unroll
    for (int r = 0; r < kRows; ++r) {
      const int row = first + r * row_tiles;
      from[r] = x + (row < rows ? row : first) * layer.in_stride;
    }
    float sum[kRows][kUnits] = {};
    for (int k = 0; k < layer.in_width; k += 4) {
      Quad a[kRows], b[kUnits];
#pragma unroll
      for (int r = 0; r < kRows; ++r) a[r] = load_quad(from[r] + k);
#pragma unroll
      for (int u = 0; u < kUnits; ++u) b[u] = load_quad(w + (unit + u) * layer.in_stride + k);
#pragma unroll
      for (int r = 0; r < kRows; ++r) {
#pragma unroll
        for (int u = 0; u < kUnits; ++u) {
#pragma unroll
          for (int i = 0; i < 4; ++i) sum[r][u] += a[r].of[i] * b[u].of[i];
        }
      }
    }
#pragma unroll
    for (int r = 0; r < kRows; ++r) {
      const int row = first + r * row_tiles;
      if (row >= rows) continue;
#pragma unroll
      for (int u = 0; u < kUnits; ++u) {
        float value = sum[r][u];
        if (bias) value += bias[unit + u];
        if (relu) value = value < 0 ? 0 : value;
        out[row * out_stride + unit + u] = value;
      }
    }
  }
}

// The gradient of a layer's input: out (rows, in) = grad (rows, units) · w. `mask` is the input
// itself where it comes from ReLU; null leaves out as it is.
__device__ __forceinline__ void input_gradient_tiles(const ClusterLayer& layer, const float* grad,
                                                     const float* w, const float* mask, float* out,
                                                     int rows) {
  constexpr int kRows = 4;
  const int quads = layer.in_width / 4, row_tiles = (rows + kRows - 1) / kRows;
  for (int tile = threadIdx.x; tile < row_tiles * quads; tile += kMlpThreads) {
    const int k = tile % quads * 4, first = tile / quads * kRows;
    Quad sum[kRows] = {};
    for (int unit = 0; unit < layer.units_width; unit += 4) {
      Quad a[kRows];
#pragma unroll
      for (int r = 0; r < kRows; ++r) {
        const int row = first + r < rows ? first + r : first;
        a[r] = load_quad(grad + row * layer.units_stride + unit);
      }
#pragma unroll
      for (int u = 0; u < 4; ++u) {
        const Quad b = load_quad(w + (unit + u) * layer.in_stride + k);
#pragma unroll
        for (int r = 0; r < kRows; ++r) {
#pragma unroll
          for (int i = 0; i < 4; ++i) sum[r].of[i] += a[r].of[u] * b.of[i];
        }
      }
    }
#pragma unroll
    for (int r = 0; r < kRows; ++r) {
      if (first + r >= rows) continue;
      const int at = (first + r) * layer.in_stride + k;
      if (mask) {
        const Quad h = load_quad(mask + at);
#pragma unroll
        for (int i = 0; i < 4; ++i) sum[r].of[i] = h.of[i] <= 0 ? 0 : sum[r].of[i];
      }
      store_quad(out + at, sum[r]);
    }
  }
}

// The gradient of a weight, applied where it is computed: gradᵀ (units, rows) · x (rows, in), of
// the block's units and features.
template <OptimizerKind kOptimizer>
__device__ __forceinline__ void update_weight(const ClusterLayer& layer, const float* grad,
                                              const float* x, float* w, Share units, Share features,
                                              int rows, const OptimizerStep& step) {
  const int quads = (features.size + 3) / 4, tiles = quads * ((units.size + 3) / 4);
  const int64_t begin = static_cast<int64_t>(units.begin) * layer.in + features.begin;
  float* const first = layer.keeps_states ? w + layer.weight_size : layer.weight[1] + begin;
  float* const second = layer.keeps_states ? w + 2 * layer.weight_size : layer.weight[2] + begin;
  const int state_stride = layer.keeps_states ? layer.in_stride : layer.in;
  for (int tile = threadIdx.x; tile < tiles; tile += kMlpThreads) {
    const int k = tile % quads * 4, unit = tile / quads * 4;
    float sum[4][4] = {};
#pragma unroll 4
    for (int row = 0; row < rows; ++row) {
      const Quad a = load_quad(grad + row * layer.units_stride + unit);
      const Quad b = load_quad(x + row * layer.in_stride + k);
#pragma unroll
      for (int u = 0; u < 4; ++u) {
#pragma unroll
        for (int i = 0; i < 4; ++i) sum[u][i] += a.of[u] * b.of[i];
      }
    }
#pragma unroll
    for (int u = 0; u < 4; ++u) {
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        if (unit + u >= units.size || k + i >= features.size) continue;
        const int64_t state = static_cast<int64_t>(unit + u) * state_stride + k + i;
        update<kOptimizer>(w + (unit + u) * layer.in_stride + k + i, first + state, second + state,
                           sum[u][i], step);
      }
    }
  }
}

// The last threads do, who have least of the weight.
template <OptimizerKind kOptimizer>
__device__ __forceinline__ void update_bias(const ClusterLayer& layer, const float* grad,
                                            float* bias, int units, int rows,
                                            const OptimizerStep& step) {
  for (int unit = kMlpThreads - 1 - threadIdx.x; unit < units; unit += kMlpThreads) {
    float sum = 0;
#pragma unroll 8
    for (int row = 0; row < rows; ++row) sum += grad[row * layer.units_stride + unit];
    float* const at = bias + unit;
    update<kOptimizer>(at, at + layer.units_stride, at + 2 * layer.units_stride, sum, step);
  }
}

}  // namespace
}  // namespace fastnet
