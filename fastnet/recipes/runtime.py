"""Where a training runs: the device, its precision, and which of several processes this is."""

from __future__ import annotations

import os
import time
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from datetime import timedelta

import torch
from torch import Tensor, distributed, nn
from torch.nn.parallel import DistributedDataParallel

from fastnet.errors import FastnetError

DEVICES = ("auto", "cpu", "cuda")
PRECISIONS = {"bf16": torch.bfloat16, "fp16": torch.float16}


@dataclass(frozen=True)
class Runtime:
    """Made by `start`."""

    device: torch.device
    amp: torch.dtype | None = None
    rank: int = 0
    world_size: int = 1
    local_rank: int = 0  # on this machine

    @property
    def is_first(self) -> bool:
        """Whether this process is the one that prints and writes."""
        return self.rank == 0

    def autocast(self) -> AbstractContextManager:
        return nullcontext() if self.amp is None else torch.autocast(self.device.type, self.amp)

    def scaler(self) -> torch.amp.GradScaler:
        return torch.amp.GradScaler(self.device.type, enabled=self.amp is torch.float16)

    def parallel(self, network: nn.Module) -> nn.Module:
        """What to call in a step, so that gradients become the mean over the processes."""
        if self.world_size == 1 or not any(p.requires_grad for p in network.parameters()):
            return network
        return DistributedDataParallel(network)

    def share_buffers(self, network: nn.Module) -> None:
        """Gives all processes the first one's buffers, such as the statistics of BatchNorm."""
        if self.world_size > 1:
            for buffer in network.buffers():
                distributed.broadcast(buffer, src=0)

    @contextmanager
    def in_turn(self) -> Iterator[None]:
        """On each machine one process first, then the others, who find the files that it has
        downloaded or written."""
        if self.world_size > 1 and self.local_rank > 0:
            distributed.barrier()
        yield
        if self.world_size > 1 and self.local_rank == 0:
            distributed.barrier()

    def sum(self, values: Tensor) -> Tensor:
        """The sum over the processes."""
        if self.world_size > 1:
            distributed.all_reduce(values)
        return values


# On the CPU, in float32.
ONE_PROCESS = Runtime(torch.device("cpu"))


@contextmanager
def start(device: str = "auto", amp: str | None = None) -> Iterator[Runtime]:
    """Chooses the device, and joins the other processes where `torchrun` started this one.

    Raises:
        FastnetError: for a device or precision that is not there.
    """
    if device not in DEVICES:
        raise FastnetError(f"--device must be one of {', '.join(DEVICES)}, not {device!r}.")
    if amp is not None and amp not in PRECISIONS:
        raise FastnetError(f"--amp must be one of {', '.join(PRECISIONS)}, not {amp!r}.")
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    elif device == "cuda" and not torch.cuda.is_available():
        raise FastnetError("--device cuda: torch sees no NVIDIA GPU here; leave --device out.")
    precision = PRECISIONS[amp] if amp else None
    if not distributed.is_torchelastic_launched():
        yield Runtime(torch.device(device), precision)
        return

    local_rank = int(os.environ["LOCAL_RANK"])
    if device == "cuda":
        if local_rank >= torch.cuda.device_count():
            raise FastnetError(
                f"torchrun started more processes than the {torch.cuda.device_count()} GPUs here: "
                "give it a smaller --nproc-per-node."
            )
        torch.cuda.set_device(local_rank)
    # One process may load data or compute features for long, while the others wait.
    distributed.init_process_group(
        "nccl" if device == "cuda" else "gloo", timeout=timedelta(hours=12)
    )
    try:
        yield Runtime(
            torch.device(device),
            precision,
            distributed.get_rank(),
            distributed.get_world_size(),
            local_rank,
        )
    finally:
        leave_processes()


def leave_processes() -> None:
    """Ends what `init_process_group` began.

    A thread of gloo's lets go of a tensor some time after the collective is complete, for which it
    takes Python's lock; and if Python ends while it waits for that, the process is aborted. (Nor
    does destroying the group wait for its threads, which DistributedDataParallel keeps alive.) So
    the lock is left to them for a while.
    """
    time.sleep(0.1)
    distributed.destroy_process_group()
