// Native training of fully connected networks on CUDA: all batches in one kernel, by one cluster of
// blocks that keep weights and optimizer state in their shared memory. Nothing of this has been
// measured on a card yet.
//
// Each layer is shared out between the blocks in one of three ways:
//   inputs  each block has columns of the weight and needs those features only; its part of every
//           unit is added to those of the others
//   units   each block has rows of the weight: it needs all features and gives some of the units
//   none    each block does all of it, and comes to the same bits as the others
// The first layer is shared by inputs, so that each block gathers its own pixels of a batch. Then
// comes units, whose results are the next one's inputs, and so on in turns; a last layer that would
// be shared by units is not shared. So a step waits for the cluster twice for each layer shared by
// inputs and for each shared by units: before the parts are added, and after.
//
// Where all of that is too much, the optimizer's states of the shared-out weights stay in global
// memory: each element is one thread's alone.
//
// In shared memory rows lie in whole quads of floats, an odd number of them: eight rows one below
// the other are in different banks. What lies behind the last feature or unit is always zero.

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
  MlpStep step;                  // without what changes from step to step
  float* steps[2 * kMaxLayers];  // the optimizer's counters on the device
  int step_count;
  double steps_before;  // where step_count is 0
  int scale_at, shift_at, floats;
  double* result;
};

