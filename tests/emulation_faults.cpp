// Kernels with planted faults, each beside what it should have been: the instrument's own test. The
// argument names the case; what must be reported is in test_emulation.py.

#include "device.h"

#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <vector>

namespace {

constexpr int kThreads = 64, kClusterBlocks = 2;

// Every thread leaves a value, and reads its neighbour's.
template <bool kBarrier>
__global__ void neighbour_kernel(int* out) {
  __shared__ int values[kThreads];
  const int i = threadIdx.x;
  values[i] = 10 * i;
  if (kBarrier) __syncthreads();
  out[i] = values[(i + 1) % kThreads];
}

// Two rounds through one buffer: without the second barrier, round two's writing meets round one's
// reading. Threads in order of their number happen to get the right result all the same.
template <bool kSecondBarrier>
__global__ void two_rounds_kernel(int* out) {
  __shared__ int values[kThreads];
  const int i = threadIdx.x;
  for (int round = 0; round < 2; ++round) {
    values[i] = round + i;
    __syncthreads();
    out[i] = values[0];
    if (kSecondBarrier) __syncthreads();
  }
}

// A sum over the block through warp shuffles; the first warp reads what each warp's lane 0 wrote.
template <bool kBarrier>
__global__ void block_sum_kernel(int* out) {
  __shared__ int sums[kThreads / 32];
  int sum = threadIdx.x;
  for (int offset = 16; offset > 0; offset /= 2) sum += __shfl_xor_sync(0xffffffffu, sum, offset);
  if (threadIdx.x % 32 == 0) sums[threadIdx.x / 32] = sum;
  if (kBarrier) __syncthreads();
  if (threadIdx.x == 0) out[0] = sums[0] + sums[1];
}

// Within a warp, memory is ordered by __syncwarp only, not by the exchange of registers.
template <bool kBarrier>
__global__ void warp_memory_kernel(int* out) {
  __shared__ int values[32];
  const int i = threadIdx.x;
  values[i] = i;
  if (kBarrier) {
    __syncwarp();
  } else {
    __shfl_xor_sync(0xffffffffu, i, 1);
  }
  out[i] = values[31 - i];
}

template <int kPast>
__global__ void global_bounds_kernel(int* out) {
  out[threadIdx.x + kPast] = 1;
}

template <int kPast>
__global__ void static_bounds_kernel(int* out) {
  __shared__ int values[kThreads];
  values[threadIdx.x + kPast] = 1;
  __syncthreads();
  out[threadIdx.x] = values[threadIdx.x];
}

template <int kPast>
__global__ void dynamic_bounds_kernel(int* out) {
  FASTNET_DYNAMIC_SHARED(int, values);
  values[threadIdx.x + kPast] = 1;
  __syncthreads();
  out[threadIdx.x] = values[threadIdx.x];
}

// Every block of a cluster leaves values in its own shared memory, and reads the next one's. (The
// barrier at the end is for what is read to be there still.)
template <bool kBarrier>
__global__ void cluster_memory_kernel(int* out) {
  FASTNET_DYNAMIC_SHARED(int, values);
  const int i = threadIdx.x, rank = fastnet::emulation::cluster_rank();
  values[i] = 100 * rank + i;
  if (kBarrier) fastnet::emulation::cluster_barrier(FastnetWhere::current());
  const int next = (rank + 1) % kClusterBlocks;
  const int value = static_cast<int*>(fastnet::emulation::shared_of(values, next))[i];
  if (rank == 0) out[i] = value;
  fastnet::emulation::cluster_barrier(FastnetWhere::current());
}

template <int kPast>
__global__ void cluster_bounds_kernel(int* out) {
  FASTNET_DYNAMIC_SHARED(int, values);
  const int i = threadIdx.x, rank = fastnet::emulation::cluster_rank();
  static_cast<int*>(fastnet::emulation::shared_of(values, kClusterBlocks - 1 - rank))[i + kPast] = i;
  fastnet::emulation::cluster_barrier(FastnetWhere::current());
  if (rank == 0) out[i] = values[i];
}

// A block's barrier is none for the cluster: each waits for threads that the other does not send.
__global__ void divergent_cluster_kernel(int*) {
  if (fastnet::emulation::cluster_rank() == 0) {
    fastnet::emulation::cluster_barrier(FastnetWhere::current());
  } else if (threadIdx.x < 32) {
    __syncthreads();
  } else {
    fastnet::emulation::cluster_barrier(FastnetWhere::current());
  }
}

__global__ void divergent_barrier_kernel(int* out) {
  if (threadIdx.x < 32) {
    __syncthreads();
    out[threadIdx.x] = 1;
  } else {
    __syncthreads();
  }
}

__global__ void early_return_kernel(int* out) {
  if (threadIdx.x == 5) return;
  __syncthreads();
  out[threadIdx.x] = 1;
}

__global__ void partial_warp_kernel(int* out) {
  // All lanes are named, but only the lower half comes.
  if (threadIdx.x < 16) out[threadIdx.x] = __shfl_xor_sync(0xffffffffu, 1, 1);
}

__global__ void vote_kernel(int* out) {
  const unsigned odd = __ballot_sync(0xffffffffu, threadIdx.x % 2);
  const int up = __shfl_up_sync(0xffffffffu, static_cast<int>(threadIdx.x), 1);
  const int down = __shfl_down_sync(0xffffffffu, static_cast<int>(threadIdx.x), 1, 16);
  // Halves of the warp, apart from each other: the upper one goes twice.
  int half = threadIdx.x % 32;
  const unsigned mask = threadIdx.x % 32 < 16 ? 0x0000ffffu : 0xffff0000u;
  half = __shfl_xor_sync(mask, half, 1);
  if (threadIdx.x % 32 >= 16) half = __shfl_xor_sync(mask, half, 2);
  half = __shfl_sync(0xffffffffu, half, 20);
  const bool right = odd == 0xaaaaaaaau && up == static_cast<int>(threadIdx.x) - (threadIdx.x % 32 > 0) &&
                     down == static_cast<int>(threadIdx.x) + (threadIdx.x % 16 < 15) && half == (20 ^ 3) &&
                     __any_sync(0xffffffffu, threadIdx.x % 32 == 3) &&
                     !__all_sync(0xffffffffu, threadIdx.x % 32 == 3);
  atomicAdd(out, right ? 1 : 0);
}

}  // namespace

