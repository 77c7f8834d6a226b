#include "isa.h"

#include <cstdlib>
#include <string_view>

#if defined(__x86_64__)
#include <cpuid.h>
#endif

namespace fastnet {
namespace {

struct Cpu {
  Isa isa = Isa::baseline;
  bool has_bfloat16 = false, has_bfloat16_tiles = false, prefers_onednn = false;
  bool multiplies_wide = false;
};

Cpu detect() {
  Cpu cpu;
#if defined(__x86_64__)
  const char* named = std::getenv("FASTNET_CPU_ISA");
  const std::string_view limit = named ? named : "";
  __builtin_cpu_init();
  const bool has_avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
  const bool has_avx512 = has_avx2 && __builtin_cpu_supports("avx512f") &&
                          __builtin_cpu_supports("avx512bw") &&
                          __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq");
  if (has_avx2 && limit != "baseline") cpu.isa = Isa::avx2;
  if (!has_avx512 || limit == "baseline" || limit == "avx2") return cpu;
  cpu.isa = Isa::avx512;

  cpu.has_bfloat16 = __builtin_cpu_supports("avx512bf16");
  unsigned a, b, c, features = 0;
  constexpr unsigned kAmxBfloat16 = 1u << 22;
  cpu.has_bfloat16_tiles = cpu.has_bfloat16 && __get_cpuid_count(7, 0, &a, &b, &c, &features) &&
                           (features & kAmxBfloat16);
  unsigned model = 0, d;
  __get_cpuid(1, &model, &b, &c, &d);
  const unsigned family = (model >> 8 & 0xf) + (model >> 20 & 0xff);
  constexpr unsigned kZen5 = 26;
  cpu.multiplies_wide = !__builtin_cpu_is("amd") || family >= kZen5;
  cpu.prefers_onednn = __builtin_cpu_is("amd") && family >= kZen5;
#endif
  return cpu;
}

const Cpu detected = detect();

}  // namespace

bool cpu_has_bfloat16() {
  return detected.has_bfloat16;
}

bool cpu_has_bfloat16_tiles() {
  return detected.has_bfloat16_tiles;
}

bool cpu_prefers_onednn() {
  return detected.prefers_onednn;
}

bool cpu_multiplies_wide() {
  return detected.multiplies_wide;
}

Isa cpu_isa() {
  return detected.isa;
}

const char* cpu_isa_name() {
  switch (detected.isa) {
    case Isa::avx512:
      return "avx512";
    case Isa::avx2:
      return "avx2";
    default:
      return "baseline";
  }
}

}  // namespace fastnet
