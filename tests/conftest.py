from __future__ import annotations

import functools
import importlib
import os
from pathlib import Path

import pytest

# Of processes that run tests side by side each has threads for all cores: one that waits must not
# keep a core from another's. Read when torch is loaded.
if "PYTEST_XDIST_WORKER" in os.environ:
    os.environ.setdefault("OMP_WAIT_POLICY", "passive")

import torch
from hypothesis import settings

settings.register_profile("fastnet", deadline=None, max_examples=60, derandomize=True)
settings.load_profile("fastnet")
# On a GPU the libraries, too, are to sum in float32, of products that are not rounded.
torch.backends.cuda.matmul.allow_bf16_reduced_precision_reduction = False
torch.backends.cuda.matmul.allow_fp16_reduced_precision_reduction = False
torch.backends.cudnn.allow_tf32 = False


def pytest_report_header() -> str:
    import fastnet

    return f"fastnet: {fastnet.build_info()}"


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


@pytest.fixture(autouse=True)
def _flags_can_be_set(monkeypatch) -> None:
    """torch.testing._internal forbids it to the whole process, in which other tests come later."""
    its_own = torch.backends.flags_frozen.__globals__  # torch.backends itself is a proxy
    monkeypatch.setitem(its_own, "__allow_nonbracketed_mutation_flag", True)


EMULATED = Path(__file__).parent.parent / "build" / "emulation"
FUSED_OPS = ("linear_relu", "cross_entropy", "conv_relu_pool")


def raw_ops(namespace: str):
    """(Python module, name of the raw op there, its qualified name) of every raw op."""
    for op in FUSED_OPS:
        module = importlib.import_module(f"fastnet.ops.{op}")
        for fake in [name for name in vars(module) if name.startswith("fake_")]:
            part = fake.removeprefix("fake")
            base, overload = (part.removesuffix("_out"), "out") if "_out" in part else (part, "")
            yield module, part, f"{namespace}::{op}{base}" + (f".{overload}" if overload else "")


@functools.cache
def load_emulated() -> bool:
    """Registers the CUDA kernels, compiled for the host, as torch.ops.fastnet_emulated."""
    library = EMULATED / os.environ.get("FASTNET_EMULATION", "plain") / "library.so"
    if not library.exists():
        return False
    torch.ops.load_library(str(library))
    for module, part, name in raw_ops("fastnet_emulated"):
        torch.library.register_fake(name, getattr(module, f"fake{part}"))
    return True


class Device(str):
    """Where tensors live ("cpu" or "cuda"), and whose kernels compute: `ops` are the raw ones."""

    name: str
    dtypes: tuple[torch.dtype, ...]
    ops: object


@pytest.fixture(params=["cpu", "emulated", "cuda"])
def device(request, monkeypatch) -> Device:
    """The CPU kernels; the CUDA kernels' own source run on the host; the CUDA kernels on a GPU."""
    name = request.param
    device = Device("cuda" if name == "cuda" else "cpu")
    device.name = name
    device.dtypes = (torch.float32, torch.float64, torch.bfloat16)
    device.ops = torch.ops.fastnet
    if name == "cuda" and not torch.cuda.is_available():
        pytest.skip("no NVIDIA GPU here")
    if name == "emulated":
        if not load_emulated():
            pytest.skip("`make emulation` builds what this needs")
        import fastnet

        device.ops = torch.ops.fastnet_emulated
        for module, part, name in raw_ops("fastnet_emulated"):
            packet, _, overload = name.partition("::")[2].partition(".")
            raw = getattr(getattr(device.ops, packet), overload or "default")
            monkeypatch.setattr(module, part, raw, raising=False)  # some are called from C++ only
        monkeypatch.setattr(fastnet._library, "NODES", None)  # they call the real ones
        # As on a GPU.
        monkeypatch.setattr(fastnet.ops.cross_entropy, "_makes_gradient", lambda *_: False)
        half = fastnet.functional._CPU_DTYPES | {torch.float16}
        monkeypatch.setattr(fastnet.functional, "_CPU_DTYPES", half)
    if name != "cpu":
        device.dtypes += (torch.float16,)
    return device


@pytest.fixture(params=["C++", "Python"])
def nodes(request, monkeypatch) -> None:
    """Nodes of autograd's graph in C++, then those in Python, small calls' too."""
    if request.param == "Python":
        import fastnet

        monkeypatch.setattr(fastnet._library, "NODES", None)
        monkeypatch.setattr(fastnet.functional, "SMALL_LOGITS", 0)
