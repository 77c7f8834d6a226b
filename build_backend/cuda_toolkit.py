"""Finding the CUDA compiler, its headers and its runtime library."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class CudaToolkit:
    """An nvcc and what belongs to it."""

    home: Path  # holds bin/nvcc
    version: str  # "13.0"

    @staticmethod
    def find() -> CudaToolkit | None:
        """The toolkit that CUDA_HOME names, else the one on PATH, else the one from PyPI."""
        for candidate in _candidates():
            toolkit = _inspect(candidate)
            if toolkit is not None:
                return toolkit
        return None

    @property
    def include_dirs(self) -> list[str]:
        """The headers, CCCL's among them.

        PyPI's toolkit can be spread over several prefixes of sys.path. All of its headers must
        come from the one whose runtime is the compiler's own version.
        """
        prefixes = [self.home, *_pypi_prefixes()]
        matching = [p for p in prefixes if _runtime_version(p / "include") == self.version]
        folders = [p / "include" for p in matching[:1]]
        folders += [p / "include" / "cccl" for p in prefixes]
        return [str(folder) for folder in folders if folder.is_dir()]

    @property
    def runtime_library(self) -> Path | None:
        """libcudart of this version's major; torch's own copy where torch brings one."""
        name = f"libcudart.so.{self.version.split('.')[0]}"
        for prefix in [*_pypi_prefixes(), self.home]:
            for folder in ("lib", "lib64"):
                if (prefix / folder / name).exists():
                    return prefix / folder / name
        return None

    def architectures(self) -> str:
        """What to compile for, in the form of TORCH_CUDA_ARCH_LIST, which overrides it.

        From Turing on, one for each generation; the last one also as PTX, for cards to come.
        """
        named = os.environ.get("TORCH_CUDA_ARCH_LIST")
        if named:
            return named
        listed = subprocess.run(
            [self.home / "bin" / "nvcc", "--list-gpu-arch"], capture_output=True, text=True
        ).stdout
        known = {int(number) for number in re.findall(r"compute_(\d+)", listed)}
        wanted = [n for n in (75, 80, 86, 90, 100, 120) if n in known]
        return ";".join(f"{n // 10}.{n % 10}" for n in wanted) + "+PTX"


def architectures_of(flags: list[str]) -> str:
    """The numbers that nvcc's flags compile for: "7.5;9.0;9.0+PTX". Of TORCH_CUDA_ARCH_LIST, which
    may hold names ("Hopper", "native"), torch makes such flags."""
    codes = re.findall(r"code=(sm|compute)_(\d+)(\d)(\w*)", " ".join(flags))
    codes.sort(key=lambda code: (int(code[1] + code[2]), code[0] == "compute"))
    return ";".join(
        f"{major}.{minor}{suffix}" + ("+PTX" if kind == "compute" else "")
        for kind, major, minor, suffix in codes
    )


def emulation_include_dirs() -> list[str]:
    """Headers that the emulation compiles with: PyPI's, or a toolkit's where those lack some."""
    for include in [prefix / "include" for prefix in _pypi_prefixes()]:
        if (include / "crt" / "host_defines.h").exists() and (include / "nv" / "target").exists():
            return [str(include)]
    toolkit = CudaToolkit.find()
    return toolkit.include_dirs if toolkit else []


def _candidates():
    for variable in ("CUDA_HOME", "CUDA_PATH"):
        if os.environ.get(variable):
            yield Path(os.environ[variable]) / "bin" / "nvcc"
    on_path = shutil.which("nvcc")
    if on_path:
        yield Path(on_path)
    yield Path("/usr/local/cuda/bin/nvcc")
    for prefix in _pypi_prefixes():
        yield prefix / "bin" / "nvcc"


def _pypi_prefixes() -> list[Path]:
    """Where PyPI's packages for CUDA 13 and later put bin, include and lib."""
    folders = (Path(entry, "nvidia") for entry in sys.path)
    return [prefix for folder in folders for prefix in sorted(folder.glob("cu[0-9]*"))]


def _inspect(nvcc: Path) -> CudaToolkit | None:
    if not nvcc.exists():
        return None
    try:
        version = subprocess.run([nvcc, "--version"], capture_output=True, text=True).stdout
        plan = subprocess.run([nvcc, "--dryrun", "none.cu"], capture_output=True, text=True).stderr
    except OSError:
        return None
    release = re.search(r"release (\d+\.\d+)", version)
    # What is on PATH may be a script that calls the compiler elsewhere; the compiler itself knows.
    here = re.search(r"_HERE_=(.+)", plan)
    if release is None or here is None:
        return None
    return CudaToolkit(Path(here.group(1).strip()).parent, release.group(1))


def _runtime_version(include: Path) -> str | None:
    header = include / "cuda_runtime_api.h"
    if not header.exists():
        return None
    found = re.search(r"#define\s+CUDART_VERSION\s+(\d+)", header.read_text(errors="replace"))
    if found is None:
        return None
    number = int(found.group(1))
    return f"{number // 1000}.{number % 1000 // 10}"


if __name__ == "__main__":
    print(" ".join(f"-isystem {folder}" for folder in emulation_include_dirs()))
