// What every CUDA kernel file shares: the stream, the one way to launch, widening to the
// accumulate type, and sums within a warp and a block.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

#include <algorithm>
#include <bit>
#include <cstring>

#include "../common.h"
#if defined(FASTNET_EMULATION)
#include "../emulation/device.h"  // the same kernels on the host, in tests
#endif

namespace fastnet {

inline constexpr int kWarp = 32;

// ---------------------------------------------------------------------------------------------
// Host side

#if defined(FASTNET_EMULATION)

class OnDeviceOf {
 public:
  explicit OnDeviceOf(const Tensor&) {}
  cudaStream_t stream() const { return nullptr; }
};

template <class Kernel>
void allow_shared_bytes(Kernel*, size_t) {}

// Dynamic shared memory that each of `blocks` may have which share a multiprocessor, in bytes.
inline size_t shared_bytes_of(int /*blocks*/, const OnDeviceOf&) {
  return 48 * 1024;
}

#define FASTNET_CUDA_LIBRARY(library) STABLE_TORCH_LIBRARY_IMPL(fastnet_emulated, CPU, library)

#else

inline void check_cuda(cudaError_t error, const char* what) {
  check(error == cudaSuccess, what, ": ", cudaGetErrorString(error));
}

// Makes a tensor's device current while it lives, and gives torch's current stream on it.
class OnDeviceOf {
 public:
  explicit OnDeviceOf(const Tensor& tensor) : device_(tensor.get_device_index()) {
    check_cuda(cudaGetDevice(&previous_), "cudaGetDevice");
    if (device_ != previous_) check_cuda(cudaSetDevice(device_), "cudaSetDevice");
    void* stream = nullptr;
    check(aoti_torch_get_current_cuda_stream(device_, &stream) == 0,
          "fastnet: torch gave no CUDA stream for device ", device_);
    stream_ = static_cast<cudaStream_t>(stream);
  }
  ~OnDeviceOf() {
    if (device_ != previous_) cudaSetDevice(previous_);
  }
  OnDeviceOf(const OnDeviceOf&) = delete;
  OnDeviceOf& operator=(const OnDeviceOf&) = delete;

  cudaStream_t stream() const { return stream_; }
  int index() const { return device_; }

 private:
  int device_;
  int previous_ = 0;
  cudaStream_t stream_ = nullptr;
};

// More than 48 KB of dynamic shared memory a kernel has only where it is allowed to.
template <class Kernel>
void allow_shared_bytes(Kernel* kernel, size_t bytes) {
  check_cuda(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize,
                                  static_cast<int>(bytes)),
             "fastnet: cudaFuncSetAttribute");
}

// Dynamic shared memory that each of `blocks` may have which share a multiprocessor, in bytes. The
// driver has a part of every block's, and what is static is left some.
inline size_t shared_bytes_of(int blocks, const OnDeviceOf& device) {
  constexpr int kOthers = 2048;
  int all = 0, most = 0;
  check_cuda(
      cudaDeviceGetAttribute(&all, cudaDevAttrMaxSharedMemoryPerMultiprocessor, device.index()),
      "cudaDeviceGetAttribute");
  check_cuda(cudaDeviceGetAttribute(&most, cudaDevAttrMaxSharedMemoryPerBlockOptin, device.index()),
             "cudaDeviceGetAttribute");
  return static_cast<size_t>(std::max(0, std::min(all / blocks, most) - kOthers));
}

// Where kernels are launched, but for those of clusters (cluster.cuh).
template <class... Parameters, class... Arguments>
void launch(void (*kernel)(Parameters...), dim3 grid, dim3 block, size_t shared_bytes,
            cudaStream_t stream, Arguments... arguments) {
  kernel<<<grid, block, shared_bytes, stream>>>(static_cast<Parameters>(arguments)...);
  check_cuda(cudaGetLastError(), "fastnet: kernel launch failed");
}

// Dynamic shared memory: FASTNET_DYNAMIC_SHARED(float, tile); then tile[i].
#define FASTNET_DYNAMIC_SHARED(type, name)                              \
  extern __shared__ __align__(16) unsigned char fastnet_shared_bytes[]; \
  type* const name = reinterpret_cast<type*>(fastnet_shared_bytes)

#define FASTNET_CUDA_LIBRARY(library) STABLE_TORCH_LIBRARY_IMPL(fastnet, CUDA, library)

#endif

inline unsigned blocks_for(int64_t items, int64_t per_block) {
  return static_cast<unsigned>((items + per_block - 1) / per_block);
}

// The element type that kernels see for each of torch's.
template <class T>
struct DeviceType {
  using type = T;
};
template <>
struct DeviceType<torch::headeronly::BFloat16> {
  using type = __nv_bfloat16;
};
template <>
struct DeviceType<torch::headeronly::Half> {
  using type = __half;
};
template <class T>
using device_t = typename DeviceType<T>::type;

template <class T>
const device_t<T>* data(const Tensor& tensor) {
  return static_cast<const device_t<T>*>(tensor.const_data_ptr());
}
template <class T>
device_t<T>* mutable_data(const Tensor& tensor) {
  return static_cast<device_t<T>*>(tensor.mutable_data_ptr());
}

// ---------------------------------------------------------------------------------------------
// Device side

