"""Every named training for a few steps on small data, the cheap ones to their documents' bounds."""

from __future__ import annotations

import math
import types
from dataclasses import replace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from support import same

from fastnet import functional
from fastnet.bench.recipes import task_on
from fastnet.data import Samples
from fastnet.errors import FastnetError
from fastnet.graphs import GraphedStep
from fastnet.recipes import RECIPES, numpy_forward
from fastnet.recipes.comparison import step_times
from fastnet.recipes.files import load_checkpoint
from fastnet.recipes.recipe import BACKENDS, Schedule
from fastnet.recipes.regressions import TRUE_BIAS, TRUE_WEIGHT
from fastnet.recipes.runtime import ONE_PROCESS, Runtime, start
from fastnet.recipes.training import train


@pytest.fixture(scope="session")
def digits():
    return RECIPES["mnist-net"].data.load()


def coloured(size: int, classes: int, count: int) -> tuple[Samples, Samples]:
    """Noise, each class brighter in some of the pixels of one channel."""
    generator = torch.Generator().manual_seed(0)
    names = tuple(f"class {number}" for number in range(classes))

    def draw(count: int) -> Samples:
        targets = torch.randint(classes, (count,), generator=generator)
        pictures = torch.randint(0, 100, (count, 3, size, size), generator=generator)
        for picture, target in zip(pictures, targets.tolist(), strict=True):
            picture[target % 3, (target // 3) :: 4] += 150
        return Samples(pictures.to(torch.uint8), targets, names, f"{size} x {size} colours")

    return draw(count), draw(count // 2)


# For those that do not train on digits: the size of pictures, how many classes, how many pictures.
SMALL = {
    "cifar-mlp": (32, 10, 320),
    "cats-dogs": (150, 2, 40),
    "resnet18-transfer": (32, 2, 24),
    "vgg16-transfer": (32, 2, 16),
    "vgg16-features": (64, 2, 40),
}
OPTIONS = {"weights": "none"}


def small(name: str, digits) -> tuple[Samples, Samples]:
    if name == "linear-regression":
        return RECIPES[name].data.load()
    if name in SMALL:
        return coloured(*SMALL[name])
    return digits[0].first(640), digits[1].first(100)


def settings(recipe, **changes):
    options = OPTIONS if recipe.pretrained else {}
    return recipe.settings(**{"epochs": 3, "log_every": 0, **options, **changes})


def without_times(content: dict) -> dict:
    rows = [{**row, "seconds": None} for row in content["history"]]
    return {**content, "history": rows}


@pytest.mark.parametrize("name", RECIPES)
def test_every_training_learns(name, digits, tmp_path):
    recipe, (train_set, test_set) = RECIPES[name], small(name, digits)
    epochs = {"gan": 20, "lsgan": 20, "dcgan": 6}.get(name, 3)
    result = train(recipe, settings(recipe, epochs=epochs), train_set, test_set, tmp_path)
    losses = [name for name in result.history[0] if name.startswith("train") and "loss" in name]
    if len(losses) == 2:
        # What the one network gains the other loses: the pictures tell.
        network = result.task.network
        torch.manual_seed(0)
        fresh = recipe.model((1, 28, 28), 10, "torch").eval()
        mean = test_set.inputs.float().mean(0).div(127.5).sub(1)
        with torch.no_grad():
            noise = torch.randn(200, *network.latent_shape)
            far, near = ((n(noise).mean(0) - mean).norm() for n in (fresh, network.eval()))
        assert near < 0.85 * far
    else:
        assert losses == ["train_loss"]
        assert result.history[-1]["train_loss"] < result.history[0]["train_loss"]
    assert all(math.isfinite(value) for row in result.history for value in row.values())
    # The figures of the run, of what it came to.
    shown, given = test_set.first(result.task.shown), result.test_set.first(result.task.shown)
    assert result.task.overview(name, result.history, shown, given).axes
    for draw in recipe.pictures.values():
        assert draw(result.task.network, test_set).axes


@pytest.mark.parametrize("name", ["gan", "batch-net", "resnet18-transfer", "cats-dogs"])
def test_resumed_trainings_are_bit_for_bit_the_uninterrupted_ones(name, digits, tmp_path):
    """With noise, BatchNorm, a scheduler, and dropout and pictures turned at random."""
    recipe, data = RECIPES[name], small(name, digits)
    changes = {"augment": name == "cats-dogs"}
    if name == "resnet18-transfer":
        recipe = replace(recipe, schedule=Schedule("StepLR", step_size=1, gamma=0.5))
    train(recipe, settings(recipe, epochs=3, **changes), *data, tmp_path / "whole")
    train(recipe, settings(recipe, epochs=1, **changes), *data, tmp_path / "parts")
    torch.rand(3)
    train(recipe, settings(recipe, epochs=3, resume=True, **changes), *data, tmp_path / "parts")
    whole, parts = (
        without_times(load_checkpoint(tmp_path / part / "checkpoint.pt"))
        for part in ("whole", "parts")
    )
    assert same(whole, parts)
    if recipe.keep_best:
        best = [
            load_checkpoint(tmp_path / part / "best.pt")["model"] for part in ("whole", "parts")
        ]
        assert same(*best)


def test_native_training_on_three_channels_is_the_same_training(tmp_path):
    recipe, data = RECIPES["cifar-mlp"], coloured(*SMALL["cifar-mlp"])
    curves = []
    for native in (False, True):
        history = train(recipe, settings(recipe, native=native), *data, tmp_path / str(native))
        curves.append([(row["train_loss"], row["test_loss"]) for row in history.history])
    torch.testing.assert_close(*map(torch.tensor, curves), rtol=1e-3, atol=1e-4)


# -------------------------------------------------------------------------------------------------
# What the documents promise


def test_numpy_forward():
    *hidden, output = numpy_forward.forward(numpy_forward.INPUT)
    first = np.tanh([2 * 3 + 4 * 5, 4 * 3 - 5 * 5])
    second = np.tanh([-first[0] + first[1], 2 * first[0] + 2 * first[1]])
    np.testing.assert_allclose(hidden, [first, second])
    assert output.item() == pytest.approx(-3 * second[0] + 7 * second[1], rel=1e-14)
    of_torch = numpy_forward.network()(torch.from_numpy(numpy_forward.INPUT)).item()
    assert of_torch == pytest.approx(output.item(), rel=1e-14)
    assert f"{output.item()!r}" in numpy_forward.run()


def test_linear_regression_finds_the_line(tmp_path):
    recipe = RECIPES["linear-regression"]
    result = train(recipe, settings(recipe), *recipe.data.load(), tmp_path)
    network = result.task.network
    found = network.weight.detach().flatten().tolist()
    assert found == pytest.approx(TRUE_WEIGHT, abs=0.01)
    assert network.bias.item() == pytest.approx(TRUE_BIAS, abs=0.01)
    words = recipe.report(network)
    assert f"{TRUE_WEIGHT[0] - found[0]:.5f}" in words
    assert result.history[-1]["test_loss"] < 1e-3


@pytest.mark.parametrize("name", ["softmax-regression", "softmax-regression-scratch"])
@pytest.mark.parametrize("dataset", ["mnist", "fashion-mnist"])
def test_softmax_regression(name, dataset, tmp_path):
    recipe = RECIPES[name].on(dataset)
    try:
        data = recipe.data.load()
    except FastnetError as error:
        pytest.skip(str(error))
    last = train(recipe, settings(recipe, epochs=10), *data, tmp_path).history[-1]
    assert last["train_loss"] < 0.5
    assert 0.7 < last["train_accuracy"] <= 1
    assert 0.7 < last["test_accuracy"] <= 1


@pytest.mark.parametrize("name", ["logistic-regression", "logistic-regression-scratch"])
def test_logistic_regression(name, digits, tmp_path):
    recipe = RECIPES[name]
    assert (
        train(recipe, settings(recipe, epochs=1), *digits, tmp_path).history[-1]["test_accuracy"]
        > 0.75
    )


def test_by_hand_and_with_modules_is_the_same_training(digits, tmp_path):
    curves = []
    for name in ("softmax-regression", "softmax-regression-scratch"):
        recipe = RECIPES[name].on("mnist")

        def zero(shape, classes, backend, recipe=recipe):
            network = recipe.model(shape, classes, backend)
            for parameter in network.parameters():
                torch.nn.init.zeros_(parameter)
            return network

        recipe = replace(recipe, model=zero)
        history = train(recipe, settings(recipe), *small(name, digits), tmp_path / name).history
        curves.append([(row["train_loss"], row["test_loss"]) for row in history])
    torch.testing.assert_close(*map(torch.tensor, curves), rtol=1e-5, atol=1e-6)


# -------------------------------------------------------------------------------------------------
# What a user chooses


@pytest.mark.parametrize("amp", ["bf16", "fp16"])
@pytest.mark.parametrize("name", ["mnist-net", "gan", "simple-cnn"])
def test_mixed_precision(name, amp, digits, tmp_path):
    """Close to the run in float32, and not the same."""
    recipe, data, losses = RECIPES[name], small(name, digits), []
    for precision in (amp, None):
        with start("cpu", precision) as runtime:
            out = tmp_path / str(precision)
            rows = train(recipe, settings(recipe), *data, out, runtime).history
        losses.append([v for row in rows for k, v in row.items() if k.endswith("loss")])
    mixed, plain = map(torch.tensor, losses)
    assert not torch.equal(mixed, plain)
    torch.testing.assert_close(mixed, plain, rtol=0.1, atol=0.1)


def test_scaler_goes_on_where_it_was(digits, tmp_path):
    recipe, data = RECIPES["mnist-net"], small("mnist-net", digits)
    with start("cpu", "fp16") as runtime:
        train(recipe, settings(recipe, epochs=2), *data, tmp_path / "whole", runtime)
        train(recipe, settings(recipe, epochs=1), *data, tmp_path / "parts", runtime)
        again = settings(recipe, epochs=2, resume=True)
        train(recipe, again, *data, tmp_path / "parts", runtime)
    whole, parts = (
        without_times(load_checkpoint(tmp_path / part / "checkpoint.pt"))
        for part in ("whole", "parts")
    )
    assert whole["scaler"]["scale"] > 1
    assert same(whole, parts)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("compiled", [False, True])
def test_backends_train_alike(backend, compiled, digits, tmp_path):
    if compiled and backend == "compile":
        pytest.skip("is compiled already")
    recipe, data = RECIPES["mnist-net"], small("mnist-net", digits)
    chosen = settings(recipe, backend=backend, compile=compiled)
    reference = train(recipe, settings(recipe, backend="torch"), *data, tmp_path / "torch")
    result = train(recipe, chosen, *data, tmp_path / "other")
    losses = ([row["train_loss"] for row in r.history] for r in (reference, result))
    torch.testing.assert_close(*map(torch.tensor, losses), rtol=1e-4, atol=1e-5)
    is_compiled = result.task.network._compiled_call_impl is not None
    assert is_compiled == (compiled or backend == "compile")


@pytest.mark.parametrize("backend", BACKENDS)
def test_cross_entropy_is_the_backends_own(backend, digits):
    task = task_on(RECIPES["simple-cnn"], backend, digits[1])
    own = functional.cross_entropy if backend == "fastnet" else F.cross_entropy
    assert task.loss is own


def test_steps_of_every_backend_are_timed(digits):
    recipe, data = RECIPES["mnist-net"], small("mnist-net", digits)
    times = step_times(recipe, settings(recipe), data[0], BACKENDS, turns=3, seconds=1)
    assert tuple(times) == BACKENDS
    assert all(0 < seconds < 1 for seconds in times.values())


@pytest.mark.parametrize(
    ("schedule", "rates"),
    [
        ({"name": "none"}, [0.1, 0.1, 0.1, 0.1]),
        ({"name": "StepLR", "step_size": 2}, [0.1, 0.1, 0.01, 0.01]),
        ({"name": "MultiStepLR", "milestones": (1, 3), "gamma": 0.5}, [0.1, 0.05, 0.05, 0.025]),
        ({"name": "ExponentialLR", "gamma": 0.5}, [0.1, 0.05, 0.025, 0.0125]),
        ({"name": "ReduceLROnPlateau", "patience": 0, "gamma": 0.5}, [0.1, 0.1, 0.05, 0.025]),
    ],
    ids=lambda value: value["name"] if isinstance(value, dict) else None,
)
def test_schedulers(schedule, rates, digits, tmp_path):
    recipe = replace(RECIPES["softmax-regression"].on("mnist"), test_batch_size=10)
    if schedule["name"] == "ReduceLROnPlateau":  # a loss that stands still
        recipe = replace(recipe, loss=lambda output, targets: output.sum() * 0 + 1)  # noqa: ARG005
    chosen = settings(recipe, epochs=4, schedule=schedule)
    history = train(recipe, chosen, *small("softmax-regression", digits), tmp_path).history
    assert [row["learning_rate"] for row in history] == pytest.approx(rates)


@pytest.mark.parametrize(
    ("name", "choices", "words"),
    [
        ("mnist-net", {"schedule": {"name": "Cosine"}}, "--scheduler must be one of .*'Cosine'"),
        ("mnist-net", {"schedule": {"name": "MultiStepLR"}}, "--milestones"),
        ("mnist-net", {"schedule": {"gamma": 0.5}}, "--gamma is for other schedulers than none"),
        ("mnist-net", {"schedule": {"name": "StepLR", "patience": 2}}, "--patience is for other"),
        ("mnist-net", {"schedule": {"name": "StepLR", "gamma": -1.0}}, "--gamma must be above 0"),
        ("mnist-net", {"schedule": {"name": "StepLR", "gamma": math.inf}}, "below inf, not inf"),
        (
            "mnist-net",
            {"schedule": {"name": "ReduceLROnPlateau", "gamma": 1.0}},
            "--gamma must be above 0 and below 1, not 1.0",
        ),
        *(
            ("mnist-net", {"lr": lr}, f"--lr must be above 0 and finite, not {lr}")
            for lr in (0.0, -0.1, math.inf, math.nan)
        ),
        ("mnist-net", {"augment": True}, "--augment"),
        ("mnist-net", {"weights": "none"}, "--weights"),
        ("mnist-net", {"backend": "jax"}, "--backend must be one of .*'jax'"),
        ("mnist-net", {"backend": "torch", "native": True}, "--native"),
        ("mnist-net", {"compile": True, "native": True}, "--native"),
    ],
)
def test_choices_that_do_not_fit(name, choices, words):
    with pytest.raises(FastnetError, match=words):
        RECIPES[name].settings(**choices)


@pytest.mark.parametrize(
    ("name", "backend"),
    [("mnist-net", "fastnet"), ("mnist-net", "torch"), ("softmax-regression-scratch", "fastnet"),
     ("gan", "fastnet")],
)  # fmt: skip
def test_a_learning_rate_of_ones_own(name, backend):
    recipe = RECIPES[name]
    rates = []
    for lr in (None, 0.025):
        chosen = settings(recipe, lr=lr, backend=backend)
        task = recipe.task(recipe, chosen, ONE_PROCESS, (1, 28, 28), 10)
        rates.append({group["lr"] for o in task.optimizers for group in o.param_groups})
    assert rates == [{recipe.optimizer.keywords["lr"]}, {0.025}]


@pytest.mark.parametrize("native", [False, True])
def test_the_learning_rate_that_is_chosen_trains(native, digits, tmp_path):
    """From it a schedule goes on, and with another a training is not resumed."""
    recipe, data = RECIPES["mnist-net"], small("mnist-net", digits)
    schedule = {"name": "ExponentialLR", "gamma": 0.5}
    chosen = settings(recipe, epochs=2, lr=0.01, schedule=schedule, native=native)
    fast = train(recipe, chosen, *data, tmp_path / "fast").history
    assert [row["learning_rate"] for row in fast] == [0.01, 0.005]
    slow = train(recipe, replace(chosen, lr=1e-6), *data, tmp_path / "slow").history
    assert fast[-1]["train_loss"] < 0.5 * slow[-1]["train_loss"]
    assert '"lr": 0.01' in (tmp_path / "fast" / "config.json").read_text()
    for lr, words in ((0.02, "with --lr 0.01, not 0.02"), (None, "with --lr 0.01: add it")):
        with pytest.raises(FastnetError, match=words):
            train(recipe, replace(chosen, lr=lr, resume=True), *data, tmp_path / "fast")


def test_checkpoints_from_before_lr_go_on(digits, tmp_path):
    recipe, data = RECIPES["mnist-net"], small("mnist-net", digits)
    path = train(recipe, settings(recipe, epochs=1), *data, tmp_path).checkpoint
    content = torch.load(path, weights_only=True)
    del content["settings"]["--lr"]
    torch.save(content, path)
    again = settings(recipe, epochs=2, resume=True)
    with pytest.raises(FastnetError, match="was trained without --lr: leave it out"):
        train(recipe, replace(again, lr=0.1), *data, tmp_path)
    assert len(train(recipe, again, *data, tmp_path).history) == 2


def test_plateaus_of_generators(digits, tmp_path):
    recipe = RECIPES["gan"]
    chosen = settings(recipe, epochs=1, schedule={"name": "ReduceLROnPlateau"})
    assert train(recipe, chosen, *small("gan", digits), tmp_path).history


@pytest.mark.parametrize(("samples", "batch_size"), [(641, 64), (20, 1)])
def test_batches_of_one_sample_are_none_for_batch_norm(samples, batch_size, digits, tmp_path):
    recipe, data = RECIPES["batch-net"], (digits[0].first(samples), digits[1].first(10))
    with pytest.raises(FastnetError, match=f"--batch-size {batch_size} leaves a batch of 1"):
        train(recipe, settings(recipe, batch_size=batch_size), *data, tmp_path)


def test_resuming_what_was_begun_otherwise(digits, tmp_path):
    recipe, data = RECIPES["mnist-net"], small("mnist-net", digits)
    train(recipe, settings(recipe, epochs=1), *data, tmp_path)
    again = settings(recipe, epochs=2, resume=True)
    with (
        start("cpu", "fp16") as runtime,
        pytest.raises(FastnetError, match="was trained without --amp: leave it out"),
    ):
        train(recipe, again, *data, tmp_path, runtime)
    for begun, resumed, words in (("bf16", "fp16", "bf16, not fp16"), ("bf16", None, "bf16: add")):
        with start("cpu", begun) as runtime:
            train(recipe, settings(recipe, epochs=1), *data, tmp_path / "half", runtime)
        with (
            start("cpu", resumed) as runtime,
            pytest.raises(FastnetError, match=f"was trained with --amp {words}"),
        ):
            train(recipe, again, *data, tmp_path / "half", runtime)
    with pytest.raises(FastnetError, match=r"test data 100 samples .*, not 50 samples"):
        train(recipe, again, data[0], data[1].first(50), tmp_path)
    kept = (tmp_path / "config.json").read_text()
    assert '"resume": false' in kept  # what was refused has left no trace
    # Where the data lie does not matter, nor that a kill has cost the metrics.
    (tmp_path / "metrics.csv").unlink()
    elsewhere = (replace(part, source="elsewhere") for part in data)
    done = settings(recipe, epochs=1, resume=True)
    assert len(train(recipe, done, *elsewhere, tmp_path).history) == 1
    assert (tmp_path / "metrics.csv").exists()


@pytest.mark.parametrize(
    ("device", "amp", "words"),
    [("tpu", None, "--device must be one of auto, cpu, cuda"), ("cpu", "int8", "--amp must be")],
)
def test_devices_that_are_not_there(device, amp, words):
    with pytest.raises(FastnetError, match=words), start(device, amp):
        pass
    if not torch.cuda.is_available():
        with pytest.raises(FastnetError, match="no NVIDIA GPU"), start("cuda"):
            pass


def test_native_is_for_one_process_in_float32(digits, tmp_path):
    recipe, data = RECIPES["mnist-net"], small("mnist-net", digits)
    half = Runtime(torch.device("cpu"), torch.bfloat16)
    with pytest.raises(FastnetError, match="--native trains in float32"):
        train(recipe, settings(recipe, native=True), *data, tmp_path, half)


def test_augmentation_changes_what_is_trained_on(tmp_path):
    recipe, data = RECIPES["cats-dogs"], coloured(150, 2, 20)
    losses = [
        train(
            recipe, settings(recipe, epochs=1, augment=augment), *data, tmp_path / str(augment)
        ).history[0]["train_loss"]
        for augment in (False, True)
    ]
    assert losses[0] != losses[1]


def test_features_are_computed_once(tmp_path, monkeypatch):
    recipe, data = RECIPES["vgg16-features"], coloured(64, 2, 20)
    first = train(recipe, settings(recipe, epochs=2), *data, tmp_path)
    assert first.train_set.inputs.shape == (20, 512 * 2 * 2)
    kept = sorted(path.name for path in tmp_path.glob("*.safetensors"))
    assert kept == ["test-features.safetensors", "training-features.safetensors"]

    def forbidden(*_):
        raise AssertionError("computed again")

    with monkeypatch.context() as patch:
        patch.setattr("fastnet.models.transfer.vgg16_features", forbidden)
        again = train(recipe, settings(recipe, epochs=2), *data, tmp_path)
        assert same(first.task.network.state_dict(), again.task.network.state_dict())
        others = Samples(data[0].inputs.flip(0), data[0].targets, data[0].classes, data[0].source)
        with pytest.raises(AssertionError, match="computed again"):  # the same, in another order
            train(recipe, settings(recipe), others, data[1], tmp_path)
    # Cut short, it is made anew.
    (tmp_path / kept[0]).write_bytes((tmp_path / kept[0]).read_bytes()[:500])
    anew = train(recipe, settings(recipe, epochs=2), *data, tmp_path)
    assert same(first.task.network.state_dict(), anew.task.network.state_dict())


def test_best_weights_are_kept(digits, tmp_path, monkeypatch):
    recipe, data = RECIPES["resnet18-transfer"], coloured(32, 2, 16)
    accuracies = iter([0.5, 0.9, 0.7, 0.9, 0.1])
    monkeypatch.setattr(
        "fastnet.recipes.training.evaluate",
        lambda *_: {"loss": 1.0, "accuracy": next(accuracies)},
    )
    result = train(recipe, settings(recipe, epochs=4), *data, tmp_path)
    best = load_checkpoint(tmp_path / "best.pt")
    assert len(best["history"]) == 2
    kept = result.task.network.state_dict()
    assert same(kept, best["model"])
    assert not same(kept, load_checkpoint(tmp_path / "checkpoint.pt")["model"])
    # It is of this run, and a new one has none of it; but one that cannot begin leaves it there.
    with pytest.raises(FastnetError, match="nowhere"):
        train(recipe, settings(recipe, epochs=1, weights="nowhere"), *data, tmp_path)
    assert (tmp_path / "best.pt").exists()
    # Nor one that ends before its first epoch does: what describes the files stays with them.
    with monkeypatch.context() as patched:
        patched.setattr("fastnet.recipes.training._train_epoch", lambda *_: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            train(RECIPES["mnist-net"], settings(RECIPES["mnist-net"]), *digits, tmp_path)
    assert (tmp_path / "best.pt").exists()
    assert '"recipe": "resnet18-transfer"' in (tmp_path / "config.json").read_text()
    train(RECIPES["mnist-net"], settings(RECIPES["mnist-net"], epochs=1), *digits, tmp_path)
    assert not (tmp_path / "best.pt").exists()
    assert '"recipe": "mnist-net"' in (tmp_path / "config.json").read_text()


def test_batches_unlike_the_first_go_past_the_graph(monkeypatch):
    """Copied into the graph's own memory, they would be cast without a word."""

    def capture(self, batch):
        self.graph = types.SimpleNamespace(replay=lambda: None)
        self.batch, self.rates, self.result = [v.clone() for v in batch], [], "graph"

    monkeypatch.setattr(torch.cuda, "Stream", lambda: None)
    monkeypatch.setattr(GraphedStep, "WARM_UP", 0)
    monkeypatch.setattr(GraphedStep, "_capture", capture)
    step = GraphedStep(lambda _: "step", [])
    first = torch.zeros(4, 3)
    assert step(first) == "graph"
    assert step(first + 1) == "graph"
    for other in (first[:2], first.double(), first.to("meta")):
        assert step(other) == "step"


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no NVIDIA GPU here")
@pytest.mark.parametrize("amp", [None, "bf16"])
@pytest.mark.parametrize("name", ["mnist-net", "simple-cnn", "gan", "cats-dogs"])
def test_cuda_graphs_train_as_steps_do(name, amp, tmp_path, monkeypatch):
    """Also with a last batch of another size, and a learning rate that falls."""
    recipe = RECIPES[name]
    if name == "cats-dogs":
        data = coloured(150, 2, 90)
    else:
        data = tuple(
            replace(samples, inputs=samples.inputs[:, :1, :28, :28].contiguous())
            for samples in coloured(32, 10, 700)
        )
    schedule = {"name": "ExponentialLR", "gamma": 0.9}
    histories, captured = [], []
    capture = GraphedStep._capture
    monkeypatch.setattr(GraphedStep, "_capture", lambda *these: captured.append(capture(*these)))
    for graphed in (True, False):
        if not graphed:
            monkeypatch.setattr("fastnet.recipes.training.step_in_graph", lambda task: task.step)
        with start("cuda", amp) as runtime:
            chosen = settings(recipe, schedule=schedule, epochs=3)
            histories.append(train(recipe, chosen, *data, tmp_path / str(graphed), runtime).history)
    assert len(captured) == 3  # one for each learning rate
    for left, right in zip(*histories, strict=True):
        losses = [[v for k, v in row.items() if k.endswith("loss")] for row in (left, right)]
        # With dropout or noise the numbers drawn are others than without a graph.
        loose = name in ("gan", "cats-dogs") or amp
        tolerance = {"rtol": 0.3, "atol": 0.3} if loose else {"rtol": 1e-3, "atol": 1e-3}
        torch.testing.assert_close(*map(torch.tensor, losses), **tolerance)


def test_one_process_is_the_first():
    assert ONE_PROCESS.is_first
    assert ONE_PROCESS.sum(torch.tensor(2.0)) == 2
