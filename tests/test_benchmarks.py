"""The benchmarks' own honesty: what they refuse to time, and what they write."""

from __future__ import annotations

import csv
import math
import re
import subprocess
import sys
import time
import types
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
import typer
from typer.testing import CliRunner

import fastnet
from benchmarks import gpu_report, kernels, peers, plot, tables
from fastnet.bench import (
    accelerate,
    conv_relu_pool,
    cross_entropy,
    harness,
    linear_relu,
    machine,
    memory,
    mlp_trainer,
    networks,
    passes,
    recipes,
    results,
    run,
)
from fastnet.errors import FastnetError
from fastnet.recipes import RECIPES

ROOT = Path(__file__).parent.parent
ON_GPU = torch.cuda.is_available()


@pytest.fixture(autouse=True)
def _on_the_cpu(monkeypatch):
    """Also where there is a GPU, of which test_on_a_gpu is."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)


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
    assert "1.50x" in results.table(list(rows.values()))


def test_the_better_memory_format_has_the_ratio(monkeypatch, tmp_path):
    times = {"eager": [4.0] * 5, "fastnet": [3.0] * 5, "fastnet, channels_last": [2.0] * 5}
    times |= {"fastnet, two ops": [1.0] * 5}  # no rival, and not what is measured
    monkeypatch.setattr(harness, "measure", lambda *_: times)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    sides = {side: lambda: [torch.ones(2)] for side in times}
    rows = harness.run(case(sides=sides))
    ratios = {row.side: row.ratio for row in rows if row.ratio == row.ratio}
    assert ratios == {"fastnet, channels_last": 2.0}
    assert "2.00x" in results.table(rows)
    saved = results.read(results.save(rows, tmp_path)).values()
    assert [row["side"] for row in filter(results.has_ratio, saved)] == ["fastnet, channels_last"]
    times["fastnet, channels_last"] = [3.0] * 5  # now the other one is as good
    (told,) = results.fallen(harness.run(case(sides=sides)), tmp_path)
    assert told.endswith("1.33, was 2.00")


def test_of_a_sequel_only_what_follows_is_timed(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    calls = []

    def before():
        calls.append("before")
        time.sleep(0.02)
        return (torch.ones(2),)

    def then(ones):
        calls.append("then")
        return [2 * ones]

    rows = harness.run(case(mode="backward", sides={"fastnet": harness.Sequel(before, then)}))
    assert rows[0].median_us < 10_000
    assert rows[0].calls >= 2
    assert rows[0].peak_mb != rows[0].peak_mb  # NaN: before left it
    assert calls == ["before", "then"] * (len(calls) // 2)


def test_measuring_again_replaces_rows(tmp_path):
    first = harness.run(case())
    other = harness.run(case(case="6"))
    results.save(first + other, tmp_path)
    path = results.save(harness.run(case()), tmp_path)
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
        results.fallen(rows(1.0), tmp_path)
    results.save(rows(1.0)[:3], tmp_path)
    assert results.fallen(rows(1.2), tmp_path) == []
    (told,) = results.fallen(rows(1.3), tmp_path)  # of the case that the file has
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
        "class Picky(nn.Module):\n"
        "    def forward(self, x):\n"
        "        assert x.shape[1] == 3\n"
    )
    monkeypatch.chdir(tmp_path)
    timed = accelerate.step_of("mine", "mine:network", (4, 2, 8, 8))
    harness.verify(timed)
    assert tuple(timed.sides) == accelerate.SIDES
    with pytest.raises(FastnetError, match="does not take pictures"):
        accelerate.step_of("mine", "mine:network", (4, 2, 9, 30))
    with pytest.raises(FastnetError, match="does not give logits"):
        accelerate.step_of("mine", "mine:encoder", (4, 2, 8, 8))
    with pytest.raises(FastnetError, match=r"pictures \(4, 2, 8, 8\) \(AssertionError\)"):
        accelerate.step_of("mine", "mine:Picky", (4, 2, 8, 8))


def test_networks_by_name(tmp_path, monkeypatch):
    (tmp_path / "named_nets.py").write_text(
        "from torch import nn\n"
        "made = nn.Sequential(nn.Linear(4, 2))\n"
        "def mlp():\n"
        "    return nn.Linear(4, 2)\n"
        "def fails(*error):\n"
        "    raise ValueError('12 is odd\\nand that is all')\n"
        "def reads():\n"
        "    open('no.pt')\n"
        "def wordless():\n"
        "    raise KeyError\n"
    )
    (tmp_path / "half_written.py").write_text("def mlp(:\n")
    (tmp_path / "a_script.py").write_text("import sys\nsys.exit('give it a file')\n")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [entry for entry in sys.path if entry])
    first, second = networks.named("named_nets:made"), networks.named("named_nets:made")
    assert torch.equal(first[0].weight, second[0].weight)
    assert first[0].weight is not second[0].weight
    assert isinstance(networks.named("named_nets.py:mlp"), torch.nn.Linear)
    assert sys.path.count("") == 1
    for name, words in (
        ("named_nets:fails", r"gave no network \(ValueError: 12 is odd\)\.$"),
        ("named_nets:reads", r"\(FileNotFoundError: .*no\.pt'\)"),
        ("named_nets:wordless", r"\(KeyError\)"),
        ("half_written:mlp", r"\(SyntaxError: .*half_written"),
        ("a_script:mlp", r"\(SystemExit: give it a file\)"),
        (":mlp", "torchvision:NAME or MODULE:CALLABLE, not ':mlp'"),
        ("named_nets:", "not 'named_nets:'"),
        ("builtins:dict", "gave a dict"),
    ):
        with pytest.raises(FastnetError, match=words):
            networks.named(name)


def test_bench_command(tmp_path):
    def bench(*arguments):
        command = [sys.executable, "-m", "fastnet", "bench", *arguments]
        return subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)

    done = bench("no_such_op")
    assert done.returncode == 1
    assert "no benchmark no_such_op; there are: linear_relu" in done.stderr
    # Away from the sources, as where pip has put it: a network of the user's.
    (tmp_path / "mine.py").write_text(
        "from torch import nn\n"
        "def network():\n"
        "    return nn.Sequential(nn.Flatten(), nn.Linear(75, 8), nn.ReLU(), nn.Linear(8, 3))\n"
    )
    done = bench("--model", "mine:network", "--batch", "4", "--size", "5", "--threads", "1")
    assert done.returncode == 0, done.stderr
    assert "accelerate     mine:network, 4x3x5x5" in done.stdout
    assert "compile, channels_last" in done.stdout
    for other in ("linear_relu", "--quick", "--no-save"):
        done = bench(other, "--model", "mine:network")
        assert done.returncode == 1
        assert "leave out the ops, --quick" in done.stderr


def test_bench_writes_and_checks(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(linear_relu, "cases", lambda _: [case(), case(case="6")])
    threads = torch.get_num_threads()
    try:
        assert run.bench(["linear_relu"], [1], out=tmp_path)
        (path,) = tmp_path.iterdir()
        assert path.stem == machine.device_slug()
        # Of the machine, however many threads are asked for.
        assert f"-{threads}-cores" in path.stem
        assert machine.versions()["device"] == machine.DEVICE
        rows = results.read(path)
        assert {key[1] for key in rows} == {"5", "6"}
        for row in rows.values():
            assert row["threads"] == "1"
            assert float(row["gflops_limit"]) > 0
            assert float(row["gbs_limit"]) > 0

        rows["op", "5", "forward", "1", "fastnet"]["ratio"] = "1000.0"
        with path.open("w", newline="") as file:
            writer = csv.DictWriter(file, list(next(iter(rows.values()))))
            writer.writeheader()
            writer.writerows(rows.values())
        assert not run.bench(["linear_relu"], [1], out=tmp_path, check=True)
        assert "FALLEN  op 5 forward, 1 threads" in capsys.readouterr().out

        def wrong(_):
            right = torch.arange(5.0)
            yield case(sides={"eager": lambda: [right], "fastnet": lambda: [right + 1]})

        def too_large(_):
            def raises():
                raise torch.OutOfMemoryError("12 TB\nwere not there")

            yield case(sides={"eager": raises, "fastnet": raises})
            yield case(case="7")

        monkeypatch.setattr(linear_relu, "cases", too_large)
        assert not run.bench(["linear_relu"], [1], out=None)
        said = capsys.readouterr().out
        assert "NOT TIMED  op 5 forward: 12 TB\n" in said
        assert "op             7" in said  # on to the next
        monkeypatch.setattr(linear_relu, "cases", wrong)
        assert not run.bench(["linear_relu"], [1], out=None)
        assert "NOT TIMED" in capsys.readouterr().out
    finally:
        torch.set_num_threads(threads)


def test_memory_is_counted():
    x = torch.randn(1000, 100, requires_grad=True)

    def square():
        return [(x * x).sum()]

    def exponential():
        y = x.exp()  # 400 kB, which its backward needs
        (y.sum() * 2).backward()
        x.grad = None
        return []

    square()
    assert memory.peak_bytes(square) == pytest.approx(400_000, abs=1000)
    assert memory.saved_bytes(square) == 0  # the input was there before
    assert memory.saved_bytes(exponential) == pytest.approx(400_000, abs=1000)
    rows = {row.side: row for row in harness.run(case(sides={"eager": square, "fastnet": square}))}
    assert rows["fastnet"].peak_mb == pytest.approx(0.4, abs=0.001)
    assert rows["fastnet"].saved_mb == 0

    layer = torch.nn.Linear(512, 512)

    def step():
        layer.zero_grad(set_to_none=True)  # whose memory the activations may get
        layer(torch.ones(512, 512)).relu().sum().backward()
        return []

    step()
    # The input, which is made in the call, and the output of the ReLU.
    assert [memory.saved_bytes(step) for _ in range(4)] == [2 * 4 * 512 * 512] * 4
    assert "(0.4 MB)" in results.table(rows.values())
    # What torch does not allocate is not counted, and said to be nothing by no one.
    (row, _, _) = harness.run(case())
    assert row.peak_mb != row.peak_mb


def test_what_the_fused_convolution_keeps():
    """One byte for each pooled output, where torch keeps the activation and an index of eight."""
    block = conv_relu_pool.Block(3, 16, 8, needs_input=False)
    *_, both = conv_relu_pool.cases_of(4, block)
    rows = {row.side: row for row in harness.run(replace(both, seconds=0.02))}
    activation, pooled = 4 * 8 * 16 * 16, 4 * 8 * 8 * 8
    assert rows["fastnet"].saved_mb == pytest.approx(pooled / 1e6)
    assert rows["eager"].saved_mb == pytest.approx((4 * activation + 8 * pooled) / 1e6)


def test_inputs_rotate():
    assert len(passes.rotation(object, 1 << 10)) == 8
    assert len(passes.rotation(object, passes.ROTATION // 2)) == 2
    assert len(passes.rotation(object, 2 * passes.ROTATION)) == 1
    for benchmark, shape in (
        (linear_relu, (6, 20, 5, True)),
        (cross_entropy, ((6, 10),)),
        (conv_relu_pool, (2, conv_relu_pool.Block(3, 8, 4))),
    ):
        for timed in benchmark.cases_of(*shape):
            for function in timed.sides.values():
                calls = [[t.clone() for t in function()] for _ in range(9)]
                assert not torch.equal(calls[0][0], calls[1][0]), timed
                assert torch.allclose(calls[0][0], calls[8][0]), timed


def test_every_layer_of_the_trainings_is_timed():
    linear, convolutions = set(), set()
    for name, shape, classes, *_ in recipes.STEPS:
        recipe = RECIPES[name]
        if recipe.pretrained:  # accelerated networks, of torchvision's layers
            continue
        network = recipe.model(shape, classes, "fastnet")
        for module in network.modules():
            if isinstance(module, fastnet.ConvReLUPool2d):
                module.register_forward_pre_hook(
                    lambda conv, args: convolutions.add(
                        (conv.in_channels, args[0].shape[-1], conv.out_channels)
                    )
                )
            elif isinstance(module, fastnet.Linear) and module.activation == "relu":
                linear.add((module.in_features, module.out_features))
        network.eval()
        latent = getattr(network, "latent_shape", shape)
        network(torch.zeros(1, *latent))
    timed = {shape[1:3] for shape, *_ in linear_relu._shapes(torch.float32)}
    assert len(linear) > 15
    assert linear <= timed
    assert {(25088, 4096), (4096, 4096), (8192, 256)} <= timed  # of the transfers
    timed = {block[:3] for (_, block), *_ in conv_relu_pool._shapes(torch.float32)}
    assert len(convolutions) == 10
    assert convolutions <= timed
    assert {(64, 224, 64), (128, 112, 128), (256, 56, 256), (512, 28, 512), (512, 14, 512)} <= timed
    for benchmark, bytes_of in (
        (linear_relu, lambda shape: shape[0] * 64 * 4),
        (cross_entropy, lambda shape: 4 * math.prod(shape)),
        (conv_relu_pool, lambda shape: 4 * shape[0] * 16 * shape[1].size ** 2),
    ):
        shapes = list(benchmark._shapes(torch.float32))
        assert len({shape for shape, *_ in shapes}) == len(shapes)  # rows replace each other
        rungs = [(x, bytes_of(shape)) for shape, series, x in shapes if series == "ladder"]
        assert all(x == counted for x, counted in rungs)
        assert (rungs[0][0], rungs[-1][0]) == (1 << 10, 1 << 30)
        batches = {x for _, series, x in shapes if series not in ("ladder", "width", "")}
        assert batches == {16, 64, 256, 1024}
        quick = [shape for shape, *_ in shapes if shape in benchmark.QUICK]
        assert len(quick) >= 3


def test_epochs_have_the_same_pictures_in_the_same_order():
    for name, shape in (("mnist-net", (1, 28, 28)), ("simple-cnn", (3, 8, 8))):
        samples = recipes.pictures(shape, 10, 3 * 64 + 5)
        timed = recipes.epoch(RECIPES[name], samples)
        assert list(timed.sides) == ["document script", "eager", "fastnet"]
        harness.verify(timed)
        assert len(timed.sides["document script"]()) == 3


def test_steps_of_trainings_agree():
    samples = recipes.pictures((1, 8, 8), 10, 32)
    sides = recipes.step_sides(RECIPES["simple-cnn"], samples, 8)
    assert set(sides) == {*accelerate.SIDES}
    harness.verify(harness.Case("recipes", "", "step", sides, tolerance=2e-3))


def test_peers_that_are_not_installed_are_skipped_by_name(capsys):
    assert peers.installed({"absent": ("torch", "no_such_package")}) == []
    assert capsys.readouterr().out == "absent: skipped, as no_such_package is not installed\n"
    assert peers.installed({"present": ("torch",)}) == ["present"]


def test_jax_trains_the_same():
    pytest.importorskip("jax")
    pytest.importorskip("optax")
    for name, shape in (("activation-net", (1, 28, 28)), ("simple-cnn", (3, 8, 8))):
        recipe, samples = RECIPES[name], recipes.pictures(shape, 10, 32)
        jax = peers.jax_step(recipe, samples, 8)
        sides = {"eager": recipes.step_sides(recipe, samples, 8)["eager"], "jax": jax}
        harness.verify(harness.Case("peers", "", "step", sides, tolerance=2e-3))
    timed = next(mlp_trainer.cases(True, others={"jax": peers.jax_epoch}))
    assert list(timed.sides) == ["eager", "compile", "jax", "fastnet"]
    harness.verify(timed)


def test_a_peer_that_writes_over_its_input(monkeypatch):
    """Liger-Kernel's functions with a stand-in, as they run on GPUs only."""

    class Overwriting(torch.autograd.Function):
        @staticmethod
        def forward(ctx, logits, target):
            gradient = logits.softmax(1)
            gradient[torch.arange(len(target)), target] -= 1
            loss = F.cross_entropy(logits, target)
            ctx.save_for_backward(logits.detach().copy_(gradient / len(target)))
            return loss

        @staticmethod
        def backward(ctx, grad):
            return ctx.saved_tensors[0] * grad, None

    functional = types.ModuleType("functional")
    functional.liger_cross_entropy = Overwriting.apply
    quack = types.ModuleType("quack")
    quack.cross_entropy = F.cross_entropy
    for name in ("liger_kernel", "liger_kernel.transformers"):
        monkeypatch.setitem(sys.modules, name, types.ModuleType(name))
    monkeypatch.setitem(sys.modules, "liger_kernel.transformers.functional", functional)
    monkeypatch.setitem(sys.modules, "quack", quack)
    monkeypatch.setattr(peers, "LOGITS", ((6, 10),))
    cases = list(peers.beside_gpu_kernels(["liger", "quack"]))
    assert len(cases) == 2  # two dtypes
    for timed in cases:
        assert list(timed.sides) == ["eager", "compile", "liger", "quack", "fastnet"]
        harness.verify(timed)


