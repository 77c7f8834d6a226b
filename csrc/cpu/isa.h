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

// Whether it has a unit that multiplies whole tiles of bfloat16 (AMX).
bool cpu_has_bfloat16_tiles();

// Whether torch has a faster product of float32 matrices than its own choice. MKL, which it takes,
// computes with half of a vector on AMD's processors, oneDNN with all of it; from Zen 5 on the
// arithmetic units are as wide, too.
bool cpu_prefers_onednn();

// Whether vectors of 512 bits are used, and multiplied at once: then two multiplications take as
// long as two loads, and a loop that loads a vector for each is bound by its loads. AMD's
// processors before Zen 5 multiply in two passes.
bool cpu_multiplies_wide();

// How the kernels see a bfloat16 in memory.
struct bfloat16 {
  uint16_t bits;
};

}  // namespace fastnet
