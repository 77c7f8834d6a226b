from __future__ import annotations

import csv
import itertools
import os
import signal
import subprocess
import sys
import time
from dataclasses import replace

import pytest
import torch

from fastnet.data import Batches, ImageSet
from fastnet.errors import FastnetError
from fastnet.recipes import RECIPES, plots
from fastnet.recipes.files import load_checkpoint, write_whole
from fastnet.recipes.training import Settings, evaluate, predict, step_times, train, train_step

RECIPE, CNN = RECIPES["mnist-net"], RECIPES["simple-cnn"]


@pytest.fixture(scope="session")
def digits():
    return RECIPE.data.load()


@pytest.fixture(scope="session")
def few(digits):
    def cut(images: ImageSet, count: int) -> ImageSet:
        return replace(images, images=images.images[:count], labels=images.labels[:count])

    return cut(digits[0], 640), cut(digits[1], 200)


def settings(**changes) -> Settings:
    return Settings(**{"epochs": 2, "batch_size": 64, "log_every": 0, **changes})


def same(left, right) -> bool:
    if isinstance(left, dict):
        return left.keys() == right.keys() and all(same(left[k], right[k]) for k in left)
    if isinstance(left, (list, tuple)):
        return len(left) == len(right) and all(map(same, left, right))
    return torch.equal(left, right) if isinstance(left, torch.Tensor) else left == right


def test_reaches_ninety_percent_on_real_digits(digits, tmp_path):
    result = train(RECIPE, settings(epochs=10), *digits, tmp_path)
    assert result.history[-1]["test_accuracy"] >= 0.9
    assert result.history[-1]["train_loss"] < result.history[0]["train_loss"] / 3
    loss, accuracy = evaluate(RECIPE, result.model, digits[1])
    assert (loss, accuracy) == (
        result.history[-1]["test_loss"],
        result.history[-1]["test_accuracy"],
    )
    predictions = predict(RECIPE, result.model, digits[1], 1000)
    assert (predictions == digits[1].labels).float().mean().item() == pytest.approx(accuracy)


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
    with pytest.raises(FastnetError, match="mnist, fashion-mnist for simple-cnn, not 'cifar'"):
        CNN.on("cifar")


@pytest.mark.parametrize(("recipe", "steps"), [(RECIPE, 100), (CNN, 40)], ids=["mnist-net", "cnn"])
def test_same_loss_curve_as_native_torch(recipe, steps, digits):
    # In channels_last: of elements of a window that are equal but for rounding, others win in
    # torch's plain format, and its own two curves part.
    layout = torch.channels_last if recipe is CNN else torch.contiguous_format

    def losses(backend):
        torch.manual_seed(1)
        model = recipe.model(backend=backend).to(memory_format=layout)
        optimizer = recipe.optimizer(model.parameters())
        order = torch.Generator().manual_seed(1)
        batches = Batches(digits[0], 64, recipe.data.mean, recipe.data.std, order)
        curve = []
        while len(curve) < steps:
            for pictures, labels in itertools.islice(batches, steps - len(curve)):
                pictures = pictures.to(memory_format=layout)
                curve.append(train_step(recipe, model, optimizer, pictures, labels).item())
        return torch.tensor(curve)

    fused, native = losses("fastnet"), losses("torch")
    assert fused[-1] < fused[0] / 2
    assert (fused - native).abs().max() <= 1e-4


@pytest.mark.parametrize(
    ("recipe", "layers"), [(RECIPE, ["fc1"]), (CNN, ["conv1", "conv2", "conv3", "fc1", "fc2"])]
)
def test_backends_have_the_same_parameters(recipe, layers):
    fused, native = (recipe.model(backend=backend) for backend in ("fastnet", "torch"))
    fused.load_state_dict(native.state_dict())
    for layer in layers:
        assert type(getattr(fused, layer)).__module__ == "fastnet.modules"
        assert type(getattr(native, layer)).__module__ == "fastnet.models.layers"


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("size", [8, 28, 32])
def test_simple_cnn_takes_pictures_of_other_sizes(channels, size):
    fused, native = (CNN.model(channels, size, 7, backend=b) for b in ("fastnet", "torch"))
    fused.load_state_dict(native.state_dict())
    pictures = torch.randn(2, channels, size, size)
    torch.testing.assert_close(fused(pictures), native(pictures), rtol=1e-4, atol=1e-5)
    with pytest.raises(ValueError, match="at least 8 pixels"):
        CNN.model(channels, 7)


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


