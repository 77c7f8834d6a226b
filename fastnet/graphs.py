"""A training step as one CUDA graph: launched whole, with nothing left to do in Python."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor


class GraphedStep:
    """Steps on batches like the first, in shapes, dtypes and devices, through a graph, others as
    they are.

    The first steps run as they are, so that libraries have made their workspaces and optimizers
    their state. Another learning rate, which a graph holds as a number, makes another graph.

    Args:
        step: a step on a batch: tensors, and values that belong to the graph.
        optimizers: those that it applies, whose counts of steps are on the GPU.
    """

    WARM_UP = 3

    def __init__(
        self, step: Callable[..., Any], optimizers: Sequence[torch.optim.Optimizer]
    ) -> None:
        self.step = step
        self.optimizers = optimizers
        self.graph: torch.cuda.CUDAGraph | None = None
        self.first: list | None = None
        self.taken = 0
        self.side = torch.cuda.Stream()

    def __call__(self, *batch: Any) -> Any:
        """What the step returns; of a graph, in memory that the next call writes to."""
        likeness = [(v.shape, v.dtype, v.device) if isinstance(v, Tensor) else v for v in batch]
        if self.first is None:
            self.first = likeness
        if likeness != self.first:
            return self.step(*batch)
        if self.taken < self.WARM_UP:
            self.taken += 1
            self.side.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(self.side):
                result = self.step(*batch)
            torch.cuda.current_stream().wait_stream(self.side)
            return result
        if self.graph is None or self.rates != self._rates():
            self._capture(batch)
        for own, value in zip(self.batch, batch, strict=True):
            if isinstance(value, Tensor):
                own.copy_(value)
        self.graph.replay()
        return self.result

    def _rates(self) -> list[float]:
        """The learning rates, but for those that a graph reads itself, from the GPU."""
        rates = [group["lr"] for o in self.optimizers for group in o.param_groups]
        return [float(r) for r in rates if not (isinstance(r, Tensor) and r.is_cuda)]

    def _capture(self, batch: Sequence) -> None:
        self.graph = None  # until there is a whole one
        self.batch = [v.clone() if isinstance(v, Tensor) else v for v in batch]
        for optimizer in self.optimizers:
            # Gradients shall be the graph's own memory.
            optimizer.zero_grad(set_to_none=True)
        graph, rates = torch.cuda.CUDAGraph(), self._rates()
        # Optimizers that count steps want to be told. Fused ones count them on the GPU in any case,
        # and warn where they are told and step outside of a graph.
        groups = [g for o in self.optimizers for g in o.param_groups if "capturable" in g]
        before = [group["capturable"] for group in groups]
        for group in groups:
            group["capturable"] = True
        try:
            # On a stream of this device: the one that torch takes by itself is the first device's.
            with torch.cuda.graph(graph, stream=self.side):
                self.result = self.step(*self.batch)
        finally:
            for group, value in zip(groups, before, strict=True):
                group["capturable"] = value
        self.graph, self.rates = graph, rates
