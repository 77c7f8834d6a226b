"""Training of fully connected networks as one native loop."""

from __future__ import annotations

import math
import operator
import time
from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastnet import _library, functional
from fastnet.graphs import GraphedStep
from fastnet.mlp_layers import check_apart, check_layer, read_layers, signature
from fastnet.mlp_optimizer import optimizer_of, read_optimizer, state_of
from fastnet.ops import mlp

# Seconds of batches in one native call on the CPU: how long Ctrl-C may wait.
CALL_SECONDS = 0.05
# Images whose hidden units are in memory at once, where they are predicted by torch's operators.
PREDICTED_AT_ONCE = 8192


class Epoch(NamedTuple):
    """What one pass through the data came to: the mean loss, and the share of right answers."""

    loss: float
    accuracy: float


class MLPTrainer:
    r"""Trains a network of linear layers and ReLU with softmax and cross-entropy, whole epochs in
    native code: the batch is gathered and normalised, goes forward and backward, and the optimizer
    is applied where a gradient is computed, with no Python, dispatch or allocation between.

    On a GPU all batches of an epoch are one kernel, on a cluster of thread blocks that keep the
    network in their shared memory (from compute capability 9.0 on). A network, or a batch, that is
    too large for that is trained by fastnet's operators and the optimizer itself, each step a CUDA
    graph.

    The parameters and the optimizer's state are the model's own tensors, before and after. So this
    can take turns with a loop in torch: `trainer.optimizer` is a `torch.optim.Adam` or `SGD` on
    `model.parameters()`, whose `state_dict` can be saved and loaded, and whose learning rate a
    scheduler can change between calls of `fit`.

    Args:
        model: `nn.Linear` layers, with or without ReLU after each but the last, in `nn.Sequential`
            or in a `forward` of its own, also after `fastnet.accelerate`. The input may be
            flattened first, and log-softmax may come last. float32, on the CPU or a GPU.
        optimizer: "adam" or "sgd"; or an `Adam` or `SGD` of `torch.optim` or `fastnet.optim` with
            one group of just these parameters, which has what follows already (and no `amsgrad`,
            `maximize`, `nesterov`, dampening or hooks).
        lr: learning rate (0.001).
        momentum: of SGD (0).
        weight_decay: an L2 penalty: this times the weight is added to its gradient (0).
        betas: of Adam's averages (0.9, 0.999).
        eps: of Adam's denominator (1e-8).

    Raises:
        ValueError: for models and optimizers that it does not train exactly as torch does.

    Example:
        >>> trainer = fastnet.MLPTrainer(model, lr=1e-3)
        >>> trainer.fit(images, labels, batch_size=64, epochs=10, mean=0.1307, std=0.3081)
        >>> trainer.evaluate(test_images, test_labels, mean=0.1307, std=0.3081).accuracy
    """

    def __init__(
        self,
        model: nn.Module,
        optimizer: str | torch.optim.Optimizer = "adam",
        *,
        lr: float | None = None,
        momentum: float | None = None,
        weight_decay: float | None = None,
        betas: tuple[float, float] | None = None,
        eps: float | None = None,
    ) -> None:
        self.model = model
        self.layers = read_layers(model)
        self._modules_read = signature(model)
        numbers = {
            "lr": lr,
            "momentum": momentum,
            "weight_decay": weight_decay,
            "betas": betas,
            "eps": eps,
        }
        given = {name: value for name, value in numbers.items() if value is not None}
        self.optimizer = optimizer_of(optimizer, model.parameters(), given)
        read_optimizer(self.optimizer, model.parameters())
        self._batches_per_call = 4  # until it is known how long they take
        self._graphed: tuple[tuple, GraphedStep] | None = None  # the last, and what it is of

    def fit(
        self,
        images: Tensor,
        targets: Tensor,
        batch_size: int = 64,
        epochs: int = 1,
        mean: float | Sequence[float] = 0.0,
        std: float | Sequence[float] = 1.0,
        generator: torch.Generator | None = None,
        *,
        shuffle: bool = True,
    ) -> list[Epoch]:
        """Trains for whole epochs.

        Ctrl-C stops between two batches, with model and optimizer as after the last one; where a
        GPU has an epoch as one kernel, between two epochs. In steps of operators it can come
        between the optimizer's count and its update, as in a loop in torch.

        Args:
            images: `(n, ...)`, of the network's `in_features` values each; uint8, which are scaled
                to 0...1, or float32. They and the targets are where the model is.
            targets: the classes, `(n)`, int64.
            batch_size: images in a batch; the last one of an epoch may be smaller.
            epochs: passes through the images.
            mean, std: subtracted and divided by; a number, or one for each of the channels of
                images `(n, channels, ...)`.
            generator: draws a new order for every epoch; None: torch's default one does.
            shuffle: False keeps the images' own order.

        Returns:
            For every epoch the mean loss and accuracy over its batches, each as it was when its
            turn came.

        Raises:
            ValueError: for images, targets or numbers that do not fit.
            TypeError: for a batch size or epochs that are no whole numbers.
        """
        for name, value in (("batch_size", batch_size), ("epochs", epochs)):
            try:
                is_too_small = operator.index(value) < 1
            except TypeError:
                raise TypeError(f"{name} must be a whole number, not {value!r}") from None
            if is_too_small:
                raise ValueError(f"{name} must be at least 1, not {value}")
        network = self._network()
        kind, options = read_optimizer(self.optimizer, self.model.parameters())
        rows, scale, shift = self._read_images(images, mean, std)
        targets = self._read_targets(targets, len(rows))
        if len(rows) == 0:
            raise ValueError("there are no images to train on")
        batch_size = min(batch_size, len(rows))
        state = state_of(self.optimizer, self.layers, kind)
        if self._is_one_kernel(rows, batch_size, kind):

            def train(part: Tensor) -> Tensor:
                sums = mlp.train(
                    rows, targets, part, batch_size, scale, shift, *network, *state, kind, *options
                )
                self._note_step()
                return sums

            split = self._split_by_time if rows.device.type == "cpu" else _whole
        else:
            train = self._step_on(rows, targets, scale, shift, batch_size, options[1:])
            split = torch.split
        history = []
        for _ in range(epochs):
            if shuffle:
                device = "cpu" if generator is None else generator.device
                order = torch.randperm(len(rows), generator=generator, device=device)
            else:
                order = torch.arange(len(rows), device="cpu")
            total = torch.zeros(2, dtype=torch.float64, device=rows.device)
            for part in split(order.to(rows.device), batch_size):
                total += train(part)
            loss, right = (total / len(rows)).tolist()
            history.append(Epoch(loss, right))
        return history

    def _note_step(self) -> None:
        """What torch's own step leaves behind, and a native one or a graph does not."""
        # As every in-place operator does: nobody must go back through an older graph.
        torch.autograd.graph.increment_version(self._parameters())
        # For the schedulers that ask whether there has been one.
        self.optimizer._opt_called = True

    def _split_by_time(self, order: Tensor, batch_size: int) -> Iterator[Tensor]:
        """Parts of whole batches, as long as Ctrl-C may wait."""
        done = 0
        while done < len(order):
            part = order[done : done + self._batches_per_call * batch_size]
            start = time.perf_counter()
            yield part
            done += len(part)
            per_image = (time.perf_counter() - start) / len(part)
            wanted = int(CALL_SECONDS / (per_image * batch_size))
            self._batches_per_call = max(1, min(wanted, 4 * self._batches_per_call))

    def _is_one_kernel(self, rows: Tensor, batch_size: int, kind: int) -> bool:
        """Whether a native loop can hold the network: on the CPU any, on a GPU small ones."""
        if rows.device.type == "cpu":
            return True
        if _library.CUDA_STATUS != "loaded":
            return False
        widths = [rows.shape[1], *(layer.linear.out_features for layer in self.layers)]
        return mlp.cluster(rows, widths, batch_size, kind) > 0

    def _step_on(
        self,
        rows: Tensor,
        targets: Tensor,
        scale: Tensor,
        shift: Tensor,
        batch_size: int,
        options: tuple,
    ) -> Callable[[Tensor], Tensor]:
        """A step of operators on the images chosen: on a GPU in a graph, wherever there can be one.

        The last graph is kept, for a call on the same tensors.
        """
        parameters = self._parameters()
        states = [v for p in parameters for v in self.optimizer.state[p].values()]

        def step(chosen: Tensor) -> Tensor:
            logits = self._apply(rows[chosen], scale, shift)
            target = targets[chosen]
            loss = functional.cross_entropy(logits, target)
            # Not backward(): nodes of an older graph would bring their own streams into a capture.
            gradients = torch.autograd.grad(loss, parameters)
            for parameter, gradient in zip(parameters, gradients, strict=True):
                parameter.grad = gradient
            self.optimizer.step()
            right = (logits.argmax(1) == target).sum()
            return torch.stack([loss.detach().double() * len(chosen), right.double()])

        taken = step
        tensors = [rows, targets, *parameters, *(v for v in states if isinstance(v, Tensor))]
        # A graph cannot count steps on the host, as optimizers that are not fused do.
        if all(tensor.is_cuda for tensor in tensors):
            key = (*((tensor.data_ptr(), tensor.shape) for tensor in tensors), batch_size, *options)
            key += (*scale.tolist(), *shift.tolist(), *(layer.relu for layer in self.layers))
            if (
                self._graphed is None
                or self._graphed[0] != key
                or self._graphed[1].optimizers[0] is not self.optimizer
            ):
                with torch.cuda.device_of(rows):
                    self._graphed = key, GraphedStep(step, [self.optimizer])
            taken = self._graphed[1]

        def train(chosen: Tensor) -> Tensor:
            # Gradients, and whether they are taken, are the caller's own.
            before = [p.grad for p in parameters]
            try:
                with torch.inference_mode(False), torch.enable_grad(), torch.cuda.device_of(rows):
                    sums = taken(chosen)
                self._note_step()
                return sums
            finally:
                for parameter, grad in zip(parameters, before, strict=True):
                    parameter.grad = grad

        return train

    def _apply(self, rows: Tensor, scale: Tensor, shift: Tensor) -> Tensor:
        """The network's logits, by fastnet's operators."""
        x = torch.addcmul(shift, rows.float(), scale)
        with torch.autocast(rows.device.type, enabled=False):
            for layer in self.layers:
                product = functional.linear_relu if layer.relu else F.linear
                x = product(x, layer.linear.weight, layer.linear.bias)
        return x

    def evaluate(
        self,
        images: Tensor,
        targets: Tensor,
        mean: float | Sequence[float] = 0.0,
        std: float | Sequence[float] = 1.0,
    ) -> Epoch:
        """Evaluates the network.

        Args:
            images, targets, mean, std: as in `fit`.

        Returns:
            An `Epoch(loss, accuracy)`: the mean loss, and the share of right answers in 0...1.

        Raises:
            ValueError: for images or targets that do not fit, or none.
        """
        logits = self._logits(images, mean, std)
        targets = self._read_targets(targets, len(logits))
        if len(logits) == 0:
            raise ValueError("there are no images to evaluate on")
        loss = functional.cross_entropy(logits, targets).item()
        return Epoch(loss, (logits.argmax(1) == targets).double().mean().item())

    def predict(
        self,
        images: Tensor,
        mean: float | Sequence[float] = 0.0,
        std: float | Sequence[float] = 1.0,
    ) -> Tensor:
        """Tells the class of each image.

        Args:
            images, mean, std: as in `fit`.

        Returns:
            `(n)`, int64.

        Raises:
            ValueError: for images that do not fit.
        """
        return self._logits(images, mean, std).argmax(1)

    def _logits(self, images, mean, std) -> Tensor:
        network = self._network()
        rows, scale, shift = self._read_images(images, mean, std)
        if rows.device.type == "cpu":
            return mlp.forward(rows, scale, shift, *network)
        with torch.no_grad():
            parts = rows.split(PREDICTED_AT_ONCE)
            return torch.cat([self._apply(part, scale, shift) for part in parts])

    @property
    def device(self) -> torch.device:
        """Where the model is, and images and targets must be."""
        return self.layers[0].linear.weight.device

    def _parameters(self) -> list[nn.Parameter]:
        """All of the model, which has no others; `model.parameters()` takes longer to find them."""
        both = (p for layer in self.layers for p in (layer.linear.weight, layer.linear.bias))
        return [p for p in both if p is not None]

    def _network(self) -> tuple[list[Tensor], list[Tensor], list[bool]]:
        if signature(self.model) != self._modules_read:
            self.layers = read_layers(self.model)
            self._modules_read = signature(self.model)
        linears = [layer.linear for layer in self.layers]
        for linear in linears:
            check_layer(linear, self.device)
        none = torch.empty(0, dtype=torch.float32, device=self.device)
        check_apart(self._parameters())
        return (
            [linear.weight.detach() for linear in linears],
            [none if linear.bias is None else linear.bias.detach() for linear in linears],
            [layer.relu for layer in self.layers],
        )

    def _read_images(self, images, mean, std) -> tuple[Tensor, Tensor, Tensor]:
        """As rows, with a factor and an offset for each of their values."""
        width = self.layers[0].linear.in_features
        if not isinstance(images, Tensor):
            raise ValueError(f"images must be a tensor, not {type(images).__name__}")
        values = images[0].numel() if images.dim() > 1 and len(images) else width
        if images.dtype not in (torch.uint8, torch.float32) or images.device != self.device:
            raise ValueError(
                f"images must be uint8 or float32 and, as the model, on {self.device}, not "
                f"{images.dtype} on {images.device}"
            )
        if images.dim() < 2 or values != width:
            raise ValueError(f"images must have {width} values each, but are {tuple(images.shape)}")
        means, stds = (
            _by_channel(name, value, images.shape[1])
            for name, value in (("mean", mean), ("std", std))
        )
        if min(stds) <= 0:
            raise ValueError(f"std must be above 0, not {min(stds)}")
        largest = 255 if images.dtype is torch.uint8 else 1
        scale = [1 / (largest * s) for s in stds]
        channels = max(len(means), len(stds))  # of which one may be the same for all
        pairs = zip(means * (channels // len(means)), stds * (channels // len(stds)), strict=True)
        shift = [-m / s for m, s in pairs]
        return (
            images.reshape(len(images), width).contiguous(),
            *(
                torch.tensor(values, dtype=torch.float32, device=self.device).repeat_interleave(
                    width // len(values)
                )
                for values in (scale, shift)
            ),
        )

    def _read_targets(self, targets: Tensor, count: int) -> Tensor:
        classes = self.layers[-1].linear.out_features
        if not isinstance(targets, Tensor):
            raise ValueError(f"targets must be a tensor, not {type(targets).__name__}")
        if (
            targets.dtype is not torch.int64
            or tuple(targets.shape) != (count,)
            or targets.device != self.device
        ):
            raise ValueError(
                f"targets must be ({count},), int64, on {self.device}, but are "
                f"{tuple(targets.shape)}, {targets.dtype}, on {targets.device}"
            )
        if count and not 0 <= int(targets.min()) <= int(targets.max()) < classes:
            raise ValueError(
                f"targets must be classes 0 to {classes - 1}, but are {int(targets.min())} to "
                f"{int(targets.max())}"
            )
        return targets.contiguous()


def _whole(order: Tensor, _batch_size: int) -> tuple[Tensor]:
    return (order,)


def _by_channel(name: str, value: float | Sequence[float] | Tensor, channels: int) -> list[float]:
    wanted = f"{name} must be a number or one for each of {channels} channels"
    try:
        numbers = torch.as_tensor(value, dtype=torch.float64, device="cpu")
    except (TypeError, ValueError, RuntimeError):
        raise ValueError(f"{wanted}, not {value!r}") from None
    values = numbers.flatten().tolist()
    if len(values) not in (1, channels):
        raise ValueError(f"{wanted}, not numbers of shape {tuple(numbers.shape)}")
    for number in values:
        if not math.isfinite(number):
            raise ValueError(f"{name} must be finite, not {number}")
    return values
