// A CUDA device on the host, for tests: with FASTNET_EMULATION defined, cuda/common.cuh includes
// this instead of launching, and a kernel file compiles, unchanged, as C++20.
//
// The threads of a block are user-level fibers on one OS thread, as are those of a cluster's blocks
// together; other blocks run one after the other. A fiber runs until it meets a barrier or a warp
// exchange, and the next one goes on. So results do not depend on timing; what a missing barrier
// would allow to happen, ThreadSanitizer is told: to it every fiber is a thread, and nothing but a
// barrier orders two of them. AddressSanitizer sees global memory (the tensors' own) and dynamic
// shared memory; UndefinedBehaviorSanitizer the bounds of static shared arrays.
//
// What this cannot see: races between blocks, the memory model below barriers, reads of shared
// memory that nothing has written, tensor cores, speed.
#pragma once

// The toolkit's own headers: types, vector types, half and bfloat16 with their host arithmetic.
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

#include <cstddef>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <source_location>
#include <type_traits>

#undef __launch_bounds__
#define __launch_bounds__(...)  // registers are no concern here

// Shared memory of a block: blocks run one after the other, so one copy does. (Those of a cluster
// do not: their kernels keep to dynamic shared memory, of which each has its own.)
#undef __shared__
#define __shared__ static

namespace fastnet::emulation {

using Where = std::source_location;

struct ThreadState {
  uint3 thread, block;
  dim3 block_dim, grid_dim;
};
const ThreadState& current();

// What a block may have of it where clusters are.
inline constexpr size_t kClusterSharedBytes = 227 * 1024;
// Blocks for which a cluster has room: 8, or for tests of smaller devices what
// FASTNET_EMULATED_CLUSTER says.
inline int most_cluster_blocks() {
  const char* given = std::getenv("FASTNET_EMULATED_CLUSTER");
  return given ? std::atoi(given) : 8;
}

// Runs body() once for every thread of every block. `shared_bytes` of dynamic shared memory;
// `cluster` blocks, neighbours along x, at a time.
void run(dim3 grid, dim3 block, size_t shared_bytes, const std::function<void()>& body,
         int cluster = 0);

void* dynamic_shared();
int cluster_rank();
void* shared_of(void* mine, int rank);  // where another block of the cluster has what is `mine`

void block_barrier(const Where& where);
void cluster_barrier(const Where& where);
void warp_barrier(unsigned mask, const Where& where);
// Gives `mine` (8 bytes) to the warp and returns what `source` gave, or all lanes' where the caller
// passes a table of 32.
uint64_t exchange(unsigned mask, uint64_t mine, int source, const Where& where,
                  uint64_t* all = nullptr);

int lane();

template <class T>
uint64_t to_bits(T value) {
  static_assert(sizeof(T) <= 8 && std::is_trivially_copyable_v<T>);
  uint64_t bits = 0;
  std::memcpy(&bits, &value, sizeof value);
  return bits;
}

template <class T>
T shuffle(unsigned mask, T value, int source, const Where& where) {
  const uint64_t bits = exchange(mask, to_bits(value), source, where);
  T result;
  std::memcpy(&result, &bits, sizeof result);
  return result;
}

}  // namespace fastnet::emulation

#define threadIdx (::fastnet::emulation::current().thread)
#define blockIdx (::fastnet::emulation::current().block)
#define blockDim (::fastnet::emulation::current().block_dim)
#define gridDim (::fastnet::emulation::current().grid_dim)

// ---------------------------------------------------------------------------------------------
// Device functions

using FastnetWhere = ::fastnet::emulation::Where;

inline void __syncthreads(FastnetWhere where = FastnetWhere::current()) {
  fastnet::emulation::block_barrier(where);
}
inline void __syncwarp(unsigned mask = 0xffffffffu, FastnetWhere where = FastnetWhere::current()) {
  fastnet::emulation::warp_barrier(mask, where);
}

// `width` splits the warp into segments, as on the device.
template <class T>
T __shfl_xor_sync(unsigned mask, T value, int lanes, int width = 32,
                  FastnetWhere where = FastnetWhere::current()) {
  const int me = fastnet::emulation::lane(), source = me ^ lanes;
  return fastnet::emulation::shuffle(mask, value, source / width <= me / width ? source : me,
                                     where);
}
template <class T>
T __shfl_down_sync(unsigned mask, T value, unsigned delta, int width = 32,
                   FastnetWhere where = FastnetWhere::current()) {
  const int me = fastnet::emulation::lane(), source = me + static_cast<int>(delta);
  return fastnet::emulation::shuffle(mask, value, source / width == me / width ? source : me,
                                     where);
}
template <class T>
T __shfl_up_sync(unsigned mask, T value, unsigned delta, int width = 32,
                 FastnetWhere where = FastnetWhere::current()) {
  const int me = fastnet::emulation::lane(), source = me - static_cast<int>(delta);
  return fastnet::emulation::shuffle(mask, value, source >= me / width * width ? source : me,
                                     where);
}
template <class T>
T __shfl_sync(unsigned mask, T value, int source, int width = 32,
              FastnetWhere where = FastnetWhere::current()) {
  const int first = fastnet::emulation::lane() / width * width;
  return fastnet::emulation::shuffle(mask, value, first + (source & (width - 1)), where);
}

inline unsigned __ballot_sync(unsigned mask, int predicate,
                              FastnetWhere where = FastnetWhere::current()) {
  uint64_t all[32];
  fastnet::emulation::exchange(mask, predicate != 0, fastnet::emulation::lane(), where, all);
  unsigned votes = 0;
  for (int lane = 0; lane < 32; ++lane) {
    if ((mask >> lane & 1) && all[lane]) votes |= 1u << lane;
  }
  return votes;
}
inline int __any_sync(unsigned mask, int predicate, FastnetWhere where = FastnetWhere::current()) {
  return __ballot_sync(mask, predicate, where) != 0;
}
inline int __all_sync(unsigned mask, int predicate, FastnetWhere where = FastnetWhere::current()) {
  return __ballot_sync(mask, predicate, where) == mask;
}

template <class T>
T atomicAdd(T* address, T value) {
  // One fiber runs at a time; what is wanted is that the sanitizers see an atomic access.
  T old;
  __atomic_load(address, &old, __ATOMIC_RELAXED);
  T sum = old + value;
  __atomic_store(address, &sum, __ATOMIC_RELAXED);
  return old;
}
template <class T>
T atomicMax(T* address, T value) {
  T old;
  __atomic_load(address, &old, __ATOMIC_RELAXED);
  if (old < value) __atomic_store(address, &value, __ATOMIC_RELAXED);
  return old;
}

// ---------------------------------------------------------------------------------------------
// Host side

namespace fastnet {

template <class... Parameters, class... Arguments>
void launch(void (*kernel)(Parameters...), dim3 grid, dim3 block, size_t shared_bytes,
            cudaStream_t /*stream*/, Arguments... arguments) {
  emulation::run(grid, block, shared_bytes, [=] { kernel(static_cast<Parameters>(arguments)...); });
}

// Dynamic shared memory: FASTNET_DYNAMIC_SHARED(float, tile); then tile[i].
#define FASTNET_DYNAMIC_SHARED(type, name) \
  type* const name = static_cast<type*>(::fastnet::emulation::dynamic_shared())

}  // namespace fastnet
