"""accelerate(model): the same network, seen from every side, on fused kernels."""

from __future__ import annotations

import copy
import functools
import io
import logging
import os
import pickle
import random
import subprocess
import sys
import types
import warnings
from collections import OrderedDict
from datetime import datetime

import networks
import numpy
import pytest
import support
import torch
import torch.distributed as dist
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from support import spied
from torch import nn
from torch.nn.utils import parametrizations, prune
from torch.utils.checkpoint import checkpoint

import fastnet
from fastnet import functional
from fastnet.bench.networks import SimpleCNN

# Network, shape of its input, and how many layers are fused.
DOCUMENTS = (
    (networks.MnistNet, (64, 784), 1),
    (networks.SoftmaxRegression, (16, 1, 28, 28), 0),
    (networks.ActivationNet, (16, 1, 28, 28), 2),
    (networks.BatchNet, (16, 1, 28, 28), 0),
    (networks.CifarMLP, (16, 3, 32, 32), 2),
    (SimpleCNN, (8, 3, 32, 32), 5),
    (networks.ConvNet, (8, 1, 28, 28), 3),
    (networks.Generator, (16, 100), 2),
    (networks.Discriminator, (16, 784), 0),
)
# Name, fused layers, options.
TORCHVISION = (
    ("alexnet", 2, {}),
    ("vgg11", 7, {}),
    ("vgg11_bn", 2, {}),
    ("vgg16", 7, {}),
    ("vgg16_bn", 2, {}),
    ("squeezenet1_1", 0, {}),
    ("resnet18", 0, {}),
    ("googlenet", 2, {"init_weights": False}),
)


@pytest.fixture
def calls(monkeypatch) -> list[str]:
    """The fused functions that were called, in order."""
    called = []
    for name in ("linear_relu", "conv_relu_pool2d", "cross_entropy"):
        monkeypatch.setattr(functional, name, spied(getattr(functional, name), called))
    return called


def assert_same(model, accelerated, *inputs, outputs=1e-5, gradients=1e-4) -> None:
    """Outputs and gradients, relative to the largest of each tensor's; random numbers alike. Below
    a millionth of the largest of all is rounding alone, as the gradient of a bias in front of
    BatchNorm."""

    def run(module):
        torch.manual_seed(5)
        leaves = [x.detach().requires_grad_(x.is_floating_point()) for x in inputs]
        result = module(*leaves)
        result = result if isinstance(result, (tuple, list)) else [result]
        seeds = [torch.randn_like(r) for r in result]
        wanted = [t for t in (*module.parameters(), *leaves) if t.requires_grad]
        grads = torch.autograd.grad(result, wanted, seeds, allow_unused=True)
        return list(result), grads

    for (expected, actual), tolerance in zip(
        zip(run(model), run(accelerated), strict=True), (outputs, gradients), strict=True
    ):
        largest = max(a.detach().abs().max().item() for a in expected if a is not None)
        for a, b in zip(expected, actual, strict=True):
            assert (a is None) == (b is None)
            if a is not None:
                scale = a.detach().abs().max().clamp_min(1e-30)
                if scale < 1e-6 * largest:
                    assert b.detach().abs().max() < 2e-6 * largest
                    continue
                assert ((a - b).abs().max() / scale).item() <= tolerance


# ---------------------------------------------------------------------------------------------
# Whole networks


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize(("network", "shape", "fused"), DOCUMENTS)
def test_document_networks(network, shape, fused, training, calls):
    model = network().train(training)
    accelerated = fastnet.accelerate(model)
    assert isinstance(accelerated, network)
    assert accelerated.training is training
    assert str(accelerated) == str(model)
    assert_same(model, accelerated, torch.randn(shape))
    assert len(calls) == fused == fastnet.accelerate_report(accelerated).fused
    pairs = zip(model.named_parameters(), accelerated.named_parameters(), strict=True)
    assert all(a == b and p is q for (a, p), (b, q) in pairs)
    assert list(model.state_dict()) == list(accelerated.state_dict())


@pytest.mark.parametrize(("name", "fused", "options"), TORCHVISION)
def test_torchvision(name, fused, options, calls):
    models = pytest.importorskip("torchvision.models")
    torch.manual_seed(3)
    model = getattr(models, name)(weights=None, num_classes=10, **options)
    accelerated = fastnet.accelerate(model)
    report = fastnet.accelerate_report(accelerated)
    assert report.fused == fused
    assert not report.untraceable
    assert_same(model, accelerated, torch.randn(2, 3, 64, 64))
    assert len(calls) == fused
    model.eval(), accelerated.eval()
    with torch.no_grad():
        x = torch.randn(1, 3, 64, 64)
        torch.testing.assert_close(accelerated(x), model(x), rtol=1e-5, atol=1e-5)


def test_a_linear_alone_runs_on_its_kernel(monkeypatch):
    """In a forward of its own and in a Sequential, beside what is fused and, with nodes in C++,
    where nothing is; with hooks it runs as it is written."""
    alone = []
    monkeypatch.setattr(functional, "linear", spied(functional.linear, alone))

    class Own(nn.Module):
        def __init__(self):
            super().__init__()
            self.hidden, self.middle, self.last = (nn.Linear(6, 6) for _ in range(3))

        def forward(self, x):
            return self.last(torch.tanh(self.middle(F.relu(self.hidden(x)))))

    class Unfused(Own):
        def forward(self, x):
            return self.last(torch.tanh(self.middle(F.relu(x))))

    sequential = nn.Sequential(nn.Linear(6, 6), nn.ReLU(), nn.Linear(6, 6), nn.Linear(6, 3))
    unfused = nn.Sequential(nn.Linear(6, 6), nn.GELU(), nn.Linear(6, 3))
    x = torch.randn(5, 6)
    for model, last, fused in (
        (Own(), "last", 1),
        (sequential, "3", 1),
        (Unfused(), "last", 0),
        (unfused, "2", 0),
    ):
        accelerated = fastnet.accelerate(model)
        assert fastnet.accelerate_report(accelerated).fused == fused
        gains = fused or fastnet._library.NODES is not None
        alone.clear()
        assert_same(model, accelerated, x)
        assert len(alone) == (2 if gains else 0)
        seen = []
        layer = accelerated.get_submodule(last)
        layer.register_forward_hook(lambda *_, seen=seen: seen.append(1))
        alone.clear()
        assert_same(model, accelerated, x)
        assert (len(alone), len(seen)) == (1 if gains else 0, 1)


def test_a_network_with_nothing_to_fuse_says_so():
    for model in (nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU()), nn.Linear(6, 6)):
        with pytest.warns(UserWarning, match=f"nothing to fuse in this {type(model).__name__}"):
            assert type(fastnet.accelerate(model)) is type(model)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for model in (net(), nn.CrossEntropyLoss()):
            fastnet.accelerate(fastnet.accelerate(model))


# ---------------------------------------------------------------------------------------------
# Everything that is to be found


class Calls(nn.Module):
    """Runs a function on itself: a forward to be written in a test."""

    calls = 0

    def __init__(self, function, **children):
        super().__init__()
        self.function = function
        for name, child in children.items():
            setattr(self, name, child)

    def forward(self, x):
        return self.function(self, x)


def conv():
    return nn.Conv2d(3, 4, 3, padding=1)


def linear():
    return nn.Linear(8, 8)


CONV_STYLES = {
    "functions": lambda m, x: F.max_pool2d(F.relu(m.conv(x)), 2),
    "torch's functions": lambda m, x: torch.max_pool2d(torch.relu(m.conv(x)), (2, 2)),
    "method": lambda m, x: F.max_pool2d(m.conv(x).relu(), kernel_size=2, stride=2),
    "in place": lambda m, x: F.max_pool2d(F.relu(m.conv(x), inplace=True), [2, 2], [2, 2]),
    "in place, method": lambda m, x: F.max_pool2d(m.conv(x).relu_(), 2, ceil_mode=True),
    "modules": lambda m, x: m.pool(m.relu(m.conv(x))),
    "pooling first": lambda m, x: F.relu(F.max_pool2d(m.conv(x), 2)),
    "pooling first, modules": lambda m, x: m.relu(m.pool(m.conv(x))),
    "mixed": lambda m, x: m.pool(F.relu_(m.conv(x))),
    "out of a Sequential": lambda m, x: m.pool(F.relu(m.inner(x))),
    "within, then out of one": lambda m, x: F.max_pool2d(m.activated(x), 2),
}


