"""What a call takes of memory: at its peak, and kept by autograd for the backward pass.

Counted is what torch's allocator gives out. What libraries take for themselves (MKL, oneDNN, and
the scratch of fastnet's convolution, 8 MB at most) is not.
"""

from __future__ import annotations

import gc
import os
from collections.abc import Callable, Iterable

import torch
from torch import nn


def peak_bytes(once: Callable[[], object]) -> int:
    """How much more is allocated while this runs than before, at most."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        once()
        torch.cuda.synchronize()
        return torch.cuda.max_memory_allocated() - before
    os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # the profiler tells of its start and end
    with torch.profiler.profile(
        activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True
    ) as profile:
        once()
    held = peak = 0
    for event in profile.profiler.kineto_results.events():
        if event.name() == "[memory]":
            held += event.nbytes()
            peak = max(peak, held)
    return peak


def saved_bytes(once: Callable[[], object]) -> int:
    """How much autograd keeps from forward to backward, beyond the tensors that were there before:
    the inputs and parameters."""
    # The memory itself is held on to, so that what is freed meanwhile is not taken for it.
    before = _memory(
        t
        for t in gc.get_objects()
        if type(t) in (torch.Tensor, nn.Parameter)
        and not torch._C._functorch.is_functorch_wrapped_tensor(t)  # these have no memory
    )
    saved: dict[int, torch.UntypedStorage] = {}

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        saved.update(_memory([tensor]))
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        once()
    return sum(storage.nbytes() for place, storage in saved.items() if place not in before)


def _memory(tensors: Iterable[torch.Tensor]) -> dict[int, torch.UntypedStorage]:
    memory = {}
    for tensor in tensors:
        storage = tensor.untyped_storage()
        try:
            memory[storage.data_ptr()] = storage
        except RuntimeError:  # what torch has left of a trace has no memory
            continue
    return memory
