"""The nodes in autograd's graph that are in C++: the same as those in Python, and quick only where
nothing stands between a call and the kernels. All other tests run on both: "cpu" on these,
"emulated" on those in Python."""

from __future__ import annotations

import contextlib
import subprocess
import sys

import pytest
import torch
import torch.nn.functional as F
from torch.autograd import forward_ad
from torch.utils.flop_counter import FlopCounterMode

import fastnet
from fastnet.functional import (
    conv_relu_pool2d,
    cross_entropy,
    linear,
    linear_cross_entropy,
    linear_relu,
)

NODES = fastnet._library.NODES
pytestmark = pytest.mark.skipif(
    NODES is None, reason="this torch is not the one that fastnet was built with"
)


def leaves(*shapes: tuple[int, ...] | None) -> list[torch.Tensor | None]:
    return [shape and torch.randn(shape, requires_grad=True) for shape in shapes]


CALLS = {
    "linear_relu": (linear_relu, lambda: leaves((6, 20), (5, 20), (5,))),
    "linear_relu, no bias": (linear_relu, lambda: leaves((2, 3, 20), (5, 20), None)),
    "conv_relu_pool": (
        lambda *given: conv_relu_pool2d(*given, padding=1),
        lambda: leaves((2, 3, 8, 8), (4, 3, 3, 3), (4,)),
    ),
    "conv_relu_pool, no bias": (conv_relu_pool2d, lambda: leaves((2, 3, 8, 8), (4, 3, 3, 3), None)),
    "cross_entropy": (
        lambda logits: cross_entropy(logits, torch.arange(6), label_smoothing=0.1),
        lambda: leaves((6, 10)),
    ),
    "cross_entropy, weighted": (
        lambda logits: cross_entropy(logits, torch.arange(2000) % 10, torch.arange(10.0)),
        lambda: leaves((2000, 10)),
    ),
}

# Which in Python are torch's own.
LINEAR = {
    "linear": (linear, lambda: leaves((6, 20), (5, 20), (5,))),
    "linear, no bias": (linear, lambda: leaves((2, 3, 20), (5, 20), None)),
}


@pytest.mark.parametrize("name", CALLS)
def test_same_results_as_in_python(name, monkeypatch):
    call, make = CALLS[name]
    given = make()
    wanted = [t for t in given if t is not None]
    results = {}
    for nodes in (NODES, None):
        monkeypatch.setattr(fastnet._library, "NODES", nodes)
        monkeypatch.setattr(fastnet.functional, "SMALL_LOGITS", 0)
        output = call(*given)
        is_python = isinstance(output.grad_fn, torch.autograd.function.BackwardCFunction)
        assert is_python == (nodes is None)
        assert output.grad_fn.name().endswith("Backward")
        torch.manual_seed(1)
        grads = torch.autograd.grad(output, wanted, torch.randn_like(output), create_graph=True)
        again = torch.autograd.grad(sum((g * g).sum() for g in grads), wanted, allow_unused=True)
        plain = torch.autograd.grad(call(*given).square().sum(), wanted)
        with torch.no_grad():
            evaluated = call(*given)
        assert evaluated.grad_fn is None
        results[nodes] = [output, evaluated, *grads, *(g for g in again if g is not None), *plain]
    # A loss that Python's node takes with its gradient is another kernel's than the C++ node's.
    near = {"rtol": 1e-5, "atol": 1e-6} if "cross_entropy" in name else {"rtol": 0, "atol": 0}
    for actual, expected in zip(*results.values(), strict=True):
        torch.testing.assert_close(actual, expected, **near)


@pytest.mark.parametrize("name", {**CALLS, **LINEAR})
def test_only_wanted_gradients(name):
    call, make = {**CALLS, **LINEAR}[name]
    for chosen in range(3):
        given = [t if t is None else t.detach() for t in make()]
        if chosen >= len(given) or given[chosen] is None:
            continue
        given[chosen].requires_grad_()
        call(*given).sum().backward()
        assert [t is not None and t.grad is not None for t in given] == [
            number == chosen for number in range(len(given))
        ]