@pytest.mark.parametrize("style", CONV_STYLES)
@pytest.mark.parametrize("inplace", [False, True])
def test_conv_styles(style, inplace, calls):
    layer = conv()
    model = Calls(
        CONV_STYLES[style],
        conv=layer,
        relu=nn.ReLU(inplace),
        pool=nn.MaxPool2d(2, padding=0),
        inner=nn.Sequential(nn.Identity(), layer),
        activated=nn.Sequential(nn.Sequential(layer), nn.ReLU(inplace)),
    )
    assert_same(model, fastnet.accelerate(model), torch.randn(2, 3, 9, 8))
    assert calls == ["conv_relu_pool2d"]


LINEAR_STYLES = {
    "F.relu": lambda m, x: F.relu(m.fc(x)),
    "torch.relu": lambda m, x: torch.relu(m.fc(x)),
    "torch.relu_": lambda m, x: torch.relu_(m.fc(x)),
    "x.relu()": lambda m, x: m.fc(x).relu(),
    "x.relu_()": lambda m, x: m.fc(x).relu_(),
    "module": lambda m, x: m.relu(m.fc(x)),
    "by loop": lambda m, x: [x := layer(x) for layer in m.list][-1],
    "Sequential, then function": lambda m, x: F.relu(m.inner(x)),
    "nested": lambda m, x: m.nested(x),
    "the result is used twice": lambda m, x: (lambda y: y + 2 * y)(F.relu(m.fc(x))),
}


@pytest.mark.parametrize("style", LINEAR_STYLES)
def test_linear_styles(style, calls):
    fc, relu = linear(), nn.ReLU(True)
    model = Calls(
        LINEAR_STYLES[style],
        fc=fc,
        relu=relu,
        list=nn.ModuleList([fc, relu]),
        inner=nn.Sequential(nn.Sequential(nn.Dropout(0.5), fc)),
        nested=nn.Sequential(
            nn.Sequential(nn.Sequential(nn.Dropout(0.5), fc)), nn.Sequential(relu)
        ),
    )
    assert_same(model, fastnet.accelerate(model), torch.randn(5, 8))
    assert calls == ["linear_relu"]


def test_one_relu_for_all(calls):
    """And one of its places that is not fused: the others are, and this one is its own."""
    relu = nn.ReLU()
    model = nn.Sequential(linear(), relu, nn.BatchNorm1d(8), relu, nn.Sequential(linear(), relu))
    assert_same(model, fastnet.accelerate(model), torch.randn(5, 8))
    assert calls == ["linear_relu"] * 2


def test_one_layer_at_two_places(calls):
    """One ReLU follows once, and once not."""
    fc = linear()
    model = Calls(lambda m, x: m.fc(F.relu(m.fc(x))), fc=fc)
    assert_same(model, fastnet.accelerate(model), torch.randn(5, 8))
    assert calls == ["linear_relu"]


@pytest.mark.parametrize(
    "function",
    [
        lambda m, x: m.loss(m.fc(x), torch.zeros_like(x[:, 0], dtype=torch.long)),
        lambda m, x: F.cross_entropy(m.fc(x), torch.zeros_like(x[:, 0], dtype=torch.long)),
        lambda m, x: F.cross_entropy(
            m.fc(x), x.softmax(1).detach(), None, label_smoothing=0.1, reduction="sum"
        ),
    ],
)
def test_cross_entropy(function, calls):
    model = Calls(function, fc=linear(), loss=nn.CrossEntropyLoss())
    assert_same(model, fastnet.accelerate(model), torch.randn(5, 8))
    assert calls == ["cross_entropy"]


def test_loss_alone():
    loss = nn.CrossEntropyLoss(torch.rand(8), label_smoothing=0.2, reduction="none")
    accelerated = fastnet.accelerate(loss)
    assert type(loss) is nn.CrossEntropyLoss
    assert type(accelerated) is fastnet.CrossEntropyLoss
    report = fastnet.accelerate_report(accelerated)
    assert [row.fused for row in report.rows] == ["softmax, as fastnet.CrossEntropyLoss"]
    # As a notebook shows it.
    assert repr(report) == str(report)
    assert repr(report).startswith("layer ")
    logits, target = torch.randn(5, 8), torch.randint(8, (5,))
    torch.testing.assert_close(accelerated(logits, target), loss(logits, target))
    old = Calls(lambda m, x: F.cross_entropy(m.act(x), x, size_average=False), act=nn.Tanh())
    assert type(fastnet.accelerate(old)) is Calls


STEPS = {
    "linear": linear,
    "relu": nn.ReLU,
    "relu in place": lambda: nn.ReLU(True),
    "dropout": lambda: nn.Dropout(0.3),
    "norm": lambda: nn.BatchNorm1d(8),
    "tanh": nn.Tanh,
    "hooked": lambda: _hooked(linear()),
    "weight norm": lambda: parametrizations.weight_norm(linear()),
    "subclass": lambda: fastnet.Linear(8, 8, activation="relu"),
}


def _hooked(module):
    module.register_forward_hook(lambda _module, _args, output: output * 1.5)
    return module


def _built(steps):
    """Lists become nested Sequentials, where one of two runs as a module with a forward."""
    parts = [_built(step) if isinstance(step, list) else STEPS[step]() for step in steps]
    if len(parts) % 2:
        return nn.Sequential(*parts)
    children = {f"part{i}": part for i, part in enumerate(parts)}

    def forward(module, x):
        for name in children:
            x = getattr(module, name)(x)
        return F.relu(x)

    return Calls(forward, **children)


@given(
    st.recursive(
        st.lists(st.sampled_from(list(STEPS)), min_size=1, max_size=6),
        lambda inner: st.lists(inner | st.sampled_from(list(STEPS)), min_size=1, max_size=5),
        max_leaves=10,
    )
)
def test_random_networks(steps):
    # float64: batch normalisation of six rows enlarges roundings.
    model = _built(steps).double()
    accelerated = fastnet.accelerate(model)
    x = torch.randn(6, 8, dtype=torch.float64)
    # Twice: batch normalisation has counted, and hooks have fired.
    for training in (True, True, False):
        model.train(training), accelerated.train(training)
        torch.manual_seed(1)
        expected = model(x)
        torch.manual_seed(1)
        torch.testing.assert_close(accelerated(x), expected)


# ---------------------------------------------------------------------------------------------
# What must be left alone


def _reason(model) -> str:
    (row,) = (r for r in fastnet.accelerate_report(model).rows if r.name.endswith("layer"))
    return row.reason


UNFUSED = {
    "used twice": (lambda m, x: (lambda z: F.relu(z) + z)(m.layer(x)), "used 2 times"),
    "never used": (lambda m, x: (m.layer(x), F.relu(x))[1], "used 0 times"),
    "is the result, too": (lambda m, x: (lambda z: (F.relu(z), z))(m.layer(x)), "used 2 times"),
    "other activation": (lambda m, x: F.gelu(m.layer(x)), "gelu follows"),
    "view between": (lambda m, x: F.relu(m.layer(x).view(-1)), "view follows"),
    "keyword": (lambda m, x: F.relu(m.layer(input=x)), "no forward"),
    "relu of two": (lambda m, x: F.threshold(m.layer(x), 0.5, 0.0), "threshold follows"),
}


@pytest.mark.parametrize("case", UNFUSED)
def test_not_fused(case, calls):
    function, reason = UNFUSED[case]
    model = Calls(function, layer=linear())
    accelerated = fastnet.accelerate(model)
    assert_same(model, accelerated, torch.randn(5, 8))
    assert not calls
    assert reason in _reason(accelerated)


