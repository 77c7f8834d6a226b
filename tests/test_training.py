from __future__ import annotations

import csv
import itertools
import json
import os
import subprocess
import sys

import pytest
import torch
from support import same

from fastnet.data import Batches
from fastnet.errors import FastnetError
from fastnet.recipes import RECIPES, plots
from fastnet.recipes.comparison import step_times
from fastnet.recipes.files import load_checkpoint, make_folder, write_whole
from fastnet.recipes.recipe import Settings
from fastnet.recipes.runtime import ONE_PROCESS
from fastnet.recipes.training import describe, evaluate, train

RECIPE, CNN = RECIPES["mnist-net"], RECIPES["simple-cnn"]


@pytest.fixture(scope="session")
def digits():
    return RECIPE.data.load()


@pytest.fixture(scope="session")
def few(digits):
    return digits[0].first(640), digits[1].first(200)


FILES = ["checkpoint.pt", "config.json", "metrics.csv", "metrics.json"]


def settings(**changes) -> Settings:
    return Settings(**{"epochs": 2, "batch_size": 64, "log_every": 0, **changes})


def test_reaches_ninety_percent_on_real_digits(digits, tmp_path):
    result = train(RECIPE, settings(epochs=10), *digits, tmp_path)
    assert result.history[-1]["test_accuracy"] >= 0.9
    assert result.history[-1]["train_loss"] < result.history[0]["train_loss"] / 3
    measures = evaluate(result.task, digits[1])
    assert measures == {name: result.history[-1][f"test_{name}"] for name in ("loss", "accuracy")}
    right = result.task.predict(digits[1]) == digits[1].targets
    assert right.float().mean().item() == pytest.approx(measures["accuracy"])


def test_simple_cnn_reaches_ninety_five_percent_on_real_digits(digits, tmp_path):
    result = train(CNN, settings(epochs=5), *digits, tmp_path)
    assert result.history[-1]["test_accuracy"] >= 0.95


def test_simple_cnn_reaches_ninety_percent_on_clothes(tmp_path):
    """A minute and a half of training, where the data is there."""
    on_clothes = CNN.on("fashion-mnist")
    try:
        clothes = on_clothes.data.load()
    except FastnetError as error:
        pytest.skip(str(error))
    result = train(on_clothes, settings(epochs=5), *clothes, tmp_path)
    assert result.history[-1]["test_accuracy"] >= 0.90


def test_other_data_sets_are_named():
    assert CNN.data.name == "mnist"
    assert CNN.on("fashion-mnist").data.name == "fashion-mnist"
    with pytest.raises(
        FastnetError, match="mnist, fashion-mnist, cifar-10 for simple-cnn, not 'cifar'"
    ):
        CNN.on("cifar")


@pytest.mark.parametrize(("recipe", "steps"), [(RECIPE, 100), (CNN, 40)], ids=["mnist-net", "cnn"])
def test_same_loss_curve_as_native_torch(recipe, steps, digits):
    # In channels_last: of elements of a window that are equal but for rounding, others win in
    # torch's plain format, and its own two curves part.
    layout = torch.channels_last if recipe is CNN else torch.contiguous_format

    def losses(backend):
        task = recipe.task(recipe, settings(backend=backend, seed=1), ONE_PROCESS, (1, 28, 28), 10)
        task.network.to(memory_format=layout)
        order = torch.Generator().manual_seed(1)
        batches = Batches(digits[0], 64, recipe.data.mean, recipe.data.std, order)
        curve = []
        while len(curve) < steps:
            for pictures, labels in itertools.islice(batches, steps - len(curve)):
                pictures = pictures.to(memory_format=layout)
                curve.append(task.step(pictures, labels)["loss"].item())
        return torch.tensor(curve)

    fused, native = losses("fastnet"), losses("torch")
    assert fused[-1] < fused[0] / 2
    drift = (fused - native).abs()
    assert drift[:5].max() <= 1e-5
    # Of elements equal but for rounding others win sooner or later there, too.
    assert drift.max() <= (0.1 if recipe is CNN else 1e-4)