def test_hooks_and_freed_graphs():
    weight, bias = leaves((5, 20), (5,))
    kept = []
    hooks = torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t)
    with hooks:
        output = linear_relu(torch.randn(6, 20), weight, bias)
    assert {tuple(t.shape) for t in kept} == {(6, 5), (6, 20)}  # not the weight: no gradient asks
    output.sum().backward()
    with pytest.raises(RuntimeError, match="second time"):
        output.sum().backward()
    output = linear_relu(torch.randn(6, 20), weight, bias)
    with torch.no_grad():
        output.add_(1)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        output.sum().backward()


@pytest.mark.parametrize("call", [linear_relu, linear], ids=lambda call: call.__name__)
def test_only_the_gradients_that_are_asked_for(call):
    """What is not has no product, and what only it would read may have changed."""
    x, weight, bias = leaves((6, 20), (5, 20), (5,))
    given = {"x": x * 1, "weight": weight * 1, "bias": bias}
    output = call(*given.values())
    grads = torch.autograd.grad(output.sum(), given.values())
    wanted = dict(zip(given, grads, strict=True))
    for name, other in (("x", "x"), ("weight", "weight"), ("bias", "x")):
        output = call(*given.values())
        given[other].detach().mul_(1)
        (actual,) = torch.autograd.grad(output.sum(), given[name])
        torch.testing.assert_close(actual, wanted[name])
    output = call(*given.values())
    given["x"].detach().mul_(1)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        torch.autograd.grad(output.sum(), given["weight"])


def test_watchers_see_calls():
    """A profiler the ops, which are called past the dispatcher otherwise; a hook the nodes."""
    weight, bias = leaves((5, 20), (5,))
    x = torch.randn(6, 20)
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        linear_relu(x, weight, bias).sum().backward()
        linear(x, weight, bias).sum().backward()
    seen = {event.key for event in profile.key_averages()}
    assert {"fastnet::linear_relu_forward", "fastnet::linear_relu_backward"} <= seen
    assert {"fastnet::linear_forward", "fastnet::linear_backward"} <= seen
    assert {"LinearReLUBackward", "LinearBackward"} <= seen
    if hasattr(torch.autograd.graph, "node_creation_hook"):
        made = []
        with torch.autograd.graph.node_creation_hook(lambda node: made.append(node.name())):
            linear_relu(x, weight, bias)
        assert made.count("LinearReLUBackward") == 1


def test_output_without_a_gradient():
    """Where what comes after gives none, neither does a node."""

    class Split(torch.autograd.Function):
        @staticmethod
        def forward(_ctx, x):
            return x.clone()

        @staticmethod
        def backward(_ctx, _grad):
            return None

    (weight,) = leaves((5, 20))
    Split.apply(linear_relu(torch.randn(6, 20), weight)).sum().backward()
    assert weight.grad is None


@pytest.mark.usefixtures("nodes")
@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
@pytest.mark.parametrize("name", {**CALLS, **LINEAR})
def test_compiled_autograd(name, backend):
    """Which traces the nodes, and calls what they call."""
    call, make = {**CALLS, **LINEAR}[name]
    given = make()
    results = []
    compiler = torch.compile(backend=backend)
    for enabled in (False, True):
        for factor in (1.0, 3.0, 1.0):  # which must not become part of what is compiled
            loss = factor * call(*given).square().sum()
            tracing = torch._dynamo.compiled_autograd._enable(compiler)
            with tracing if enabled else contextlib.nullcontext():
                loss.backward()
        results.append([tensor.grad for tensor in given if tensor is not None])
        for tensor in given:
            if tensor is not None:
                tensor.grad = None
    torch.testing.assert_close(*results)


def test_errors_are_those_of_the_kernels():
    with pytest.raises(RuntimeError, match=r"linear_relu.*\(6, 21\)|6x21|shapes"):
        linear_relu(torch.randn(6, 21), torch.randn(5, 20))
    with pytest.raises(IndexError):
        cross_entropy(torch.randn(6, 10), torch.full((6,), 10))


class Watched(torch.Tensor):
    pass