POOLS = {
    "three wide": (lambda m, x: F.max_pool2d(F.relu(m.layer(x)), 3), "max-pooling by 3"),
    "overlapping": (lambda m, x: F.max_pool2d(F.relu(m.layer(x)), 2, 1), "stride 1"),
    "padded": (lambda m, x: F.max_pool2d(F.relu(m.layer(x)), 2, 2, 1), "padding 1"),
    "dilated": (lambda m, x: F.max_pool2d(F.relu(m.layer(x)), 2, 2, 0, 2), "dilation 2"),
    "indices": (
        lambda m, x: F.max_pool2d(F.relu(m.layer(x)), 2, return_indices=True)[0],
        "no max-pooling",
    ),
    "average": (lambda m, x: F.avg_pool2d(F.relu(m.layer(x)), 2), "no max-pooling"),
    "activation used": (
        lambda m, x: (lambda y: F.max_pool2d(y, 2) + y[..., ::2, ::2])(F.relu(m.layer(x))),
        "used 2 times",
    ),
    "no relu": (lambda m, x: F.max_pool2d(m.layer(x), 2), "no ReLU"),
    "computed window": (
        lambda m, x: F.max_pool2d(F.relu(m.layer(x)), x.shape[-1] // 4),
        "no max-pooling",
    ),
}


@pytest.mark.parametrize("case", POOLS)
def test_not_pooled(case, calls):
    function, reason = POOLS[case]
    model = Calls(function, layer=conv())
    accelerated = fastnet.accelerate(model)
    assert_same(model, accelerated, torch.randn(2, 3, 8, 8))
    assert not calls
    assert reason in _reason(accelerated)


def _pruned(layer):
    prune.random_unstructured(layer, "weight", 0.3)


def _old_weight_norm(layer):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        nn.utils.weight_norm(layer)


CHANGES = {
    "forward hook": _hooked,
    "forward pre-hook": lambda m: m.register_forward_pre_hook(lambda _, args: (args[0] * 2,)),
    "backward hook": lambda m: m.register_full_backward_hook(lambda _m, grads, _o: (grads[0] * 2,)),
    "weight_norm": parametrizations.weight_norm,
    "old weight_norm": _old_weight_norm,
    "spectral_norm": parametrizations.spectral_norm,
    "orthogonal": parametrizations.orthogonal,
    "pruning": _pruned,
    "forward replaced": lambda m: setattr(m, "forward", lambda x: F.linear(x, m.weight) * 3),
    "other class": lambda m: setattr(m, "__class__", type("Own", (nn.Linear,), {})),
}


@pytest.mark.parametrize("when", ["before", "after"])
@pytest.mark.parametrize("change", CHANGES)
@pytest.mark.parametrize("sequential", [True, False])
def test_changed_layers_run_as_written(change, when, sequential, calls):
    torch.manual_seed(2)
    layer = linear()
    model = (
        nn.Sequential(linear(), nn.ReLU(), layer, nn.ReLU())
        if sequential
        else Calls(lambda m, x: F.relu(m.b(F.relu(m.a(x)))), a=linear(), b=layer)
    ).eval()  # spectral_norm iterates in training
    if when == "before":
        CHANGES[change](layer)
        accelerated = fastnet.accelerate(model, inplace=True)
    else:
        accelerated = fastnet.accelerate(model, inplace=True)
        CHANGES[change](layer)
    written = type(model)._fastnet_written
    x = torch.randn(5, 8)
    actual = accelerated(x)
    assert calls == ["linear_relu"]
    accelerated.__class__ = written
    torch.testing.assert_close(actual, accelerated(x))


def test_hooked_relu(calls):
    model = nn.Sequential(linear(), _hooked(nn.ReLU()))
    assert_same(model, fastnet.accelerate(model), torch.randn(5, 8))
    assert not calls


def test_hooks_of_containers_fire(calls):
    model = nn.Sequential(_hooked(nn.Sequential(linear(), nn.ReLU())), linear(), nn.ReLU())
    accelerated = fastnet.accelerate(model)
    assert_same(model, accelerated, torch.randn(5, 8))
    assert calls == ["linear_relu"] * 2
    seen = []
    accelerated[0].register_forward_hook(lambda _module, _args, output: seen.append(output))
    accelerated(torch.randn(5, 8))
    assert len(seen) == 1


def test_global_hooks_see_every_layer(calls):
    model = fastnet.accelerate(nn.Sequential(linear(), nn.ReLU()))
    seen = []
    hook = nn.modules.module.register_module_forward_hook(
        lambda m, _args, _out: seen.append(type(m))
    )
    try:
        model(torch.randn(5, 8))
    finally:
        hook.remove()
    assert seen[:2] == [nn.Linear, nn.ReLU]
    assert not calls


def test_layers_can_be_replaced(calls):
    """As for a transfer to other classes."""
    model = fastnet.accelerate(nn.Sequential(linear(), nn.ReLU(), linear()))
    model[0] = nn.Linear(4, 8)
    model[1] = nn.Sigmoid()
    model[2] = nn.Linear(8, 3)
    model.append(nn.ReLU())
    x = torch.randn(5, 4)
    expected = F.relu(F.linear(torch.sigmoid(model[0](x)), model[2].weight, model[2].bias))
    torch.testing.assert_close(model(x), expected)
    assert calls == ["linear_relu"]
    assert model[:2](x).min() > 0  # a slice is one of these, too: layer and sigmoid
    own = fastnet.accelerate(
        Calls(lambda m, x: m.fc2(F.relu(m.fc1(x))), fc1=linear(), fc2=linear())
    )
    own.fc1, own.fc2 = nn.Bilinear(1, 1, 8), nn.Linear(8, 2)
    own.fc1 = nn.Sequential(nn.Linear(3, 8), nn.Tanh())
    assert own(torch.randn(5, 3)).shape == (5, 2)


# ---------------------------------------------------------------------------------------------
# Forwards that cannot be traced, or may not


class DataDependent(nn.Module):
    def __init__(self):
        super().__init__()
        self.features = nn.Sequential(linear(), nn.ReLU())
        self.fc = linear()

    def forward(self, x):
        x = self.features(x)
        return F.relu(self.fc(x)) if x.sum() > 0 else self.fc(x)


def _draws(m, x):
    return F.relu(m.fc(x)) * random.random()


def _sets(m, x):
    m.seen = 1
    return F.relu(m.fc(x))


def _counts(m, x):
    m.count = m.count + 1
    return F.relu(m.fc(x))


def _without_gradients(m, x):
    with torch.no_grad():
        return F.relu(m.fc(x))


@torch.autocast("cpu", enabled=False)
def _never_autocast(m, x):
    return F.relu(m.fc(x))


def _prints(m, x):
    print("here")
    return F.relu(m.fc(x))


def _keeps(m, x):
    m.kept["x"] = x
    return F.relu(m.fc(x))


def _appends(m, x):
    m.seen_inputs.append(x)
    return F.relu(m.fc(x))


def _logs(m, x):
    LOGGER.info("here")
    return F.relu(m.fc(x))


def _warns(m, x):
    warnings.warn("here", stacklevel=1)
    return F.relu(m.fc(x))


def _appends_below(m, x):
    m.fc.history.append(x)
    return F.relu(m.fc(x))


def _appends_to_a_global(m, x):
    SEEN.append(x)
    return F.relu(m.fc(x))


def _sets_in_a_global(m, x):
    SETTINGS.last = x
    return F.relu(m.fc(x))


def _of_a_function(value):
    return lambda m, x: F.relu(m.fc(x)) * value["scale"]


def _counts_on_a_class(m, x):
    Config.calls += 1
    return F.relu(m.fc(x))


def _counts_on_its_class(m, x):
    m.__class__.calls += 1
    return F.relu(m.fc(x))


def _sets_on_a_class(m, x):
    Config.last = F.relu(m.fc(x))
    return Config.last


def _keeps_on_a_class(m, x):
    Config.kept["h"] = x
    return F.relu(m.fc(x))


def _keeps_below(m, x):
    m.fc.cache["h"] = x
    return F.relu(m.fc(x))


def _read_in(config):
    return config.scale


class Config:
    """Used as a namespace."""

    scale = 2.0
    calls = 0
    kept: dict = {}  # noqa: RUF012


class Scaler:
    def __init__(self):
        self.by = 2.0

    def __call__(self, x):
        return x * self.by


def _asserts(m, x):
    assert x.shape[1] == 8
    return F.relu(m.fc(x))


SCALER = Scaler()
LOGGER = logging.getLogger("fastnet.tests")
SEEN: list = []
SETTINGS = types.SimpleNamespace(scale=2)
SCALE = 2

REFUSED = {
    "logs": (_logs, "of logging"),
    "warns": (_warns, "warn"),
    "appends below": (_appends_below, "self.fc.history, a list"),
    "appends to a global": (_appends_to_a_global, "SEEN, a list"),
    "counts on a class": (_counts_on_a_class, "sets calls"),
    "counts on its class": (_counts_on_its_class, "sets calls"),
    "sets on a class": (_sets_on_a_class, "sets last"),
    "keeps on a class": (_keeps_on_a_class, "Config.kept, a dict"),
    "keeps below": (_keeps_below, "self.fc.cache, a dict"),
    "its class": (lambda m, x: F.relu(m.fc(x)) + m.__class__.calls, "self.__class__, a type"),
    "class given away": (lambda m, x: F.relu(m.fc(x)) * _read_in(Config), "Config, a type"),
    "callable with a state": (lambda m, x: SCALER(F.relu(m.fc(x))), "SCALER, a Scaler"),
    "its own callable": (lambda m, x: m.scaler(F.relu(m.fc(x))), "self.scaler, a Scaler"),
    "part of a state": (lambda m, x: m.part(F.relu(m.fc(x))), "self.part, a partial"),
    "bound builtin": (lambda m, x: F.relu(m.fc(x)) * m.get("y"), "self.get, a builtin"),
    "package": (lambda m, x: F.relu(m.fc(x)) * getattr(support, "FACTOR", 1), "a module"),
    "sets in a global": (_sets_in_a_global, "sets last"),
    "global settings": (lambda m, x: F.relu(m.fc(x)) * SETTINGS.scale, "SETTINGS"),
    "a function's settings": (_of_a_function({"scale": 3}), "value, a dict"),
    "gradient": (lambda m, x: F.relu(m.fc(x)) * (m.fc.weight.grad is None), "asks for grad"),
    "frozen": (lambda m, x: F.relu(m.fc(x)) * m.fc.weight.requires_grad, "requires_grad"),
    "processes": (lambda m, x: F.relu(m.fc(x)) * (1 + dist.is_initialized()), "is_initialized"),
    "compiles": (lambda m, x: F.relu(m.fc(x)) * (1 + torch.compiler.is_compiling()), "is_comp"),
    "environment": (lambda m, x: F.relu(m.fc(x)) * float(os.getenv("FACTOR", "2")), "getenv"),
    "the time": (lambda m, x: F.relu(m.fc(x)) * (datetime.now().year > 0), "now"),
    "no_grad": (_without_gradients, "a `with`"),
    "autocast": (_never_autocast, "autocast"),
    "no_grad, decorated": (torch.no_grad()(lambda m, x: F.relu(m.fc(x))), "_contextlib"),
    "prints": (_prints, "calls print"),
    "keeps": (_keeps, "self.kept, a dict"),
    "appends": (_appends, "self.seen_inputs, a list"),
    "random": (_draws, "random numbers"),
    "noise": (lambda m, x: F.relu(m.fc(x)) + torch.randn(8), "tensor"),
    "constant": (lambda m, x: F.relu(m.fc(x)) + torch.arange(8), "tensor"),
    "sets": (_sets, "sets seen"),
    "counts": (_counts, "sets count"),
    "type": (lambda m, x: F.relu(m.fc(x)) if isinstance(x, torch.Tensor) else x, "type"),
    "length": (lambda m, x: F.relu(m.fc(x)) * len(x), "len"),
    "values": (lambda m, x: F.relu(m.fc(x)) if x.max() > 0 else x, "branches on its input"),
    "asserts": (_asserts, "(an `if` or `assert` on a tensor or its shape)"),
    "fails": (lambda m, x: F.relu(m.missing(x)), "missing"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_refused(case):
    function, reason = REFUSED[case]
    model = Calls(function, fc=linear())
    model.count, model.kept, model.seen_inputs, model.fc.history = 0, {"y": 1}, [2], []
    model.fc.cache, model.scaler = {}, SCALER
    model.part, model.get = functools.partial(SCALER.__call__), model.kept.get
    accelerated = fastnet.accelerate(model)
    assert type(accelerated) is Calls
    assert model.count == accelerated.count == 0
    kept = (*SEEN, *Config.kept.values(), *model.fc.history, *model.fc.cache.values())
    assert all(type(one) is torch.Tensor for one in kept)
    report = fastnet.accelerate_report(accelerated)
    assert reason in report.untraceable["Calls"]
    assert "runs as written" in str(report)
    if case != "fails":
        x = torch.randn(5, 8)
        for seed in (1, 2):
            random.seed(seed), torch.manual_seed(seed)
            expected = model(x)
            random.seed(seed), torch.manual_seed(seed)
            torch.testing.assert_close(accelerated(x), expected)


def test_a_package_with_a_name_of_pythons_own(tmp_path):
    """Is looked at as all of the user's are, and no other package less for it."""
    (tmp_path / "wave").mkdir()
    (tmp_path / "wave" / "__init__.py").write_text("")
    (tmp_path / "wave" / "net.py").write_text(
        "import torch.nn.functional as F\n"
        "from torch import nn\n"
        "class Net(nn.Module):\n"
        "    def __init__(self):\n"
        "        super().__init__()\n"
        "        self.fc, self.count = nn.Linear(8, 8), 0\n"
        "    def forward(self, x):\n"
        "        self.count += 1\n"
        "        return F.relu(self.fc(x))\n"
    )
    program = (
        "import fastnet, torch\n"
        "from wave.net import Net\n"
        "from fastnet.acceleration.conditions import is_library\n"
        "net = fastnet.accelerate(Net())\n"
        "net(torch.ones(1, 8)), net(torch.ones(1, 8))\n"
        "assert net.count == 2, net.count\n"
        "assert 'sets count' in fastnet.accelerate_report(net).untraceable['Net']\n"
        "assert not is_library('wave.net')\n"
        "names = 'builtins', 'torch.nn', 'collections.abc', 'os', 'math', '_json', 'json.decoder'\n"
        "assert all(map(is_library, names))\n"
    )
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(tmp_path), *sys.path])}
    run = subprocess.run(
        [sys.executable, "-c", program], env=environment, capture_output=True, text=True
    )
    assert run.returncode == 0, run.stderr