@pytest.mark.parametrize(
    ("recipe", "layers"), [(RECIPE, ["fc1"]), (CNN, ["conv1", "conv2", "conv3", "fc1", "fc2"])]
)
def test_backends_have_the_same_parameters(recipe, layers):
    fused, native = (recipe.model((1, 28, 28), 10, backend) for backend in ("fastnet", "torch"))
    fused.load_state_dict(native.state_dict())
    for layer in layers:
        assert type(getattr(fused, layer)).__module__ == "fastnet.modules"
        assert type(getattr(native, layer)).__module__ == "fastnet.models.layers"


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("size", [8, 28, 32])
def test_simple_cnn_takes_pictures_of_other_sizes(channels, size):
    fused, native = (CNN.model((channels, size, size), 7, b) for b in ("fastnet", "torch"))
    fused.load_state_dict(native.state_dict())
    pictures = torch.randn(2, channels, size, size)
    torch.testing.assert_close(fused(pictures), native(pictures), rtol=1e-4, atol=1e-5)
    with pytest.raises(ValueError, match="at least 8 pixels"):
        CNN.model((channels, 7, 7), 7, "fastnet")


@pytest.mark.parametrize("backend", ["fastnet", "torch"])
@pytest.mark.parametrize(
    ("name", "accuracy"),
    [("logistic-regression", 0.8), ("softmax-regression", 0.85), ("activation-net", 0.55)],
)
def test_mlps_learn_digits(name, accuracy, backend, digits, tmp_path):
    recipe = RECIPES[name].on("mnist")
    chosen = settings(epochs=recipe.epochs if name != "activation-net" else 3, backend=backend)
    result = train(recipe, chosen, *digits, tmp_path)
    assert result.history[-1]["test_accuracy"] >= accuracy


NATIVE = (
    "logistic-regression",
    "softmax-regression",
    "mnist-net",
    "simple-net",
    "activation-net",
)


@pytest.mark.parametrize("name", NATIVE)
def test_native_training_is_the_same_training(name, few, tmp_path):
    """The same batches in the same order: the losses agree as far as rounding lets them."""
    recipe = RECIPES[name].on("mnist")
    curves = [
        [
            (row["train_loss"], row["train_accuracy"], row["test_loss"])
            for row in train(recipe, settings(native=native), *few, tmp_path / str(native)).history
        ]
        for native in (False, True)
    ]
    torch.testing.assert_close(*map(torch.tensor, curves), rtol=1e-3, atol=1e-4)


def test_native_training_of_other_networks(few, tmp_path):
    with pytest.raises(FastnetError, match=r"--native cannot train simple-cnn: .*ConvReLUPool2d"):
        train(CNN, settings(native=True), *few, tmp_path)


def test_same_seed_same_run(few, tmp_path):
    first, again, other = (
        train(RECIPE, settings(seed=seed), *few, tmp_path / name)
        for seed, name in ((5, "a"), (5, "b"), (6, "c"))
    )
    assert same(first.task.network.state_dict(), again.task.network.state_dict())
    assert not same(first.task.network.state_dict(), other.task.network.state_dict())


@pytest.mark.parametrize(
    ("recipe", "native"),
    [(RECIPE, False), (RECIPE, True), (CNN, False)],
    ids=["mlp", "native", "cnn"],
)
def test_resumed_training_is_bit_for_bit_the_uninterrupted_one(recipe, native, few, tmp_path):
    whole = train(recipe, settings(epochs=4, native=native), *few, tmp_path / "whole")
    train(recipe, settings(epochs=2, native=native), *few, tmp_path / "parts")
    torch.rand(7)  # whatever the process has drawn in between
    again = settings(epochs=4, resume=True, native=native)
    parts = train(recipe, again, *few, tmp_path / "parts")
    contents = [load_checkpoint(r.checkpoint, recipe.name) for r in (whole, parts)]
    for content in contents:
        for row in content["history"]:
            del row["seconds"]
    assert same(*contents)