int main(int count, char** arguments) {
  const char* name = count > 1 ? arguments[1] : "";
  int* out = new int[kThreads]();
  using Kernel = void (*)(int*);
  struct Case {
    const char* name;
    Kernel kernel;
    int threads;
    int cluster = 0;
  };
  const Case cases[] = {
      {"neighbour", neighbour_kernel<true>, kThreads},
      {"neighbour-fault", neighbour_kernel<false>, kThreads},
      {"two-rounds", two_rounds_kernel<true>, kThreads},
      {"two-rounds-fault", two_rounds_kernel<false>, kThreads},
      {"block-sum", block_sum_kernel<true>, kThreads},
      {"block-sum-fault", block_sum_kernel<false>, kThreads},
      {"warp-memory", warp_memory_kernel<true>, 32},
      {"warp-memory-fault", warp_memory_kernel<false>, 32},
      {"global-bounds", global_bounds_kernel<0>, kThreads},
      {"global-bounds-fault", global_bounds_kernel<1>, kThreads},
      {"static-bounds", static_bounds_kernel<0>, kThreads},
      {"static-bounds-fault", static_bounds_kernel<1>, kThreads},
      {"dynamic-bounds", dynamic_bounds_kernel<0>, kThreads},
      {"dynamic-bounds-fault", dynamic_bounds_kernel<1>, kThreads},
      {"cluster-memory", cluster_memory_kernel<true>, kThreads, kClusterBlocks},
      {"cluster-memory-fault", cluster_memory_kernel<false>, kThreads, kClusterBlocks},
      {"cluster-bounds", cluster_bounds_kernel<0>, kThreads, kClusterBlocks},
      {"cluster-bounds-fault", cluster_bounds_kernel<1>, kThreads, kClusterBlocks},
      {"divergent-cluster-fault", divergent_cluster_kernel, kThreads, kClusterBlocks},
      {"too-many-blocks-fault", cluster_memory_kernel<true>, kThreads, 16},
      {"divergent-barrier-fault", divergent_barrier_kernel, kThreads},
      {"early-return-fault", early_return_kernel, kThreads},
      {"partial-warp-fault", partial_warp_kernel, 32},
      {"vote", vote_kernel, kThreads},
      {"too-many-threads-fault", neighbour_kernel<true>, 2048},
  };
  for (const Case& each : cases) {
    if (std::strcmp(each.name, name) != 0) continue;
    // Several blocks, or clusters: what one leaves behind must not be the next one's race.
    const int blocks = each.cluster > 0 ? each.cluster : 1;
    fastnet::emulation::run(
        dim3(3 * blocks), dim3(each.threads), kThreads * sizeof(int), [&] { each.kernel(out); },
        each.cluster);
    for (int i = 0; i < kThreads; ++i) std::printf("%d ", out[i]);
    std::printf("\n");
    delete[] out;
    return 0;
  }
  std::fprintf(stderr, "no case %s\n", name);
  return 2;
}