class Scaled(nn.Module):
    factor = 1

    def __init__(self):
        super().__init__()
        self.fc = linear()

    def forward(self, x):
        x = F.relu(self.fc(x)) * SCALE + support.SHIFT
        return x * self.factor * Config.scale + fastnet.bench.networks.SHIFT


@pytest.mark.parametrize(
    ("owner", "name"),
    [
        (sys.modules[__name__], "SCALE"),
        (support, "SHIFT"),
        (fastnet.bench.networks, "SHIFT"),
        (Config, "scale"),
        (Scaled, "factor"),
    ],
)
def test_globals_may_change(owner, name, calls, monkeypatch):
    """The numbers that stand in a trace are looked at in each call."""
    monkeypatch.setattr(support, "SHIFT", 1, raising=False)
    monkeypatch.setattr(fastnet.bench.networks, "SHIFT", 1, raising=False)
    model, x = Scaled(), torch.randn(5, 8)
    accelerated = fastnet.accelerate(model)
    for one in (accelerated, _pickled(accelerated)):
        was = getattr(owner, name)
        for value, count in ((was, 1), (3, 0), (torch.ones(8), 0), (was, 1)):
            monkeypatch.setattr(owner, name, value)
            calls.clear()
            torch.testing.assert_close(one(x), model(x))
            assert len(calls) == count
    compiled = torch.compile(accelerated, fullgraph=True, backend="eager")
    for value in (getattr(owner, name), 5):
        monkeypatch.setattr(owner, name, value)
        torch.testing.assert_close(compiled(x), model(x))


@pytest.mark.parametrize(
    "ask",
    [
        torch.are_deterministic_algorithms_enabled,
        torch.is_autocast_cpu_enabled,
        torch.is_anomaly_enabled,
        torch.get_default_dtype,
        torch.get_num_threads,
        torch.jit.is_tracing,
        torch.backends.cuda.flash_sdp_enabled,
    ],
)
def test_questions_about_the_moment_are_asked_in_each_call(ask):
    def asks(m, x):
        return F.relu(m.fc(x)) + (ask() in (True, torch.float32))

    report = fastnet.accelerate_report(fastnet.accelerate(Calls(asks, fc=linear())))
    assert ask.__name__ in report.untraceable["Calls"]


def test_flags_of_torch_may_change(monkeypatch, calls):
    model = Calls(lambda m, x: F.relu(m.fc(x)) + torch.backends.cudnn.enabled, fc=linear())
    accelerated, x = fastnet.accelerate(model), torch.randn(5, 8)
    for value in (True, False):
        monkeypatch.setattr(torch.backends.cudnn, "enabled", value)
        torch.testing.assert_close(accelerated(x), model(x))
    assert calls == ["linear_relu"]


def test_falls_back_to_submodules(calls):
    model = DataDependent()
    accelerated = fastnet.accelerate(model)
    assert_same(model, accelerated, torch.randn(5, 8))
    assert calls == ["linear_relu"]
    report = fastnet.accelerate_report(accelerated)
    assert report.untraceable["DataDependent"].startswith("it branches on its input (an `if`")
    assert [bool(row.fused) for row in report.rows] == [True, False]


def _assigned(m, x):
    h = F.relu(m.fc(x))
    m.fc2.weight.data = torch.renorm(m.fc2.weight.data, 2, 0, 0.1)
    return m.fc2(h)


def _added(m, x):
    h = m.fc2(F.relu(m.fc(x)))
    y = h
    h += 1
    h *= 0.5
    return y + m.fc2(h)


def _moving(m, x):
    b = m.buffer
    b *= 0.9
    b += 0.1 * x.detach().mean(0)
    return F.relu(m.fc(x)) + m.buffer


