"""Trainings in several processes, which torchrun starts."""

from __future__ import annotations

import csv
import os
import subprocess
import sys

import pytest
import torch

from fastnet.recipes.files import load_checkpoint


def python(*arguments: str, cwd, processes: int = 1) -> subprocess.CompletedProcess:
    launcher = ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={processes}"]
    return subprocess.run(
        [sys.executable, *(launcher if processes > 1 else []), *arguments],
        cwd=cwd,
        capture_output=True,
        text=True,
        timeout=300,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )


def fastnet(*arguments: str, **where) -> subprocess.CompletedProcess:
    return python("-m", "fastnet", *arguments, "--device", "cpu", **where)


def metrics(folder) -> list[dict]:
    return list(csv.DictReader((folder / "metrics.csv").read_text().splitlines()))


# 4,000 digits in batches of 63 leave a last one of 31, which two processes cannot halve.
@pytest.mark.parametrize(
    "arguments",
    [
        ["mnist-net", "--epochs", "2", "--batch-size", "63"],
        ["autoencoder", "--epochs", "1"],
        ["linear-regression", "--epochs", "2", "--batch-size", "9"],
    ],
    ids=lambda arguments: arguments[0],
)
def test_two_processes_train_as_one_does(arguments, tmp_path):
    runs = {}
    for processes in (1, 2):
        out = tmp_path / str(processes)
        done = fastnet("train", *arguments, "--out", str(out), cwd=tmp_path, processes=processes)
        assert done.returncode == 0, done.stderr
        assert done.stdout.count("data: ") == 1  # one of them talks
        runs[processes] = metrics(out)
    assert len(runs[1]) == len(runs[2]) >= 1
    for one, two in zip(runs[1], runs[2], strict=True):
        for name in one:
            if name != "seconds":
                assert float(one[name]) == pytest.approx(float(two[name]), rel=1e-3, abs=2e-5)


@pytest.mark.parametrize("name", ["gan", "batch-net"])
def test_resumed_in_several_processes(name, tmp_path):
    """Also noise, which every process draws for itself, and BatchNorm's buffers."""
    common = ("train", name, "--batch-size", "500", "--log-every", "0")
    for out, epochs, resume in (("whole", 2, ()), ("parts", 1, ()), ("parts", 2, ("--resume",))):
        chosen = ("--epochs", str(epochs), "--out", out, *resume)
        done = fastnet(*common, *chosen, cwd=tmp_path, processes=2)
        assert done.returncode == 0, done.stderr
    whole, parts = (load_checkpoint(tmp_path / out / "checkpoint.pt") for out in ("whole", "parts"))
    assert whole["model"].keys() == parts["model"].keys()
    assert all(torch.equal(whole["model"][key], parts["model"][key]) for key in whole["model"])


def test_comparisons_take_one_process(tmp_path):
    done = fastnet("train", "mnist-net", "--compare", cwd=tmp_path, processes=2)
    assert done.returncode != 0
    assert "comparisons run in one process" in done.stderr


def test_processes_end_in_peace(tmp_path):
    """Also where Python's lock is never taken from who has it: gloo's threads wait for it then, to
    let go of the last gradients, until the process ends."""
    script = tmp_path / "script.py"
    script.write_text(
        """import sys, torch
from fastnet.recipes import runtime

sys.setswitchinterval(1000)
with runtime.start("cpu") as here:
    network = here.parallel(torch.nn.Linear(4, 4))
    network(torch.randn(2, 4)).sum().backward()
"""
    )
    for _ in range(3):
        done = python(str(script), cwd=tmp_path, processes=2)
        assert done.returncode == 0, done.stderr
