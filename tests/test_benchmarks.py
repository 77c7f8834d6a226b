"""The benchmarks' own honesty: what they refuse to time, and what they write."""

from __future__ import annotations

import csv
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from benchmarks import (
    accelerate,
    conv_relu_pool,
    cross_entropy,
    gpu_report,
    harness,
    linear_relu,
    plot,
)
from fastnet.errors import FastnetError

ROOT = Path(__file__).parent.parent


def case(**changes) -> harness.Case:
    values = torch.arange(5.0)
    sides = {"eager": lambda: [values], "compile": lambda: [values], "fastnet": lambda: [values]}
    return harness.Case(
        **{"op": "op", "case": "5", "mode": "forward", "sides": sides, "seconds": 0.02, **changes}
    )


def test_sides_that_differ_are_not_timed():
    right = torch.arange(5.0)
    for wrong in (right + 1e-3, right * float("nan")):
        sides = {"eager": lambda: [right], "fastnet": lambda wrong=wrong: [wrong]}
        with pytest.raises(AssertionError, match="fastnet differs from eager"):
            harness.run(case(sides=sides))


def test_ratio_is_to_the_best_of_the_others(monkeypatch):
    times = {"eager": [4.0] * 5, "compile": [3.0] * 5, "fastnet": [1.0, 1.0, 2.0, 9.0, 9.0]}
    monkeypatch.setattr(harness, "measure", lambda *_: times)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    rows = {row.side: row for row in harness.run(case(flops=4e9, bytes=8e9))}
    assert rows["fastnet"].median_us == 2e6
    assert (rows["fastnet"].p20_us, rows["fastnet"].p80_us) == (1e6, 9e6)
    assert rows["fastnet"].ratio == 1.5
    assert (rows["fastnet"].gflops, rows["fastnet"].gbs) == (2.0, 4.0)
    assert rows["eager"].ratio != rows["eager"].ratio  # NaN: a ratio is fastnet's alone
    assert "1.50x" in harness.table(list(rows.values()))


def test_measuring_again_replaces_rows(tmp_path):
    first = harness.run(case())
    other = harness.run(case(case="6"))
    harness.save(first + other, tmp_path)
    path = harness.save(harness.run(case()), tmp_path)
    rows = list(csv.DictReader(path.read_text().splitlines()))
    assert len(rows) == 6
    assert {row["case"] for row in rows} == {"5", "6"}
    assert all(row["commit"] and row["torch"] == torch.__version__ for row in rows)


def test_ratios_that_have_fallen_are_told(tmp_path, monkeypatch):
    def rows(seconds):
        times = {"eager": [4.0] * 5, "compile": [3.0] * 5, "fastnet": [seconds] * 5}
        monkeypatch.setattr(harness, "measure", lambda *_: times)
        return harness.run(case()) + harness.run(case(case="6"))

    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(FastnetError, match="without --check first"):
        harness.fallen(rows(1.0), tmp_path)
    harness.save(rows(1.0)[:3], tmp_path)
    assert harness.fallen(rows(1.2), tmp_path) == []
    (told,) = harness.fallen(rows(1.3), tmp_path)  # of the case that the file has
    assert "op 5 forward" in told
    assert told.endswith("2.31, was 3.00")


def test_a_network_of_ones_own(tmp_path, monkeypatch):
    (tmp_path / "mine.py").write_text(
        "from torch import nn\n"
        "def network():\n"
        "    layers = nn.Conv2d(2, 4, 3), nn.ReLU(), nn.MaxPool2d(2), nn.Flatten(), nn.Dropout()\n"
        "    return nn.Sequential(*layers, nn.Linear(36, 3))\n"
        "def encoder():\n"
        "    return nn.Sequential(nn.Conv2d(2, 4, 3))\n"
    )
    monkeypatch.chdir(tmp_path)
    timed = accelerate.step_of("mine", "mine:network", (4, 2, 8, 8))
    harness.verify(timed)
    assert tuple(timed.sides) == accelerate.SIDES
    with pytest.raises(FastnetError, match="does not take pictures"):
        accelerate.step_of("mine", "mine:network", (4, 2, 9, 30))
    with pytest.raises(FastnetError, match="does not give logits"):
        accelerate.step_of("mine", "mine:encoder", (4, 2, 8, 8))