def test_operators_compute_what_autograd_does():
    for op in ("linear_relu", "linear"):
        for timed in linear_relu.cases_of(6, 20, 5, True, op=op):
            assert timed.op == op
            if timed.mode == "operators":
                harness.verify(timed)
                assert len(timed.sides["fastnet"]()) == 4


def test_operators_of_cross_entropy():
    for shape in ((6, 10), (2, 5, 3, 4)):
        modes = []
        for timed in cross_entropy.cases_of(shape):
            harness.verify(timed)
            modes.append(timed.mode)
        assert modes == ["forward", "backward", "forward+backward", "operators"]


@pytest.mark.skipif(
    fastnet.build_info()["autograd"] != "C++", reason="fastnet was built with another torch"
)
def test_kernels_from_cpp_compute_the_same():
    for case, count in (
        (kernels.loss(6, 10), 2),
        (kernels.layer(6, 20, 5, needs_input=False), 3),
        (kernels.layer(6, 20, 5, needs_input=True), 4),
    ):
        harness.verify(case)
        assert [len(side()) for side in case.sides.values()] == [count, count]


def test_kernels_from_cpp_want_the_torch_of_the_build(monkeypatch):
    built_elsewhere = {"autograd": "Python", "torch_built_with": "2.9.0"}
    monkeypatch.setattr(fastnet, "build_info", lambda: built_elsewhere)
    with pytest.raises(FastnetError, match="built with torch 2"):
        kernels.compiled.__wrapped__()


