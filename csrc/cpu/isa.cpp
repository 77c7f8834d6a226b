#include "isa.h"

#include <cstdlib>
#include <string_view>

#if defined(__x86_64__)
#include <cpuid.h>
#endif

namespace fastnet {
namespace {

Isa detect() {
#if defined(__x86_64__)
  const char* named = std::getenv("FASTNET_CPU_ISA");
  const std::string_view limit = named ? named : "";
  __builtin_cpu_init();
  const bool has_avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
  const bool has_avx512 = has_avx2 && __builtin_cpu_supports("avx512f") &&
                          __builtin_cpu_supports("avx512bw") &&
                          __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq");
  if (has_avx512 && limit != "baseline" && limit != "avx2") return Isa::avx512;
  if (has_avx2 && limit != "baseline") return Isa::avx2;
#endif
  return Isa::baseline;
}

const Isa detected = detect();

bool detect_bfloat16() {
#if defined(__x86_64__)
  __builtin_cpu_init();
  return __builtin_cpu_supports("avx512bf16");
#else
  return false;
#endif
}

const bool detected_bfloat16 = detect_bfloat16();

bool detect_bfloat16_tiles() {
#if defined(__x86_64__)
  unsigned a, b, c, features = 0;
  constexpr unsigned kAmxBfloat16 = 1u << 22;
  return __get_cpuid_count(7, 0, &a, &b, &c, &features) && (features & kAmxBfloat16);
#else
  return false;
#endif
}

const bool detected_bfloat16_tiles = detect_bfloat16_tiles();

bool detect_zen5() {
#if defined(__x86_64__)
  __builtin_cpu_init();
  unsigned model = 0, b, c, d;
  __get_cpuid(1, &model, &b, &c, &d);
  const unsigned family = (model >> 8 & 0xf) + (model >> 20 & 0xff);
  return __builtin_cpu_is("amd") && family >= 26;
#else
  return false;
#endif
}

const bool detected_zen5 = detect_zen5();

}  // namespace

bool cpu_has_bfloat16() {
  return detected_bfloat16 && detected == Isa::avx512;
}

bool cpu_has_bfloat16_tiles() {
  return detected_bfloat16_tiles && cpu_has_bfloat16();
}

bool cpu_prefers_onednn() {
  return detected_zen5 && detected == Isa::avx512;
}

Isa cpu_isa() {
  return detected;
}

const char* cpu_isa_name() {
  switch (detected) {
    case Isa::avx512:
      return "avx512";
    case Isa::avx2:
      return "avx2";
    default:
      return "baseline";
  }
}

}  // namespace fastnet