@pytest.mark.parametrize(
    ("seconds", "words"),
    [
        (0.0012345, "1.23 ms"),
        (0.00012345, "0.123 ms"),
        (0.0456, "45.6 ms"),
        (0.9996, "1.00 s"),  # rounded, it is a second
        (12.345, "12.3 s"),
        (123.4, "123 s"),
        (0.0, "0 ms"),
    ],
)
def test_times_have_three_digits(seconds, words):
    row = {"epoch": 1, "train_loss": 0.5, "learning_rate": 0.1, "seconds": seconds}
    assert describe(row) == f"train loss 0.5000, {words}"


def test_files_of_a_run(few, tmp_path):
    train(RECIPE, settings(), *few, tmp_path)
    assert sorted(p.name for p in tmp_path.iterdir()) == FILES
    rows = list(csv.DictReader((tmp_path / "metrics.csv").read_text().splitlines()))
    assert [row["epoch"] for row in rows] == ["1", "2"]
    columns = "epoch train_loss train_accuracy test_loss test_accuracy learning_rate seconds"
    assert list(rows[0]) == columns.split()
    as_json = json.loads((tmp_path / "metrics.json").read_text())
    assert [{name: str(value) for name, value in row.items()} for row in as_json] == rows


def test_checkpoint_of_another_network(few, tmp_path):
    result = train(RECIPE, settings(epochs=1), *few, tmp_path)
    content = torch.load(result.checkpoint, weights_only=True)
    torch.save({**content, "recipe": "other-net"}, result.checkpoint)
    with pytest.raises(FastnetError, match="other-net, not of mnist-net"):
        train(RECIPE, settings(resume=True), *few, tmp_path)
    torch.save({**content, "model": {"fc9.weight": torch.zeros(1)}}, result.checkpoint)
    with pytest.raises(FastnetError, match="another network"):
        train(RECIPE, settings(resume=True), *few, tmp_path)


class Malicious:
    def __reduce__(self):
        return os.mkdir, ("executed",)


@pytest.mark.parametrize(
    "content", ["missing", "garbage", "cut", "flipped", "foreign", "tensor", "malicious"]
)
def test_unusable_checkpoints(few, tmp_path, content, monkeypatch):
    monkeypatch.chdir(tmp_path)
    path = train(RECIPE, settings(epochs=1), *few, tmp_path / "run").checkpoint
    if content == "missing":
        path.unlink()
    elif content == "garbage":
        path.write_bytes(b"not a checkpoint")
    elif content == "cut":
        path.write_bytes(path.read_bytes()[:-2000])
    elif content == "flipped":  # one bit of the weights
        whole = bytearray(path.read_bytes())
        whole[whole.index(b"data/0") + 400] ^= 1
        path.write_bytes(whole)
    elif content == "tensor":
        torch.save(torch.zeros(3), path)
    elif content == "foreign":
        torch.save([1, 2, 3], path)
    else:
        torch.save({"format": 2, "recipe": RECIPE.name, "model": Malicious()}, path)
    with pytest.raises(FastnetError) as caught:
        train(RECIPE, settings(resume=True), *few, tmp_path / "run")
    assert str(path.relative_to(tmp_path)) in str(caught.value)
    assert not (tmp_path / "executed").exists()


def test_resuming_with_other_settings(few, tmp_path):
    train(RECIPE, settings(epochs=1), *few, tmp_path)
    for changes, words in (
        ({"batch_size": 32}, "--batch-size 64, not 32"),
        ({"seed": 9}, "--seed 0, not 9"),
        ({"backend": "torch"}, "--backend fastnet, not torch"),
    ):
        with pytest.raises(FastnetError, match=words):
            train(RECIPE, settings(resume=True, **changes), *few, tmp_path)
    with pytest.raises(FastnetError, match=r"640 samples .*, not 320 samples"):
        train(RECIPE, settings(resume=True), few[0].first(320), few[1], tmp_path)


