"""Epochs of fully connected networks: one native loop against torch's own loop, and JAX's scan.

Eager torch and torch.compile are given batches that are gathered and normalised already; JAX and
fastnet gather and normalise in the loop, from uint8.
"""

from __future__ import annotations

import copy
import importlib.util
import itertools
from collections.abc import Callable, Iterator

import torch
import torch.nn.functional as F
from torch import nn

import fastnet
from benchmarks import mnist_net
from benchmarks.harness import FASTNET, Case
from fastnet.data import MNIST, Batches, Samples
from fastnet.models import MnistNet

LR = 1e-3
HAS_JAX = importlib.util.find_spec("jax") is not None


def cases(quick: bool = False) -> Iterator[Case]:
    """On the CPU: there is no native loop on a GPU yet."""
    if torch.cuda.is_available():
        return
    if not HAS_JAX:
        print("  (JAX is not installed, and so not timed: pip install jax)")
    digits, _ = MNIST.load()
    yield _epoch("784-28-10", (784, 28, 10), digits, 64)
    if quick:
        return
    yield _epoch("784-28-10", (784, 28, 10), digits, 16, tolerance=0.3)
    yield _epoch("784-28-10", (784, 28, 10), digits, 256)
    yield _epoch("784-10", (784, 10), digits, 64)
    yield _epoch("784-300-100-10", (784, 300, 100, 10), digits, 64, tolerance=0.3)
    colour = Samples(
        torch.randint(0, 256, (320, 3, 32, 32), dtype=torch.uint8),
        torch.randint(0, 10, (320,)),
        MNIST.load()[0].classes,
        "random",
    )
    yield _epoch("3072-1000-500-10", (3072, 1000, 500, 10), colour, 16, tolerance=1.0)
    yield _document()


def _network(widths: tuple[int, ...]) -> nn.Sequential:
    torch.manual_seed(0)
    layers: list[nn.Module] = [nn.Flatten()]
    for before, after in itertools.pairwise(widths):
        layers += [nn.Linear(before, after), nn.ReLU()]
    return nn.Sequential(*layers[:-1])


def _epoch(
    name: str,
    widths: tuple[int, ...],
    images: Samples,
    batch_size: int,
    tolerance: float = 1e-2,
) -> Case:
    """An epoch of whole batches in the set's own order, with Adam, on from where the last ended."""
    count = len(images) // batch_size * batch_size
    pictures, labels = images.inputs[:count], images.targets[:count]
    whole = Samples(pictures, labels, images.classes, images.source)
    batches = list(Batches(whole, batch_size, MNIST.mean, MNIST.std))
    torch._dynamo.reset()
    sides: dict[str, Callable] = {}
    for side in ("eager", "compile"):
        model = _network(widths)
        called = torch.compile(model, dynamic=False) if side == "compile" else model
        sides[side] = _torch_epoch(model, called, batches)
    if HAS_JAX and torch.get_num_threads() > 1:  # its pool has a thread for each core
        sides["jax"] = _jax_epoch(_network(widths), pictures, labels, batch_size)
    model = _network(widths)
    trainer = fastnet.MLPTrainer(model, lr=LR)

    def native():
        trainer.fit(pictures, labels, batch_size, mean=MNIST.mean, std=MNIST.std, shuffle=False)
        return [p.detach() for p in model.parameters()]

    sides[FASTNET] = native
    steps = count // batch_size
    # Training parts what rounding has parted, and three epochs are compared.
    return Case(
        "mlp_trainer",
        f"{name}, batch {batch_size}, {steps} steps",
        "epoch",
        sides,
        tolerance=tolerance,
        seconds=6.0,
    )


def _torch_epoch(model, called, batches):
    optimizer = torch.optim.Adam(model.parameters(), lr=LR, fused=True)

    def once():
        for pictures, labels in batches:
            optimizer.zero_grad()
            F.cross_entropy(called(pictures), labels).backward()
            optimizer.step()
        return [p.detach() for p in model.parameters()]

    return once


def _jax_epoch(model, pictures, labels, batch_size):
    """The same in one jitted lax.scan."""
    import jax
    import jax.numpy as jnp

    def log_likelihood(parameters, x, y):
        for weight, bias in parameters[:-1]:
            x = jax.nn.relu(x @ weight.T + bias)
        weight, bias = parameters[-1]
        logits = jax.nn.log_softmax(x @ weight.T + bias)
        return -jnp.take_along_axis(logits, y[:, None], 1).mean()

    def step(state, chosen):
        parameters, first, second, count = state
        x = (images[chosen].astype(jnp.float32) / 255 - MNIST.mean[0]) / MNIST.std[0]
        grads = jax.grad(log_likelihood)(parameters, x, classes[chosen])
        count = count + 1
        tree = jax.tree.map
        first = tree(lambda m, g: 0.9 * m + 0.1 * g, first, grads)
        second = tree(lambda v, g: 0.999 * v + 0.001 * g * g, second, grads)
        rate = LR / (1 - 0.9**count)
        scale = 1 / jnp.sqrt(1 - 0.999**count)
        parameters = tree(
            lambda p, m, v: p - rate * m / (jnp.sqrt(v) * scale + 1e-8), parameters, first, second
        )
        return (parameters, first, second, count), None

    images = jnp.asarray(pictures.reshape(len(pictures), -1).numpy())
    classes = jnp.asarray(labels.numpy())
    order = jnp.arange(len(labels)).reshape(-1, batch_size)
    epoch = jax.jit(lambda state: jax.lax.scan(step, state, order)[0], donate_argnums=0)
    linears = [layer for layer in model if isinstance(layer, nn.Linear)]

    def fresh(make):
        return [tuple(make(t.detach().numpy()) for t in (m.weight, m.bias)) for m in linears]

    state = (fresh(jnp.array), fresh(jnp.zeros_like), fresh(jnp.zeros_like), jnp.float32(0))

    def once():
        nonlocal state
        state = jax.block_until_ready(epoch(state))
        return [torch.from_numpy(p.__array__().copy()) for pair in state[0] for p in pair]

    return once


def _document() -> Case:
    """An epoch of 60,000 pictures, against the script of the tutorials as it is."""
    images = mnist_net.pictures(60_000)
    model = MnistNet()
    start = copy.deepcopy(model.state_dict())
    order = torch.Generator()

    def native():
        model.load_state_dict(start)
        trainer = fastnet.MLPTrainer(model, lr=LR)
        trainer.fit(
            images.inputs, images.targets, 64, 1, MNIST.mean, MNIST.std, order.manual_seed(0)
        )
        return []

    sides = {"document script": mnist_net.document_epoch(images), FASTNET: native}
    return Case("mlp_trainer", "60,000 pictures, batch 64", "epoch", sides, seconds=0.1)