def test_a_side_that_repeats_is_timed_per_time(monkeypatch):
    case = harness.Case("op", "case", "step", {"fastnet": lambda: []}, repeats=4, seconds=0)
    monkeypatch.setattr(harness, "measure", lambda *_: {"fastnet": [8e-6]})
    assert harness.run(case)[0].median_us == 2


def test_sides_of_conv_relu_pool_agree():
    Block = conv_relu_pool.Block
    for block in (Block(3, 8, 4), Block(1, 9, 4, 5, 2, False), Block(2, 6, 4, trained=False)):
        modes = []
        for timed in conv_relu_pool.cases_of(2, block):
            harness.verify(timed)
            modes.append(timed.mode)
        assert modes == ["forward", "backward", "forward+backward"][: 3 if block.trained else 1]


def test_on_a_gpu(monkeypatch):
    if not ON_GPU:
        pytest.skip("no NVIDIA GPU here")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    for timed in linear_relu.cases_of(6, 20, 5, True):
        rows = {row.side: row for row in harness.run(replace(timed, seconds=0.05))}
        assert rows["fastnet"].median_us > 0
        is_counted = timed.mode != "backward" and not timed.mode.endswith("graph")
        assert (rows["fastnet"].peak_mb == rows["fastnet"].peak_mb) == is_counted


