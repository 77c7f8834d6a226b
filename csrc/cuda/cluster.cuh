// Clusters: blocks that run at the same time, wait for each other, and read and write each other's
// shared memory. From compute capability 9.0 on.
#pragma once

#include "common.cuh"

namespace fastnet {

inline constexpr int kMaxCluster = 8;  // blocks; what every device with clusters has

#if defined(FASTNET_EMULATION)

// Dynamic shared memory that a cluster's blocks may have, in bytes; 0 where there are no clusters.
template <class Kernel>
size_t cluster_shared_bytes(const Tensor&, Kernel*) {
  return emulation::kClusterSharedBytes;
}

// Whether the device has room for a cluster of so many blocks.
template <class Kernel>
bool cluster_fits(const Tensor&, Kernel*, int blocks, dim3, size_t) {
  return blocks <= emulation::most_cluster_blocks();
}

// One cluster of `blocks`.
template <class... Parameters, class... Arguments>
void launch_cluster(void (*kernel)(Parameters...), int blocks, dim3 block, size_t shared_bytes,
                    cudaStream_t /*stream*/, Arguments... arguments) {
  emulation::run(
      dim3(blocks), block, shared_bytes, [=] { kernel(static_cast<Parameters>(arguments)...); },
      blocks);
}

inline int cluster_rank() {
  return emulation::cluster_rank();
}
inline void cluster_barrier(FastnetWhere where = FastnetWhere::current()) {
  emulation::cluster_barrier(where);
}
template <class T>
T* shared_of(T* mine, int rank) {
  return static_cast<T*>(emulation::shared_of(mine, rank));
}

#else

template <class Kernel>
size_t cluster_shared_bytes(const Tensor& tensor, Kernel* kernel) {
  const OnDeviceOf device(tensor);
  cudaFuncAttributes attributes{};
  const bool is_there = cudaFuncGetAttributes(&attributes, kernel) == cudaSuccess;
  if (!is_there) cudaGetLastError();  // which is no error of the next launch
  // What was compiled for an older device only traps.
  if (!is_there || attributes.ptxVersion < 90) return 0;
  int clusters = 0, bytes = 0;
  check_cuda(cudaDeviceGetAttribute(&clusters, cudaDevAttrClusterLaunch, device.index()),
             "cudaDeviceGetAttribute");
  check_cuda(
      cudaDeviceGetAttribute(&bytes, cudaDevAttrMaxSharedMemoryPerBlockOptin, device.index()),
      "cudaDeviceGetAttribute");
  return clusters ? static_cast<size_t>(bytes) : 0;
}

// A launch of one cluster.
struct ClusterLaunch {
  cudaLaunchAttribute shape{};
  cudaLaunchConfig_t config{};

  ClusterLaunch(int blocks, dim3 block, size_t shared_bytes, cudaStream_t stream = nullptr) {
    shape.id = cudaLaunchAttributeClusterDimension;
    shape.val.clusterDim = {static_cast<unsigned>(blocks), 1, 1};
    config.gridDim = dim3(blocks);
    config.blockDim = block;
    config.dynamicSmemBytes = shared_bytes;
    config.stream = stream;
    config.attrs = &shape;
    config.numAttrs = 1;
  }
  ClusterLaunch(const ClusterLaunch&) = delete;
  ClusterLaunch& operator=(const ClusterLaunch&) = delete;
};

// A cluster's blocks run on neighbouring multiprocessors, of which part of a device, or one that
// has lost some, may have too few together.
template <class Kernel>
bool cluster_fits(const Tensor& tensor, Kernel* kernel, int blocks, dim3 block,
                  size_t shared_bytes) {
  const OnDeviceOf device(tensor);
  const ClusterLaunch launch(blocks, block, shared_bytes);
  int clusters = 0;
  // Of the most that a device allows the kernel may have a little itself, which is told here.
  const bool is_told =
      cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize,
                           static_cast<int>(shared_bytes)) == cudaSuccess &&
      cudaOccupancyMaxActiveClusters(&clusters, kernel, &launch.config) == cudaSuccess;
  if (!is_told) cudaGetLastError();  // which is no error of the next launch
  return is_told && clusters > 0;
}

template <class... Parameters, class... Arguments>
void launch_cluster(void (*kernel)(Parameters...), int blocks, dim3 block, size_t shared_bytes,
                    cudaStream_t stream, Arguments... arguments) {
  allow_shared_bytes(kernel, shared_bytes);
  const ClusterLaunch launch(blocks, block, shared_bytes, stream);
  check_cuda(cudaLaunchKernelEx(&launch.config, kernel, static_cast<Parameters>(arguments)...),
             "fastnet: kernel launch failed");
}

#if !defined(__CUDA_ARCH__) || __CUDA_ARCH__ >= 900
#define FASTNET_ON_CLUSTER(...) asm volatile(__VA_ARGS__)
#else
#define FASTNET_ON_CLUSTER(...) __trap()
#endif

// The block's number in its cluster.
__device__ __forceinline__ int cluster_rank() {
  int rank = 0;
  FASTNET_ON_CLUSTER("mov.u32 %0, %%cluster_ctarank;" : "=r"(rank));
  return rank;
}

// Waits for all threads of all blocks, and orders what they wrote, wherever, before what follows.
__device__ __forceinline__ void cluster_barrier() {
  FASTNET_ON_CLUSTER(
      "barrier.cluster.arrive.release.aligned;\n"
      "barrier.cluster.wait.acquire.aligned;" :: : "memory");
}

// Where another block has what is `mine` in this one's shared memory.
template <class T>
__device__ __forceinline__ T* shared_of(T* mine, int rank) {
  uint64_t theirs = 0;
  FASTNET_ON_CLUSTER("mapa.u64 %0, %1, %2;" : "=l"(theirs) : "l"(reinterpret_cast<uint64_t>(mine)),
                     "r"(rank));
  return reinterpret_cast<T*>(theirs);
}

#endif

}  // namespace fastnet
