// The extension module: registers the schemas, and tells what this build is.

#include "cpu/isa.h"
#include "cpu/ops.h"
#include "schemas.h"

// Some versions of torch have a pybind11 that refuses to be compiled for the stable ABI, though it
// knows nothing of torch. What is above has been compiled for it.
#undef TORCH_TARGET_VERSION
#include <pybind11/pybind11.h>

STABLE_TORCH_LIBRARY(fastnet, library) {
  fastnet::define_schemas(library);
}

namespace {

#define FASTNET_TEXT_OF(value) #value
#define FASTNET_TEXT(value) FASTNET_TEXT_OF(value)

pybind11::dict build_info() {
  pybind11::dict info;
  info["version"] = FASTNET_TEXT(FASTNET_VERSION);
  info["torch_built_with"] = FASTNET_TEXT(FASTNET_TORCH_VERSION);
  info["torch_minimum"] = FASTNET_TEXT(FASTNET_TORCH_MINIMUM);
#if defined(__clang__)
  info["compiler"] = "clang " __clang_version__;
#else
  info["compiler"] = "gcc " __VERSION__;
#endif
  info["cpu_isa"] = fastnet::cpu_isa_name();
  info["cpu_products"] = fastnet::cpu_prefers_onednn() ? "oneDNN" : "torch";
#if defined(FASTNET_CUDA_VERSION)
  info["cuda_version"] = FASTNET_TEXT(FASTNET_CUDA_VERSION);
  info["cuda_architectures"] = FASTNET_TEXT(FASTNET_CUDA_ARCHITECTURES);
#else
  info["cuda_version"] = pybind11::none();
  info["cuda_architectures"] = pybind11::none();
#endif
  return info;
}

constexpr fastnet::cpu::Ops kCpuOps{};

}  // namespace

PYBIND11_MODULE(_C, module) {
  module.doc() = "fastnet's operator schemas and CPU kernels, registered as torch.ops.fastnet.*";
  module.def("build_info", &build_info,
             "What this build is: versions, compiler, instruction set, CUDA architectures.");
  module.attr("cpu_ops") = pybind11::capsule(&kCpuOps, fastnet::cpu::kOpsCapsule);
}