def test_report_without_a_gpu_is_one_sentence():
    if ON_GPU:
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
         "ratio": "1.5", "gbs": "100", "gflops": "50", "peak_mb": "3", "gbs_limit": "1000",
         "gflops_limit": limit}
        for name, limit in (("a", "100"), ("b, bfloat16", "500")) for side in ("fastnet",)
    ]  # fmt: skip
    card = {"name": "Card", "torch": "2", "date": "d"}
    text = gpu_report.report(parts, rows, card, tmp_path).read_text()
    for words in ("stopped after 1 s; half way", "exit status 3", "no/such/program"):
        assert words in text
    assert "| linear_relu | a | forward | 10.0 | 1.50 | 3 | 10.0% | 50.0% |" in text
    assert "| 10.0% | 10.0% |" in text  # bfloat16, against its own rate
    assert "Of what tests printed:\n\n```\nhalf way\n```" in text


def test_parts_tell_what_they_have_found_when_their_time_is_up(tmp_path, monkeypatch):
    monkeypatch.setitem(gpu_report.LIMITS, "tests", 4)
    (tmp_path / "test_slow.py").write_text(
        "import time\n"
        "def test_wrong():\n    assert 'found' == 'wanted'\n"
        "def test_slow():\n    time.sleep(30)\n"
    )
    command = [sys.executable, "-m", "pytest", "-v", "-rf", "-p", "no:cacheprovider", str(tmp_path)]
    part = gpu_report.run("tests", command, tmp_path, is_asked=True)
    assert not part.ok
    assert part.said.startswith("stopped after 4 s; ")
    assert "1 failed" in part.said
    assert "test_slow.py::test_wrong" in part.log