@pytest.mark.parametrize(
    "recipe", [r for r in RECIPES.values() if r is not CNN], ids=lambda r: r.name
)
def test_native_training_is_the_same_training(recipe, few, tmp_path):
    """The same batches in the same order: the losses agree as far as rounding lets them."""
    recipe = recipe.on("mnist")
    curves = [
        [
            (row["train_loss"], row["test_loss"])
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
    assert same(first.model.state_dict(), again.model.state_dict())
    assert not same(first.model.state_dict(), other.model.state_dict())


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


def test_files_of_a_run(few, tmp_path):
    train(RECIPE, settings(), *few, tmp_path)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["checkpoint.pt", "metrics.csv"]
    rows = list(csv.DictReader((tmp_path / "metrics.csv").read_text().splitlines()))
    assert [row["epoch"] for row in rows] == ["1", "2"]
    assert set(rows[0]) == {"epoch", "train_loss", "test_loss", "test_accuracy", "seconds"}


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


@pytest.mark.parametrize("content", ["missing", "garbage", "cut", "foreign", "malicious"])
def test_unusable_checkpoints(few, tmp_path, content, monkeypatch):
    monkeypatch.chdir(tmp_path)
    path = train(RECIPE, settings(epochs=1), *few, tmp_path / "run").checkpoint
    if content == "missing":
        path.unlink()
    elif content == "garbage":
        path.write_bytes(b"not a checkpoint")
    elif content == "cut":
        path.write_bytes(path.read_bytes()[:-2000])
    elif content == "foreign":
        torch.save([1, 2, 3], path)
    else:
        torch.save({"format": 1, "recipe": RECIPE.name, "model": Malicious()}, path)
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
    other = replace(few[0], images=few[0].images[:320], labels=few[0].labels[:320])
    with pytest.raises(FastnetError, match=r"640 pictures of .*, not 320 pictures"):
        train(RECIPE, settings(resume=True), other, few[1], tmp_path)


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
        "title", history, few[1].images[:3], labels, torch.tensor([1, 2, 9]), few[1].classes
    )
    titles = [axes.get_title() for axes in figure.axes]
    assert [t for t in titles if t] == ["1 (1)", "2 (2)", "9 (3)"]


# -------------------------------------------------------------------------------------------------
# The command line, as a user meets it


def command(*arguments: str, cwd) -> subprocess.CompletedProcess:
    return subprocess.run(
        [sys.executable, "-m", "fastnet", *arguments], cwd=cwd, capture_output=True, text=True
    )


def test_train_command(tmp_path):
    done = command("train", "mnist-net", "--epochs", "2", "--log-every", "20", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    for words in (
        "4,000 to train, 1,000 to test",
        "epoch 1 [1280/4000] loss",
        "epoch 2/2",
        "test accuracy",
        "a training step, batch 64: fastnet",
        "native torch",
        "runs/mnist-net/checkpoint.pt",
        "runs/mnist-net/overview.png",
    ):
        assert words in done.stdout
    run = tmp_path / "runs" / "mnist-net"
    assert (run / "overview.png").read_bytes()[:4] == b"\x89PNG"
    names = {"checkpoint.pt", "metrics.csv", "overview.png"}
    assert {path.name for path in run.iterdir()} == names
    more = command("train", "mnist-net", "--epochs", "3", "--resume", cwd=tmp_path)
    assert more.returncode == 0, more.stderr
    assert "going on from epoch 2" in more.stdout
    assert "epoch 3/3" in more.stdout


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["train", "no-such-net"], "mnist-net"),
        (["train", "mnist-net", "--backend", "jax"], "'jax'"),
        (["train", "mnist-net", "--dataset", "cifar"], "'cifar'"),
        (["train", "mnist-net", "--native", "--backend", "torch"], "--native"),
        (["train", "simple-cnn", "--native"], "ConvReLUPool2d"),
        (["train", "mnist-net", "--data-dir", "nowhere"], "train-images-idx3-ubyte"),
        (["train", "mnist-net", "--resume"], "no checkpoint"),
        (["train", "mnist-net", "--out", "/proc/nowhere"], "no folder to write to"),
    ],
    ids=["name", "backend", "dataset", "native", "network", "data", "resume", "out"],
)
def test_bad_input_is_one_sentence(tmp_path, arguments, words):
    done = command(*arguments, cwd=tmp_path)
    assert done.returncode == 1
    assert words in done.stderr
    assert done.stderr.startswith("fastnet: ")
    assert done.stderr.count("\n") == 1
    assert not list(tmp_path.rglob("*.pt"))


def test_interrupt_keeps_the_last_finished_epoch(tmp_path):
    process = subprocess.Popen(
        [sys.executable, "-m", "fastnet", "train", "mnist-net", "--epochs", "1000"],
        cwd=tmp_path,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
    )
    checkpoint = tmp_path / "runs" / "mnist-net" / "checkpoint.pt"
    deadline = time.monotonic() + 120
    while not checkpoint.exists() and time.monotonic() < deadline:
        time.sleep(0.05)
    process.send_signal(signal.SIGINT)
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 1
    assert "--resume goes on" in errors.splitlines()[-1]
    assert "Traceback" not in errors
    done = load_checkpoint(checkpoint, RECIPE.name)["history"][-1]["epoch"]
    assert sorted(p.name for p in checkpoint.parent.iterdir()) == ["checkpoint.pt", "metrics.csv"]
    more = command("train", "mnist-net", "--epochs", str(done + 1), "--resume", cwd=tmp_path)
    assert more.returncode == 0, more.stderr
    assert f"epoch {done + 1}/{done + 1}" in more.stdout


def test_list_and_info(tmp_path):
    assert "mnist-net" in command("list", cwd=tmp_path).stdout
    assert "cpu_isa" in command("info", cwd=tmp_path).stdout
