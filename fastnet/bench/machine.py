"""What the figures were measured on, and what it can do at best."""

from __future__ import annotations

import datetime
import functools
import importlib.util
import platform
import re
import shutil
import subprocess
import time
from dataclasses import dataclass
from pathlib import Path

import torch

import fastnet

ROOT = Path(__file__).parents[2]


def device() -> torch.device:
    """Where everything is timed: on the GPU where there is one."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def _device_name() -> str:
    if torch.cuda.is_available():
        return torch.cuda.get_device_name()
    name = platform.processor() or platform.machine()
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        text = cpuinfo.read_text()
        found = re.search(r"model name\s*:\s*(.+)", text)
        name = found.group(1).strip() if found else name
        family = re.search(r"cpu family\s*:\s*(\d+)", text)
        if family and not re.search(r"\d", name):  # as a virtual machine's often is: any of some
            name += f" of family {family.group(1)}"
    return f"{name}, {torch.get_num_threads()} cores, {fastnet.build_info()['cpu_isa']}"


# The GPU where there is one, else the processor and its cores: before anybody changes the number of
# threads.
DEVICE = _device_name()


def device_slug() -> str:
    """The same as a file's name."""
    return re.sub(r"[^a-z0-9]+", "-", DEVICE.lower()).strip("-")


def has(work: str, *packages: str) -> bool:
    """Whether what some work needs is installed. Where it is not, it tells."""
    missing = [name for name in packages if importlib.util.find_spec(name) is None]
    if missing:
        print(f"{work}: skipped, as {', '.join(missing)} is not installed", flush=True)
    return not missing


@functools.cache
def versions() -> dict[str, str]:
    """Where a row comes from. The commit is that of a checkout as the process began; an installed
    fastnet has none."""
    commit = ""
    if (ROOT / ".git").exists() and shutil.which("git"):
        command = ["git", "describe", "--always", "--dirty"]
        commit = subprocess.run(command, cwd=ROOT, capture_output=True, text=True).stdout.strip()
    return {
        "device": DEVICE,
        "torch": torch.__version__,
        "fastnet": fastnet.__version__,
        "commit": commit,
        "date": datetime.date.today().isoformat(),
    }


@dataclass(frozen=True)
class Limits:
    """What this machine reaches with the threads that torch has now."""

    gflops: float  # a large product of matrices
    gbs: float  # GB/s of a copy too large for any cache, reads and writes counted


def limits(dtype: torch.dtype = torch.float32) -> Limits:
    """Measured once in a process, for each dtype and number of threads. On a CPU float32 is the
    limit of half types, too: what has no instructions for them converts."""
    dtype = dtype if torch.cuda.is_available() else torch.float32
    return _limits(dtype, torch.get_num_threads())


@functools.cache
def _limits(dtype: torch.dtype, threads: int) -> Limits:  # noqa: ARG001
    where = device()
    on_gpu = where.type == "cuda"
    size = 8192 if on_gpu else 2048
    a = torch.randn(size, size, device=where).to(dtype)
    product = torch.empty_like(a)
    seconds = _fastest(lambda: torch.mm(a, a, out=product))
    source = torch.zeros(1 << (30 if on_gpu else 28), dtype=torch.uint8, device=where)
    target = torch.zeros_like(source)
    copied = _fastest(lambda: target.copy_(source))
    return Limits(2 * size**3 / seconds / 1e9, 2 * source.numel() / copied / 1e9)


def _fastest(function, seconds: float = 1.0) -> float:
    """Of the calls that go into so many seconds, the first of which warms up."""
    wait = torch.cuda.synchronize if torch.cuda.is_available() else (lambda: None)
    function()
    taken = []
    end = time.perf_counter() + seconds
    while len(taken) < 3 or time.perf_counter() < end:
        wait()
        start = time.perf_counter()
        function()
        wait()
        taken.append(time.perf_counter() - start)
    return min(taken)