def test_figures_of_the_report_go_into_the_committed_ones(tmp_path, monkeypatch):
    """Also where there is no folder of them yet."""
    monkeypatch.setattr(gpu_report, "ROOT", tmp_path)
    out, committed = tmp_path / "out", tmp_path / results.RESULTS
    quick = harness.run(case())
    path = results.save(quick, out)
    assert len(gpu_report.timed_rows(out)) == 1
    assert (committed / path.name).read_text() == path.read_text()
    results.save([replace(row, case="6", median_us=1.0) for row in quick], committed)
    results.save([replace(row, median_us=2.0) for row in quick], out)
    assert [row["median_us"] for row in gpu_report.timed_rows(out)] == ["2.0"]
    medians = {
        (row["case"], row["median_us"]) for row in results.read(committed / path.name).values()
    }
    assert medians == {("5", "2.0"), ("6", "1.0")}


def test_parts_end_within_the_time_that_is_told():
    asked = [name for name in gpu_report.LIMITS if name in ("tests", "memcheck", "racecheck")]
    longest = sum(gpu_report.LIMITS.values()) + len(asked) * gpu_report.PATIENCE
    (told,) = re.findall(r"within (\d+)\s+minutes", gpu_report.__doc__)
    assert 60 * (int(told) - 1) < longest <= 60 * int(told)