def test_quick_calls_leave_what_is_not_plain():
    x, w, b = torch.randn(6, 20), torch.randn(5, 20), torch.randn(5)
    target = torch.arange(6)

    def is_taken(x=x, w=w, b=b):
        output = NODES.quick_linear_relu(x, w, b)
        if output is not None:
            torch.testing.assert_close(output, F.linear(x, w, b).relu())
        assert (NODES.quick_linear(x, w, b) is None) == (output is None)
        return output is not None

    def loss_is_taken(x=x, target=target):
        return NODES.quick_cross_entropy(x, target, 1, -100, 0.0) is not None

    assert is_taken()
    assert is_taken(b=None)
    assert is_taken(torch.nn.Parameter(x), torch.nn.Parameter(w), torch.nn.Parameter(b))
    assert is_taken(x.double(), w.double(), b.double())
    assert is_taken(x.T[:5].T.repeat(1, 4))  # any strides
    assert loss_is_taken()
    for refused in (
        x.as_subclass(Watched),
        x.half(),
        x.double(),
        x.to_sparse(),
        x.to("meta"),
        x[0, 0],
        torch.ones(6, 20, dtype=torch.int64),
        torch._neg_view(x),
        [1.0],
        None,
    ):
        assert not is_taken(refused), refused
    assert not is_taken(w=w[0])
    assert not is_taken(b=b[:4])
    assert not is_taken(b=b.double())
    for refused in (x.as_subclass(Watched), x.half(), x[None], x[:, :0]):
        assert not loss_is_taken(refused)
    assert loss_is_taken(torch.randn(6, 100_000))
    for options in ((-100.0, 0.0), (-100, None), (-100, 2.0), (True, 0.0), (1 << 70, 0.0)):
        assert NODES.quick_cross_entropy(x, target, 1, *options) is None
    for refused in (target.int(), target[:5], torch.softmax(x, 1), target.as_subclass(Watched)):
        assert not loss_is_taken(target=refused)

    with torch.autocast("cpu", torch.float16):
        assert not is_taken()
        assert loss_is_taken()  # in float32
    with forward_ad.dual_level():
        assert not is_taken(forward_ad.make_dual(x, x))
    seen = []
    torch.func.vmap(lambda row: seen.append(is_taken()) or row)(x)
    torch.jit.trace(lambda t: seen.append(is_taken()) or t + 1, x, check_trace=False)
    with torch._subclasses.FakeTensorMode():
        seen.append(NODES.quick_linear_relu(x, w, b) is not None)
    assert seen
    assert not any(seen)
    assert is_taken()


def test_quick_calls_take_what_is_there_in_inference_mode():
    x, w, b = torch.randn(6, 20), torch.randn(5, 20), torch.randn(5)
    weight = torch.randn(5, 20, requires_grad=True)
    images, filters = torch.randn(2, 4, 9, 8), torch.randn(6, 4, 3, 3)
    windows = (1, 0, 1, 1, 2, None, 0, False)
    target = torch.arange(6)

    def results(x, w, images):
        return [
            NODES.quick_linear_relu(x, w, b),
            NODES.quick_linear(x, w, b),
            NODES.quick_conv_relu_pool(images, filters, None, *windows),
            NODES.quick_cross_entropy(x, target, 1, -100, 0.0),
        ]

    wanted = results(x, w, images)
    with torch.inference_mode():
        made_here = x.clone(), w.clone(), images.clone()
        for given in ((x, w, images), made_here):
            for actual, plain in zip(results(*given), wanted, strict=True):
                assert actual.is_inference()
                assert torch.equal(actual, plain)
        with torch.autocast("cpu", torch.bfloat16):
            assert [t.dtype for t in results(x, w, images)] == 3 * [torch.bfloat16] + [x.dtype]
    assert not results(*made_here)[0].is_inference()
    for call in (NODES.quick_linear_relu, NODES.quick_linear):
        assert not call(made_here[0], w, b).requires_grad
        with pytest.raises(RuntimeError, match="Inference tensors cannot be saved"):
            call(made_here[0], weight, b)


