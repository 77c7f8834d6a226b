// Which instruction set the CPU kernels run on.
#pragma once

#include <cstdint>

namespace fastnet {

enum class Isa { baseline, avx2, avx512 };

// The best one that the processor has, or a lesser one named by FASTNET_CPU_ISA (baseline, avx2,
// avx512), read once when the library is loaded.
Isa cpu_isa();
const char* cpu_isa_name();

// Whether the processor, as far as it is used, has instructions that multiply bfloat16.
bool cpu_has_bfloat16();

// How the kernels see a bfloat16 in memory.
struct bfloat16 {
  uint16_t bits;
};

}  // namespace fastnet
