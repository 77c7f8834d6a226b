"""A training step as one CUDA graph: launched whole, with nothing left to do in Python."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from fastnet.recipes.tasks import Measures, Task

Step = Callable[[Tensor, Tensor, float], Measures]


def step_in_graph(task: Task) -> Step:
    """The task's step, in a graph where one can be: on a GPU, in one process, and without a scaler,
    which looks at gradients from the host."""
    possible = (
        task.runtime.device.type == "cuda"
        and task.runtime.world_size == 1
        and task.runtime.amp is not torch.float16
    )
    return GraphedStep(task) if possible else task.step


class GraphedStep:
    """Steps on batches of the first shape through a graph, others as they are.

    The first steps run as they are, so that libraries have made their workspaces and optimizers
    their state. Another learning rate, which a graph holds as a number, makes another graph.
    """

    WARM_UP = 3

    def __init__(self, task: Task) -> None:
        self.task = task
        self.graph: torch.cuda.CUDAGraph | None = None
        self.shape: torch.Size | None = None
        self.taken = 0
        self.side = torch.cuda.Stream()

    def __call__(self, inputs: Tensor, targets: Tensor, weight: float = 1.0) -> Measures:
        if self.shape is None:
            self.shape = inputs.shape
        if inputs.shape != self.shape:
            return self.task.step(inputs, targets, weight)
        if self.taken < self.WARM_UP:
            self.taken += 1
            self.side.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(self.side):
                measures = self.task.step(inputs, targets, weight)
            torch.cuda.current_stream().wait_stream(self.side)
            return measures
        if self.graph is None or self.rates != self._rates():
            self._capture(inputs, targets)
        self.inputs.copy_(inputs)
        self.targets.copy_(targets)
        self.graph.replay()
        return self.measures

    def _rates(self) -> list[float]:
        return [group["lr"] for o in self.task.optimizers for group in o.param_groups]

    def _capture(self, inputs: Tensor, targets: Tensor) -> None:
        self.rates = self._rates()
        self.inputs, self.targets = inputs.clone(), targets.clone()
        for optimizer in self.task.optimizers:
            # Gradients shall be the graph's own memory.
            optimizer.zero_grad(set_to_none=True)
        self.graph = torch.cuda.CUDAGraph()
        self._set_capturable(True)
        with torch.cuda.graph(self.graph):
            self.measures = self.task.step(self.inputs, self.targets)
        self._set_capturable(False)

    def _set_capturable(self, value: bool) -> None:
        """Optimizers that count steps want to be told. Fused ones, as the recipes', count them on
        the GPU in any case, and warn where they are told and step outside of a graph."""
        for optimizer in self.task.optimizers:
            for group in optimizer.param_groups:
                if "capturable" in group:
                    group["capturable"] = value