def test_what_tells_most_of_a_failure_is_kept():
    lines = ["NOT TIMED  a: differs", *(f"table {i}" for i in range(50)), "Traceback", "KeyError"]
    assert gpu_report.kept(lines)[0] == "NOT TIMED  a: differs"
    assert gpu_report.kept(lines)[-2:] == ["Traceback", "KeyError"]
    assert len(gpu_report.kept(lines[1:])) == gpu_report.KEPT_LINES
    assert gpu_report.kept(["x" * 1000]) == ["x" * gpu_report.KEPT_WIDTH]


def test_figures_are_a_line_for_each_case():
    modes = ("forward", "forward+backward, graph")
    rows = [
        row("cross_entropy", case, mode, "fastnet", ratio="1.5")
        for case in ("64x10", "64x10, bfloat16")
        for mode in modes
    ]
    assert gpu_report.figures(rows, "cross_entropy").split("\n") == [
        "64x10 | forward 1.50x 10.0 | both, graph 1.50x 10.0 25%",
        "64x10, bfloat16 | forward 1.50x 10.0 | both, graph 1.50x 10.0 25%",
    ]
    assert gpu_report.figures(rows, "linear_relu") == ""


def row(op, case, mode, side, threads="2", series="", x="0", **more) -> dict[str, str]:
    figures = {"ratio": "2", "median_us": "10", "gflops": "10", "gbs": "5"}
    figures |= {"gflops_limit": "100", "gbs_limit": "20"}
    named = {"op": op, "case": case, "mode": mode, "side": side, "threads": threads}
    return {**figures, **named, "series": series, "x": x, **more}