def _evaluates(m, x):
    m.norm.eval()
    return m.norm(F.relu(m.fc(x)))


class Doubled(nn.Linear):
    def __call__(self, *args):
        return 2 * super().__call__(*args)


class Reversed(nn.Sequential):
    def __iter__(self):
        return iter(list(self._modules.values())[::-1])


def _tries(m, x):
    try:
        big = bool((x > 0.5).any())
    except RuntimeError:
        big = False
    return F.relu(m.fc(x)) + big


def _switches(m, x):
    torch.set_grad_enabled(False)
    h = F.relu(m.fc(x))
    torch.set_grad_enabled(True)
    return m.fc2(h)


def _autocasts(m, x):
    context = torch.autocast("cpu", dtype=torch.bfloat16)
    context.__enter__()
    h = F.relu(m.fc(x))
    context.__exit__(None, None, None)
    return m.fc2(h.float())


def _reorders(m, x):
    h = m.fc(x)
    s = m.drop(x)
    return m.relu_drop(h) + s


def _matches(m, x):
    h = F.relu(m.fc(x))
    return h + (1 if type(x) is torch.Tensor else 2)


def _freezes(m, x):
    for parameter in m.fc2.parameters():
        parameter.requires_grad_(False)
    return m.fc2(F.relu(m.fc(x)))


TRAPS = {
    "parameter assigned": _assigned,
    "in place": _added,
    "buffer in place": _moving,
    "submodule to evaluation": _evaluates,
    "own __call__": lambda m, x: m.doubled(F.relu(m.fc(x))),
    "own __iter__": lambda m, x: F.relu(m.reversed(x)),
    "try": _tries,
    "gradients off": _switches,
    "autocast by hand": _autocasts,
    "random order": _reorders,
    "type": _matches,
    "is_tensor": lambda m, x: F.relu(m.fc(x)) + torch.is_tensor(x),
    "hasattr": lambda m, x: F.relu(m.fc(x)) + hasattr(x, "mask"),
    "text": lambda m, x: F.relu(m.fc(x)) + (str(x.dtype) == "torch.float32"),
    "formatted": lambda m, x: F.relu(m.fc(x)) + ("cpu" in f"{x.device}"),
    "set": lambda m, x: F.relu(m.fc(x)) + (x.dtype in {torch.float32}),
    "same": lambda m, x: F.relu(m.fc(x)) + (x is m.buffer),
    "grad mode": lambda m, x: F.relu(m.fc(x)) + torch.is_grad_enabled(),
    "ordered dict": lambda m, x: tuple(OrderedDict(out=F.relu(m.fc(x))).values()),
    "dictionary read": lambda m, x: F.relu(m.fc(x)) * m.config["scale"],
    "numpy scalar": lambda m, x: F.relu(m.fc(x)) * m.root,
    "own generator": lambda m, x: F.relu(m.fc(x)) * m.generator.random(),
    "parameters frozen": _freezes,
    "module asked": lambda m, x: F.relu(m.fc(x)) + sum(p.sum() for p in m.fc2.parameters()),
    "checkpoint": lambda m, x: F.relu(checkpoint(m.fc, x, use_reentrant=False)),
}


def _trap(function):
    torch.manual_seed(4)
    model = Calls(
        function,
        fc=linear(),
        fc2=linear(),
        norm=nn.BatchNorm1d(8),
        drop=nn.Dropout(0.5),
        relu_drop=nn.Sequential(nn.ReLU(), nn.Dropout(0.5)),
        doubled=Doubled(8, 8),
        reversed=Reversed(linear(), nn.Tanh()),
    )
    model.register_buffer("buffer", torch.ones(8))
    model.config, model.root = {"scale": 2.0}, numpy.sqrt(8.0)
    model.generator = numpy.random.default_rng(3)
    return model


@pytest.mark.parametrize("trap", TRAPS)
def test_traps(trap):
    """What a trace alone would get wrong: the same comes out, and the same is left."""
    states = []
    for accelerate in (False, True):
        model = _trap(TRAPS[trap])
        if accelerate:
            model = fastnet.accelerate(model, inplace=True)
        torch.manual_seed(6)
        results = []
        for _ in range(2):
            x = torch.arange(24.0).reshape(3, 8).sin().requires_grad_()
            output = model(x)
            output = output[0] if isinstance(output, tuple) else output
            results.append(output)
            if output.requires_grad:
                leaves = (x, *(p for p in model.parameters() if p.requires_grad))
                results += torch.autograd.grad(output.sum(), leaves, allow_unused=True)
        flags = [p.requires_grad for p in model.parameters()]
        modes = [module.training for module in model.modules()]
        states.append((flags, modes, output.requires_grad, results, model.state_dict()))
    (*flags, expected, parameters), (*others, actual, theirs) = states
    assert flags == others
    torch.testing.assert_close(theirs, parameters)
    for a, b in zip(actual, expected, strict=True):
        assert (a is None) == (b is None)
        if a is not None:
            torch.testing.assert_close(a, b)


def test_later_changes():
    """Attributes of every kind that forward read, and lists of modules."""

    def act(m, x):
        x = m.act(F.relu(m.fc(x))) * getattr(m, "late", 1.0)
        for layer in m.layers:
            x = layer(x)
        return x if m.shortcut is None else x + m.shortcut

    changes = {
        "callable": lambda m: setattr(m, "act", torch.sigmoid),
        "missing": lambda m: setattr(m, "late", 3.0),
        "parameter": lambda m: setattr(m, "shortcut", nn.Parameter(torch.ones(8))),
        "longer": lambda m: m.layers.append(nn.Tanh()),
        "shorter": lambda m: setattr(m, "layers", m.layers[:1]),
        "type": lambda m: setattr(m, "factor", 2.0),
    }
    for name, change in changes.items():
        model = Calls(act, fc=linear(), layers=nn.ModuleList([linear(), nn.ReLU()]))
        model.act, model.factor = torch.tanh, 2
        model.register_parameter("shortcut", None)
        accelerated = fastnet.accelerate(model)
        assert fastnet.accelerate_report(accelerated).fused == 2
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            change(model), change(accelerated)
        x = torch.randn(3, 8)
        torch.testing.assert_close(accelerated(x), model(x), msg=name)


def _in_turn(layers, x):
    for layer in layers:
        x = layer(x)
    return F.relu(x)


