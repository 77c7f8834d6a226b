// Compiles the loops in FASTNET_KERNELS once per instruction set, each in a namespace of its own,
// so that one library runs on any processor and uses what that processor has:
//
//   #define FASTNET_KERNELS "linear_relu_kernels.h"
//   #include "foreach_isa.h"
//   ...
//   FASTNET_BEST_ISA(forward_kernel<float>(x, w, ...));
//
// Kernels must call nothing but what is compiled along with them: an inline function of a library
// header, compiled for AVX2 here and for a plain processor elsewhere, is merged into one by the
// linker, and then crashes on the processor that lacks AVX2.

#include "isa.h"

namespace fastnet::baseline {
inline constexpr int kVectorBytes = 16;
#if defined(__aarch64__)
inline constexpr int kRegisters = 32;
#else
inline constexpr int kRegisters = 16;
#endif
#include "simd.h"

#include FASTNET_KERNELS
}  // namespace fastnet::baseline

#if defined(__x86_64__)

#if defined(__clang__)
#pragma clang attribute push(__attribute__((target("avx2,fma"))), apply_to = function)
#else
#pragma GCC push_options
#pragma GCC target("avx2,fma")
#endif
namespace fastnet::avx2 {
inline constexpr int kVectorBytes = 32;
inline constexpr int kRegisters = 16;
#include "simd.h"

#include FASTNET_KERNELS
}  // namespace fastnet::avx2
#if defined(__clang__)
#pragma clang attribute pop
#pragma clang attribute push( \
    __attribute__((target("avx2,fma,avx512f,avx512bw,avx512vl,avx512dq"))), apply_to = function)
#else
#pragma GCC pop_options
#pragma GCC push_options
#pragma GCC target("avx2,fma,avx512f,avx512bw,avx512vl,avx512dq")
#endif
namespace fastnet::avx512 {
inline constexpr int kVectorBytes = 64;
inline constexpr int kRegisters = 32;
#include "simd.h"

#include FASTNET_KERNELS
}  // namespace fastnet::avx512
#if defined(__clang__)
#pragma clang attribute pop
#else
#pragma GCC pop_options
#endif

#define FASTNET_BEST_ISA(...)                                           \
  (::fastnet::cpu_isa() == ::fastnet::Isa::avx512 ? avx512::__VA_ARGS__ \
   : ::fastnet::cpu_isa() == ::fastnet::Isa::avx2 ? avx2::__VA_ARGS__   \
                                                  : baseline::__VA_ARGS__)

#else

#define FASTNET_BEST_ISA(...) (baseline::__VA_ARGS__)

#endif

#undef FASTNET_INLINE
#undef FASTNET_UNROLL
#undef FASTNET_KERNELS