@pytest.mark.parametrize("nodes", [NODES, None], ids=["C++", "Python"])
def test_inference_mode_records_nothing(nodes, monkeypatch):
    """As in torch, also where gradients are enabled in it again."""
    monkeypatch.setattr(fastnet._library, "NODES", nodes)
    monkeypatch.setattr(fastnet.functional, "SMALL_LOGITS", 0)
    for call, make in (*CALLS.values(), *LINEAR.values()):
        given = make()
        with torch.inference_mode(), torch.enable_grad():
            output = call(*given)
        assert output.is_inference()
        assert not output.requires_grad


@pytest.mark.parametrize("name", CALLS)
def test_backward_among_forward_derivatives(name):
    call, make = CALLS[name]
    given = make()
    wanted = [t for t in given if t is not None]
    output = call(*given).sum()
    expected = torch.autograd.grad(output, wanted, retain_graph=True)
    with forward_ad.dual_level():
        torch.testing.assert_close(torch.autograd.grad(2 * output / 2, wanted), expected)


def autocast_calls():
    x, w, b = leaves((6, 20), (5, 20), (5,))
    images, filters, bias = leaves((2, 4, 9, 8), (6, 4, 3, 3), (6,))
    logits = leaves((2000, 10))[0].to(torch.bfloat16).detach().requires_grad_()
    target = torch.arange(2000) % 10
    return {
        "linear_relu": (linear_relu, (x, w, b)),
        "linear_relu, in part": (linear_relu, (x.to(torch.bfloat16), w, b)),
        "linear_relu, float64": (linear_relu, (x.double(), w.double(), b.double())),
        "conv_relu_pool": (conv_relu_pool2d, (images, filters, bias)),
        "cross_entropy": (lambda logits: cross_entropy(logits, target), (logits,)),
        "cross_entropy, float32": (lambda logits: cross_entropy(logits, target), (logits.float(),)),
    }


@pytest.mark.parametrize("is_on", [True, False])
@pytest.mark.parametrize("name", autocast_calls())
def test_casts_as_in_python(name, is_on, monkeypatch):
    call, given = autocast_calls()[name]
    given = [t.detach().requires_grad_() for t in given]
    monkeypatch.setattr(fastnet.functional, "SMALL_LOGITS", 0)
    results = {}
    for nodes in (NODES, None):
        monkeypatch.setattr(fastnet._library, "NODES", nodes)
        with torch.autocast("cpu", torch.bfloat16, enabled=is_on):
            if not is_on and len({t.dtype for t in given}) > 1:
                with pytest.raises(RuntimeError):
                    call(*given)
                return
            output = call(*given)
        torch.manual_seed(1)
        results[nodes] = output, *torch.autograd.grad(output, given, torch.randn_like(output))
    for actual, wanted in zip(*results.values(), strict=True):
        assert actual.dtype is wanted.dtype
        assert torch.equal(actual, wanted)


def test_a_weight_is_cast_once():
    x, w, b = leaves((6, 20), (5, 20), (5,))
    casts = []
    with torch.autocast("cpu", torch.bfloat16):
        for call in (linear_relu, linear):
            casts.append(call(x, w, b).grad_fn.next_functions[1][0])
    assert casts[0].name() == "ToCopyBackward0"
    assert casts[0] is casts[1]


def test_function_modes_see_torchs_functions():
    """And a default device, which is one, too, leaves the kernels where they are."""
    seen = []

    class Mode(torch.overrides.TorchFunctionMode):
        def __torch_function__(self, function, types, args=(), kwargs=None):
            seen.append(getattr(function, "__name__", ""))
            return function(*args, **(kwargs or {}))

    x, w, b = leaves((6, 20), (5, 20), (5,))
    images, filters = leaves((2, 4, 9, 8), (6, 4, 3, 3))
    calls = {
        "linear": lambda: linear(x, w, b),
        "relu": lambda: linear_relu(x, w, b),
        "max_pool2d": lambda: conv_relu_pool2d(images, filters),
        "cross_entropy": lambda: cross_entropy(x, torch.arange(6)),
    }
    for name, call in calls.items():
        with Mode():
            call()
        assert name in seen
        seen.clear()
    with torch.device("cpu"):
        assert NODES.quick_linear_relu(x, w, b) is not None
        assert calls["relu"]().grad_fn.name() == "LinearReLUBackward"
        assert calls["max_pool2d"]().grad_fn.name() == "ConvReLUPoolBackward"


