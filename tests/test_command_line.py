"""The command line, as a user meets it."""

from __future__ import annotations

import contextlib
import io
import json
import os
import shlex
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from support import interruptible

import fastnet
from fastnet.cli import main
from fastnet.recipes import COMPARISONS, RECIPES
from fastnet.recipes.files import load_checkpoint

# Processes start in other folders, where Python finds the fastnet that is installed.
THIS = {**os.environ, "PYTHONPATH": str(Path(__file__).parent.parent)}


def process(*arguments: str, cwd) -> subprocess.CompletedProcess:
    return subprocess.run(
        [sys.executable, "-m", "fastnet", *arguments],
        cwd=cwd,
        env=THIS,
        capture_output=True,
        text=True,
    )


def command(*arguments: str, cwd) -> subprocess.CompletedProcess:
    """The same without the seconds that a new process takes to import torch."""
    words = ["fastnet", *map(str, arguments)]
    output, errors = io.StringIO(), io.StringIO()
    code = 0
    with (
        pytest.MonkeyPatch.context() as patch,
        contextlib.redirect_stdout(output),
        contextlib.redirect_stderr(errors),
    ):
        patch.chdir(cwd)
        patch.setattr(sys, "argv", words)
        try:
            main()
        except SystemExit as done:
            code = done.code or 0
    return subprocess.CompletedProcess(words, code, output.getvalue(), errors.getvalue())


def test_train_command(tmp_path):
    done = process("train", "mnist-net", "--epochs", "2", "--log-every", "20", cwd=tmp_path)
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
    names = {"checkpoint.pt", "config.json", "metrics.csv", "metrics.json", "overview.png"}
    assert {path.name for path in run.iterdir()} == names
    more = process("train", "mnist-net", "--epochs", "3", "--resume", cwd=tmp_path)
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
        (["train", "mnist-net", "--compare", "--backend", "torch"], "--compare"),
        (["train", "mnist-net", "--amp", "fp8"], "'fp8'"),
        (["train", "mnist-net", "--device", "tpu"], "'tpu'"),
        (["train", "mnist-net", "--scheduler", "Cosine"], "'Cosine'"),
        (["train", "mnist-net", "--milestones", "a,b"], "'a,b'"),
        (["train", "mnist-net", "--milestones", "0,2"], "from 1 on, such as 10,20, not '0,2'"),
        (["train", "mnist-net", "--lr", "-1"], "--lr must be above 0 and finite, not -1.0"),
        (["bench", "--threads", "0"], "--threads must be numbers from 1 on"),
        (["train", "cifar-mlp"], "data_batch_1"),
        (["train", "cats-dogs"], "--data-dir"),
        (["train", "vgg16-transfer", "--weights", "no.pth", "--data-dir", "pets"], "pets"),
        (["export", "runs/none"], "no checkpoint"),
        (["split", "nowhere", "out"], "nowhere"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else None,
)
def test_bad_input_is_one_sentence(tmp_path, arguments, words):
    done = command(*arguments, cwd=tmp_path)
    assert done.returncode == 1
    assert words in done.stderr
    assert done.stderr.startswith("fastnet: ")
    assert done.stderr.count("\n") == 1
    assert not list(tmp_path.rglob("*.pt"))


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["softmax-regression"], ["./data has no Fashion", "; or choose --dataset mnist, which"]),
        (
            ["simple-cnn", "--dataset", "cifar-10", "--data-dir", "there"],
            ["The folder there has no CIFAR-10", "--dataset mnist and leave out --data-dir"],
        ),
    ],
)
def test_without_data_there_are_the_digits(tmp_path, monkeypatch, arguments, words):
    monkeypatch.setattr("fastnet.data.mnist.DEBIAN_FASHION_MNIST", tmp_path / "nowhere")
    said = command("train", *arguments, cwd=tmp_path).stderr
    assert all(part in said for part in words)
    # But not to a training that has none of them, or was told to take just these.
    for others in (["cifar-mlp"], ["simple-cnn", "--dataset", "mnist", "--data-dir", "there"]):
        assert "choose --dataset" not in command("train", *others, cwd=tmp_path).stderr


def test_bad_input_in_a_process_of_its_own(tmp_path):
    done = process("train", "no-such-net", cwd=tmp_path)
    assert done.returncode == 1
    assert done.stderr.startswith("fastnet: There is no training 'no-such-net'")
    assert done.stderr.count("\n") == 1