// What lies before the floats.
struct ClusterHeader {
  MlpStep step;
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

template <MlpOptimizer kOptimizer>
inline constexpr int kStates = kOptimizer == MlpOptimizer::adam       ? 2
                               : kOptimizer == MlpOptimizer::momentum ? 1
                                                                      : 0;

// One parameter with its states.
template <MlpOptimizer kOptimizer>
__device__ __forceinline__ void update(float* w, float* first_at, float* second_at, float gradient,
                                       const MlpStep& step) {
  gradient += *w * step.weight_decay;
  if constexpr (kOptimizer == MlpOptimizer::sgd) {
    *w -= step.lr * gradient;
  } else if constexpr (kOptimizer == MlpOptimizer::momentum) {
    const float first = *first_at * step.beta1 + gradient;
    *first_at = first;
    *w -= step.lr * first;
  } else {
    // Of the two ways to go from one to the other, that which keeps the nearer.
    const float old = *first_at, way = gradient - old;
    const float first =
        step.beta1_rest < 0.5f ? old + way * step.beta1_rest : gradient - way * step.beta1;
    const float second = *second_at * step.beta2 + (gradient * gradient) * step.beta2_rest;
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
template <MlpOptimizer kOptimizer>
__device__ __forceinline__ void update_weight(const ClusterLayer& layer, const float* grad,
                                              const float* x, float* w, Share units, Share features,
                                              int rows, const MlpStep& step) {
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
template <MlpOptimizer kOptimizer>
__device__ __forceinline__ void update_bias(const ClusterLayer& layer, const float* grad,
                                            float* bias, int units, int rows, const MlpStep& step) {
  for (int unit = kMlpThreads - 1 - threadIdx.x; unit < units; unit += kMlpThreads) {
    float sum = 0;
#pragma unroll 8
    for (int row = 0; row < rows; ++row) sum += grad[row * layer.units_stride + unit];
    float* const at = bias + unit;
    update<kOptimizer>(at, at + layer.units_stride, at + 2 * layer.units_stride, sum, step);
  }
}

// ---------------------------------------------------------------------------------------------
// The rest of a step

// x (rows, in_width) = the block's columns of the images, normalised.
template <class Pixel>
__device__ __forceinline__ void gather(const ClusterCall& call, const ClusterHeader& header,
                                       float* memory, Share share, int rows) {
  const ClusterLayer& layer = call.layers[0];
  const float *const scale = memory + call.scale_at, *const shift = memory + call.shift_at;
  const Pixel* const pixels = static_cast<const Pixel*>(call.images) + share.begin;
  const int lane = threadIdx.x % kWarp;
#pragma unroll 4
  for (int row = threadIdx.x / kWarp; row < rows; row += kMlpWarps) {
    const Pixel* const from = pixels + header.rows[row] * layer.in;
    for (int k = 4 * lane; k < layer.in_width; k += 4 * kWarp) {
      struct alignas(4 * sizeof(Pixel)) Pixels {
        Pixel of[4];
      } four = {};
      if (call.in_quads && k < share.size) {
        four = *reinterpret_cast<const Pixels*>(from + k);
      } else {
        for (int i = 0; i < 4 && k + i < share.size; ++i) four.of[i] = from[k + i];
      }
      Quad quad;
#pragma unroll
      for (int i = 0; i < 4; ++i) {  // scale and shift are zero behind the last one
        quad.of[i] = static_cast<float>(four.of[i]) * scale[k + i] + shift[k + i];
      }
      store_quad(memory + layer.input_at + row * layer.in_stride + k, quad);
    }
  }
}

// Softmax and cross-entropy: logits become their gradient, of the mean loss. Adds to *loss and
// *right what the rows of the thread's group come to, in the group's first lane.
__device__ __forceinline__ void loss_rows(const ClusterHeader& header, float* logits, int stride,
                                          int classes, int rows, double* loss, int* right) {
  constexpr int kGroup = 8;  // lanes to a row
  const float share = 1.0f / static_cast<float>(rows);
  const int lane = threadIdx.x % kGroup;
  // All lanes of a warp go round equally often, also those that have no row.
  for (int start = 0; start < rows; start += kMlpThreads / kGroup) {
    const int row = start + threadIdx.x / kGroup;
    const bool is_row = row < rows;
    float* const z = logits + (is_row ? row : 0) * stride;
    const int target = is_row ? header.targets[row] : 0;
    float most = -INFINITY, target_logit = 0;
    int first_most = lane;
    for (int c = lane; c < classes && is_row; c += kGroup) {
      if (z[c] > most) most = z[c], first_most = c;
      if (c == target) target_logit = z[c];
    }
    target_logit = __shfl_sync(0xffffffffu, target_logit, target % kGroup, kGroup);
#pragma unroll
    for (int offset = kGroup / 2; offset > 0; offset /= 2) {
      const float other = __shfl_xor_sync(0xffffffffu, most, offset);
      const int other_first = __shfl_xor_sync(0xffffffffu, first_most, offset);
      if (other > most || (other == most && other_first < first_most)) {
        most = other, first_most = other_first;
      }
    }
    float total = 0;
    for (int c = lane; c < classes && is_row; c += kGroup) {
      const float e = expf(z[c] - most);
      z[c] = e;
      total += e;
    }
#pragma unroll
    for (int offset = kGroup / 2; offset > 0; offset /= 2) {
      total += __shfl_xor_sync(0xffffffffu, total, offset);
    }
    const float factor = share / total;
    for (int c = lane; c < classes && is_row; c += kGroup) {
      z[c] = z[c] * factor - (c == target ? share : 0);
    }
    if (lane == 0 && is_row) {
      *loss += static_cast<double>(most + logf(total) - target_logit);
      *right += first_most == target;
    }
  }
}

// The sums of what all blocks have at `part` (rows, stride), each quad of them through finish(sum,
// its place), to all blocks' memory at `to`.
template <class Finish>
__device__ __forceinline__ void add_parts(const ClusterCall& call, float* memory, int rank,
                                          int part, int to, int rows, int stride, Finish finish) {
  cluster_barrier();  // all have written their parts
  const int quads = rows * stride / 4;
  const int begin = rank * quads / call.blocks, end = (rank + 1) * quads / call.blocks;
  for (int quad = begin + threadIdx.x; quad < end; quad += kMlpThreads) {
    float* const mine = memory + part + 4 * quad;
    Quad sum = load_quad(shared_of(mine, 0));
    for (int block = 1; block < call.blocks; ++block) {
      const Quad other = load_quad(shared_of(mine, block));
#pragma unroll
      for (int i = 0; i < 4; ++i) sum.of[i] += other.of[i];
    }
    sum = finish(sum, 4 * quad);
    for (int block = 0; block < call.blocks; ++block) {
      store_quad(shared_of(memory + to + 4 * quad, block), sum);
    }
  }
  cluster_barrier();  // all have what the others have added, and nobody reads a part any more
}

template <class Body>
__device__ __forceinline__ void for_each_parameter(const ClusterCall& call, float* memory, int rank,
                                                   int states, Body body) {
  for (int l = 0; l < call.layer_count; ++l) {
    const ClusterLayer& layer = call.layers[l];
    const bool by_units = layer.split == Split::units;
    const Share units = share_of(layer.units, by_units, rank, call.blocks);
    const Share features = share_of(layer.in, layer.split == Split::inputs, rank, call.blocks);
    for (int s = 0; s <= states; ++s) {
      const bool stays = s > 0 && !layer.keeps_states;
      // Whether the block is the one to write it back.
      const bool is_weights = layer.split != Split::none || rank == 0;
      for (int i = threadIdx.x; i < units.size * features.size && !stays; i += kMlpThreads) {
        const int unit = i / features.size, k = i % features.size;
        body(layer.weight[s] + static_cast<int64_t>(units.begin + unit) * layer.in +
                 features.begin + k,
             memory + layer.weight_at + s * layer.weight_size + unit * layer.in_stride + k,
             is_weights);
      }
      if (!layer.bias[0]) continue;
      for (int unit = threadIdx.x; unit < units.size; unit += kMlpThreads) {
        body(layer.bias[s] + units.begin + unit,
             memory + layer.bias_at + s * layer.units_stride + unit, by_units || rank == 0);
      }
    }
  }
}

template <MlpOptimizer kOptimizer, class Pixel>
__global__ void __launch_bounds__(kMlpThreads, 1)
    mlp_cluster_kernel(const __grid_constant__ ClusterCall call) {
  FASTNET_DYNAMIC_SHARED(ClusterHeader, header);
  float* const memory = reinterpret_cast<float*>(header + 1);
  const int rank = cluster_rank(), thread = static_cast<int>(threadIdx.x), L = call.layer_count;
  const ClusterLayer &front = call.layers[0], &back = call.layers[L - 1];
  const Share pixels = share_of(front.in, true, rank, call.blocks);

  for (int i = thread; i < call.floats; i += kMlpThreads) memory[i] = 0;
  __syncthreads();  // zeros are there before what is not zero
  for_each_parameter(call, memory, rank, kStates<kOptimizer>,
                     [](const float* global, float* shared, bool) { *shared = *global; });
  for (int k = thread; k < pixels.size; k += kMlpThreads) {
    memory[call.scale_at + k] = call.scale[pixels.begin + k];
    memory[call.shift_at + k] = call.shift[pixels.begin + k];
  }

  // The row that the thread looks up for the batch to come.
  int64_t row = 0;
  int target = 0;
  const auto find_row = [&](int64_t at) {
    row = call.order[at];
    device_assert(row >= 0 && row < call.image_count, "mlp: order names no image");
  };
  const auto find_target = [&] {
    const int64_t y = call.targets[row];
    device_assert(y >= 0 && y < back.units, "mlp: target is out of bounds");
    target = static_cast<int>(y);
  };
  const auto batch_at = [&](int64_t done) {
    const int64_t left = call.count - done;
    return static_cast<int>(left < call.batch_size ? left : call.batch_size);
  };
  if (thread < batch_at(0)) {
    find_row(thread);
    find_target();
  }

  const double before = call.step_count > 0 ? *call.steps[0] : call.steps_before;
  double power1 = pow(call.beta1, before), power2 = pow(call.beta2, before);
  double loss = 0;
  int64_t right = 0;
  for (int64_t done = 0; done < call.count; done += call.batch_size) {
    const int rows = batch_at(done);
    const int64_t next = done + rows;
    const bool looks_up = thread < batch_at(next);
    if (thread < rows) {
      header->rows[thread] = row;
      header->targets[thread] = target;
    }
    if (looks_up) find_row(next + thread);
    if (thread == 0) {
      MlpStep step = call.step;
      if constexpr (kOptimizer == MlpOptimizer::adam) {
        power1 *= call.beta1;
        power2 *= call.beta2;
        step.lr = static_cast<float>(call.lr / (1 - power1));
        step.second_scale = static_cast<float>(1 / sqrt(1 - power2));
      }
      header->step = step;
    }
    __syncthreads();  // the batch's rows are known
    gather<Pixel>(call, *header, memory, pixels, rows);
    __syncthreads();  // the first layer's input is there

    for (int l = 0; l < L; ++l) {
      const ClusterLayer& layer = call.layers[l];
      const int to = l + 1 < L ? call.layers[l + 1].input_at : layer.grad_at;
      const float* const bias = memory + layer.bias_at;  // zero where there is none
      const bool in_parts = layer.split == Split::inputs;
      const auto forward = [&](auto tile_rows) {
        forward_tiles<decltype(tile_rows)::value, 2>(
            layer, memory + layer.input_at, memory + layer.weight_at, in_parts ? nullptr : bias,
            !in_parts && layer.relu, memory + (in_parts ? layer.part_at : to), layer.units_stride,
            rows);
      };
      // Small tiles where large ones would leave threads without.
      if (rows * layer.units_width >= 4 * kMlpThreads) {
        forward(std::integral_constant<int, 4>{});
      } else {
        forward(std::integral_constant<int, 1>{});
      }
      if (in_parts) {
        const auto finish = [&](Quad sum, int at) {
          const Quad offsets = load_quad(bias + at % layer.units_stride);
#pragma unroll
          for (int i = 0; i < 4; ++i) {
            const float value = sum.of[i] + offsets.of[i];
            sum.of[i] = layer.relu && value < 0 ? 0 : value;
          }
          return sum;
        };
        add_parts(call, memory, rank, layer.part_at, to, rows, layer.units_stride, finish);
      } else {
        __syncthreads();  // the next layer's input, or the logits, are there
      }
    }

    if (looks_up) {
      find_target();
      const char* const from =
          static_cast<const char*>(call.images) + (row * front.in + pixels.begin) * sizeof(Pixel);
      for (size_t at = 0; at < pixels.size * sizeof(Pixel); at += 128) prefetch(from + at);
    }
    int right_now = 0;
    loss_rows(*header, memory + back.grad_at, back.units_stride, back.units, rows, &loss,
              &right_now);
    right += right_now;
    __syncthreads();  // the logits' gradient is there

    // A weight is read for the gradient of its layer's input before it is updated.
    for (int l = L - 1; l >= 0; --l) {
      const ClusterLayer& layer = call.layers[l];
      const float* const grad = memory + layer.grad_at;
      const float* const input = memory + layer.input_at;
      if (l > 0) {
        const ClusterLayer& below = call.layers[l - 1];
        const bool in_parts = layer.split == Split::units;
        input_gradient_tiles(layer, grad, memory + layer.weight_at,
                             below.relu && !in_parts ? input : nullptr,
                             memory + (in_parts ? layer.part_at : below.grad_at), rows);
        if (in_parts) {
          const auto finish = [&](Quad sum, int at) {
            const Quad h = load_quad(input + at);
#pragma unroll
            for (int i = 0; i < 4; ++i) sum.of[i] = below.relu && h.of[i] <= 0 ? 0 : sum.of[i];
            return sum;
          };
          add_parts(call, memory, rank, layer.part_at, below.grad_at, rows, layer.in_stride,
                    finish);
        } else {
          __syncthreads();  // the gradient below is there, and the weight has been read
        }
      }
      const Share units = share_of(layer.units, layer.split == Split::units, rank, call.blocks);
      const Share features = share_of(layer.in, layer.split == Split::inputs, rank, call.blocks);
      update_weight<kOptimizer>(layer, grad, input, memory + layer.weight_at, units, features, rows,
                                header->step);
      if (layer.bias[0]) {
        update_bias<kOptimizer>(layer, grad, memory + layer.bias_at, units.size, rows,
                                header->step);
      }
    }
    __syncthreads();  // inputs, rows and step have been read, and weights are written
  }

  for_each_parameter(call, memory, rank, kStates<kOptimizer>,
                     [](float* global, const float* shared, bool is_mine) {
                       if (is_mine) *global = *shared;
                     });
  if (rank != 0) return;
  if (thread < call.step_count) {
    *call.steps[thread] =
        static_cast<float>(before + (call.count + call.batch_size - 1) / call.batch_size);
  }
  loss = warp_sum(loss);
  const double hits = warp_sum(static_cast<double>(right));
  if (thread % kWarp == 0) {
    header->sums[0][thread / kWarp] = loss;
    header->sums[1][thread / kWarp] = hits;
  }
  __syncthreads();  // the first threads read what every warp has written
  if (thread < 2) {
    double sum = 0;
    for (int w = 0; w < kMlpWarps; ++w) sum += header->sums[thread][w];
    call.result[thread] = sum;
  }
}

// ---------------------------------------------------------------------------------------------
// Host side

struct ClusterSize {
  int blocks;         // 0: there is none
  bool keeps_states;  // in shared memory
};

// How a network is shared out: of the call, all that shapes decide.
ClusterCall plan_cluster(const std::vector<int64_t>& widths, int64_t batch_size,
                         MlpOptimizer optimizer, ClusterSize size) {
  ClusterCall call{};
  const int blocks = call.blocks = size.blocks;
  const int states = static_cast<int>(optimizer);  // 0, 1 or 2 for each parameter
  call.layer_count = static_cast<int>(widths.size()) - 1;
  const int rows = static_cast<int>(batch_size);
  int at = 0;
  const auto take = [&](int floats) {
    at += floats;
    return at - floats;
  };
  const auto width = [&](int64_t features, bool split) {
    const int quads = static_cast<int>((features + 3) / 4);
    return 4 * (split ? (quads + blocks - 1) / blocks : quads);
  };
  const auto stride = [](int width) { return width % 8 == 4 ? width : width + 4; };
  bool is_split = true;  // whether each block has its own features: the images' columns, at first
  for (int l = 0; l < call.layer_count; ++l) {
    ClusterLayer& layer = call.layers[l];
    layer.in = static_cast<int>(widths[l]);
    layer.units = static_cast<int>(widths[l + 1]);
    layer.split = is_split ? Split::inputs : l + 1 == call.layer_count ? Split::none : Split::units;
    is_split = layer.split == Split::units;
    layer.in_width = width(layer.in, layer.split == Split::inputs);
    layer.units_width = width(layer.units, is_split);
    layer.in_stride = stride(layer.in_width);
    layer.units_stride = stride(layer.units_width);
    layer.weight_size = layer.units_width * layer.in_stride;
    layer.keeps_states = size.keeps_states || layer.split == Split::none;
    layer.weight_at = take((layer.keeps_states ? 1 + states : 1) * layer.weight_size);
    layer.bias_at = take((1 + states) * layer.units_stride);
    layer.input_at = take(rows * layer.in_stride);
    layer.grad_at = take(rows * layer.units_stride);
    // Hidden units are added before there is a gradient; where the sum goes must be elsewhere.
    const bool is_hidden = l + 1 < call.layer_count;
    layer.part_at = layer.split == Split::units  ? take(rows * layer.in_stride)
                    : layer.split == Split::none ? 0
                    : is_hidden                  ? layer.grad_at
                                                 : take(rows * layer.units_stride);
  }
  call.scale_at = take(call.layers[0].in_width);
  call.shift_at = take(call.layers[0].in_width);
  call.floats = at;
  return call;
}

size_t most_shared_bytes(const Tensor& images) {
  return cluster_shared_bytes(images, mlp_cluster_kernel<MlpOptimizer::adam, uint8_t>);
}

size_t shared_bytes(const ClusterCall& call) {
  return sizeof(ClusterHeader) + call.floats * sizeof(float);
}

// As many blocks as find work, and more where the network needs their memory.
ClusterSize choose_cluster(const std::vector<int64_t>& widths, int64_t batch_size,
                           MlpOptimizer optimizer, size_t most_shared) {
  constexpr int64_t kColumnsPerBlock = 32;
  // Beyond this no network fits, and sizes would not fit an int.
  constexpr int64_t kWidest = 1 << 16, kMostParameters = 1 << 24;
  int64_t parameters = 0;
  for (size_t l = 0; l + 1 < widths.size(); ++l) {
    if (widths[l] > kWidest || widths[l + 1] > kWidest) return {};
    parameters += widths[l] * widths[l + 1];
  }
  if (parameters > kMostParameters || batch_size > kMlpThreads || widths.size() > kMaxLayers + 1) {
    return {};
  }
  for (const bool keeps_states : {true, false}) {
    for (int blocks = 1; blocks <= kMaxCluster; blocks *= 2) {
      if (blocks < kMaxCluster && widths[0] >= 2 * blocks * kColumnsPerBlock) continue;
      const ClusterSize size{blocks, keeps_states};
      if (shared_bytes(plan_cluster(widths, batch_size, optimizer, size)) <= most_shared) {
        return size;
      }
    }
  }
  return {};
}

int64_t mlp_cluster(const Tensor& images, std::vector<int64_t> widths, int64_t batch_size,
                    int64_t optimizer) {
  const MlpOptimizer kind = mlp_optimizer(optimizer);
  return choose_cluster(widths, batch_size, kind, most_shared_bytes(images)).blocks;
}

Tensor mlp_train(const Tensor& images, const Tensor& targets, const Tensor& order,
                 int64_t batch_size, const Tensor& scale, const Tensor& shift,
                 std::vector<Tensor> weights, std::vector<Tensor> biases, std::vector<bool> relu,
                 std::vector<Tensor> first, std::vector<Tensor> second, std::vector<Tensor> steps,
                 int64_t optimizer, double lr, double beta1, double beta2, double eps,
                 double weight_decay) {
  const MlpOptimizer kind = mlp_optimizer(optimizer);
  const std::vector<MlpLayer> layers =
      check_mlp_training(images, targets, order, &batch_size, scale, shift, weights, biases, relu,
                         first, second, steps, kind);
  std::vector<int64_t> widths{layers.front().in};
  for (const MlpLayer& layer : layers) widths.push_back(layer.out);
  const ClusterSize size = choose_cluster(widths, batch_size, kind, most_shared_bytes(images));
  check(size.blocks > 0, "mlp: the network, with batches of ", batch_size,
        ", does not fit into the shared memory of a cluster of this device");

  ClusterCall call = plan_cluster(widths, batch_size, kind, size);
  for (size_t l = 0; l < layers.size(); ++l) {
    const MlpLayer& layer = layers[l];
    ClusterLayer& to = call.layers[l];
    to.relu = layer.relu;
    const Tensor* const of_weight[] = {&layer.weight, &layer.weight_first, &layer.weight_second};
    const Tensor* const of_bias[] = {&layer.bias, &layer.bias_first, &layer.bias_second};
    for (int s = 0; s < 3; ++s) {
      to.weight[s] = mutable_data<float>(*of_weight[s]);
      to.bias[s] = layer.bias.numel() > 0 ? mutable_data<float>(*of_bias[s]) : nullptr;
    }
  }
  const bool is_uint8 = images.scalar_type() == ScalarType::Byte;
  call.images = images.const_data_ptr();
  call.in_quads = layers.front().in % 4 == 0 &&
                  reinterpret_cast<uintptr_t>(call.images) % (is_uint8 ? 4 : 16) == 0;
  call.targets = data<int64_t>(targets);
  call.order = data<int64_t>(order);
  call.image_count = images.size(0);
  call.count = order.size(0);
  call.batch_size = static_cast<int>(batch_size);
  call.scale = data<float>(scale);
  call.shift = data<float>(shift);
  call.lr = lr;
  call.beta1 = beta1;
  call.beta2 = beta2;
  call.step = mlp_step(lr, beta1, beta2, eps, weight_decay);
  // torch.optim keeps its counters on the device, or on the host, which need not wait to read them.
  std::vector<float*> on_host;
  for (const Tensor& step : steps) {
    float* const counter = static_cast<float*>(step.mutable_data_ptr());
    if (step.is_cpu() && !images.is_cpu()) {
      on_host.push_back(counter);
      call.steps_before = *counter;
    } else {
      call.steps[call.step_count++] = counter;
    }
  }
  check(on_host.empty() || call.step_count == 0,
        "mlp: the optimizer's steps must be all on the host or all on the device");
  Tensor result = torch::stable::new_empty(images, {2}, ScalarType::Double);
  call.result = mutable_data<double>(result);

  const OnDeviceOf device(images);
  const auto launch_with = [&](auto optimizer, auto pixel) {
    launch_cluster(mlp_cluster_kernel<optimizer.value, decltype(pixel)>, size.blocks,
                   dim3(kMlpThreads), shared_bytes(call), device.stream(), call);
  };
  const auto launch_for = [&](auto optimizer) {
    is_uint8 ? launch_with(optimizer, uint8_t{}) : launch_with(optimizer, float{});
  };
  switch (kind) {
    case MlpOptimizer::sgd:
      launch_for(std::integral_constant<MlpOptimizer, MlpOptimizer::sgd>{});
      break;
    case MlpOptimizer::momentum:
      launch_for(std::integral_constant<MlpOptimizer, MlpOptimizer::momentum>{});
      break;
    case MlpOptimizer::adam:
      launch_for(std::integral_constant<MlpOptimizer, MlpOptimizer::adam>{});
      break;
  }
  for (float* counter : on_host) {
    *counter += static_cast<float>((call.count + batch_size - 1) / batch_size);
  }
  return result;
}

}  // namespace

FASTNET_CUDA_LIBRARY(library) {
  library.impl("mlp_train", TORCH_BOX(&mlp_train));
  library.impl("mlp_cluster", TORCH_BOX(&mlp_cluster));
}

}  // namespace fastnet