def test_bars_tell_every_ratio():
    rows = [
        row("linear_relu", "a", "forward+backward", "fastnet", ratio="1.5"),
        row("linear_relu", "a", "forward+backward", "fastnet", "1", ratio="0.8"),
        row("linear_relu", "a", "forward+backward", "eager", ratio="nan"),
        row("linear_relu", "b", "forward+backward", "fastnet", ratio="4.0"),
        row("linear_relu", "b", "forward", "fastnet", ratio="9.0"),
        row("recipes", "c", "step", "fastnet", ratio="0.9"),
        # Of a series the batch nearest to 64, and of the sweeps none.
        *(
            row("recipes", f"d {x}", "step", "fastnet", series="d", x=x, ratio=ratio)
            for x, ratio in (("16", "5"), ("50", "6"), ("256", "7"))
        ),
        row("recipes", "e", "step", "fastnet", series="ladder", x="1024", ratio="8"),
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
    assert set(bars) == {1.5, 0.8, 4.0, 0.9, 6.0}
    assert bars[0.8][:3] == bars[0.9][:3] != bars[1.5][:3]
    # A panel of small ratios has a scale, too.
    (axes,) = plot.speed_ups(rows[:1], "title").axes
    low, high = axes.get_xlim()
    assert {tick for tick in axes.get_xticks() if low <= tick <= high} == {1, 1.25, 1.5}


def test_roofline_stands_over_its_points():
    rows = [
        row("linear_relu", "a", "forward+backward", "fastnet", gflops="40", gbs="8"),
        row("linear_relu", "a", "forward+backward", "eager", gflops="20", gbs="4", median_us="20"),
        row("linear_relu", "a", "forward+backward", "compile", gflops="1", gbs="4", median_us="99"),
        row("linear_relu", "a", "forward", "fastnet", gflops="77"),
        row("linear_relu", "a", "forward+backward", "fastnet", "1", gflops="78"),
    ]
    # Where bfloat16 is multiplied as float32 is, they have one roof.
    widened = [{**rows[0], "case": "a, bfloat16"}, {**rows[1], "case": "a, bfloat16"}]
    widened[0]["gflops_limit"] = "95"
    (axes,) = plot.roofline(rows + widened, "title").axes
    assert [text.get_text() for text in axes.texts if "product" in text.get_text()] == [
        "100 GFLOP/s: a large product"
    ]
    points = {
        (round(float(x), 3), round(float(y), 3))
        for line in axes.lines
        if line.get_marker() == "o"
        for x, y in zip(line.get_xdata(), line.get_ydata(), strict=True)
    }
    assert points == {(5.0, 40.0), (5.0, 20.0)}  # of the best other side, at 5 operations a byte
    (roof,) = [line for line in axes.lines if line.get_color() == "black"]
    assert list(roof.get_ydata()) == [pytest.approx(20 * 5 / 1.5), 100, 100]


def test_scaling_curves():
    rows = []
    for series, points in {
        "64->64": ((16, 3), (64, 2), (256, 1.5)),
        "width": ((32, 3), (64, 0.5)),
        "ladder": ((1024, 4), (1 << 30, 1)),
    }.items():
        for x, ratio in points:
            for side in ("eager", "fastnet"):
                case = f"{series} {x}"
                of = row("linear_relu", case, "forward+backward", side, "2", series, str(x))
                rows.append({**of, "ratio": str(ratio)})
    # The first case with one thread, where fastnet takes three times as long, and eager twice.
    for side, median in (("eager", "20"), ("fastnet", "30")):
        rows.append({**rows[0], "side": side, "threads": "1", "median_us": median})
    figure = plot.scaling(rows, "title")
    batch, width, ladder, threads = figure.axes

    def curves(axes):
        return {tuple(map(float, line.get_ydata())) for line in axes.lines[:2]}

    assert (3.0, 2.0, 1.5) in curves(batch)
    assert (3.0, 0.5) in curves(width)
    assert (4.0, 1.0) in curves(ladder)
    assert curves(threads) == {(1.0, 3.0), (1.0, 2.0)}


def test_tables_are_those_of_the_results():
    more = {"peak_mb": "1.5"}
    both = [
        row("linear_relu", "64x8->4", "forward+backward", side, threads, "8->4", "64", **more)
        for side, threads in (("eager", "2"), ("compile", "2"), ("fastnet", "2"), ("fastnet", "1"))
    ]
    both[0]["median_us"], both[1]["median_us"], both[2]["median_us"] = "1234", "99.94", "12.345"
    both[2]["ratio"], both[3]["ratio"] = "8.1", "0.5"
    steps = [
        row("mlp_trainer", "8-4, batch 64, 10 steps", "epoch", side, median_us=median)
        for side, median in (("eager", "5000"), ("compile", "7000"), ("fastnet", "1000"))
    ]
    text = (
        "before\n<!-- measured: linear_relu -->\nold\n<!-- end -->\nbetween\n"
        "<!-- measured: mlp_trainer -->\n<!-- end -->\nafter\n"
    )
    made = tables.updated(text, both + steps)
    assert "| 64×8→4 | 1.23 ms | 99.9 µs | 12.3 µs | 8.10 |  |  |  | 0.50 |" in made  # noqa: RUF001
    assert "| 8-4, batch 64 | 500 µs | 700 µs | 100 µs | 5.0 | 7.0 |  |" in made
    assert "old" not in made
    assert [line for line in made.splitlines() if line in ("before", "between", "after")]
    assert tables.updated(made, both + steps) == made


def test_pictures_in_the_documents_are_of_the_machine_they_tell_of(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "docs").mkdir()
    for file, documents in tables.DOCUMENTS.items():
        folder = tmp_path / file.removesuffix(".csv")
        folder.mkdir()
        (folder / file).write_bytes((ROOT / results.RESULTS / file).read_bytes())
        plot.main(folder / file, None)
        assert len(list(folder.glob("*.png"))) == (0 if "README.md" in documents else 3)
    assert len(list((tmp_path / "docs").glob("*.png"))) == 3


@pytest.mark.parametrize(
    ("changes", "drawn"),
    [
        ({"mode": "step"}, {"speed-up"}),  # as of trainings alone
        ({"side": "eager", "ratio": "nan"}, set()),
        ({"series": "64->64", "x": "64"}, {"speed-up", "roofline", "scaling"}),
        ({"series": "64->64", "x": "64", "mode": "forward"}, set()),
    ],
)
def test_pictures_without_rows_are_left_out_by_name(changes, drawn, tmp_path, capsys):
    file = tmp_path / "card.csv"
    sides = [row("linear", "a", "forward+backward", side) for side in ("fastnet", "eager")]
    sides[1]["ratio"] = "nan"
    with file.open("w", newline="") as lines:
        writer = csv.DictWriter(lines, [*sides[0], "device"])
        writer.writeheader()
        writer.writerows([{**side, "device": "card", **changes} for side in sides])
    plot.main(file, None)
    assert {path.stem for path in tmp_path.glob("*.png")} == drawn
    told = capsys.readouterr().out
    for name in {"speed-up", "roofline", "scaling"} - drawn:
        assert f"{name}.png is left out: {file} has no rows for it." in told


@pytest.mark.parametrize("command", [tables, plot])
@pytest.mark.parametrize(
    ("content", "words"), [(None, "does not exist"), ("op,case,mode,threads,side\n", "has no rows")]
)
def test_without_rows_the_documents_stay_as_they_are(
    command, content, words, tmp_path, monkeypatch
):
    """As of a name without its folder, which `make plot` is easily given."""
    file, documents = next(iter(tables.DOCUMENTS.items()))
    if content is not None:
        (tmp_path / file).write_text(content)
    monkeypatch.setattr(tables, "ROOT", tmp_path)
    (tmp_path / "docs").mkdir()
    for name in documents:
        (tmp_path / name).write_text("<!-- measured: linear -->\nfigures\n<!-- end -->\n")
    app = typer.Typer()
    app.command()(command.main)
    told = CliRunner().invoke(app, [str(tmp_path / file)], env={"COLUMNS": "400"})
    assert told.exit_code == 2
    assert words in " ".join(told.output.replace("│", " ").split())
    assert all("figures" in (tmp_path / name).read_text() for name in documents)
    assert not list(tmp_path.rglob("*.png"))


@pytest.mark.parametrize("name", tables.DOCUMENTS)
def test_documents_tell_what_was_measured(name):
    file = ROOT / results.RESULTS / name
    rows = list(results.read(file).values())
    for document in tables.DOCUMENTS[name]:
        text = (ROOT / document).read_text()
        names = re.findall(r"<!-- measured: (\w+) -->", text)
        assert names
        assert tables.updated(text, rows) == text, (
            f"python -m benchmarks.tables {results.RESULTS / name}"
        )