def test_interrupt_keeps_the_last_finished_epoch(tmp_path):
    process = subprocess.Popen(
        [sys.executable, "-m", "fastnet", "train", "mnist-net", "--epochs", "1000"],
        cwd=tmp_path,
        env=THIS,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
        preexec_fn=interruptible,
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
    done = load_checkpoint(checkpoint, "mnist-net")["history"][-1]["epoch"]
    names = {path.name for path in checkpoint.parent.iterdir()}
    assert names >= {"checkpoint.pt", "config.json", "metrics.csv", "metrics.json"}
    assert not [name for name in names if name.startswith(".")]  # nothing half-written
    more = command("train", "mnist-net", "--epochs", str(done + 1), "--resume", cwd=tmp_path)
    assert more.returncode == 0, more.stderr
    assert f"epoch {done + 1}/{done + 1}" in more.stdout


@pytest.mark.parametrize("seconds", [0.05, 0.4, 1.1])
def test_killed_at_any_moment_a_run_loses_one_epoch_at_most(seconds, tmp_path):
    arguments = ["train", "mnist-net", "--log-every", "0", "--epochs"]
    process = subprocess.Popen(
        [sys.executable, "-m", "fastnet", *arguments, "1000"],
        cwd=tmp_path,
        env=THIS,
        stdout=subprocess.PIPE,
    )
    process.stdout.readline()  # it has begun
    run = tmp_path / "runs" / "mnist-net"
    deadline = time.monotonic() + 120
    while not (run / "checkpoint.pt").exists() and time.monotonic() < deadline:
        time.sleep(0.01)
    time.sleep(seconds)
    process.kill()
    said = process.communicate()[0].decode().count(": train loss")
    done = load_checkpoint(run / "checkpoint.pt", "mnist-net")["history"][-1]["epoch"]
    assert done >= said >= 0
    more = command(*arguments, str(done + 2), "--resume", cwd=tmp_path)
    assert more.returncode == 0, more.stderr
    whole = command(*arguments, str(done + 2), "--out", "whole", cwd=tmp_path)
    assert whole.returncode == 0, whole.stderr
    models = [load_checkpoint(p / "checkpoint.pt")["model"] for p in (run, tmp_path / "whole")]
    assert all(torch.equal(models[0][key], models[1][key]) for key in models[0])


def test_compare_trains_on_every_backend(tmp_path):
    done = command("train", "mnist-net", "--compare", "--epochs", "1", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    run = tmp_path / "runs" / "mnist-net"
    content = json.loads((run / "comparison.json").read_text())
    assert list(content) == ["fastnet", "torch", "compile"]
    losses = [content[backend]["train_loss"] for backend in content]
    assert losses == pytest.approx([losses[0]] * 3, rel=1e-4)
    assert all(0 < content[backend]["step_seconds"] < 1 for backend in content)
    heading, *rows = done.stdout.splitlines()[-5:-1]
    assert heading.endswith("ms a step  times fastnet's")
    assert [row.split()[0] for row in rows] == list(content)
    assert (run / "comparison.png").read_bytes()[:4] == b"\x89PNG"
    assert (run / "torch" / "checkpoint.pt").exists()
    # Stopped before the last of them had its turn, it goes on with those that had theirs.
    shutil.rmtree(run / "compile")
    done = command("train", "mnist-net", "--compare", "--epochs", "1", "--resume", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("nothing to do") == 2


def test_mlp_comparison(tmp_path):
    done = command("train", "mlp-comparison", "--epochs", "2", "--native", cwd=tmp_path)
    assert done.returncode == 1  # BatchNorm has no native loop
    assert "--native cannot train batch-net" in done.stderr
    assert "epoch" not in done.stdout
    done = command("train", "mlp-comparison", "--epochs", "2", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    run = tmp_path / "runs" / "mlp-comparison"
    content = json.loads((run / "comparison.json").read_text())
    assert tuple(content) == ("simple-net", "activation-net", "batch-net")
    # With BatchNorm it learns fastest.
    assert content["batch-net"]["test_accuracy"] > content["activation-net"]["test_accuracy"]
    for name in content:
        assert name in done.stdout.splitlines()[-5 + list(content).index(name) + 1]
        assert (run / name / "overview.png").exists()


def test_numpy_forward(tmp_path):
    done = command("train", "numpy-forward", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    values = [line.split()[-1] for line in done.stdout.splitlines()[-2:]]
    assert float(values[0]) == pytest.approx(float(values[1]), rel=1e-14)
    refused = command("train", "numpy-forward", "--epochs", "3", "--compile", cwd=tmp_path)
    assert refused.returncode != 0
    assert "leave out --epochs, --compile" in refused.stderr


def test_linear_regression_tells_its_errors(tmp_path):
    done = command("train", "linear-regression", "--log-every", "0", cwd=tmp_path)
    assert "estimation errors: of w [" in done.stdout
    # By hand on every backend: there is nothing to time.
    assert "native torch" not in done.stdout


def test_events_for_tensorboard(tmp_path):
    events = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    for arguments in (["--epochs", "2"], ["--epochs", "3", "--resume"]):
        done = command("train", "mnist-net", "--tensorboard", *arguments, cwd=tmp_path)
        assert done.returncode == 0, done.stderr
    run = tmp_path / "runs" / "mnist-net"
    written = events.EventAccumulator(str(run / "tensorboard"))
    written.Reload()
    history = json.loads((run / "metrics.json").read_text())
    for tag, column in (("loss/train", "train_loss"), ("accuracy/test", "test_accuracy")):
        scalars = written.Scalars(tag)
        assert [scalar.step for scalar in scalars] == [1, 2, 3]
        expected = [row[column] for row in history]
        assert [scalar.value for scalar in scalars] == pytest.approx(expected, rel=1e-6)


def test_pictures_of_every_epoch_and_of_weights(tmp_path):
    done = command("train", "autoencoder", "--epochs", "2", "--log-every", "0", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    folder = tmp_path / "runs" / "autoencoder" / "samples"
    assert [path.name for path in sorted(folder.iterdir())] == ["epoch-001.png", "epoch-002.png"]
    # Those of a longer run that was there before are not left among a new one's.
    done = command("train", "autoencoder", "--epochs", "1", "--log-every", "0", cwd=tmp_path)
    assert [path.name for path in folder.iterdir()] == ["epoch-001.png"], done.stderr
    done = command("train", "logistic-regression", "--log-every", "0", cwd=tmp_path)
    assert "templates.png" in done.stdout
    run = tmp_path / "runs" / "logistic-regression"
    assert (run / "templates.png").read_bytes()[:4] == b"\x89PNG"


def test_cats_and_dogs_from_a_flat_folder(tmp_path):
    image = pytest.importorskip("PIL.Image")
    (tmp_path / "flat").mkdir()
    for number in range(20):
        for name, colour in (("cat", (200, 120, 40)), ("dog", (60, 90, 180))):
            picture = image.new("RGB", (160 + number, 150), colour)
            picture.save(tmp_path / "flat" / f"{name}.{number}.jpg")
    done = command("split", "flat", "my pets", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert "cat: 16 to train, 4 to validate" in done.stdout
    assert len(list((tmp_path / "flat").iterdir())) == 40
    *_, line = done.stdout.splitlines()
    arguments = shlex.split(line)[1:]  # as a shell takes the line
    done = command(*arguments, "--epochs", "1", "--augment", "--amp", "bf16", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert "32 to train, 8 to test" in done.stdout
    done = command("export", "runs/cats-dogs", cwd=tmp_path)
    assert done.stdout == "written: runs/cats-dogs/model.safetensors\n"


def test_configuration_of_a_run(tmp_path):
    chosen = ["--epochs", "1", "--seed", "7", "--scheduler", "MultiStepLR", "--milestones", "1,2"]
    chosen += ["--lr", "0.002"]
    done = command("train", "mnist-net", *chosen, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    content = json.loads((tmp_path / "runs" / "mnist-net" / "config.json").read_text())
    assert content["settings"]["seed"] == 7
    assert content["settings"]["lr"] == 0.002
    assert content["settings"]["schedule"]["milestones"] == [1, 2]
    assert content["device"] == "cpu" or content["device"].startswith("cuda")


def test_version(tmp_path):
    done = command("--version", cwd=tmp_path)
    assert (done.returncode, done.stdout) == (0, f"fastnet {fastnet.__version__}\n")


@pytest.mark.parametrize("name", ["mnist-nett", "MNIST-Net", "mnist_net"])
def test_a_name_that_is_nearly_one(name, tmp_path):
    said = command("train", name, cwd=tmp_path).stderr
    assert f"no training {name!r}: did you mean mnist-net? There are: numpy-forward, " in said
    assert "did you mean" not in command("train", "transformer", cwd=tmp_path).stderr


def test_list_and_info(tmp_path):
    listed = command("list", cwd=tmp_path).stdout.splitlines()
    names = [line.split()[0] for line in listed[1:]]
    assert names == ["numpy-forward", *RECIPES, *COMPARISONS]
    assert next(line for line in listed if "mnist-net " in line).split()[1:3] == ["10", "64"]
    assert "cpu_isa" in command("info", cwd=tmp_path).stdout