__device__ __forceinline__ float widen(float value) {
  return value;
}
__device__ __forceinline__ double widen(double value) {
  return value;
}
__device__ __forceinline__ float widen(__nv_bfloat16 value) {
  return __bfloat162float(value);
}
__device__ __forceinline__ float widen(__half value) {
  return __half2float(value);
}

__device__ __forceinline__ void narrow(float value, float* to) {
  *to = value;
}
__device__ __forceinline__ void narrow(double value, double* to) {
  *to = value;
}
__device__ __forceinline__ void narrow(float value, __nv_bfloat16* to) {
  *to = __float2bfloat16(value);
}
__device__ __forceinline__ void narrow(float value, __half* to) {
  *to = __float2half(value);
}

// What a thread moves to and from memory at once, at best.
inline constexpr int kVectorBytes = 16;

// Elements that are loaded and stored together.
template <class T, int kCount>
struct alignas(sizeof(T) * kCount) Pack {
  T elements[kCount];
};

// A pack in the accumulate type, and back. Elements of two bytes go two at a time: of a register
// with two bfloat16, each is widened by one instruction, and two are narrowed by one.
template <class T, int kCount>
__device__ __forceinline__ void widen(const Pack<T, kCount>& pack, acc_t<T> (&values)[kCount]) {
  if constexpr (std::is_same_v<T, __nv_bfloat16> && kCount % 2 == 0) {
#pragma unroll
    for (int i = 0; i < kCount; i += 2) {
      uint32_t two;
      std::memcpy(&two, &pack.elements[i], sizeof two);
      values[i] = std::bit_cast<float>(two << 16);
      values[i + 1] = std::bit_cast<float>(two & 0xffff0000u);
    }
  } else {
#pragma unroll
    for (int i = 0; i < kCount; ++i) values[i] = widen(pack.elements[i]);
  }
}

template <class T, int kCount>
__device__ __forceinline__ void narrow(const acc_t<T> (&values)[kCount], Pack<T, kCount>* pack) {
  if constexpr (sizeof(T) == 2 && kCount % 2 == 0) {
#pragma unroll
    for (int i = 0; i < kCount; i += 2) {
      if constexpr (std::is_same_v<T, __nv_bfloat16>) {
        const __nv_bfloat162 two = __floats2bfloat162_rn(values[i], values[i + 1]);
        std::memcpy(static_cast<void*>(&pack->elements[i]), &two, sizeof two);
      } else {
        const __half2 two = __floats2half2_rn(values[i], values[i + 1]);
        std::memcpy(static_cast<void*>(&pack->elements[i]), &two, sizeof two);
      }
    }
  } else {
#pragma unroll
    for (int i = 0; i < kCount; ++i) narrow(values[i], &pack->elements[i]);
  }
}

// Stores a pack, which must be aligned there, by one instruction where it is kVectorBytes: of an
// assignment the compiler may make a store for every word.
template <class T, int kCount>
__device__ __forceinline__ void store(const Pack<T, kCount>& pack, T* to) {
#if defined(__CUDA_ARCH__)
  if constexpr (sizeof pack == sizeof(uint4)) {
    uint4 words;
    std::memcpy(&words, &pack, sizeof words);
    asm volatile("st.global.v4.u32 [%0], {%1, %2, %3, %4};" ::"l"(__cvta_generic_to_global(to)),
                 "r"(words.x), "r"(words.y), "r"(words.z), "r"(words.w)
                 : "memory");
    return;
  }
#endif
  *reinterpret_cast<Pack<T, kCount>*>(to) = pack;
}

// Stops the kernel, as torch's own operators do: the next call on the card reports a device-side
// assertion. (assert() itself is compiled out of release builds.)
__device__ __forceinline__ void device_assert(bool holds, const char* what) {
  if (!holds) __assert_fail(what, __FILE__, __LINE__, __func__);
}

// Brings a line on its way to the second-level cache.
__device__ __forceinline__ void prefetch([[maybe_unused]] const void* address) {
#if defined(__CUDA_ARCH__)
  asm volatile("prefetch.global.L2 [%0];" ::"l"(address));
#endif
}

// Sixteen bytes from global to shared memory, both aligned, without a way through registers: they
// are there for the thread that asked for them after wait_for_copies().
__device__ __forceinline__ void copy_async(void* shared, const void* global) {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 800
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16;" ::"r"(
                   static_cast<unsigned>(__cvta_generic_to_shared(shared))),
               "l"(__cvta_generic_to_global(global))
               : "memory");
#else
  struct alignas(kVectorBytes) Bytes {
    unsigned char of[kVectorBytes];
  };
  *static_cast<Bytes*>(shared) = *static_cast<const Bytes*>(global);
#endif
}

__device__ __forceinline__ void wait_for_copies() {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 800
  asm volatile("cp.async.wait_all;" ::: "memory");
#endif
}

// The sum over a warp, in every lane. The order of additions is fixed.
template <class A>
__device__ __forceinline__ A warp_sum(A value) {
#pragma unroll
  for (int offset = kWarp / 2; offset > 0; offset /= 2) {
    value += __shfl_xor_sync(0xffffffffu, value, offset);
  }
  return value;
}

}  // namespace fastnet