# A forward, and what is done to the model after it was accelerated.
LATER = {
    "mode of a child": (
        lambda m, x: F.dropout(F.relu(m.fc(x)), 0.5, m.drop.training),
        lambda m: m.drop.eval(),
    ),
    "mode of a norm": (
        lambda m, x: F.batch_norm(
            F.relu(m.fc(x)), m.norm.running_mean, m.norm.running_var, training=m.norm.training
        ),
        lambda m: m.norm.eval(),
    ),
    "number of a child": (
        lambda m, x: F.dropout(F.relu(m.fc(x)), m.drop.p),
        lambda m: setattr(m.drop, "p", 0.1),
    ),
    "child to None": (
        lambda m, x: F.relu(m.fc(x)) if m.act is None else m.act(F.relu(m.fc(x))),
        lambda m: setattr(m, "act", None),
    ),
    "child of a child to None": (
        lambda m, x: F.relu(m.fc(x)) if m.seq.act is None else m.seq.act(F.relu(m.fc(x))),
        lambda m: setattr(m.seq, "act", None),
    ),
    "parameter to None": (
        lambda m, x: F.relu(m.fc(x)) + (0 if m.shift is None else m.shift),
        lambda m: setattr(m, "shift", None),
    ),
    "child deleted": (
        lambda m, x: m.act(F.relu(m.fc(x))) if hasattr(m, "act") else F.relu(m.fc(x)),
        lambda m: delattr(m, "act"),
    ),
    "child of another type": (
        lambda m, x: F.relu(m.fc(x)) * (2 if isinstance(m.act, nn.ReLU) else 3),
        lambda m: setattr(m, "act", nn.Tanh()),
    ),
    "child of another class": (
        lambda m, x: F.relu(m.fc(x)) * (2 if m.act.__class__ == nn.ReLU else 3),
        lambda m: setattr(m, "act", nn.Tanh()),
    ),
    "Sequential longer": (
        lambda m, x: _in_turn(m.seq, x),
        lambda m: m.seq.append(nn.Tanh()),
    ),
    "Sequential shorter": (
        lambda m, x: _in_turn(m.seq, x),
        lambda m: m.seq.__delitem__(0),
    ),
    "last of a Sequential": (
        lambda m, x: m.seq[-1](F.relu(m.fc(x))),
        lambda m: m.seq.append(nn.Tanh()),
    ),
    "length": (
        lambda m, x: F.relu(m.fc(x)) * len(m.seq),
        lambda m: m.seq.append(nn.Tanh()),
    ),
    "slice": (
        lambda m, x: _in_turn(m.seq[1:], x),
        lambda m: m.seq.append(nn.Tanh()),
    ),
    "list in a list": (
        lambda m, x: _in_turn([layer for layers in m.lists for layer in layers], x),
        lambda m: m.lists[0].append(nn.Tanh()),
    ),
    "children, one more": (
        lambda m, x: _in_turn(m.seq.children(), x),
        lambda m: m.seq.add_module("more", nn.Tanh()),
    ),
    "children, one less": (
        lambda m, x: _in_turn(m.seq.children(), x),
        lambda m: delattr(m.seq, "act"),
    ),
    "children, one None": (
        lambda m, x: _in_turn(m.seq.children(), x),
        lambda m: setattr(m.seq, "act", None),
    ),
    "its own children": (
        lambda m, x: F.relu(m.fc(x)) * sum(1 for _ in m.children()),
        lambda m: m.add_module("more", nn.Tanh()),
    ),
    "another key": (
        lambda m, x: _in_turn(m.dict.values(), x),
        lambda m: (m.dict.pop("b"), m.dict.update({"c": nn.Tanh()})),
    ),
    "module registered": (
        lambda m, x: F.relu(m.fc(x)) if m.none is None else m.none(m.fc(x)),
        lambda m: m.add_module("none", nn.Tanh()),
    ),
    "buffer registered": (
        lambda m, x: F.relu(m.fc(x)) + (0 if m.no_buffer is None else m.no_buffer),
        lambda m: m.register_buffer("no_buffer", torch.ones(8)),
    ),
    "parameter registered": (
        lambda m, x: F.relu(m.fc(x)) + (0 if m.no_shift is None else m.no_shift),
        lambda m: m.register_parameter("no_shift", nn.Parameter(torch.ones(8))),
    ),
    "module added": (
        lambda m, x: F.relu(m.fc(x)) * (2 if hasattr(m, "more") else 3),
        lambda m: m.add_module("more", nn.Tanh()),
    ),
}
# What forward never looks at may change: it is fused still.
UNSEEN = {
    "unused list to None": lambda m: setattr(m, "lists", None),
    "unused list deleted": lambda m: delattr(m, "lists"),
    "unused list longer": lambda m: m.lists.append(nn.Tanh()),
}


def _of_many_parts(function):
    model = Calls(
        function,
        fc=linear(),
        act=nn.ReLU(),
        drop=nn.Dropout(0.5),
        norm=nn.BatchNorm1d(8),
        seq=nn.Sequential(OrderedDict(act=nn.Tanh(), fc=linear())),
        lists=nn.ModuleList([nn.ModuleList([nn.Tanh()]), nn.ModuleList([linear()])]),
        dict=nn.ModuleDict({"b": nn.Sigmoid(), "a": linear()}),
        shift=nn.Parameter(torch.randn(8)),
    )
    model.register_module("none", None)
    model.register_buffer("no_buffer", None)
    model.register_parameter("no_shift", None)
    return model


@pytest.mark.parametrize("case", [*LATER, *UNSEEN])
def test_what_forward_read_is_looked_at_in_each_call(case, calls):
    function, change = LATER.get(case) or (lambda m, x: F.relu(m.fc(x)), UNSEEN.get(case))
    model, x = _of_many_parts(function), torch.randn(5, 8)
    accelerated = fastnet.accelerate(model)
    copied = copy.deepcopy(accelerated)
    assert_same(model, accelerated, x)
    assert calls == ["linear_relu"]
    for one in (model, accelerated, copied):
        change(one)
    copied.load_state_dict(model.state_dict())
    assert_same(model, accelerated, x)
    assert_same(model, copied, x)
    assert len(calls) == (3 if case in UNSEEN else 1)
    assert_same(model, fastnet.accelerate(accelerated), x)


class Flagged(nn.Module):
    def __init__(self, flag):
        super().__init__()
        self.first, self.last, self.flag, self.acts = linear(), linear(), flag, (torch.tanh, F.gelu)

    def forward(self, x):
        h = F.relu(self.first(x))
        return self.acts[0](self.last(h)) if self.flag else self.last(-h)


def test_equal_values_of_different_kinds(calls):
    x = torch.randn(5, 8)
    for flag in (True, 1, 1.0, False, 0, 0.0, -0.0):
        model = Flagged(flag)
        accelerated = fastnet.accelerate(model)
        for one in (accelerated, _pickled(accelerated), fastnet.accelerate(accelerated)):
            calls.clear()
            assert_same(model, one, x)
            assert calls == ["linear_relu"]


def test_what_was_set_is_looked_at_anew(calls):
    model = fastnet.accelerate(Optional())
    x = torch.randn(5, 8)
    with pytest.warns(UserWarning, match=r"Optional\.scale was 2\.0"):
        model.scale = 3.0
    model(x)
    assert not calls
    assert fastnet.accelerate(model, inplace=True) is model
    torch.testing.assert_close(model(x), 3 * F.relu(model.fc(x)))
    assert calls == ["linear_relu"]
    assert fastnet.accelerate_report(model).fused == 1


@pytest.mark.parametrize("sequential", [True, False])
@pytest.mark.parametrize("kind", [nn.ReLU, nn.MaxPool2d, nn.Conv2d])
def test_classes_of_layers_may_be_patched(kind, sequential, calls, monkeypatch):
    """As for guided backpropagation."""
    layers = OrderedDict(conv=conv(), relu=nn.ReLU(), pool=nn.MaxPool2d(2))
    model = nn.Sequential(layers) if sequential else Calls(CONV_STYLES["modules"], **layers)
    accelerated, x = fastnet.accelerate(model), torch.randn(2, 3, 8, 8)
    monkeypatch.setattr(kind, "forward", lambda _self, input: input * 2)
    assert torch.equal(accelerated(x), model(x))
    assert not calls


class OwnSequential(nn.Sequential):
    pass


@pytest.mark.parametrize("name", ["forward", "act"])
@pytest.mark.parametrize("sequential", [True, False])
def test_its_own_class_may_be_patched(name, sequential, calls, monkeypatch):
    class Own(nn.Module):
        def __init__(self):
            super().__init__()
            self.fc = linear()

        def act(self, x):
            return F.relu(x)

        def forward(self, x):
            return self.act(self.fc(x))

    model = OwnSequential(linear(), nn.ReLU()) if sequential else Own()
    accelerated, x = fastnet.accelerate(model), torch.randn(5, 8)
    accelerated(x)
    monkeypatch.setattr(type(model), name, lambda _self, input: input * 2, raising=False)
    assert torch.equal(accelerated(x), model(x)) or (name, sequential) == ("act", True)
    assert calls == ["linear_relu"] * (1 + (name == "act" and sequential))


@pytest.mark.parametrize(
    "relu",
    [
        lambda x: F.relu(x, inplace=True),
        lambda x: F.relu(x, True),
        torch.relu_,
        lambda x: x.relu_(),
        F.relu,
    ],
)
def test_what_is_in_place_stays_so_where_it_is_not_fused(relu):
    results = []
    for accelerate in (False, True):
        torch.manual_seed(1)
        model = Calls(lambda m, x: relu(m.fc(x)), fc=linear())
        if accelerate:
            model = fastnet.accelerate(model, inplace=True)
        kept, x = [], torch.randn(5, 8)
        handle = model.fc.register_forward_hook(lambda *call, kept=kept: kept.append(call[-1]))
        with torch.no_grad():
            output = model(x)
            handle.remove()
            model.fc = nn.Identity()
            model(x)
        results.append((output, *kept, x))
    torch.testing.assert_close(*results)


class OwnReduce(nn.Sequential):
    def __reduce__(self):
        return type(self), tuple(self)


def test_what_has_its_own_way_of_being_copied():
    model = OwnReduce(linear(), nn.ReLU())
    accelerated, x = fastnet.accelerate(model, inplace=True), torch.randn(5, 8)
    assert torch.equal(copy.deepcopy(accelerated)(x), model(x))
    assert "pickled" in fastnet.accelerate_report(accelerated).untraceable["OwnReduce"]


