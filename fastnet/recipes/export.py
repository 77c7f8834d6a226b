"""Trained networks as files for other programs."""

from __future__ import annotations

import json
from pathlib import Path

import torch
from torch import nn

from fastnet.errors import FastnetError
from fastnet.recipes import RECIPES
from fastnet.recipes.files import load_checkpoint, write_whole

FORMATS = ("safetensors", "onnx")


def load_trained(folder: Path) -> tuple[nn.Module, tuple[int, ...], dict[str, str]]:
    """The network that a training left in a folder: the best one where it kept that, or the last.

    Returns:
        The network on torch's own layers, in eval mode; the shape of one input; and what to know
        about it: the training, the classes, and how pictures are normalised.

    Raises:
        FastnetError: for a folder without a usable checkpoint.
    """
    path = folder / "checkpoint.pt"
    content = load_checkpoint(path)
    if content["recipe"] not in RECIPES:
        raise FastnetError(f"{path} is of {content['recipe']!r}, which this fastnet does not know.")
    recipe = RECIPES[content["recipe"]].on(content["dataset"])
    if recipe.keep_best:
        path = folder / "best.pt"
        content = load_checkpoint(path, recipe.name)
    options = {"weights": "none"} if recipe.pretrained else {}
    shape, classes = tuple(content["input_shape"]), tuple(content["classes"])
    network = recipe.model(shape, len(classes), "torch", **options)
    try:
        network.load_state_dict(content["model"])
    except RuntimeError as error:
        raise FastnetError(f"{path} holds another network than {recipe.name}'s.") from error
    shape = getattr(network, "latent_shape", shape)
    about = {"training": recipe.name, "classes": json.dumps(classes), "input": json.dumps(shape)}
    if len(shape) == 3:
        about |= {"mean": json.dumps(recipe.data.mean), "std": json.dumps(recipe.data.std)}
    return network.eval(), shape, about


def export(folder: Path, file_format: str, out: Path | None = None) -> Path:
    """Writes the network that a training left in a folder; returns the file.

    Args:
        folder: of the training.
        file_format: "safetensors", the parameters under the names that torch gives them; or "onnx",
            the network with a batch of any size.
        out: the file; None: `model.safetensors` or `model.onnx` in the folder.

    Raises:
        FastnetError: for another format, a folder without a training, or a package that is missing.
    """
    if file_format not in FORMATS:
        raise FastnetError(f"--format must be one of {', '.join(FORMATS)}, not {file_format!r}.")
    network, shape, about = load_trained(folder)
    out = out or folder / f"model.{file_format}"
    write = _write_safetensors if file_format == "safetensors" else _write_onnx
    try:
        write_whole(out, lambda path: write(network, shape, about, path))
    except ImportError as error:
        raise FastnetError(
            f"--format {file_format} needs a package ({error}): pip install 'fastnet[export]'."
        ) from error
    return out


def _write_safetensors(network: nn.Module, shape, about: dict[str, str], path: Path) -> None:  # noqa: ARG001
    from safetensors.torch import save

    state = {name: value.contiguous() for name, value in network.state_dict().items()}
    path.write_bytes(save(state, metadata=about))


def _write_onnx(network: nn.Module, shape, about: dict[str, str], path: Path) -> None:
    # torch needs it, and says less clearly that it is missing.
    import onnxscript  # noqa: F401

    # Two samples, as torch.export takes a batch of one for a constant.
    program = torch.onnx.export(
        network,
        (torch.zeros(2, *shape),),
        dynamo=True,
        input_names=["input"],
        output_names=["output"],
        dynamic_shapes=({0: torch.export.Dim("batch")},),
        verbose=False,
    )
    program.model.metadata_props.update(about)
    program.save(path)
