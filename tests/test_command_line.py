"""The command line, as a user meets it."""

from __future__ import annotations

import signal
import subprocess
import sys
import time

import pytest

from fastnet.recipes.files import load_checkpoint


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
    names = {"checkpoint.pt", "config.json", "metrics.csv", "metrics.json", "overview.png"}
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
    done = load_checkpoint(checkpoint, "mnist-net")["history"][-1]["epoch"]
    names = {path.name for path in checkpoint.parent.iterdir()}
    assert names >= {"checkpoint.pt", "config.json", "metrics.csv", "metrics.json"}
    assert not [name for name in names if name.startswith(".")]  # nothing half-written
    more = command("train", "mnist-net", "--epochs", str(done + 1), "--resume", cwd=tmp_path)
    assert more.returncode == 0, more.stderr
    assert f"epoch {done + 1}/{done + 1}" in more.stdout


def test_list_and_info(tmp_path):
    assert "mnist-net" in command("list", cwd=tmp_path).stdout
    assert "cpu_isa" in command("info", cwd=tmp_path).stdout