def test_what_is_no_tensor_runs_as_written(calls):
    def masked(m, x, mask):
        mask = torch.zeros(()) if mask is None else mask
        return F.relu(m.fc(x)) + mask

    class TwoInputs(Calls):
        def forward(self, x, mask):
            return masked(self, x, mask)

    model = TwoInputs(None, fc=linear())
    accelerated = fastnet.accelerate(model)
    x, mask = torch.randn(3, 8), torch.randn(8)
    torch.testing.assert_close(accelerated(x, mask), model(x, mask))
    assert len(calls) == 1
    torch.testing.assert_close(accelerated(x, None), model(x, None))
    assert len(calls) == 1


def test_new_instances_of_its_class_run_as_written():
    class Deep(nn.Module):
        def __init__(self, depth):
            super().__init__()
            self.layers = nn.ModuleList(linear() for _ in range(depth))
            self.depth = depth

        def forward(self, x):
            for at in range(self.depth):
                x = F.relu(self.layers[at](x))
            return x

    one = fastnet.accelerate(Deep(1))
    three = type(one)(3)
    x = torch.randn(3, 8)
    torch.testing.assert_close(three(x), Deep.forward(three, x))
    three.depth = 2
    torch.testing.assert_close(three(x), Deep.forward(three, x))


def test_subclasses_are_not_announced():
    known = []

    class Registered(nn.Module):
        def __init_subclass__(cls, *, title, **options):
            known.append(title)

        def __init__(self):
            super().__init__()
            self.fc = linear()

        def forward(self, x):
            return F.relu(self.fc(x))

    class Mine(Registered, title="mine"):
        pass

    accelerated = fastnet.accelerate(Mine())
    assert fastnet.accelerate_report(accelerated).fused == 1
    assert known == ["mine"]


def test_models_that_copy_themselves():
    class Selfish(nn.Module):
        def __init__(self):
            super().__init__()
            self.fc = linear()

        def forward(self, x):
            return F.relu(self.fc(x))

        def __deepcopy__(self, memo):
            return type(self)()

    with pytest.raises(RuntimeError, match="inplace=True"):
        fastnet.accelerate(Selfish())
    assert fastnet.accelerate_report(fastnet.accelerate(Selfish(), inplace=True)).fused == 1


def test_names_that_collide():
    class Odd(nn.Module):
        def __init__(self):
            super().__init__()
            self.parts = nn.ModuleDict({"class": linear(), "_training": linear()})

        def forward(this, _training):  # noqa: N805
            return F.relu(this.parts["class"](F.relu(this.parts["_training"](_training))))

    model = Odd()
    assert_same(model, fastnet.accelerate(model), torch.randn(3, 8))


def test_infinite_constants(calls):
    model = Calls(lambda m, x: F.relu(m.fc(x)).masked_fill(x > 0, float("-inf")), fc=linear())
    accelerated = fastnet.accelerate(model)
    x = torch.randn(3, 8)
    torch.testing.assert_close(accelerated(x), model(x))
    assert calls == ["linear_relu"]


def test_functions_without_a_name():
    """What a trace calls must be found again by its name, after pickling."""
    apply = torch.vmap(torch.sin)
    model = Calls(lambda m, x: F.relu(m.fc(apply(x))), fc=linear())
    accelerated = fastnet.accelerate(model)
    x = torch.randn(3, 8)
    torch.testing.assert_close(accelerated(x), model(x))
    report = fastnet.accelerate_report(accelerated)
    assert "would fuse" not in str(report)
    assert report.fused or report.untraceable


def test_other_tracers():
    model = nn.Sequential(conv(), nn.ReLU(), nn.MaxPool2d(2), nn.Flatten(), nn.Linear(64, 8))
    accelerated = fastnet.accelerate(model.eval())
    x = torch.randn(2, 3, 8, 8)
    traced = torch.jit.trace(accelerated, (x,))
    file = io.BytesIO()
    torch.jit.save(traced, file)
    torch.testing.assert_close(traced(x), model(x))
    graph = torch.fx.symbolic_trace(accelerated)
    torch.testing.assert_close(graph(x), model(x))
    torch.testing.assert_close(fastnet.accelerate(graph, inplace=True)(x), model(x))


def test_features_are_found_by_name():
    extraction = pytest.importorskip("torchvision.models.feature_extraction")
    model = Calls(
        lambda m, x: F.relu(m.fc(m.features(x).flatten(1))),
        features=nn.Sequential(conv(), nn.ReLU(), nn.MaxPool2d(2)),
        fc=nn.Linear(64, 8),
    )
    x = torch.randn(2, 3, 8, 8)
    outputs = [
        extraction.create_feature_extractor(one, {"features.1": "y", "fc": "z"})(x)
        for one in (model, fastnet.accelerate(model))
    ]
    torch.testing.assert_close(*outputs)


def test_tracing_leaves_random_numbers_alone():
    model = Calls(lambda m, x: F.relu(m.fc(x)) + torch.rand(8), fc=linear())
    state = torch.get_rng_state()
    fastnet.accelerate(model)
    assert torch.equal(state, torch.get_rng_state())


class Optional(nn.Module):
    def __init__(self):
        super().__init__()
        self.fc = linear()
        self.scale = 2.0

    def forward(self, x, mask=None, *rest, power=1, **more):
        x = F.relu(self.fc(x)) ** power * self.scale
        if mask is not None:
            x = x * mask
        return x + len(rest) + sum(more.values())


def test_optional_arguments(calls):
    model = Optional()
    accelerated = fastnet.accelerate(model)
    x, mask = torch.randn(5, 8), torch.rand(8)
    for args, kwargs, fused in (
        ((x,), {}, 1),
        ((), {"x": x}, 1),
        ((x, None), {"power": 1}, 1),
        ((x, mask), {}, 0),
        ((x,), {"mask": mask, "power": 2}, 0),
        ((x, mask, 1, 2), {"a": 1, "b": 2}, 0),
    ):
        calls.clear()
        torch.testing.assert_close(accelerated(*args, **kwargs), model(*args, **kwargs))
        assert len(calls) == fused


def test_attributes_that_forward_read(calls):
    accelerated = fastnet.accelerate(Optional())
    x = torch.randn(5, 8)
    accelerated.scale = 2.0  # the same
    accelerated.other = 7
    accelerated(x)
    assert calls == ["linear_relu"]
    with pytest.warns(UserWarning, match=r"Optional\.scale was 2\.0"):
        accelerated.scale = 3
    torch.testing.assert_close(accelerated(x), 3 * F.relu(accelerated.fc(x)))
    assert calls == ["linear_relu"]
    assert "was set" in fastnet.accelerate_report(accelerated).untraceable["Optional"]


def test_others_are_not_touched():
    attention = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True, dropout=0.0)
    model = nn.Sequential(attention, linear(), nn.ReLU())
    accelerated = fastnet.accelerate(model)
    assert_same(model, accelerated, torch.randn(2, 3, 8))
    assert type(accelerated[0]) is nn.TransformerEncoderLayer
    assert "torch's own" in fastnet.accelerate_report(accelerated).untraceable["0"]
    scripted = torch.jit.script(nn.Sequential(linear(), nn.ReLU()))
    x = torch.randn(5, 8)
    torch.testing.assert_close(fastnet.accelerate(scripted, inplace=True)(x), scripted(x))


# ---------------------------------------------------------------------------------------------
# The result as a module


def net():
    return Calls(
        lambda m, x: m.head(F.dropout(F.max_pool2d(F.relu(m.conv(x)), 2), 0.5, m.training)),
        conv=conv(),
        head=nn.Sequential(nn.Flatten(), nn.Linear(64, 8), nn.ReLU(True), linear()),
    )


class Picklable(nn.Module):
    """`Calls` with a function that pickle can name."""

    def __init__(self):
        super().__init__()
        self.conv, self.fc = conv(), nn.Linear(64, 8)

    def forward(self, x):
        x = F.max_pool2d(F.relu(self.conv(x)), 2).flatten(1)
        return F.dropout(torch.relu(self.fc(x)), training=self.training)


def _pickled(model):
    return pickle.loads(pickle.dumps(model))


def _saved(model):
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


@pytest.mark.parametrize("through", [copy.deepcopy, _pickled, _saved, copy.copy])
@pytest.mark.parametrize("sequential", [True, False])
def test_copies(through, sequential, calls):
    model = nn.Sequential(conv(), nn.ReLU(), nn.MaxPool2d(2)) if sequential else Picklable()
    accelerated = fastnet.accelerate(model)
    copied = through(accelerated)
    assert type(copied) is type(accelerated)
    assert_same(model, copied, torch.randn(2, 3, 8, 8))
    assert "conv_relu_pool2d" in calls
    if through is not copy.copy:
        with torch.no_grad():
            next(copied.parameters()).zero_()
        assert next(model.parameters()).any()
    assert fastnet.accelerate_report(copied).fused == fastnet.accelerate_report(accelerated).fused