def test_flops_are_counted():
    x, w, b = leaves((6, 20), (5, 20), (5,))
    images, filters = leaves((2, 4, 9, 8), (6, 4, 3, 3))
    with FlopCounterMode(display=False) as native:
        torch.relu(F.linear(x, w, b)).sum().backward()
        F.max_pool2d(torch.relu(F.conv2d(images, filters)), 2).sum().backward()
    with FlopCounterMode(display=False) as fused:
        linear_relu(x, w, b).sum().backward()
        conv_relu_pool2d(images, filters).sum().backward()
    assert fused.get_total_flops() == native.get_total_flops() > 0


def test_quick_convolutions_leave_what_is_not_plain():
    x, w, b = torch.randn(2, 4, 9, 8), torch.randn(6, 2, 3, 3), torch.randn(6)
    plain = (1, 1, 1, 2, 2, None, 0, False)  # stride, padding, dilation, groups; and of the pool

    def is_taken(x=x, w=w, b=b, **changed):
        names = ("stride", "padding", "dilation", "groups")
        names += ("pool_kernel_size", "pool_stride", "pool_padding", "ceil_mode")
        options = dict(zip(names, plain, strict=True)) | changed
        output = NODES.quick_conv_relu_pool(x, w, b, *options.values())
        if output is not None:
            kernel, step, around, ceil = list(options.values())[4:]
            z = F.conv2d(x, w, b, *list(options.values())[:4])
            want = F.max_pool2d(z.relu(), kernel, step, around, ceil_mode=ceil)
            torch.testing.assert_close(output, want, rtol=1e-4, atol=1e-5)
            got = conv_relu_pool2d(x, w, b, **options)
            torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-5)
        return output is not None

    assert is_taken()
    assert is_taken(b=None)
    assert is_taken(torch.nn.Parameter(x), torch.nn.Parameter(w), torch.nn.Parameter(b))
    assert is_taken(x.double(), w.double(), b.double())
    assert is_taken(x.to(memory_format=torch.channels_last))
    assert is_taken(x[:0])
    assert is_taken(x[:, :2], groups=1)
    for taken in (
        {"stride": (2, 1)},
        {"padding": (0, 3)},
        {"dilation": (1, 2)},
        {"pool_kernel_size": (2, 2), "pool_stride": 2, "pool_padding": (0, 0)},
        {"padding": (0, 1), "dilation": (3, 1)},
    ):
        assert is_taken(**taken), taken
    for refused in (
        {"x": x[0]},
        {"x": x.half()},
        {"x": x[:, :3]},
        {"x": x[:, :, :0]},
        {"x": x.as_subclass(Watched)},
        {"w": w[0]},
        {"w": w.double()},
        {"w": w[:5]},
        {"b": b[:5]},
        {"b": b.double()},
        {"stride": 0},
        {"stride": (1,)},
        {"stride": (1, 1, 1)},
        {"stride": [1, 1]},
        {"stride": 1.0},
        {"stride": True},
        {"padding": -1},
        {"padding": "same"},
        {"padding": 1 << 70},
        {"dilation": 0},
        {"dilation": 5},  # no window is left
        {"groups": 0},
        {"groups": -2},
        {"groups": 4},
        {"groups": 2.0},
        {"pool_kernel_size": 3},
        {"pool_stride": 1},
        {"pool_padding": 1},
        {"ceil_mode": True},  # of nine rows
        {"ceil_mode": 1},
    ):
        assert not is_taken(**refused), refused
    assert is_taken(x[:, :, :8], ceil_mode=True)
    with torch.autocast("cpu", torch.float16):
        assert not is_taken()
    with forward_ad.dual_level():
        assert not is_taken(forward_ad.make_dual(x, x))


def test_other_threads_go_on():
    """Python's lock is not held while a kernel runs."""
    import threading
    import time

    x, w = torch.randn(4096, 1024), torch.randn(1024, 1024)
    ticks, done = 0, threading.Event()

    def count():
        nonlocal ticks
        while not done.is_set():
            ticks += 1
            time.sleep(0.0005)

    thread = threading.Thread(target=count)
    thread.start()
    end = time.monotonic() + 0.5
    calls = 0
    while time.monotonic() < end:
        linear_relu(x, w)
        calls += 1
    done.set()
    thread.join()
    assert ticks > 2 * calls


