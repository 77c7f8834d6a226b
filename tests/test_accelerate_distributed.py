"""Accelerated models under DistributedDataParallel and FSDP2: two processes over gloo."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from support import spied
from torch import nn

import fastnet
from fastnet import functional
from fastnet.bench import networks
from fastnet.recipes.runtime import leave_processes

STEPS = 3


def network() -> nn.Module:
    torch.manual_seed(0)
    return networks.SimpleCNN(1, 16)


def batches() -> list[tuple[torch.Tensor, torch.Tensor]]:
    """Of eight; each of two processes takes half."""
    torch.manual_seed(1)
    return [(torch.randn(8, 1, 16, 16), torch.randint(10, (8,))) for _ in range(STEPS)]


def train(model, share=slice(None)) -> list[torch.Tensor]:
    """The gradients of the first step, then some steps."""
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
    first = None
    for pictures, target in batches():
        optimizer.zero_grad()
        F.cross_entropy(model(pictures[share]), target[share]).backward()
        first = first or [_whole(p.grad).clone() for p in model.parameters()]
        optimizer.step()
    return first


def _whole(tensor):
    return tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor.detach()


def _process(rank: int, way: str, folder: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2)
    try:
        called = []
        for name in ("linear_relu", "conv_relu_pool2d"):
            setattr(functional, name, spied(getattr(functional, name), called))
        model = fastnet.accelerate(network())
        if way == "ddp":
            model = nn.parallel.DistributedDataParallel(model)
        else:
            from torch.distributed.fsdp import fully_shard

            if way == "fsdp2, layers too":
                for layer in model.modules():
                    if isinstance(layer, (nn.Linear, nn.Conv2d)):
                        fully_shard(layer)
            if way != "fsdp2, whole":
                for block in (model.layer1, model.layer2, model.layer3, model.layer4):
                    fully_shard(block)
            fully_shard(model)
        grads = train(model, slice(4 * rank, 4 * rank + 4))
        parameters = [_whole(p) for p in model.parameters()]
        if rank == 0:
            torch.save((grads, parameters, len(called)), f"{folder}/result.pt")
        dist.barrier()
    finally:
        leave_processes()


@pytest.mark.parametrize("way", ["ddp", "fsdp2, whole", "fsdp2", "fsdp2, layers too"])
def test_two_processes_train_as_one(way, tmp_path):
    if not dist.is_gloo_available():
        pytest.skip("this torch has no gloo")
    torch.multiprocessing.spawn(_process, (way, str(tmp_path)), nprocs=2)
    grads, parameters, called = torch.load(tmp_path / "result.pt")
    # A layer that is sharded by itself has hooks, and so runs as written.
    assert called == (0 if way == "fsdp2, layers too" else 5 * STEPS)
    alone = fastnet.accelerate(copy.deepcopy(network()))
    for expected, actual in zip(train(alone), grads, strict=True):
        torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-5)
    for expected, actual in zip(alone.parameters(), parameters, strict=True):
        torch.testing.assert_close(actual, expected.detach(), rtol=1e-4, atol=1e-5)
