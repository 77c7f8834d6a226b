"""mlp: batches of training a fully connected network, and its logits."""

from __future__ import annotations

import torch
from torch import Tensor

from fastnet import _library  # noqa: F401  registers torch.ops.fastnet

train = torch.ops.fastnet.mlp_train.default
forward = torch.ops.fastnet.mlp_forward.default  # on the CPU
cluster = torch.ops.fastnet.mlp_cluster.default  # on CUDA

# By their numbers in csrc/mlp.h.
SGD, MOMENTUM, ADAM = 0, 1, 2


@torch.library.register_fake("fastnet::mlp_train")
def fake_train(images: Tensor, *_args, **_kwargs) -> Tensor:
    return images.new_empty(2, dtype=torch.float64)


@torch.library.register_fake("fastnet::mlp_forward")
def fake_forward(images: Tensor, scale, shift, weights, biases, relu) -> Tensor:
    return images.new_empty((images.shape[0], weights[-1].shape[0]), dtype=torch.float32)