def test_pickle_in_another_process(tmp_path):
    """Where nothing has been accelerated yet."""
    model = fastnet.accelerate(networks.ConvNet().eval())
    x = torch.randn(2, 1, 28, 28)
    torch.save((model, x, model(x)), tmp_path / "model.pt")
    program = f"""
import torch
model, x, expected = torch.load({str(tmp_path / "model.pt")!r}, weights_only=False)
torch.testing.assert_close(model(x), expected)
print(type(model).forward.__code__.co_filename)
"""
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    run = subprocess.run(
        [sys.executable, "-c", program], env=environment, capture_output=True, text=True
    )
    assert run.returncode == 0, run.stderr
    assert "<ConvNet.forward" in run.stdout


def test_it_shares_parameters_and_buffers():
    model = nn.Sequential(nn.BatchNorm1d(8), linear(), nn.ReLU())
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    accelerated = fastnet.accelerate(model)
    assert type(model) is nn.Sequential
    before = model[1].weight.detach().clone()
    accelerated(torch.randn(5, 8)).sum().backward()
    optimizer.step()
    assert not torch.equal(accelerated[1].weight, before)
    assert accelerated[1].weight is model[1].weight
    assert model[0].num_batches_tracked == 1
    twin = nn.Sequential(nn.BatchNorm1d(8), linear(), nn.ReLU())
    twin.load_state_dict(accelerated.state_dict())
    accelerated.load_state_dict(twin.state_dict())


def test_inplace():
    model = net()
    assert fastnet.accelerate(model, inplace=True) is model
    assert fastnet.accelerate_report(model).fused == 2
    again = type(model)
    assert type(fastnet.accelerate(model, inplace=True)) is again
    assert type(fastnet.accelerate(model)) is again


def test_lists_of_modules_refer_to_the_copy():
    model = Calls(lambda m, x: [x := layer(x) for layer in m.layers][-1], fc=linear())
    model.relu = nn.ReLU()
    model.layers = [model.fc, model.relu]
    accelerated = fastnet.accelerate(model)
    assert accelerated.layers[0] is accelerated.fc is not model.fc
    assert_same(model, accelerated, torch.randn(5, 8))


def test_what_cannot_be_accelerated():
    with pytest.raises(TypeError, match="not int"):
        fastnet.accelerate(3)
    model = nn.Sequential(linear(), nn.ReLU())
    model.lock = (i for i in ())
    with pytest.raises(RuntimeError, match="inplace=True"):
        fastnet.accelerate(model)
    assert fastnet.accelerate(model, inplace=True) is model


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16])
def test_dtypes(dtype):
    model = net().eval()
    accelerated = fastnet.accelerate(copy.deepcopy(model)).to(dtype)
    x = torch.randn(2, 3, 8, 8).to(dtype)
    expected = model.to(dtype)(x)
    assert accelerated(x).dtype is dtype
    tolerance = {torch.float64: 1e-12, torch.bfloat16: 2e-2, torch.float16: 5e-3}[dtype]
    torch.testing.assert_close(accelerated(x), expected, rtol=tolerance, atol=tolerance)


def test_train_and_eval():
    accelerated = fastnet.accelerate(net())
    x = torch.randn(2, 3, 8, 8)
    assert not torch.equal(accelerated(x), accelerated(x))
    accelerated.eval()
    assert not accelerated.head.training
    assert torch.equal(accelerated(x), accelerated(x))


def test_report():
    report = fastnet.accelerate_report(net())
    assert report.fused == 0
    assert {row.reason for row in report.rows[:2]} == {"accelerate(model) would fuse it"}
    text = str(fastnet.accelerate_report(fastnet.accelerate(net())))
    assert "conv    Conv2d  ReLU, MaxPool2d" in text
    assert "2 of 3 layers are fused." in text
    own = nn.Sequential(fastnet.Linear(8, 8, activation="relu"), fastnet.Linear(8, 8), nn.ReLU())
    rows = fastnet.accelerate_report(fastnet.accelerate(own)).rows
    assert [bool(row.fused) for row in rows] == [True, False]


# ---------------------------------------------------------------------------------------------
# With the rest of torch


@pytest.mark.parametrize("training", [True, False])
def test_compile(training):
    torch._dynamo.reset()
    model = Calls(
        lambda m, x: m.head(F.max_pool2d(F.relu(m.conv(x)), 2)),
        conv=conv(),
        head=nn.Sequential(nn.Flatten(), nn.Linear(64, 8), nn.ReLU(True), linear()),
    ).train(training)
    compiled = torch.compile(fastnet.accelerate(model), fullgraph=True)
    assert_same(model, compiled, torch.randn(2, 3, 8, 8))


@pytest.mark.parametrize("strict", [True, False])
def test_export(strict):
    model = net().eval()
    x = torch.randn(2, 3, 8, 8)
    # Into torch's own operators: what is exported runs where fastnet is not.
    exported = torch.export.export(
        fastnet.accelerate(model),
        (x,),
        dynamic_shapes={"x": {0: torch.export.Dim("batch", min=2)}},
        strict=strict,
    )
    assert "fastnet" not in str(exported.graph)
    x = torch.randn(5, 3, 8, 8)
    torch.testing.assert_close(exported.module()(x), model(x))


def test_autocast_with_grad_scaler():
    results = []
    for accelerate in (False, True):
        torch.manual_seed(0)
        model = net().eval()
        if accelerate:
            model = fastnet.accelerate(model)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        scaler = torch.amp.GradScaler("cpu")
        x = torch.randn(4, 3, 8, 8)
        for _ in range(3):
            optimizer.zero_grad()
            with torch.autocast("cpu", dtype=torch.bfloat16):
                output = model(x)
                loss = output.float().square().mean()
            assert output.dtype is torch.bfloat16
            scaler.scale(loss).backward()
            scaler.step(optimizer)
            scaler.update()
        results.append(loss.detach())
    torch.testing.assert_close(*results, rtol=2e-2, atol=2e-2)


@pytest.mark.parametrize("use_reentrant", [True, False])
def test_checkpointing(use_reentrant, calls):
    model = net()
    accelerated = fastnet.accelerate(model)
    x = torch.randn(2, 3, 8, 8)
    grads = []
    for module, rerun in ((model, False), (accelerated, True)):
        torch.manual_seed(1)
        leaf = x.clone().requires_grad_()
        output = checkpoint(module, leaf, use_reentrant=use_reentrant) if rerun else module(leaf)
        grads.append(torch.autograd.grad(output.sum(), leaf)[0]) if not use_reentrant else (
            output.sum().backward(),
            grads.append(leaf.grad),
        )
    torch.testing.assert_close(*grads)
    assert len(calls) == 4


def test_functional_call():
    model = net().eval()
    accelerated = fastnet.accelerate(model)
    others = {name: torch.randn_like(p) for name, p in model.named_parameters()}
    x = torch.randn(2, 3, 8, 8)
    expected = torch.func.functional_call(model, others, (x,))
    actual = torch.func.functional_call(accelerated, others, (x,))
    assert (actual - expected).abs().max() <= 1e-5 * expected.abs().max()

    def loss(parameters, x):
        return torch.func.functional_call(accelerated, parameters, (x,)).sum()

    per_sample = torch.func.vmap(torch.func.grad(loss), (None, 0))(others, x.unsqueeze(1))
    one = torch.func.grad(loss)(others, x[:1])
    for name in others:
        torch.testing.assert_close(per_sample[name][0], one[name], rtol=1e-4, atol=1e-3)


def test_cuda_graph():
    if not torch.cuda.is_available():
        pytest.skip("no NVIDIA GPU here")
    model = net().eval().cuda()
    accelerated = fastnet.accelerate(model)
    x = torch.randn(2, 3, 8, 8, device="cuda")
    graphed = torch.cuda.make_graphed_callables(accelerated, (x,))
    assert_same(model, graphed, x)


def test_command_line():
    pytest.importorskip("typer")

    def info(*arguments):
        return subprocess.run(
            [sys.executable, "-m", "fastnet", "info", "--model", *arguments],
            capture_output=True,
            text=True,
        )

    run = info("fastnet.bench.networks:SimpleCNN")
    assert run.returncode == 0, run.stderr
    assert "5 of 6 layers are fused." in run.stdout
    for wrong, message in (
        ("vgg16", "torchvision:NAME"),
        ("fastnet.bench.networks:Missing", "no attribute"),
        ("missing_package:Net", "No module"),
        ("builtins:dict", "not a module"),
    ):
        run = info(wrong)
        assert run.returncode == 1
        assert message in run.stderr
        assert "Traceback" not in run.stderr