def test_what_is_said_of_resuming_can_be_typed(few, tmp_path, capsys):
    train(RECIPE, settings(native=True), *few, tmp_path)
    with pytest.raises(FastnetError, match="was trained with --native: add it, or name another"):
        train(RECIPE, settings(resume=True), *few, tmp_path)
    capsys.readouterr()
    train(RECIPE, settings(resume=True, native=True, epochs=1), *few, tmp_path)
    said = capsys.readouterr().out
    assert "checkpoint.pt has 2 epochs already, and --epochs 1 counts them all" in said
    assert "going on" not in said
    train(RECIPE, settings(epochs=1), *few, tmp_path)
    with pytest.raises(FastnetError, match="was trained without --native: leave it out, or name"):
        train(RECIPE, settings(resume=True, native=True), *few, tmp_path)
    with pytest.raises(FastnetError, match=r"no checkpoint .* to go on from: leave out --resume"):
        train(RECIPE, settings(resume=True), *few, tmp_path / "empty")


def test_unwritable_folder_is_noticed_before_training(few, tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(FastnetError, match="no folder to write to"):
        train(RECIPE, settings(), *few, tmp_path / "file")


def test_writing_that_fails_leaves_the_old_file(tmp_path):
    target = tmp_path / "f"
    target.write_text("old")

    def fail(path):
        path.write_text("half")
        raise OSError(28, "No space left on device")

    with pytest.raises(FastnetError, match="No space left"):
        write_whole(target, fail)
    assert target.read_text() == "old"
    assert list(tmp_path.iterdir()) == [target]


@pytest.mark.parametrize("name", ["checkpoint.pt", "comparison.png"])
def test_what_a_killed_run_left_half_written_goes_with_the_next(name, tmp_path):
    other = tmp_path / ".12-of-mine"
    other.touch()
    program = f"""
import os, signal
from pathlib import Path
from fastnet.recipes.files import write_whole

def half(path):
    path.touch()
    os.kill(os.getpid(), signal.SIGKILL)

write_whole(Path({str(tmp_path / name)!r}), half)
"""
    subprocess.run([sys.executable, "-c", program])
    assert len(list(tmp_path.iterdir())) == 2
    make_folder(tmp_path)
    assert list(tmp_path.iterdir()) == [other]


def test_step_times_measures_every_backend(few):
    times = step_times(RECIPE, settings(), few[0], ("fastnet", "torch"), turns=1)
    assert set(times) == {"fastnet", "torch"}
    assert all(0 < seconds < 1 for seconds in times.values())


def test_overview_shows_the_predictions(few):
    history = [
        {"epoch": e, "train_loss": 1 / e, "test_loss": 1 / e, "test_accuracy": 0.5} for e in (1, 2)
    ]
    labels = torch.tensor([1, 2, 3])
    figure = plots.overview(
        "title", history, few[1].inputs[:3], labels, torch.tensor([1, 2, 9]), few[1].classes
    )
    titles = [axes.get_title() for axes in figure.axes]
    assert [t for t in titles if t] == ["1 (1)", "2 (2)", "9 (3)"]


def test_a_single_epoch_is_seen_on_every_side():
    history = [{"epoch": 1, "train_loss": 0.5, "train_accuracy": 0.9, "learning_rate": 0.1}]
    sides = ("fastnet", "torch", "compile")
    compared = plots.comparison(dict.fromkeys(sides, history))
    for figure in (plots.learning_curves(history), compared):
        for axes in figure.axes:
            low, high = axes.get_xlim()
            assert [tick for tick in axes.get_xticks() if low <= tick <= high] == [1]
            assert all(line.get_marker() == "o" for line in axes.lines)
    # The same curves do not cover each other.
    for axes in compared.axes:
        assert len({line.get_linestyle() for line in axes.lines}) == 3
        sizes = [line.get_markersize() for line in axes.lines]
        assert sizes == sorted({*sizes}, reverse=True)
