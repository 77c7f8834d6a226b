// The kernel that trains a network, all batches in one launch (see mlp.cu).
#pragma once

#include "mlp_layers.cuh"

namespace fastnet {
namespace {

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

template <OptimizerKind kOptimizer, class Pixel>
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
      OptimizerStep step = call.step;
      if constexpr (kOptimizer == OptimizerKind::adam) {
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

}  // namespace
}  // namespace fastnet
