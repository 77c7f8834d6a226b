"""Trained networks as files for other programs, and what those make of them."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from fastnet.data import Samples
from fastnet.errors import FastnetError
from fastnet.recipes import RECIPES
from fastnet.recipes.export import export, load_trained
from fastnet.recipes.training import train

README = Path(__file__).parent.parent / "README.md"


def trained(name: str, folder):
    recipe = RECIPES[name]
    channels, size, classes = {"resnet18-transfer": (3, 32, 2), "cifar-mlp": (3, 32, 10)}.get(
        name, (1, 28, 10)
    )
    generator = torch.Generator().manual_seed(0)
    pictures = torch.randint(0, 256, (32, channels, size, size), generator=generator)
    targets = torch.randint(classes, (32,), generator=generator)
    names = tuple(f"class {number}" for number in range(classes))
    samples = Samples(pictures.to(torch.uint8), targets, names, "noise")
    options = {"weights": "none"} if recipe.pretrained else {}
    chosen = recipe.settings(epochs=2, log_every=0, **options)
    return recipe, samples, train(recipe, chosen, samples, samples, folder).task


NETWORKS = ["mnist-net", "batch-net", "simple-cnn", "cifar-mlp", "resnet18-transfer", "dcgan"]


@pytest.mark.parametrize("name", NETWORKS)
def test_safetensors(name, tmp_path):
    safetensors = pytest.importorskip("safetensors")
    recipe, samples, task = trained(name, tmp_path)
    path = export(tmp_path, "safetensors")
    assert path == tmp_path / "model.safetensors"
    with safetensors.safe_open(path, "pt") as file:
        about, state = file.metadata(), {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
    assert about["training"] == name
    assert json.loads(about["classes"]) == list(samples.classes)
    if name != "dcgan":
        assert json.loads(about["mean"]) == list(recipe.data.mean)
        assert tuple(json.loads(about["input"])) == tuple(samples.inputs.shape[1:])
    kept = task.network.state_dict()
    assert state.keys() == kept.keys()
    assert all(torch.equal(state[key], kept[key]) for key in state)


def test_the_example_of_the_readme(tmp_path, monkeypatch):
    pytest.importorskip("safetensors")
    (example,) = (
        block.split("```")[0]
        for block in README.read_text().split("```python\n")
        if "of fastnet export" in block
    )
    _, _, task = trained("simple-cnn", tmp_path / "runs/simple-cnn")
    export(tmp_path / "runs/simple-cnn", "safetensors")
    monkeypatch.chdir(tmp_path)
    names = {}
    exec(example, names)
    loaded = names["network"].state_dict()
    assert all(torch.equal(loaded[key], value) for key, value in task.network.state_dict().items())


@pytest.mark.parametrize("name", NETWORKS)
@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")
def test_onnx(name, tmp_path):
    """Another program gets the same answers, at batch sizes that the export did not see."""
    pytest.importorskip("onnxscript")
    onnxruntime = pytest.importorskip("onnxruntime")
    _, samples, task = trained(name, tmp_path)
    path = export(tmp_path, "onnx", tmp_path / "network.onnx")
    session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    assert session.get_modelmeta().custom_metadata_map["training"] == name
    task.network.eval()
    for count in (1, 5):
        inputs = task.noise(count) if name == "dcgan" else task.inputs(samples.first(count))
        with torch.no_grad():
            expected = task.network(inputs)
        (answers,) = session.run(None, {"input": inputs.numpy()})
        torch.testing.assert_close(torch.from_numpy(answers), expected, rtol=1e-4, atol=1e-5)


def test_the_best_network_is_what_is_exported(tmp_path):
    trained("resnet18-transfer", tmp_path)
    network, shape, _ = load_trained(tmp_path)
    best = torch.load(tmp_path / "best.pt", weights_only=True)["model"]
    assert all(torch.equal(value, best[key]) for key, value in network.state_dict().items())
    assert shape == (3, 32, 32)
    assert not network.training


def test_what_cannot_be_exported(tmp_path):
    with pytest.raises(FastnetError, match="no checkpoint"):
        export(tmp_path, "onnx")
    trained("mnist-net", tmp_path)
    with pytest.raises(FastnetError, match=r"--format must be one of .*'pickle'"):
        export(tmp_path, "pickle")
    with pytest.raises(FastnetError, match="cannot be written"):
        export(tmp_path, "safetensors", tmp_path / "nowhere" / "m.safetensors")
    content = torch.load(tmp_path / "checkpoint.pt", weights_only=True)
    torch.save({**content, "recipe": "other-net"}, tmp_path / "checkpoint.pt")
    with pytest.raises(FastnetError, match="other-net"):
        export(tmp_path, "onnx")
