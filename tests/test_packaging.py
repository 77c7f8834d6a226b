"""What the build finds, and what it says when it cannot go on."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from conftest import raw_ops
from torch.utils import cpp_extension

import fastnet
from fastnet import _library

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT / "build_backend"))
import cuda_toolkit  # noqa: E402
import fastnet_build  # noqa: E402


def fake_nvcc(folder: Path, home: Path, version: str = "13.0") -> Path:
    """A script that answers as nvcc does. `home` is where the real one would be."""
    folder.mkdir(parents=True, exist_ok=True)
    script = folder / "nvcc"
    script.write_text(
        "#!/bin/sh\n"
        f'case "$1" in --version) echo "Cuda compilation, release {version}, V{version}.1";;\n'
        "--list-gpu-arch) printf 'compute_75\\ncompute_80\\ncompute_90\\n';;\n"
        f'*) echo "#\\$ _HERE_={home}/bin" >&2;; esac\n'
    )
    script.chmod(0o755)
    return script


@pytest.fixture
def clean(monkeypatch):
    for variable in ("CUDA_HOME", "CUDA_PATH", "TORCH_CUDA_ARCH_LIST", "FASTNET_CUDA"):
        monkeypatch.delenv(variable, raising=False)
    monkeypatch.setenv("PATH", "/usr/bin:/bin")
    monkeypatch.setattr(cuda_toolkit, "_pypi_prefixes", list)
    return monkeypatch


def test_a_wrapper_script_on_path_leads_to_the_real_toolkit(clean, tmp_path):
    home = tmp_path / "cuda-13.0"
    (home / "bin").mkdir(parents=True)
    fake_nvcc(tmp_path / "bin", home)
    clean.setenv("PATH", f"{tmp_path / 'bin'}:/usr/bin:/bin")
    toolkit = cuda_toolkit.CudaToolkit.find()
    assert toolkit is not None
    assert (toolkit.home, toolkit.version) == (home, "13.0")


def test_cuda_home_goes_before_path(clean, tmp_path):
    for name, version in (("a", "12.8"), ("b", "13.0")):
        fake_nvcc(tmp_path / name / "bin", tmp_path / name, version)
    clean.setenv("CUDA_HOME", str(tmp_path / "a"))
    clean.setenv("PATH", f"{tmp_path / 'b' / 'bin'}:/usr/bin:/bin")
    assert cuda_toolkit.CudaToolkit.find().version == "12.8"


def test_architectures_are_those_that_the_compiler_knows(clean, tmp_path):
    fake_nvcc(tmp_path / "bin", tmp_path)
    toolkit = cuda_toolkit.CudaToolkit(tmp_path, "13.0")
    assert toolkit.architectures() == "7.5;8.0;9.0+PTX"
    clean.setenv("TORCH_CUDA_ARCH_LIST", "8.6")
    assert toolkit.architectures() == "8.6"


@pytest.mark.parametrize(
    ("named", "numbers"),
    [
        ("9.0", "9.0"),
        ("7.5;9.0+PTX", "7.5;9.0;9.0+PTX"),
        ("8.0 9.0a", "8.0;9.0a"),
        ("Ampere+Tegra;Hopper", "8.7;9.0;9.0+PTX"),
        ("12.0+PTX", "12.0;12.0+PTX"),
    ],
)
def test_a_build_records_the_numbers_that_it_compiled_for(clean, named, numbers):
    clean.setenv("TORCH_CUDA_ARCH_LIST", named)
    flags = cpp_extension._get_cuda_arch_flags()
    assert cuda_toolkit.architectures_of(flags) == numbers


def test_headers_come_from_the_prefix_of_the_compilers_version(clean, tmp_path):
    prefixes = [tmp_path / name for name in ("other", "right")]
    for prefix, number in zip(prefixes, (13020, 13000), strict=True):
        (prefix / "include" / "cccl").mkdir(parents=True)
        header = prefix / "include" / "cuda_runtime_api.h"
        header.write_text(f"#define CUDART_VERSION  {number}\n")
    clean.setattr(cuda_toolkit, "_pypi_prefixes", lambda: prefixes)
    folders = cuda_toolkit.CudaToolkit(tmp_path / "nowhere", "13.0").include_dirs
    assert folders == [str(prefixes[1] / "include")] + [
        str(prefix / "include" / "cccl") for prefix in prefixes
    ]


@pytest.mark.parametrize(
    ("torch_cuda", "asked", "available", "expected"),
    [
        ("13.0", None, True, "nvidia-cuda-nvcc==13.0.*"),
        ("13.0", "0", True, None),
        ("13.0", None, False, None),  # PyPI cannot be reached: the CPU part alone
        ("12.6", None, True, None),
        (None, None, True, None),
    ],
)
def test_compiler_from_pypi(clean, capsys, torch_cuda, asked, available, expected):
    clean.setattr(fastnet_build.CudaToolkit, "find", staticmethod(lambda: None))
    clean.setattr(fastnet_build, "_can_be_had", lambda _: available)
    clean.setattr(torch.version, "cuda", torch_cuda)
    if asked:
        clean.setenv("FASTNET_CUDA", asked)
    requirements = fastnet_build.cuda_compiler_requirements()
    assert (expected in requirements) if expected else not requirements
    said = capsys.readouterr().err
    assert said.count("\n") == (1 if not expected and not asked and torch_cuda else 0)


def setup(*arguments: str, **environment: str) -> subprocess.CompletedProcess:
    return subprocess.run(
        [sys.executable, "setup.py", *arguments],
        cwd=ROOT,
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
    )


@pytest.mark.parametrize(
    ("environment", "words"),
    [
        ({"FASTNET_CUDA": "maybe"}, "'maybe'"),
        ({"CXX": "no-such-compiler", "PATH": "/nowhere"}, "install g++"),
        ({"FASTNET_CUDA": "1", "CUDA_HOME": "", "CUDA_PATH": "", "PATH": "/usr/bin:/bin"}, "nvcc"),
        ({"FASTNET_CUDA": "1", "TORCH_CUDA_ARCH_LIST": "Hoper"}, "'Hoper'"),
    ],
    ids=["setting", "compiler", "nvcc", "card"],
)
def test_a_build_that_cannot_be_ends_in_one_sentence(environment, words):
    if "CUDA_HOME" in environment and Path("/usr/local/cuda/bin/nvcc").exists():
        pytest.skip("this machine has a toolkit where it is always found")
    if "TORCH_CUDA_ARCH_LIST" in environment and cuda_toolkit.CudaToolkit.find() is None:
        pytest.skip("there is no nvcc")
    done = setup("--version", **environment)
    assert done.returncode != 0
    assert words in done.stderr
    assert done.stderr.strip().splitlines()[-1].startswith("fastnet: ")
    assert "Traceback" not in done.stderr


def test_a_source_distribution_can_be_built_from(tmp_path):
    """It has the backend, and what the CUDA kernels are made of, wherever it comes from."""
    done = setup("-q", "egg_info", "--egg-base", str(tmp_path), FASTNET_CUDA="0")
    assert done.returncode == 0, done.stderr
    listed = set((tmp_path / "fastnet.egg-info" / "SOURCES.txt").read_text().splitlines())
    needed = {"setup.py", "pyproject.toml", "README.md", "LICENSE"}
    for folder, pattern in (("build_backend", "*.py"), ("fastnet", "*.py"), ("csrc", "*.*")):
        needed |= {
            path.relative_to(ROOT).as_posix() for path in ROOT.glob(f"{folder}/**/{pattern}")
        }
    assert needed <= listed
    assert not [path for path in listed if "__pycache__" in path]


def test_build_info_tells_what_runs_here():
    info = fastnet.build_info()
    assert info["version"] == fastnet.__version__
    assert info["torch"] == torch.__version__
    assert info["cpu_isa"] in ("baseline", "avx2", "avx512")
    assert info["cpu_products"] in ("torch", "oneDNN")
    built_cuda = info["cuda_version"] is not None
    assert built_cuda == (info["cuda_architectures"] is not None)
    if built_cuda and torch.version.cuda:
        # The kernels register where there is no GPU too.
        assert info["cuda_status"] == "loaded"
        for _, _, name in raw_ops("fastnet"):
            on_cuda = torch._C._dispatch_has_kernel_for_dispatch_key(name, "CUDA")
            assert on_cuda != ("cross_entropy_with_gradient.out" in name)  # that is the CPU's
        for name in ("mlp_train", "mlp_cluster", "cross_entropy_reads_once", "gather_pictures"):
            assert torch._C._dispatch_has_kernel_for_dispatch_key(f"fastnet::{name}", "CUDA")


@pytest.mark.parametrize(
    ("listed", "card", "is_built"),
    [
        ("9.0", (9, 0), True),
        ("7.5;9.0;9.0+PTX", (8, 6), False),  # between the two: PTX is for cards to come
        ("8.0", (8, 6), True),  # a generation's code runs on its later cards
        ("8.6", (8, 0), False),
        ("8.0;9.0", (12, 0), False),
        ("8.0;9.0;9.0+PTX", (12, 0), True),
        ("9.0a", (9, 0), True),
        ("10.0a;10.0a+PTX", (10, 3), False),  # what has an a runs on that card alone
        (None, (9, 0), False),
    ],
)
def test_cards_that_kernels_were_built_for(listed, card, is_built, monkeypatch):
    monkeypatch.setattr(_library, "build_info", lambda: {"cuda_architectures": listed})
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: card)
    assert _library.is_built_for.__wrapped__(0) == is_built


def test_vectors_that_there_are_not():
    done = subprocess.run(
        [sys.executable, "-c", "import fastnet"],
        cwd=ROOT,
        env={**os.environ, "FASTNET_CPU_ISA": "AVX2"},
        capture_output=True,
        text=True,
    )
    assert "must be one of baseline, avx2, avx512, not 'AVX2'" in done.stderr


def test_kernels_import_without_the_extras():
    program = (
        "import sys\n"
        "for name in ('torchvision', 'matplotlib', 'typer', 'tqdm', 'mlxtend'):\n"
        "    sys.modules[name] = None\n"
        "import fastnet, torch\n"
        "fastnet.Linear(4, 2, activation='relu')(torch.ones(1, 4))\n"
    )
    done = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
