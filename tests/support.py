"""What the op tests share: tolerances, and comparison with a float64 reference."""

from __future__ import annotations

import contextlib
import functools
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

import fastnet

# Largest error allowed against the float64 reference, relative to the largest value in the result:
# a few roundings of the result's own type. Sums run in float32 or wider.
TOLERANCES = {
    torch.float64: 1e-13,
    torch.float32: 5e-6,
    torch.bfloat16: 1e-2,
    torch.float16: 2e-3,
}

# Whether the processor multiplies bfloat16 itself, and has a unit for matrices of it: where kernels
# of our own leave some, or most, to the library.
MULTIPLIES_BFLOAT16, MULTIPLIES_TILES = (
    fastnet.build_info()["cpu_isa"] == "avx512" and flag in Path("/proc/cpuinfo").read_text()
    for flag in ("avx512_bf16", "amx_bf16")
)


@contextlib.contextmanager
def threads(count: int) -> Iterator[None]:
    """With so many of torch's threads."""
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def assert_near(
    actual: torch.Tensor, reference: torch.Tensor, dtype: torch.dtype, times: float = 1
) -> None:
    """`reference` is float64; infinities and NaN must stand where it has them. `times` is how much
    more than the tolerance is allowed."""
    assert actual.shape == reference.shape
    actual = actual.detach().to("cpu", torch.float64)
    reference = reference.detach().cpu()
    finite = reference.isfinite()
    torch.testing.assert_close(actual[~finite], reference[~finite], equal_nan=True)
    if not finite.any():
        return
    scale = reference[finite].abs().max().clamp_min(1e-30)
    error = (actual[finite] - reference[finite]).abs().max() / scale
    assert error <= times * TOLERANCES[dtype], f"error {error:.3g} at {dtype}"


def run_on_isa(isa: str, file: str, select: str) -> None:
    """Runs tests on one instruction set's kernels: the library picks them when it is loaded, so
    each needs a process of its own."""
    environment = {**os.environ, "FASTNET_CPU_ISA": isa}

    def run(*arguments):
        return subprocess.run(
            [sys.executable, *arguments], env=environment, capture_output=True, text=True
        )

    got = run("-c", "import fastnet; print(fastnet.build_info()['cpu_isa'])").stdout.strip()
    if got != isa:
        pytest.skip(f"this processor has no {isa}")
    tests = run("-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", file, "-k", select)
    assert tests.returncode == 0, tests.stdout[-3000:]
    assert " passed" in tests.stdout


def spied(function, called: list[str]):
    """The function, which adds its name to `called` whenever it is."""

    @functools.wraps(function)
    def spy(*args, **kwargs):
        called.append(function.__name__)
        return function(*args, **kwargs)

    return spy


def assert_kernel_stops(device, program: str, words: str) -> None:
    """Of the CUDA kernels, in a process of its own, which ends there: nothing can be done on that
    card afterwards. The program has `ops`, and `device` for its tensors."""
    if device.name == "cpu":
        pytest.skip("the CPU raises an IndexError")
    namespace = "fastnet_emulated" if device.name == "emulated" else "fastnet"
    start = f"""
import sys, torch, fastnet
sys.path.insert(0, {str(Path(__file__).parent)!r})
import conftest
assert {device.name != "emulated"} or conftest.load_emulated()
ops, device = torch.ops.{namespace}, {str(device)!r}
"""
    end = """
if device == "cuda":
    torch.cuda.synchronize()
print("went on")
"""
    run = subprocess.run(
        [sys.executable, "-c", start + program + end], capture_output=True, text=True
    )
    assert run.returncode != 0
    assert "went on" not in run.stdout
    assert words in run.stderr or "device-side assert" in run.stderr


def interruptible() -> None:
    """For `preexec_fn`: Ctrl-C reaches a process also where the tests run in the background, which
    has it ignored by all that is started there."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)


def peak_memory(setup: str, measured: str) -> int:
    """Bytes by which `measured` raises the memory of a process of its own, at its peak."""
    program = f"""
import torch, torch.nn.functional as F
from fastnet.functional import cross_entropy, linear_cross_entropy

def status(name):
    for line in open("/proc/self/status"):
        if line.startswith(name):
            return 1024 * int(line.split()[1])

{setup}
open("/proc/self/clear_refs", "w").write("5")  # the peak starts here
before = status("VmRSS")
{measured}
print(status("VmHWM") - before)
"""
    run = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    return int(run.stdout)


def same(left, right) -> bool:
    """Whether two nests of containers hold equal things, tensors bit for bit."""
    if isinstance(left, dict):
        return left.keys() == right.keys() and all(same(left[k], right[k]) for k in left)
    if isinstance(left, (list, tuple)):
        return len(left) == len(right) and all(map(same, left, right))
    return torch.equal(left, right) if isinstance(left, torch.Tensor) else left == right
