"""python -m benchmarks.peers: fastnet beside other projects that are made for the same work.

On the CPU JAX (with optax): a jitted training step, and a whole epoch in one jitted lax.scan. On a
GPU the cross-entropies of Liger-Kernel and QuACK. What is not installed is skipped by name:

    pip install jax optax           # on a CPU
    pip install liger-kernel        # on a GPU
    pip install quack-kernels
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Annotated

import torch
import typer
from torch import nn

from fastnet.bench import cross_entropy, machine, mlp_trainer, recipes, results, run
from fastnet.bench.harness import Case
from fastnet.data import MNIST, Batches, Samples
from fastnet.recipes import RECIPES, Recipe

# A name, and the packages to import for it.
ON_CPU = {"jax": ("jax", "optax")}
ON_GPU = {"liger": ("liger_kernel",), "quack": ("quack",)}
STEPS = (
    ("mnist-net", recipes.GREY, (16, 64, 256, 1024)),
    ("activation-net", recipes.GREY, (64,)),
    ("simple-cnn", recipes.GREY, (64,)),
    ("simple-cnn", recipes.COLOUR, (64,)),
    ("cifar-mlp", recipes.COLOUR, (16,)),
)
LOGITS = ((64, 10), (1024, 1000), (8192, 1000), (8192, 32_000), (8192, 131_072))


def installed(peers: dict[str, tuple[str, ...]]) -> list[str]:
    """Those of which all packages are there; of the others it tells."""
    return [name for name, packages in peers.items() if machine.has(name, *packages)]


def cases() -> Iterator[Case]:
    """Each named as the benchmark that it is a case of, under the op "peers"."""
    if torch.cuda.is_available():
        of_peers = beside_gpu_kernels(installed(ON_GPU))
    else:
        of_peers = beside_jax() if installed(ON_CPU) else iter(())
    for case in of_peers:
        yield replace(case, op="peers", case=f"{case.op}: {case.case}", series="", x=0)


def beside_jax() -> Iterator[Case]:
    for name, shape, batch_sizes in STEPS:
        recipe = RECIPES[name]
        for batch_size in batch_sizes:
            samples = recipes.pictures(shape, 10, 4 * batch_size)
            sides = {"jax": jax_step(recipe, samples, batch_size)}
            sides = {**recipes.step_sides(recipe, samples, batch_size), **sides}
            named = f"{name}, batch {batch_size}, {'x'.join(map(str, shape))}"
            yield Case("recipes", named, "step", sides, tolerance=2e-3)
    if torch.get_num_threads() > 1:  # JAX's pool has a thread for each core
        yield from mlp_trainer.cases(others={"jax": jax_epoch})


def _jax_parameters(network: nn.Module) -> list[tuple]:
    """Weights and biases, in the order they are used in; filters as JAX has them on a CPU."""
    import jax.numpy as jnp

    values = [p.detach().numpy() for p in network.parameters()]
    return [
        (jnp.array(weight.transpose(2, 3, 1, 0) if weight.ndim == 4 else weight), jnp.array(bias))
        for weight, bias in zip(values[::2], values[1::2], strict=True)
    ]


def _jax_loss(parameters, pictures, target):
    """Cross-entropy of 3 x 3 convolutions with ReLU and 2 x 2 max-pooling, of pictures that have
    their channels last, and of linear layers with ReLU between."""
    import jax
    import jax.numpy as jnp

    x = pictures
    for number, (weight, bias) in enumerate(parameters):
        if weight.ndim == 4:
            formats = ("NHWC", "HWIO", "NHWC")
            x = jax.lax.conv_general_dilated(x, weight, (1, 1), "SAME", dimension_numbers=formats)
            x = jax.nn.relu(x + bias)
            windows = (1, 2, 2, 1)
            x = jax.lax.reduce_window(x, -jnp.inf, jax.lax.max, windows, windows, "VALID")
            continue
        if x.ndim == 4:
            x = x.transpose(0, 3, 1, 2).reshape(len(x), -1)  # as torch flattens
        x = x @ weight.T + bias
        if number < len(parameters) - 1:
            x = jax.nn.relu(x)
    log_likelihood = jnp.take_along_axis(jax.nn.log_softmax(x), target[:, None], 1)
    return -log_likelihood.mean()


def _optax(recipe: Recipe):
    import optax

    made = recipe.optimizer.func
    return (optax.adam if made is torch.optim.Adam else optax.sgd)(recipe.optimizer.keywords["lr"])


def jax_step(recipe: Recipe, samples: Samples, batch_size: int) -> Callable:
    """One jitted step after the other, on batches that are ready."""
    import jax
    import optax

    network = recipes.task_on(recipe, "torch", samples).network
    optimizer, parameters = _optax(recipe), _jax_parameters(network)
    convolves = parameters[0][0].ndim == 4
    state = (parameters, optimizer.init(parameters))
    data = recipe.data
    batches = itertools.cycle(
        [
            (
                # Rows, or pictures with their channels last.
                jax.numpy.array((x.permute(0, 2, 3, 1) if convolves else x.flatten(1)).numpy()),
                jax.numpy.array(target.numpy()),
            )
            for x, target in Batches(samples, batch_size, data.mean, data.std)
        ]
    )

    @functools.partial(jax.jit, donate_argnums=0)
    def step(state, pictures, target):
        parameters, moments = state
        loss, gradients = jax.value_and_grad(_jax_loss)(parameters, pictures, target)
        updates, moments = optimizer.update(gradients, moments)
        return (optax.apply_updates(parameters, updates), moments), loss

    def once():
        nonlocal state
        state, loss = jax.block_until_ready(step(state, *next(batches)))
        return [torch.tensor(loss.item())]

    return once


def jax_epoch(network: nn.Sequential, samples: Samples, batch_size: int) -> Callable:
    """An epoch in one jitted lax.scan, which gathers and normalises each batch from uint8."""
    import jax
    import jax.numpy as jnp
    import optax

    optimizer, parameters = optax.adam(mlp_trainer.LR), _jax_parameters(network)
    state = (parameters, optimizer.init(parameters))
    images = jnp.asarray(samples.inputs.flatten(1).numpy())
    classes = jnp.asarray(samples.targets.numpy())
    order = jnp.arange(len(samples)).reshape(-1, batch_size)

    def step(state, chosen):
        parameters, moments = state
        x = (images[chosen].astype(jnp.float32) / 255 - MNIST.mean[0]) / MNIST.std[0]
        gradients = jax.grad(_jax_loss)(parameters, x, classes[chosen])
        updates, moments = optimizer.update(gradients, moments)
        return (optax.apply_updates(parameters, updates), moments), None

    epoch = jax.jit(lambda state: jax.lax.scan(step, state, order)[0], donate_argnums=0)

    def once():
        nonlocal state
        state = jax.block_until_ready(epoch(state))
        return [torch.from_numpy(p.__array__().copy()) for pair in state[0] for p in pair]

    return once


def beside_gpu_kernels(names: list[str]) -> Iterator[Case]:
    makers = {"liger": _liger, "quack": _quack}
    for dtype in (torch.float32, torch.bfloat16) if names else ():
        for shape in LOGITS:
            others = {name: makers[name]() for name in names}
            # Liger's forward pass alone would have the gradient in it.
            both = cross_entropy.cases_of(shape, dtype, others=others)
            yield next(case for case in both if case.mode == "forward+backward")


def _liger() -> Callable:
    from liger_kernel.transformers.functional import liger_cross_entropy

    compared = itertools.repeat(None, 3)

    def loss(logits, target):
        # It writes the gradient over the logits: over a copy in the calls that are compared, which
        # are the first three, and over the logits where it is timed.
        if next(compared, False) is None:
            return liger_cross_entropy(logits.clone(), target)
        return liger_cross_entropy(logits, target)

    return loss


def _quack() -> Callable:
    from quack import cross_entropy as quack_cross_entropy

    return lambda logits, target: quack_cross_entropy(logits, target, reduction="mean")


def main(
    save: Annotated[bool, typer.Option(help="Write the results file.")] = True,
    out: Annotated[Path, typer.Option(help="The results file's folder.")] = results.RESULTS,
) -> None:
    """Time fastnet beside the peers that are installed."""
    run.announce()
    if not run.time_cases(cases(), out if save else None):
        raise typer.Exit(1)


if __name__ == "__main__":
    typer.run(main)
