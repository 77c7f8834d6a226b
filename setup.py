"""Builds fastnet._C (schemas, CPU kernels), fastnet._nodes (autograd) and, where there is an nvcc,
fastnet._C_cuda.

FASTNET_CUDA=0 leaves the CUDA kernels out, FASTNET_CUDA=1 insists on them;
TORCH_CUDA_ARCH_LIST says which GPUs to compile for, MAX_JOBS how many compilers run at a time.
"""

from __future__ import annotations

import os
import re
import shutil
import sys
import sysconfig
from pathlib import Path

from setuptools import setup

ROOT = Path(__file__).parent
sys.path.insert(0, str(ROOT / "build_backend"))
from cuda_toolkit import CudaToolkit, architectures_of  # noqa: E402

# The oldest torch whose stable ABI has all that the kernels call: one build serves every torch
# from this one on.
TORCH_MINIMUM = (2, 10)
OLDEST = ".".join(map(str, TORCH_MINIMUM))


def fail(sentence: str) -> None:
    raise SystemExit(f"fastnet: {sentence}")


try:
    import torch
    from torch.utils import cpp_extension
except ImportError as missing:
    fail(f"building needs torch {OLDEST} or later ({missing}).")

if tuple(int(part) for part in re.findall(r"\d+", torch.__version__)[:2]) < TORCH_MINIMUM:
    fail(f"building needs torch {OLDEST} or later, not {torch.__version__}.")

if not any(
    shutil.which(name) for name in (os.environ.get("CXX", "c++").split()[0], "g++", "clang++")
):
    fail("building needs a C++20 compiler, and there is none: install g++ (or set CXX).")

if not Path(sysconfig.get_paths()["include"], "Python.h").exists():
    fail("building needs Python's headers: install your system's python3-dev package.")

VERSION = re.search(r'"(.+)"', (ROOT / "fastnet" / "_version.py").read_text()).group(1)


def find_cuda() -> CudaToolkit | None:
    wanted = os.environ.get("FASTNET_CUDA", "")
    if wanted not in ("", "0", "1"):
        fail(f"FASTNET_CUDA must be 0 or 1, not {wanted!r}.")
    if wanted == "0":
        return None
    toolkit = CudaToolkit.find()
    if toolkit is None and wanted == "1":
        fail("FASTNET_CUDA=1, but no nvcc was found: set CUDA_HOME, or install CUDA's toolkit.")
    torch_cuda = torch.version.cuda
    if toolkit and torch_cuda and toolkit.version.split(".")[0] != torch_cuda.split(".")[0]:
        sentence = f"nvcc is for CUDA {toolkit.version}, torch for CUDA {torch_cuda}"
        if wanted == "1":
            fail(f"{sentence}: set CUDA_HOME to a toolkit that matches.")
        print(f"fastnet: {sentence}; building without CUDA kernels.", file=sys.stderr)
        return None
    return toolkit


cuda = find_cuda()

macros = [
    ("TORCH_TARGET_VERSION", "0x{:02x}{:02x}000000000000".format(*TORCH_MINIMUM)),
    ("FASTNET_VERSION", VERSION),
    ("FASTNET_TORCH_VERSION", torch.__version__),
    ("FASTNET_TORCH_MINIMUM", OLDEST),
]
cxx_flags = ["-std=c++20", "-O3", "-g0", "-fvisibility=hidden", "-ffp-contract=fast", "-Wall"]
# Wide vectors are only ever passed between functions that are inlined.
cxx_flags += ["-Wno-psabi", "-Wno-ignored-attributes", "-Wno-unknown-pragmas"]


def headers() -> list[str]:
    return [str(p.relative_to(ROOT)) for p in ROOT.glob("csrc/**/*") if p.suffix in (".h", ".cuh")]


def sources(pattern: str) -> list[str]:
    return sorted(str(path.relative_to(ROOT)) for path in ROOT.glob(pattern))


if cuda:
    os.environ["TORCH_CUDA_ARCH_LIST"] = architectures = cuda.architectures()
    try:
        flags = cpp_extension._get_cuda_arch_flags()
    except (ValueError, IndexError):  # an unknown name; "native" where there is no card
        fail(f"TORCH_CUDA_ARCH_LIST={architectures!r} names cards that are unknown or not here.")
    macros += [
        ("FASTNET_CUDA_VERSION", cuda.version),
        ("FASTNET_CUDA_ARCHITECTURES", architectures_of(flags)),
    ]
    # torch guesses this from PATH, and guesses wrong where nvcc there is a script.
    cpp_extension.CUDA_HOME = str(cuda.home)

extensions = [
    cpp_extension.CppExtension(
        "fastnet._C",
        ["csrc/library.cpp", *sources("csrc/cpu/*.cpp")],
        define_macros=macros,
        extra_compile_args={"cxx": cxx_flags},
        depends=headers(),
    ),
    # Of torch's whole C++ interface, and so for this torch only.
    cpp_extension.CppExtension(
        "fastnet._nodes",
        sources("csrc/autograd/*.cpp"),
        extra_compile_args={"cxx": cxx_flags},
        depends=headers(),
    ),
]
if cuda:
    runtime = cuda.runtime_library
    extensions.append(
        cpp_extension.CppExtension(
            "fastnet._C_cuda",
            sources("csrc/cuda/*.cu"),
            include_dirs=cuda.include_dirs,
            define_macros=[*macros, ("USE_CUDA", None)],
            extra_compile_args={
                "cxx": cxx_flags,
                "nvcc": [
                    "-std=c++20",
                    "-O3",
                    "-Xcompiler",
                    "-fvisibility=hidden",
                    "--threads",
                    "2",
                ],
            },
            # By its full name: PyPI's runtime lacks the unversioned one. Where torch is a CPU
            # build its CUDA library cannot be linked; _library.py loads it first.
            extra_link_args=[str(runtime)] if runtime else [],
            depends=headers(),
        )
    )


class BuildExtension(cpp_extension.BuildExtension):
    """Keeps object files in one lasting folder, so that a change recompiles what it touched."""

    def finalize_options(self) -> None:
        super().finalize_options()
        self.build_temp = str(
            ROOT / "build" / f"{sys.implementation.cache_tag}-{torch.__version__}"
        )

    def run(self) -> None:
        try:
            super().run()
        except Exception as error:
            # ninja has printed the compiler's own words above.
            fail(f"compiling the kernels failed ({error}); the compiler's message stands above.")


setup(
    ext_modules=extensions,
    cmdclass={
        "build_ext": BuildExtension.with_options(use_ninja=shutil.which("ninja") is not None)
    },
)