def test_the_first_call_may_come_in_any_mode():
    """Whatever it is, later ones are quick."""
    code = """if True:
        import torch, fastnet
        x, w, b = torch.randn(4, 6), torch.randn(3, 6), torch.randn(3)
        with torch.inference_mode():
            fastnet.functional.linear_relu(x, w, b)
        assert fastnet._library.NODES.quick_linear_relu(x, w, b) is not None
    """
    subprocess.run([sys.executable, "-c", code], check=True)


def native_convolution(x, w, b):
    return F.max_pool2d(F.relu(F.conv2d(x, w, b, padding=1)), 2)


LAYERS = {  # fused, and native
    "linear_relu": (linear_relu, lambda x, w, b: F.relu(F.linear(x, w, b))),
    "linear": (linear, F.linear),
    "conv_relu_pool": (lambda *given: conv_relu_pool2d(*given, padding=1), native_convolution),
}


@pytest.mark.parametrize("nodes", [NODES, None], ids=["C++", "Python"])
@pytest.mark.parametrize("recorded", ["in the level", "before it"])
@pytest.mark.parametrize("op", LAYERS)
def test_tangents_of_gradients(op, recorded, nodes, monkeypatch):
    """Forward over reverse: only what comes after the op has a tangent."""
    monkeypatch.setattr(fastnet._library, "NODES", nodes)
    shapes = ((2, 3, 8, 8), (4, 3, 3, 3), (4,)) if "conv" in op else ((6, 20), (5, 20), (5,))
    given = [torch.randn(shape, dtype=torch.float64) for shape in shapes]
    fused, native = LAYERS[op]
    tangent = torch.randn_like(native(*given))

    def derivative(function):
        x, w, b = (t.clone().requires_grad_() for t in given)
        if recorded == "before it":
            output = function(x, w, b)
        with forward_ad.dual_level():
            if recorded == "in the level":
                output = function(x, w, b)
            by = forward_ad.make_dual(torch.ones_like(tangent), tangent)
            gradients = torch.autograd.grad(output, (x, w, b), by)
            return [forward_ad.unpack_dual(gradient).tangent for gradient in gradients]

    torch.testing.assert_close(derivative(fused), derivative(native))


LOSSES = {  # of a layer's logits
    "cross_entropy": lambda x, w, t: cross_entropy(F.linear(x, w), t),
    "linear_cross_entropy": linear_cross_entropy,
}


@pytest.mark.parametrize("nodes", [NODES, None], ids=["C++", "Python"])
@pytest.mark.parametrize("rows", [6, 4000])  # the latter is fused in Python, too
@pytest.mark.parametrize("op", LOSSES)
def test_batched_gradients_of_a_loss(op, rows, nodes, monkeypatch):
    monkeypatch.setattr(fastnet._library, "NODES", nodes)
    x, w = torch.randn(rows, 5, requires_grad=True), torch.randn(5, 5)
    target, by = torch.arange(rows) % 5, torch.tensor([1.0, 2.0])

    def gradient(function):
        return torch.autograd.grad(function(x, w, target), x, by, is_grads_batched=True)

    native = gradient(lambda x, w, t: F.cross_entropy(F.linear(x, w), t))
    torch.testing.assert_close(gradient(LOSSES[op]), native)


ON_META = {
    "bias": lambda x, w, _: linear_relu(x, w, torch.empty(300, device="meta")),
    "target": lambda x, _, target: cross_entropy(x, target),
    "target of a layer": linear_cross_entropy,
}


@pytest.mark.parametrize("case", ON_META)
def test_what_is_on_meta_is_refused_as_in_torch(case):
    x, w = torch.randn(64, 400), torch.randn(300, 400)
    target = torch.zeros(64, dtype=torch.int64, device="meta")
    with pytest.raises(RuntimeError, match="meta"):
        ON_META[case](x, w, target)