def test_bench_command():
    done = subprocess.run(
        [sys.executable, "-m", "fastnet", "bench", "no_such_op"],
        cwd=ROOT,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 2
    assert "no benchmark no_such_op" in done.stderr


def test_operators_compute_what_autograd_does():
    for timed in linear_relu._cases(6, 20, 5, True, "cpu", torch.float32):
        if timed.mode == "operators":
            harness.verify(timed)
            assert len(timed.sides["fastnet"]()) == 4


def test_operators_of_cross_entropy():
    for shape in ((6, 10), (2, 5, 3, 4)):
        modes = []
        for timed in cross_entropy._cases(shape, "cpu", torch.float32):
            harness.verify(timed)
            modes.append(timed.mode)
        assert modes == ["forward", "forward+backward", "operators"]


def test_sides_of_conv_relu_pool_agree():
    for shape in ((2, 3, 8, 4, 3, 1, True), (2, 1, 9, 4, 5, 2, False)):
        modes = []
        for timed in conv_relu_pool._cases(shape, "cpu", torch.float32):
            harness.verify(timed)
            modes.append(timed.mode)
        assert modes == ["forward", "forward+backward"]


def test_report_without_a_gpu_is_one_sentence():
    if torch.cuda.is_available():
        pytest.skip("there is a GPU here")
    done = subprocess.run(
        [sys.executable, "benchmarks/gpu_report.py"], cwd=ROOT, capture_output=True, text=True
    )
    assert done.returncode == 2
    assert done.stderr.count("\n") == 1
    assert "no NVIDIA GPU" in done.stderr


def test_parts_that_fail_are_reported_and_stop_nothing(tmp_path, monkeypatch):
    monkeypatch.setitem(gpu_report.LIMITS, "tests", 1)
    print_then_wait = "import time; print('half way', flush=True); time.sleep(30)"
    parts = [
        gpu_report.run("build", [sys.executable, "-c", "print('done')"], tmp_path),
        gpu_report.run("tests", [sys.executable, "-c", print_then_wait], tmp_path),
        gpu_report.run("memcheck", ["/no/such/program"], tmp_path),
        gpu_report.run("racecheck", [sys.executable, "-c", "raise SystemExit(3)"], tmp_path),
    ]
    assert [part.ok for part in parts] == [True, False, False, False]
    rows = [
        {"op": "linear_relu", "case": name, "mode": "forward", "side": side, "median_us": "10",
         "ratio": "1.5", "gbs": "100", "gflops": "50"}
        for name in ("a", "b, bfloat16") for side in ("eager", "fastnet")
    ]  # fmt: skip
    card = {"name": "Card", "torch": "2", "date": "d", "copy": 1e3, "float32": 100, "bfloat16": 500}
    text = gpu_report.report(parts, rows, card, tmp_path).read_text()
    for words in ("stopped after 1 s; half way", "exit status 3", "no/such/program"):
        assert words in text
    assert "| linear_relu | a | forward | 10.0 | 1.50 | 10.0% | 50.0% |" in text
    assert "| 10.0% | 10.0% |" in text  # bfloat16, against its own rate


def test_bars_tell_every_ratio():
    rows = [
        {"op": op, "case": case, "mode": mode, "side": side, "threads": threads, "ratio": ratio}
        for op, case, mode, side, threads, ratio in (
            ("linear_relu", "a", "forward+backward", "fastnet", "2", "1.5"),
            ("linear_relu", "a", "forward+backward", "fastnet", "1", "0.8"),
            ("linear_relu", "a", "forward+backward", "eager", "2", "nan"),
            ("linear_relu", "b", "forward+backward", "fastnet", "2", "4.0"),
            ("linear_relu", "b", "forward", "fastnet", "2", "9.0"),
            ("recipes", "c", "step", "fastnet", "2", "0.9"),
        )
    ]
    figure = plot.speed_ups(rows, "title")
    assert [axes.get_title() for axes in figure.axes] == [
        "linear_relu, forward+backward",
        "recipes, step",
    ]
    # From the line at 1 to the ratio, the losing ones in red.
    bars = {
        round(1 + bar.get_width(), 3): bar.get_facecolor()
        for axes in figure.axes
        for bar in axes.patches
        if bar.get_width() == bar.get_width()
    }
    assert set(bars) == {1.5, 0.8, 4.0, 0.9}
    assert bars[0.8][:3] == bars[0.9][:3] != bars[1.5][:3]
