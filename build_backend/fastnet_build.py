"""The build backend: setuptools, and a CUDA compiler from PyPI where the machine has none.

pip asks `get_requires_for_build_wheel` after torch stands in the build environment, so the compiler
can be chosen to match that torch.
"""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
import sysconfig
from pathlib import Path

from setuptools import build_meta
from setuptools.build_meta import *  # noqa: F403  every hook that is not replaced below

sys.path.insert(0, str(Path(__file__).parent))
from cuda_toolkit import CudaToolkit


def cuda_compiler_requirements() -> list[str]:
    """The PyPI packages that make up an nvcc for the torch at hand; empty where none is wanted."""
    if os.environ.get("FASTNET_CUDA") == "0" or CudaToolkit.find() is not None:
        return []
    import torch

    if torch.version.cuda is None:
        return []
    version = ".".join(torch.version.cuda.split(".")[:2])
    if int(version.split(".")[0]) < 13:
        _say(f"PyPI has no complete nvcc for CUDA {version}; building without CUDA kernels.")
        return []
    matched = ("nvidia-cuda-nvcc", "nvidia-cuda-crt", "nvidia-nvvm", "nvidia-cuda-runtime")
    requirements = [f"{package}=={version}.*" for package in matched] + ["nvidia-cuda-cccl"]
    if not _can_be_had(requirements):
        _say(f"No nvcc here, nor one for CUDA {version} on PyPI; building without CUDA kernels.")
        return []
    return requirements


def get_requires_for_build_wheel(config_settings=None) -> list[str]:
    return build_meta.get_requires_for_build_wheel(config_settings) + cuda_compiler_requirements()


def get_requires_for_build_editable(config_settings=None) -> list[str]:
    return (
        build_meta.get_requires_for_build_editable(config_settings) + cuda_compiler_requirements()
    )


def _can_be_had(requirements: list[str]) -> bool:
    """Whether pip would find them. Without this, one package missing would fail the whole build."""
    # The build environment hides pip; the interpreter that it was made from has one.
    pip = Path(sysconfig.get_paths()["purelib"]) / "pip"
    if not pip.is_dir():
        spec = importlib.util.find_spec("pip")
        if spec is None or spec.origin is None:
            return True  # another installer is at work: leave it to that one
        pip = Path(spec.origin).parent
    command = [sys.executable, str(pip), "install", "--dry-run", "--quiet", "--no-deps"]
    environment = {**os.environ, "PYTHONPATH": str(pip.parent)}
    found = subprocess.run([*command, *requirements], env=environment, capture_output=True)
    return found.returncode == 0


def _say(sentence: str) -> None:
    print(f"fastnet: {sentence}", file=sys.stderr)
