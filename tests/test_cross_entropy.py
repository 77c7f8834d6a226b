from __future__ import annotations

import copy
import functools
import itertools
import math
import sys

import pytest
import torch
import torch.nn.functional as F
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from support import (
    TOLERANCES,
    assert_kernel_stops,
    assert_near,
    peak_memory,
    run_on_isa,
    threads,
)

import fastnet
from fastnet.functional import cross_entropy
from fastnet.ops.cross_entropy import REDUCTIONS, accumulate_dtype

SHAPES = [
    (64, 10),  # the document networks' losses
    (256, 10),
    (32, 1000),
    (10,),  # one row: no batch dimension
    (1, 1),  # one class: the loss is 0
    (5, 2),
    (70, 7),  # narrower than a vector, and more rows than a tile of the CPU kernels
    (37, 128),  # as many classes as a tile has, and rows that do not fill one
    (37, 129),  # just past the kernels for few classes
    (3, 33),  # few classes, but too few rows for a tile
    (4, 8, 3),  # positions behind the classes, fewer than a vector
    (2, 21, 9, 11),  # a segmentation: vectors along the positions, the last one reaching back
    (2, 70, 130),  # more classes than a block of them, more positions than a chunk
    (3, 5, 2, 1, 3),  # several dimensions, one of them 1
    (2, 5000),  # several blocks of classes; not a multiple of any vector
    (1, 40_000),  # on CUDA several blocks share a row
]
OPTIONS = [
    dict(zip(("reduction", "weight", "label_smoothing", "probabilities"), values, strict=True))
    for values in itertools.product(REDUCTIONS, [False, True], [0.0, 0.1], [False, True])
]


@pytest.fixture(autouse=True)
def _kernels_at_any_size(request, monkeypatch):
    if "routing" not in request.node.name:
        monkeypatch.setattr("fastnet.functional.SMALL_LOGITS", 0)
        monkeypatch.setattr("fastnet.functional.SMALL_LOGITS_FORWARD", 0)


def class_dim(shape) -> int:
    return 0 if len(shape) == 1 else 1


def sample(shape, dtype, device="cpu", *, weight=False, probabilities=False, scale=3.0, **_):
    """Logits, target and class weights."""
    dim = class_dim(shape)
    C = shape[dim]
    logits = (scale * torch.randn(shape, device=device)).to(dtype).requires_grad_()
    if probabilities:
        target = torch.randn(shape, device=device).softmax(dim).to(dtype)
    else:
        target = torch.randint(C, shape[:dim] + shape[dim + 1 :], device=device)
        if target.dim():
            target.view(-1)[2::5] = -100
    return logits, target, torch.rand(C, device=device).to(dtype) if weight else None


def to_double(*tensors):
    return [
        None if t is None else t.detach().cpu().double() if t.is_floating_point() else t.cpu()
        for t in tensors
    ]


def reference(logits, target, weight, grad=None, **options):
    """The loss and the logits' gradient in float64, from torch's own operators."""
    x, t, w = to_double(logits, target, weight)
    loss = F.cross_entropy(x.requires_grad_(), t, w, **options)
    grad = torch.ones_like(loss) if grad is None else grad.detach().cpu().double()
    return loss.detach(), torch.autograd.grad(loss, x, grad)[0]


def check(logits, target, weight, dtype, **options):
    loss = cross_entropy(logits, target, weight, **options)
    grad = torch.rand(loss.shape, device=loss.device).to(loss.dtype) + 0.5
    (gradient,) = torch.autograd.grad(loss, logits, grad)
    assert loss.dtype == gradient.dtype == dtype
    expected, expected_gradient = reference(logits, target, weight, grad, **options)
    assert_near(loss, expected, dtype)
    # Of a sure row the gradient is about 0, and what is left is the rounding of p.
    size = max(expected_gradient.abs().max().item(), 0.1)
    error = (gradient.detach().cpu().double() - expected_gradient).abs().max().item()
    assert error <= TOLERANCES[dtype] * size, f"gradient off by {error:.3g} of {size:.3g}"


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_matches_float64(shape, device):
    if device.name == "emulated" and math.prod(shape) > 20_000:
        shape = (*shape[:-1], 3000) if len(shape) == 2 else (1, *shape[1:])  # quicker
    for dtype in device.dtypes:
        for options in OPTIONS:
            inputs = sample(shape, dtype, device, **options)
            check(*inputs, dtype, reduction=options["reduction"],
                  label_smoothing=options["label_smoothing"])  # fmt: skip


@pytest.mark.parametrize("C", [*range(1, 71), 1000, 1024, 1025, 2048, 2049, 4100])
def test_every_class_count(C, device):
    for dtype in device.dtypes:
        check(*sample((3, C), dtype, device), dtype)
    check(*sample((20, C), torch.float32, device), torch.float32)
    check(*sample((2, C, 17), torch.float32, device), torch.float32)


@pytest.mark.parametrize("C", [32_000, 131_072])
def test_very_many_classes(C, device):
    rows = 1 if device.name == "emulated" else 3
    for dtype in (torch.float32, torch.bfloat16):
        check(*sample((rows, C), dtype, device), dtype)


def lay_out(tensor, layout):
    """The same values, otherwise laid out in memory."""
    if layout == "classes last":
        return (
            tensor.movedim(class_dim(tensor.shape), -1)
            .contiguous()
            .movedim(-1, class_dim(tensor.shape))
        )
    if layout == "reversed":
        return (
            tensor.permute(*reversed(range(tensor.dim())))
            .contiguous()
            .permute(*reversed(range(tensor.dim())))
        )
    if layout == "strided":
        return torch.stack([tensor, tensor], dim=-1)[..., 0]
    if layout == "offset":
        return torch.cat([tensor.new_zeros(1), tensor.reshape(-1)])[1:].view(tensor.shape)
    if layout == "expanded":
        return tensor[:1].expand(tensor.shape)
    return tensor


LAYOUTS = ["dense", "classes last", "reversed", "strided", "offset", "expanded"]


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture])  # the device stays as it is
@given(
    N=st.integers(1, 40),
    C=st.integers(1, 140),
    positions=st.lists(st.integers(1, 7), max_size=3),
    dtype=st.sampled_from([torch.float32, torch.float64, torch.bfloat16]),
    options=st.sampled_from(OPTIONS),
    layouts=st.tuples(st.sampled_from(LAYOUTS), st.sampled_from(LAYOUTS)),
)
def test_any_shape_and_strides(device, N, C, positions, dtype, options, layouts):
    logits, target, weight = sample((N, C, *positions), dtype, device, **options)
    logits = lay_out(logits.detach(), layouts[0]).requires_grad_()
    if target.shape == logits.shape or layouts[1] != "classes last":
        target = lay_out(target, layouts[1])
    check(logits, target, weight, dtype, reduction=options["reduction"],
          label_smoothing=options["label_smoothing"])  # fmt: skip


@pytest.mark.parametrize("layout", LAYOUTS)
def test_gradient_has_the_layout_of_the_logits(layout, device):
    logits = lay_out(torch.randn(4, 5, 3, 2, device=device), layout).requires_grad_()
    target = torch.randint(5, (4, 3, 2), device=device)
    (gradient,) = torch.autograd.grad(cross_entropy(logits, target), logits)
    assert gradient.stride() == torch.empty_like(logits).stride()


# -------------------------------------------------------------------------------------------------
# torch's own samples


def torchs_own(database: str, is_wanted):
    """An entry of torch.testing._internal, which needs more than torch does."""
    pytest.importorskip("expecttest")
    from torch.testing._internal import common_methods_invocations, common_modules

    entries = {"ops": common_methods_invocations.op_db, "modules": common_modules.module_db}
    return next(entry for entry in entries[database] if is_wanted(entry))


def assert_same(actual, expected, leaf_pairs, dtype):
    """Losses of any reduction, and their gradients with respect to pairs of leaves."""
    assert actual.dtype == expected.dtype
    rtol, atol = (4e-2, 4e-2) if dtype is torch.bfloat16 else (1e-5, 1e-5)
    torch.testing.assert_close(actual, expected, rtol=rtol, atol=atol, equal_nan=True)
    for got, wanted in leaf_pairs:
        (g,) = torch.autograd.grad(actual.sum(), got, retain_graph=True)
        (w,) = torch.autograd.grad(expected.sum(), wanted, retain_graph=True)
        torch.testing.assert_close(g, w, rtol=rtol, atol=atol, equal_nan=True)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
def test_samples_of_the_operator(dtype, device):
    op = torchs_own("ops", lambda op: op.name == "nn.functional.cross_entropy")
    samples = list(op.sample_inputs(str(device), dtype, requires_grad=True))
    assert len(samples) >= 20
    for s in samples:
        actual = cross_entropy(s.input, *s.args, **s.kwargs)
        expected = F.cross_entropy(s.input, *s.args, **s.kwargs)
        leaves = [t for t in (s.input, *s.args) if t.requires_grad]
        assert_same(actual, expected, [(t, t) for t in leaves], dtype)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
def test_samples_of_the_module(dtype, device):
    module = torchs_own("modules", lambda m: m.module_cls is torch.nn.CrossEntropyLoss)
    samples = module.module_inputs_func(
        module, device=str(device), dtype=dtype, requires_grad=True, training=True
    )
    assert len(samples) >= 10
    for s in samples:
        made = s.constructor_input
        fused = fastnet.CrossEntropyLoss(*made.args, **made.kwargs)
        native = torch.nn.CrossEntropyLoss(*made.args, **made.kwargs)
        inputs = s.forward_input
        actual = fused(*inputs.args, **inputs.kwargs)
        expected = native(*inputs.args, **inputs.kwargs)
        assert_same(actual, expected, [(inputs.args[0], inputs.args[0])], dtype)


# -------------------------------------------------------------------------------------------------
# What must be true of any loss


@pytest.mark.parametrize("shape", [(40, 10), (9, 300), (2, 12, 40)], ids=str)
def test_loss_is_positive_and_gradients_sum_to_zero(shape, device):
    logits, target, _ = sample(shape, torch.float32, device)
    loss = cross_entropy(logits, target, reduction="none")
    assert (loss >= 0).all()
    (gradient,) = torch.autograd.grad(loss.sum(), logits)
    assert gradient.sum(1).abs().max() < 1e-5


def test_ignored_rows_have_no_loss_and_no_gradient(device):
    logits, target, _ = sample((40, 300), torch.float32, device)
    loss = cross_entropy(logits, target, reduction="none")
    (gradient,) = torch.autograd.grad(loss.sum(), logits)
    ignored = target == -100
    assert ignored.any()
    assert not loss[ignored].any()
    assert not gradient[ignored].any()


@pytest.mark.parametrize("shape", [(20, 10), (5, 3000), (2, 12, 40)], ids=str)
def test_a_shift_of_all_logits_changes_nothing(shape, device):
    # Multiples of 1/8 below 64, shifted by multiples of 1024: float32 holds the sums exactly.
    logits = (torch.randint(-256, 257, shape, device=device) / 8).requires_grad_()
    target = torch.randint(shape[1], (shape[0], *shape[2:]), device=device)
    results = []
    for shift in (0, 1024, -8192):
        loss = cross_entropy(logits + shift, target, reduction="none")
        results.append((loss.detach(), torch.autograd.grad(loss.sum(), logits)[0]))
    for loss, gradient in results[1:]:
        torch.testing.assert_close(loss, results[0][0], rtol=0, atol=0)
        torch.testing.assert_close(gradient, results[0][1], rtol=0, atol=0)


@pytest.mark.parametrize("shape", [(20, 10), (5, 300), (5, 5000), (2, 12, 40)], ids=str)
@pytest.mark.parametrize("centre", [1e4, -1e4, 0.0])
def test_large_logits(shape, centre, device):
    """Their log-sum-exp in float32 alone would leave three digits of the gradient."""
    for dtype in (torch.float32, torch.float64):
        logits, target, weight = sample(shape, dtype, device, weight=True)
        logits = (logits.detach() + centre).requires_grad_()
        check(logits, target, weight, dtype)
        check(logits, target, weight, dtype, label_smoothing=0.2)
        spread = sample(shape, dtype, device, scale=1e4)
        check(*spread, dtype, reduction="none")


def hostile(shape):
    """Logits with what softmax chokes on, by name; rows of their own for each."""
    torch.manual_seed(1)
    inf, nan = float("inf"), float("nan")
    C = shape[1]
    for name, values in {
        "-inf beside": {0: -inf},
        "-inf at the target": {1: -inf},
        "all but one -inf": dict.fromkeys(range(C - 1), -inf),
        "all -inf": dict.fromkeys(range(C), -inf),
        "the first half -inf, the rest far down": {
            **dict.fromkeys(range(C // 2), -inf), **{c: -1000.0 - c for c in range(C // 2, C)}
        },
        "inf": {2: inf},
        "two inf": {1: inf, 2: inf},
        "nan": {C - 1: nan},
        "nan and inf": {0: nan, 1: inf},
        "all nan": dict.fromkeys(range(C), nan),
        "nan among -inf": {**dict.fromkeys(range(C), -inf), 1: nan},
        "largest": {1: 3e38, 2: -3e38},
    }.items():  # fmt: skip
        logits = torch.randn(shape)
        for c, value in values.items():
            logits[0, c] = value
        yield name, logits


@pytest.mark.parametrize("shape", [(2, 10), (2, 70), (2, 4200), (2, 40, 17)], ids=str)
@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_nan_and_infinity_pass_as_in_torch(shape, smoothing, device):
    rows = (shape[0], *shape[2:])
    for name, values in hostile(shape):
        targets = {
            "classes": torch.ones(rows, dtype=torch.int64),
            "ignored": torch.full(rows, -100),
            "probabilities": torch.rand(shape).softmax(1),
        }
        for kind, target in targets.items():
            results = []
            for function, where in ((F.cross_entropy, "cpu"), (cross_entropy, str(device))):
                logits = values.to(where).requires_grad_()
                loss = function(
                    logits, target.to(where), reduction="none", label_smoothing=smoothing
                )
                results.append((loss.cpu(), torch.autograd.grad(loss.sum(), logits)[0].cpu()))
            for actual, expected in zip(results[1], results[0], strict=True):
                torch.testing.assert_close(
                    actual, expected, equal_nan=True, rtol=1e-4, atol=1e-5,
                    msg=functools.partial("{}, {}: {}".format, name, kind),
                )  # fmt: skip


@pytest.mark.parametrize("C", [2048, 4104], ids=str)
def test_every_place_of_a_pack(C, device):
    """Kernels that take several logits at once: the class, NaN and -inf in each of them, where all
    packs of a thread are there and where the last ones are not."""
    places = [*range(16), *range(C - 16, C)]
    rows, columns = torch.arange(len(places)), torch.tensor(places)
    for dtype in device.dtypes:
        plain = torch.randn(len(places), C).to(dtype)
        check(plain.to(device).requires_grad_(), columns.to(device), None, dtype)
        for value, spoils in ((math.nan, True), (-math.inf, False)):
            logits = plain.clone()
            logits[rows, columns] = value
            logits = logits.to(device).requires_grad_()
            target = (columns + 1).remainder(C).to(device)
            loss = cross_entropy(logits, target, reduction="none")
            (gradient,) = torch.autograd.grad(loss.sum(), logits)
            at = gradient.cpu()[rows, columns]
            assert loss.isnan().all() if spoils else loss.isfinite().all()
            assert at.isnan().all() if spoils else not at.any()


def test_nothing_counts(device):
    """As in torch: the mean of nothing is NaN, its gradient is not."""
    logits = torch.randn(4, 6, device=device, requires_grad=True)
    ignored = torch.full((4,), -100, device=device)
    loss = cross_entropy(logits, ignored)
    assert loss.isnan()
    assert not torch.autograd.grad(loss, logits)[0].any()
    assert cross_entropy(logits, ignored, reduction="sum") == 0
    weightless = cross_entropy(logits, torch.ones_like(ignored), torch.zeros(6, device=device))
    assert weightless.isnan()
    assert torch.autograd.grad(weightless, logits)[0].isnan().all()


@pytest.mark.parametrize("shape", [(0, 5), (0, 5, 3), (2, 5, 0)], ids=str)
@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_empty_batches(shape, reduction, device):
    logits = torch.randn(shape, device=device, requires_grad=True)
    target = torch.zeros(shape[:1] + shape[2:], dtype=torch.int64, device=device)
    expected = F.cross_entropy(logits, target, reduction=reduction)
    actual = cross_entropy(logits, target, reduction=reduction)
    torch.testing.assert_close(actual, expected, equal_nan=True)
    # And the raw ops by themselves.
    loss, statistics = device.ops.cross_entropy_forward(
        logits.detach(), target, None, REDUCTIONS[reduction], -100, 0.0
    )
    torch.testing.assert_close(loss, expected.detach(), equal_nan=True)
    gradient = device.ops.cross_entropy_backward(
        torch.ones_like(loss), logits.detach(), target, None, statistics, REDUCTIONS[reduction],
        -100, 0.0,
    )  # fmt: skip
    assert gradient.shape == shape


def test_exponentials_and_logarithms_are_good_to_2_ulp():
    """Through the raw ops: with m = 0, log Σ = 0 and Σ q = 1 given, and probabilities of 0, the
    gradient is exp(x); of C equal logits the log-sum is log C."""
    ranges = ((torch.float32, -87.3, 88.3, 23), (torch.float64, -708, 709, 52))
    for dtype, low, high, digits in ranges:
        x = torch.linspace(low, high, 200_001, dtype=torch.float64).to(dtype).view(-1, 3)
        rows = len(x)
        statistics = torch.zeros(3 * rows + 1, dtype=dtype)
        statistics[2 * rows : 3 * rows] = 1
        actual = torch.ops.fastnet.cross_entropy_backward(
            torch.ones((), dtype=dtype), x, torch.zeros_like(x), None, statistics, 2, -100, 0.0
        )
        # float64's own exp, which is good to 1 ulp of its own.
        expected = x.double().exp()
        allowed = 2.0 if dtype is torch.float32 else 3.0
        ulp = torch.exp2(expected.log2().floor() - digits)
        assert ((actual.double() - expected).abs() / ulp).max() <= allowed
        for C in [*range(1, 100), 1000, 5000]:
            logits = torch.full((1, C), -3.25, dtype=dtype)
            _, statistics = torch.ops.fastnet.cross_entropy_forward(
                logits, torch.zeros(1, dtype=torch.int64), None, 2, -100, 0.0
            )
            error = abs(statistics[1].item() - math.log(C))
            assert error <= allowed * 2.0 ** (math.frexp(math.log(C))[1] - 1 - digits), C


def test_inputs_are_not_written_to(device):
    for shape in ((20, 10), (3, 300), (2, 12, 40)):
        logits, target, weight = sample(shape, torch.float32, device, weight=True)
        before = [t.detach().clone() for t in (logits, target, weight)]
        cross_entropy(logits, target, weight, label_smoothing=0.1).backward()
        for old, new in zip(before, (logits, target, weight), strict=True):
            assert torch.equal(old, new)


@pytest.mark.parametrize("shape", [(70, 10), (5, 33), (3, 5000), (2, 12, 41)], ids=str)
def test_raw_backward_in_the_place_of_the_logits(shape, device):
    for dtype in device.dtypes:
        logits, target, _ = (t if t is None else t.detach() for t in sample(shape, dtype, device))
        options = (1, -100, 0.1)
        loss, statistics = device.ops.cross_entropy_forward(logits, target, None, *options)
        arguments = (torch.ones_like(loss), logits, target, None, statistics, *options)
        expected = device.ops.cross_entropy_backward(*arguments)
        device.ops.cross_entropy_backward(*arguments, out=logits)
        # What goes by columns otherwise goes by rows here; a compiler may fuse either's additions.
        assert_near(logits, expected.double(), dtype)


# Around a vector, around a block of 2,048 classes, and more blocks than a row keeps notes of.
@pytest.mark.parametrize(
    "C", [1, 7, 32, 33, 40, 47, 1000, 2047, 2048, 2049, 2055, 2056, 5000, 131_072, 140_000]
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
def test_gradient_with_the_loss(C, dtype):
    logits = (4 * torch.randn(5, C)).to(dtype)
    logits[1] *= 1000
    logits[2] = torch.linspace(-50, 50, C)  # the maximum rises with every block
    logits[3, : C // 2] = -math.inf
    target = torch.tensor([0, C - 1, C // 2, C - 1, -100])
    wide = logits.double().requires_grad_()
    for weight in (None, torch.rand(C).to(accumulate_dtype(dtype))):
        for reduction in ("mean", "sum"):
            expected = F.cross_entropy(
                wide, target, None if weight is None else weight.double(), reduction=reduction
            )
            (of_logits,) = torch.autograd.grad(expected, wide)
            loss, gradient = torch.ops.fastnet.cross_entropy_with_gradient(
                logits, target, weight, REDUCTIONS[reduction], -100, 0.0
            )
            close = {"rtol": 1e-4, "atol": 1e-6}
            torch.testing.assert_close(loss, expected.to(loss.dtype), **close)
            close = {"rtol": 1e-2, "atol": 1e-4} if dtype is torch.bfloat16 else close
            torch.testing.assert_close(gradient, of_logits.to(dtype), **close)


@pytest.mark.parametrize(
    "options", [o for o in OPTIONS if o["reduction"] != "none"], ids=str
)  # fmt: skip
@pytest.mark.parametrize("shape", [(70, 10), (5, 300), (2, 12, 41), (3, 40, 5, 4), (6,)], ids=str)
def test_gradient_with_the_loss_in_every_variety(shape, options):
    reduction, smoothing = REDUCTIONS[options["reduction"]], options["label_smoothing"]
    inputs = sample(shape, torch.float32, **options)
    for layout in LAYOUTS if len(shape) == 4 else (None,):
        logits, target, weight = (None if t is None else t.detach() for t in inputs)
        logits = logits if layout is None else lay_out(logits, layout)
        arguments = (logits, target, weight)
        loss, statistics = torch.ops.fastnet.cross_entropy_forward(
            *arguments, reduction, -100, smoothing
        )
        gradient = torch.ops.fastnet.cross_entropy_backward(
            torch.ones(()), *arguments, statistics, reduction, -100, smoothing
        )
        at_once = torch.ops.fastnet.cross_entropy_with_gradient(
            *arguments, reduction, -100, smoothing
        )
        torch.testing.assert_close(at_once, (loss, gradient), check_stride=True)
        for memory in (torch.full_like(logits, 7.0), torch.full((*shape, 2), 7.0)[..., 0]):
            given = torch.ops.fastnet.cross_entropy_with_gradient(
                *arguments, reduction, -100, smoothing, out=memory
            )
            torch.testing.assert_close((given, memory), (loss, gradient), check_stride=False)


@pytest.mark.parametrize("bad", [math.inf, -math.inf, math.nan])
@pytest.mark.parametrize("C", [40, 5000])
def test_gradient_with_the_loss_of_infinite_logits(bad, C):
    for place in (0, C // 2, C - 1, slice(None), slice(0, C - 1)):
        logits = torch.randn(2, C)
        logits[0, place] = bad
        wide = logits.clone().requires_grad_()
        target = torch.tensor([1, 2])
        expected = F.cross_entropy(wide, target, reduction="sum")
        (of_logits,) = torch.autograd.grad(expected, wide)
        loss, gradient = torch.ops.fastnet.cross_entropy_with_gradient(
            logits, target, None, 2, -100, 0.0
        )
        torch.testing.assert_close(loss, expected.detach(), equal_nan=True)
        torch.testing.assert_close(gradient, of_logits, equal_nan=True)


@pytest.mark.usefixtures("nodes")
@pytest.mark.parametrize("shape", [(64, 10), (1024, 1000)], ids=str)  # in kept memory or not
def test_gradient_of_the_forward_pass_is_used_once(shape):
    logits, target, _ = sample(shape, torch.float32)
    (once,) = torch.autograd.grad(F.cross_entropy(logits, target), logits)
    close = {"rtol": 1e-4, "atol": 1e-9}

    loss = cross_entropy(logits, target)
    first, second = (torch.autograd.grad(loss, logits, retain_graph=True)[0] for _ in range(2))
    first.fill_(7)  # is nobody else's
    torch.testing.assert_close(second, once, **close)
    (last,) = torch.autograd.grad(loss, logits)
    torch.testing.assert_close(last, once, **close)

    # Scaled, while another loss of that shape waits for its own backward pass.
    others = sample(shape, torch.float32)[0]
    waiting = 5 * cross_entropy(others, target)
    (3 * cross_entropy(logits, target)).backward()
    torch.testing.assert_close(logits.grad, 3 * once, **close)
    waiting.backward()
    (of_others,) = torch.autograd.grad(F.cross_entropy(others, target), others)
    torch.testing.assert_close(others.grad, 5 * of_others, **close)
    torch.testing.assert_close(logits.grad, 3 * once, **close)
    torch.testing.assert_close(last, once, **close)
    (cross_entropy(logits, target) - 2 * cross_entropy(logits, target)).backward()
    torch.testing.assert_close(logits.grad, 2 * once, **close)

    # Differentiated, and used thereafter.
    loss = cross_entropy(logits, target)
    (gradient,) = torch.autograd.grad(loss, logits, create_graph=True)
    assert gradient.requires_grad
    torch.testing.assert_close(gradient, once, **close)
    torch.testing.assert_close(torch.autograd.grad(loss, logits)[0], once, **close)


@pytest.mark.usefixtures("nodes")
@pytest.mark.parametrize("shape", [(2000, 10), (1024, 1000)], ids=str)
def test_a_gradient_that_is_not_finite_leaves_ignored_rows_alone(shape):
    logits, target, _ = sample(shape, torch.float32)
    target[:5] = -100
    for factor in (math.inf, math.nan):
        actual, expected = (
            torch.autograd.grad(factor * loss(logits, target), logits)[0]
            for loss in (cross_entropy, F.cross_entropy)
        )
        assert (expected[:5] == 0).all()
        torch.testing.assert_close(actual, expected, equal_nan=True)
        assert not actual.requires_grad


@pytest.mark.usefixtures("nodes")
@pytest.mark.parametrize("shape", [(2000, 10), (1024, 1000)], ids=str)
def test_traced_steps(shape):
    """make_fx records what is called, and must not find a number or a kept gradient in it."""
    from torch.fx.experimental.proxy_tensor import make_fx

    logits, target, _ = sample(shape, torch.float32)
    cross_entropy(logits, target).backward()

    def step(logits, target, factor):
        return torch.autograd.grad(factor * cross_entropy(logits, target), logits)

    for mode in ("real", "fake"):
        traced = make_fx(step, tracing_mode=mode)(logits, target, torch.tensor(2.0))
        for factor in (torch.tensor(1.0), torch.tensor(3.0)):
            (expected,) = torch.autograd.grad(factor * F.cross_entropy(logits, target), logits)
            torch.testing.assert_close(traced(logits, target, factor)[0], expected)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_large_logits_of_every_kind(dtype, reduction):
    logits, target, _ = sample((600, 2000), dtype)
    wide = logits.detach().float().requires_grad_()
    for _ in range(2):  # in new memory, and in that
        loss = cross_entropy(logits, target, reduction=reduction)
        expected = F.cross_entropy(wide, target, reduction=reduction)
        grad = torch.rand_like(expected)
        (actual,) = torch.autograd.grad(loss, logits, grad.to(loss.dtype))
        (of_logits,) = torch.autograd.grad(expected, wide, grad)
        torch.testing.assert_close(actual, of_logits.to(dtype), rtol=2e-2, atol=1e-5)
    target[3] = 2000
    with pytest.raises(IndexError, match="target 2000 at position 3"):
        cross_entropy(logits, target, reduction=reduction)


@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_changed_logits_are_noticed_where_they_are_read(reduction, device):
    logits, target, _ = sample((20, 10), torch.float32, device)
    logits.requires_grad_()
    (expected,) = torch.autograd.grad(
        cross_entropy(logits, target, reduction=reduction).sum(), logits
    )
    # With the loss; the node in Python reads all that it has saved, even so.
    is_made = device.name == "cpu" and reduction == "mean" and fastnet._library.NODES is not None
    for changed, factor in itertools.product((0, 1), (1.0, 2.0, float("inf"))):
        hidden, labels = logits * 1, target.clone()
        loss = cross_entropy(hidden, labels, reduction=reduction).sum()
        (hidden, labels)[changed].mul_(0)
        weight = torch.tensor(factor, device=logits.device)
        if is_made and (factor == 1 or (factor == 2 and changed == 0)):
            (actual,) = torch.autograd.grad(loss, logits, weight)
            torch.testing.assert_close(actual, factor * expected)
        else:
            with pytest.raises(RuntimeError, match="modified by an inplace operation"):
                torch.autograd.grad(loss, logits, weight)


@pytest.mark.parametrize("shape", [(5000, 10), (100, 1000), (8, 21, 33, 31)], ids=str)
def test_same_bits_every_time_and_on_any_number_of_threads(shape, device):
    if device.name == "emulated":
        shape = (shape[0] // 4, *shape[1:])
    logits, target, weight = sample(shape, torch.float32, device, weight=True)

    def run():
        loss = cross_entropy(logits, target, weight, label_smoothing=0.1)
        return [loss.detach(), *torch.autograd.grad(loss, logits)]

    first = run()
    for again in (run() for _ in range(5 if device.name == "cpu" else 1)):
        assert all(map(torch.equal, first, again))
    with threads(1):
        assert all(map(torch.equal, first, run()))


# -------------------------------------------------------------------------------------------------
# torch's machinery


CASES = {
    "classes": {"shape": (5, 4)},
    "weight, smoothing": {"shape": (5, 4), "weight": True, "smoothing": 0.2},
    "probabilities": {"shape": (5, 4), "probabilities": True, "weight": True, "smoothing": 0.2},
    "positions": {"shape": (2, 4, 3, 2)},
    "sum": {"shape": (5, 4), "reduction": "sum"},
    "none": {"shape": (2, 4, 3), "reduction": "none", "weight": True},
    "one row": {"shape": (4,)},
}


def case(name, device):
    """A function of the logits alone, and float64 logits."""
    options = {"weight": False, "probabilities": False, "smoothing": 0.0, "reduction": "mean",
               **CASES[name]}  # fmt: skip
    logits, target, weight = sample(
        options["shape"], torch.float64, device, weight=options["weight"],
        probabilities=options["probabilities"],
    )  # fmt: skip

    def function(x, loss=cross_entropy):
        return loss(x, target, weight, reduction=options["reduction"],
                    label_smoothing=options["smoothing"])  # fmt: skip

    return function, logits


@pytest.mark.parametrize("name", CASES)
def test_gradcheck(name, device):
    function, logits = case(name, device)
    assert torch.autograd.gradcheck(function, logits)


@pytest.mark.parametrize("name", CASES)
def test_gradgradcheck(name, device):
    function, logits = case(name, device)
    assert torch.autograd.gradgradcheck(function, logits)


def test_hooks_run_once_under_create_graph(device):
    function, logits = case("classes", device)
    logits.register_hook(lambda gradient: 2 * gradient)
    actual, expected = (
        torch.autograd.grad(function(logits, loss), logits, create_graph=True)[0]
        for loss in (cross_entropy, F.cross_entropy)
    )
    torch.testing.assert_close(actual, expected)


def test_forward_mode():
    function, logits = case("classes", "cpu")
    assert torch.autograd.gradcheck(function, logits, check_forward_ad=True)


def test_batched_gradients(device):
    function, logits = case("none", device)
    grads = torch.randn(3, 2, 3, dtype=torch.float64, device=device)
    actual, expected = (
        torch.autograd.grad(function(logits, loss), logits, grads, is_grads_batched=True)
        for loss in (cross_entropy, F.cross_entropy)
    )
    torch.testing.assert_close(actual, expected)


@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_opcheck(options, device):
    for shape in ((5, 4), (2, 4, 3), (4,)):
        inputs = sample(shape, torch.float64, device, **options)
        logits, target, weight = (None if t is None else t.detach() for t in inputs)
        rest = (REDUCTIONS[options["reduction"]], -100, options["label_smoothing"])
        torch.library.opcheck(
            device.ops.cross_entropy_forward.default, (logits, target, weight, *rest)
        )
        loss, statistics = device.ops.cross_entropy_forward(logits, target, weight, *rest)
        backward = (torch.rand_like(loss), logits, target, weight, statistics, *rest)
        torch.library.opcheck(device.ops.cross_entropy_backward.default, backward)
        torch.library.opcheck(
            device.ops.cross_entropy_backward.out, backward, {"out": torch.empty_like(logits)}
        )
        if options["reduction"] == "none":
            continue
        forward = (logits, target, weight, *rest)
        torch.library.opcheck(device.ops.cross_entropy_with_gradient.default, forward)
        if device.name == "cpu":
            torch.library.opcheck(
                device.ops.cross_entropy_with_gradient.out,
                forward,
                {"out": torch.empty_like(logits)},
            )


def on_cuda(device) -> None:
    if device.name == "cpu":
        pytest.skip("the CUDA kernels'")


# Whole rows in shared memory: of one turn of the block's threads and of several, the last of them
# not full; and those that are made in two passes: odd, with room for no row, positions.
@pytest.mark.parametrize("shape", [(7, 16), (3, 1000), (2, 4104), (2, 7000), (2, 12_000), (3, 33),
                                   (1, 131_072), (2, 8, 3)], ids=str)  # fmt: skip
@pytest.mark.parametrize("reduction", ["mean", "sum"])
@pytest.mark.parametrize("weighted", [False, True], ids=["", "weight"])
def test_gradient_along_with_the_loss_on_cuda(shape, reduction, weighted, device):
    on_cuda(device)
    for dtype in device.dtypes:
        logits, target, weight = sample(shape, dtype, device, weight=weighted)
        wide = accumulate_dtype(dtype)
        kept = logits.detach().clone()
        loss, gradient = device.ops.cross_entropy_with_gradient(
            logits.detach(), target, None if weight is None else weight.to(wide),
            REDUCTIONS[reduction], -100, 0.0,
        )  # fmt: skip
        assert torch.equal(logits, kept)
        assert loss.dtype is wide
        assert gradient.dtype is dtype
        assert gradient.stride() == torch.empty_like(kept).stride()
        expected, of_logits = reference(logits, target, weight, reduction=reduction)
        assert_near(loss, expected, dtype)
        size = max(of_logits.abs().max().item(), 0.1)
        assert (gradient.cpu().double() - of_logits).abs().max().item() <= TOLERANCES[dtype] * size


def test_gradient_along_with_the_loss_of_hostile_logits_on_cuda(device):
    on_cuda(device)
    logits = torch.randn(6, 64, device=device)
    logits[0, 3], logits[1, 5], logits[2], logits[3, :7] = torch.nan, torch.inf, 1e4, -torch.inf
    target = torch.tensor([1, 5, 6, 9, -100, 2], device=device)
    for ignored in (target, torch.full_like(target, -100)):  # the mean over nothing is NaN
        statistics = device.ops.cross_entropy_forward(logits, ignored, None, 1, -100, 0.0)
        one = torch.ones((), device=device)
        expected = device.ops.cross_entropy_backward(
            one, logits, ignored, None, statistics[1], 1, -100, 0.0
        )
        loss, gradient = device.ops.cross_entropy_with_gradient(logits, ignored, None, 1, -100, 0.0)
        torch.testing.assert_close(loss, statistics[0], equal_nan=True, rtol=0, atol=0)
        torch.testing.assert_close(gradient, expected, equal_nan=True, rtol=0, atol=0)


@pytest.mark.parametrize("C", [64, 65])
def test_gradient_times_a_factor_on_cuda(C, device):
    on_cuda(device)
    target = torch.tensor([0, -100, 2], device=device)
    for dtype in device.dtypes:
        wide = accumulate_dtype(dtype)
        gradient = torch.randn(3, C, device=device).to(dtype)
        gradient[1] = 0
        for factor in (1, 0.25, 0, 3, math.inf, -math.inf, math.nan):
            scaled = gradient.clone()
            by = torch.tensor(factor, dtype=wide, device=device)
            device.ops.cross_entropy_scale(scaled, by, target, -100)
            expected = (gradient.to(wide) * by).to(dtype)
            expected[1] = 0
            if not math.isfinite(factor):
                expected[0, 0] = expected[2, 2] = math.nan
            assert torch.equal(scaled.nan_to_num(7), expected.nan_to_num(7))


@pytest.mark.parametrize("grad", [1, 0.5, math.inf])
def test_autograd_with_the_gradient_made_along_on_cuda(grad, device, monkeypatch):
    """As of large logits: retained graphs, second derivatives, a batch of gradients."""
    on_cuda(device)
    module = fastnet.ops.cross_entropy
    monkeypatch.setattr(fastnet._library, "NODES", None)
    monkeypatch.setattr(module, "_makes_gradient", lambda *_: True)
    monkeypatch.setattr(module, "_with_gradient", device.ops.cross_entropy_with_gradient.default)
    logits, target, _ = sample((5, 64), torch.float32, device)
    by = torch.tensor(float(grad), device=device)
    loss = cross_entropy(logits, target)
    if device.name == "emulated":  # tensors of the CPU, which gradient_of takes for its own
        with monkeypatch.context() as patch:
            patch.setattr(torch.Tensor, "is_cpu", False)
            results = [
                torch.autograd.grad(loss, logits, by, retain_graph=keep)[0]
                for keep in (True, False)
            ]
    else:
        results = [
            torch.autograd.grad(loss, logits, by, retain_graph=keep)[0] for keep in (True, False)
        ]
    _, expected = reference(logits, target, None, by)
    for result in results:
        assert_near(result, expected, torch.float32)
    assert not results[0][2].any()  # an ignored row
    loss = cross_entropy(logits, target)
    (first,) = torch.autograd.grad(loss, logits, create_graph=True)
    (second,) = torch.autograd.grad(first.square().sum(), logits)
    assert second.isfinite().all()
    grads = torch.rand(3, device=device)
    (batched,) = torch.autograd.grad(
        cross_entropy(logits, target), logits, grads, is_grads_batched=True
    )
    assert_near(batched, reference(logits, target, None)[1] * grads.cpu().view(3, 1, 1),
                torch.float32)  # fmt: skip


def test_large_logits_are_read_once_on_cuda(device):
    on_cuda(device)
    reads_once = device.ops.cross_entropy_reads_once
    target = torch.zeros(2**15, dtype=torch.int64, device=device)

    def rows(C, dtype):
        return torch.empty(1, C, dtype=dtype, device=device).expand(2**15, C)

    assert reads_once(rows(4096, torch.bfloat16), target, 0.0)
    assert reads_once(rows(1024, torch.float32), target, 0.0)
    for logits, smoothing in (
        (rows(1024, torch.bfloat16), 0.0),  # small
        (rows(4097, torch.bfloat16), 0.0),  # odd
        (rows(4096, torch.float16), 0.0),  # whose gradients vanish
        (rows(131_072, torch.bfloat16), 0.0),  # too long
        (rows(4096, torch.bfloat16), 0.1),
    ):
        assert not reads_once(logits, target, smoothing)


def test_opcheck_of_other_layouts(device):
    target = torch.randint(5, (4, 3, 2), device=device)
    for layout in LAYOUTS:
        logits = lay_out(torch.randn(4, 5, 3, 2, device=device), layout)
        loss, statistics = device.ops.cross_entropy_forward(logits, target, None, 1, -100, 0.0)
        torch.library.opcheck(
            device.ops.cross_entropy_backward.default,
            (torch.ones_like(loss), logits, target, None, statistics, 1, -100, 0.0),
        )


@pytest.mark.parametrize("dynamic", [False, True], ids=["static", "dynamic"])
@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_compile_without_graph_breaks(dynamic, reduction):
    torch._dynamo.reset()
    module = fastnet.CrossEntropyLoss(torch.rand(7), reduction=reduction, label_smoothing=0.1)
    compiled = torch.compile(module, fullgraph=True, dynamic=dynamic)
    for rows in (3, 8):
        logits, target, _ = sample((rows, 7), torch.float32)
        expected, actual = module(logits, target), compiled(logits, target)
        torch.testing.assert_close(actual, expected)
        torch.testing.assert_close(
            torch.autograd.grad(actual.square().sum(), logits),
            torch.autograd.grad(expected.square().sum(), logits),
        )


def test_export():
    module = fastnet.CrossEntropyLoss()
    inputs = (torch.randn(4, 6), torch.tensor([1, 2, 3, 0]))
    exported = torch.export.export(module, inputs).module()
    torch.testing.assert_close(exported(*inputs), module(*inputs))


def test_symbolic_trace():
    loss = torch.fx.symbolic_trace(fastnet.CrossEntropyLoss(label_smoothing=0.1))
    logits, target, _ = sample((6, 10), torch.float32)
    torch.testing.assert_close(
        loss(logits, target), F.cross_entropy(logits, target, label_smoothing=0.1)
    )


def functional_cases():
    from torch.func import grad, hessian, jvp, vmap

    def loss(f, x, t):
        return f(x, t).square().sum()

    return {
        "grad": lambda f, x, t: grad(loss, argnums=1)(f, x, t),
        "per-sample grad": lambda f, x, t: vmap(grad(lambda row, y: f(row, y)))(x, t),
        "hessian": lambda f, x, t: hessian(lambda v: f(v, t))(x),
        "jvp": lambda f, x, t: jvp(lambda v: f(v, t), (x,), (torch.ones_like(x),)),
        "compiled grad": lambda f, x, t: torch.compile(
            lambda v: grad(lambda u: f(u, t))(v), fullgraph=True
        )(x),
    }


@pytest.mark.parametrize("name", functional_cases())
def test_torch_func(name):
    logits, target, _ = sample((4, 6), torch.float64)
    run = functional_cases()[name]
    actual, expected = (
        run(f, logits.detach(), target.clamp(min=0)) for f in (cross_entropy, F.cross_entropy)
    )
    torch.testing.assert_close(actual, expected)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("probabilities", [False, True])
def test_autocast_gives_float32(dtype, probabilities, device):
    for logits_dtype in (torch.float32, dtype, torch.float64):
        logits, target, weight = sample(
            (8, 20), logits_dtype, device, weight=True, probabilities=probabilities
        )
        target = target.float() if probabilities else target
        weight = weight.to(torch.float64 if logits_dtype is torch.float64 else torch.float32)
        with torch.autocast(device, dtype=dtype):
            loss_dtype = F.cross_entropy(logits, target, weight).dtype
            actual = cross_entropy(logits, target, weight)
        assert actual.dtype == loss_dtype
        # On CUDA torch's own has rounded the logarithms to the logits' dtype.
        wide = target.to(loss_dtype) if probabilities else target
        expected = F.cross_entropy(logits.to(loss_dtype), wide, weight)
        torch.testing.assert_close(actual, expected)
        got, wanted = (torch.autograd.grad(loss, logits)[0] for loss in (actual, expected))
        assert got.dtype == logits_dtype
        torch.testing.assert_close(got, wanted, rtol=1e-2, atol=1e-5)


# -------------------------------------------------------------------------------------------------
# Inputs that the kernels do not take


@pytest.mark.parametrize("nodes", ["C++", "Python"])
def test_routing_of_small_logits(nodes, monkeypatch):
    """To whom nothing but a call's own cost matters, which is less with nodes in C++."""
    if nodes == "Python":
        monkeypatch.setattr(fastnet._library, "NODES", None)
    elif fastnet.build_info()["autograd"] == "Python":
        pytest.skip("this torch is not the one that fastnet was built with")
    for N, needs_gradient, fused in ((64, True, False), (2000, True, True), (64, False, False),
                                     (500, False, True)):  # fmt: skip
        fused = fused or nodes == "C++"
        logits, target, _ = sample((N, 10), torch.float32)
        logits.requires_grad_(needs_gradient)
        with torch.profiler.profile() as profile:
            loss = cross_entropy(logits, target)
        names = {event.key for event in profile.key_averages()}
        op = "with_gradient" if needs_gradient else "forward"
        assert (f"fastnet::cross_entropy_{op}" in names) == fused
        torch.testing.assert_close(loss, F.cross_entropy(logits, target))


def native_and_fused(*arguments, **options):
    outcomes = []
    for function in (F.cross_entropy, cross_entropy):
        try:
            outcomes.append(function(*arguments, **options))
        except Exception as error:  # which one is what is compared
            outcomes.append(error)
    return outcomes


LOGITS = torch.randn(3, 5)
LABELS = torch.tensor([1, 0, 4])


@pytest.mark.parametrize(
    ("arguments", "options"),
    [
        ((LOGITS.half(), LABELS), {}),
        ((LOGITS, LABELS.byte()), {}),
        ((LOGITS, LOGITS.softmax(1).double()), {}),
        ((LOGITS, LABELS), {"label_smoothing": -1.0}),  # torch takes this for none
        ((LOGITS[0], torch.tensor([1])), {}),  # one row, its target in a list
        ((LOGITS.to("meta"), LABELS.to("meta")), {}),
        ((LOGITS, LABELS), {"ignore_index": 4}),
        ((LOGITS, LABELS + 100), {"ignore_index": 104, "reduction": "none"}),
    ],
    ids=["float16", "uint8 target", "wider target", "negative smoothing", "target of one", "meta",
         "a class ignored", "rejected"],
)  # fmt: skip
def test_what_torch_takes_is_taken(arguments, options):
    expected, actual = native_and_fused(*arguments, **options)
    assert type(actual) is type(expected)
    if isinstance(expected, torch.Tensor):
        assert (actual.dtype, actual.shape) == (expected.dtype, expected.shape)
        if not expected.is_meta:
            torch.testing.assert_close(actual, expected)


@pytest.mark.parametrize(
    ("arguments", "options", "words"),
    [
        ((LOGITS, torch.tensor([1, 5, 0])), {}, "5"),
        ((LOGITS, torch.tensor([1, -1, 0])), {}, "-1"),
        ((LOGITS, torch.tensor([1, 0, 9])), {"label_smoothing": 0.1}, "9"),
        ((LOGITS, torch.tensor([1, 0])), {}, "3"),
        ((LOGITS, LABELS.int()), {}, "Int"),
        ((LOGITS, LABELS), {"label_smoothing": 2.0}, "2"),
        ((LOGITS, LABELS), {"reduction": "median"}, "median"),
        ((LOGITS, LABELS, torch.rand(5).double()), {}, "Double"),
        ((LOGITS, LABELS, torch.rand(4)), {}, "4"),
        ((LOGITS, LABELS, torch.rand(5, requires_grad=True)), {}, "weight"),
        ((LOGITS, LOGITS.softmax(1)), {"ignore_index": 2}, "ignore_index"),
        ((LOGITS, torch.ones(3, 5, dtype=torch.int64)), {}, "Long"),
        ((None, LABELS), {}, "NoneType"),
        ((LOGITS, [1, 2, 3]), {}, "list"),
        ((LOGITS, LABELS, [1.0] * 5), {}, "list"),
        ((LOGITS, LABELS), {"ignore_index": None}, "NoneType"),
        ((LOGITS, LABELS), {"ignore_index": True}, "bool"),
        ((LOGITS, LABELS), {"ignore_index": 1 << 70}, "Overflow"),
        ((LOGITS, LABELS), {"reduction": ["mean"]}, "mean"),
    ],
    ids=["class 5 of 5", "class -1", "smoothed", "batch", "int32 target", "smoothing", "reduction",
         "weight dtype", "weight size", "weight gradient", "ignored probability", "2-d labels",
         "no logits", "a list of labels", "a list of weights", "nothing ignored", "a truth ignored",
         "too large", "a list of words"],
)  # fmt: skip
def test_what_torch_rejects_is_rejected(arguments, options, words):
    expected, actual = native_and_fused(*arguments, **options)
    assert isinstance(expected, Exception)
    assert type(actual) is type(expected)
    assert words in str(actual)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"target": torch.tensor([1, 0])}, r"target \(2\) does not fit logits \(3, 5\)"),
        ({"target": LABELS.int()}, "Int"),
        ({"weight": torch.rand(4)}, r"weight must be \(5\).*but is \(4\)"),
        ({"weight": torch.rand(5).double()}, "weight is Double"),
        ({"reduction": 7}, "7"),
        ({"label_smoothing": 1.5}, "1.5"),
        ({"logits": torch.randn(3, 0)}, "no classes"),
        ({"logits": torch.randn(3, 5).half()}, "Half"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_raw_op_rejects(change, words):
    arguments = {"logits": LOGITS, "target": LABELS, "weight": None, "reduction": 1,
                 "ignore_index": -100, "label_smoothing": 0.0, **change}  # fmt: skip
    with pytest.raises(RuntimeError, match=words):
        torch.ops.fastnet.cross_entropy_forward(*arguments.values())


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"grad_loss": torch.ones(3)}, "must have 1 values"),
        ({"grad_loss": torch.ones((), dtype=torch.float64)}, "Double"),
        ({"statistics": torch.ones(6)}, "must have 7 values"),
        ({"out": torch.empty(3, 4)}, r"out \(3, 4\) does not fit"),
        ({"out": torch.empty(3, 5).double()}, "Double"),
        ({"target": torch.tensor([1, 0, 5])}, "target 5 at position 2"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_raw_backward_rejects(change, words):
    out = {"out": change.pop("out")} if "out" in change else {}
    arguments = {"grad_loss": torch.ones(()), "logits": LOGITS, "target": LABELS, "weight": None,
                 "statistics": torch.zeros(7), "reduction": 1, "ignore_index": -100,
                 "label_smoothing": 0.0, **change}  # fmt: skip
    with pytest.raises((RuntimeError, IndexError), match=words):
        torch.ops.fastnet.cross_entropy_backward(*arguments.values(), **out)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"reduction": 0}, "must be 1"),
        ({"out": LOGITS}, "in the logits' place"),
        ({"out": torch.empty(3, 4)}, r"out \(3, 4\) does not fit"),
        ({"target": torch.tensor([1, 0, 5])}, "target 5 at position 2"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_raw_op_with_gradient_rejects(change, words):
    memory = {"out": change.pop("out")} if "out" in change else {}
    arguments = {"logits": LOGITS, "target": LABELS, "weight": None, "reduction": 1,
                 "ignore_index": -100, "label_smoothing": 0.0, **change}  # fmt: skip
    with pytest.raises((RuntimeError, IndexError), match=words):
        torch.ops.fastnet.cross_entropy_with_gradient(*arguments.values(), **memory)


@pytest.mark.parametrize("shape", ["(3, 5)", "(3, 2000)", "(3, 5, 40)"])
def test_cuda_kernels_stop_at_a_target_out_of_bounds(shape, device):
    program = f"""
shape = {shape}
logits = torch.randn(shape, device=device)
target = torch.zeros(shape[:1] + shape[2:], dtype=torch.int64, device=device)
target[1] = shape[1]
ops.cross_entropy_forward(logits, target, None, 1, -100, 0.0)
"""
    assert_kernel_stops(device, program, "out of bounds")


@pytest.mark.parametrize("isa", ["baseline", "avx2", "avx512"])
def test_every_instruction_set(isa):
    run_on_isa(
        isa,
        __file__,
        "cpu and (float64 or strides or nan or bits or large) or ulp or with_the_loss",
    )


# -------------------------------------------------------------------------------------------------
# Memory


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc")
def test_no_memory_beyond_the_gradient():
    N, C = 1024, 16_000
    peak = peak_memory(
        f"""
few = torch.randn(8, {C}, requires_grad=True)
cross_entropy(few, torch.zeros(8, dtype=torch.int64)).backward()  # what is allocated once
logits, target = torch.randn({N}, {C}, requires_grad=True), torch.randint({C}, ({N},))
""",
        "cross_entropy(logits, target).backward()",
    )
    size = 4 * N * C
    assert (peak - size) / size <= 0.02


def large_gradient(seed=0):
    logits = torch.randn(20, 30_000, generator=torch.Generator().manual_seed(seed))
    logits.requires_grad_()
    target = torch.arange(20)
    return torch.autograd.grad(cross_entropy(logits, target), logits)[0]


@pytest.mark.skipif(fastnet._library.NODES is None, reason="the nodes in C++ keep it")
def test_memory_of_a_large_gradient_is_used_again():
    first = large_gradient()
    expected, place = first.clone(), first.data_ptr()
    del first
    again = large_gradient()
    assert again.data_ptr() == place
    assert torch.equal(again, expected)
    assert again.untyped_storage().nbytes() == again.nbytes


@pytest.mark.parametrize(
    "hold",
    [
        lambda g: g,
        lambda g: g[3],
        lambda g: g.numpy(),
        lambda g: g.untyped_storage(),
        lambda g: g.share_memory_(),
        lambda g: g.untyped_storage().resize_(0),
    ],
    ids=["gradient", "row", "numpy", "storage", "shared memory", "resized"],
)
def test_memory_that_somebody_holds_is_not_used_again(hold):
    expected = large_gradient().clone()
    gradient = large_gradient()
    held = hold(gradient)
    del gradient
    again = large_gradient()
    assert torch.equal(again, expected)
    large_gradient(seed=1)  # which must overwrite neither of them
    assert torch.equal(again, expected)
    if isinstance(held, torch.UntypedStorage) and held.nbytes():
        held = torch.tensor([], dtype=torch.float32).set_(held)
    if not isinstance(held, torch.UntypedStorage):
        rows = torch.as_tensor(held).reshape(-1, 30_000)
        assert torch.equal(rows, expected if len(rows) == 20 else expected[3:4])


def test_saved_tensors_may_change_where_torch_lets_them():
    """Its mode for that looks at everything that an operator writes to."""
    with torch.autograd.graph.allow_mutation_on_saved_tensors():
        for _ in range(2):  # the second loss has the first one's memory for its gradient
            logits = torch.randn(1100, 500, requires_grad=True)
            target = torch.randint(500, (1100,))
            loss = cross_entropy(logits, target)
            expected = torch.autograd.grad(F.cross_entropy(logits, target), logits)
            with torch.no_grad():
                logits.mul_(2)
            torch.testing.assert_close(torch.autograd.grad(loss, logits), expected)


def test_gradients_add_up_in_large_memory():
    logits = torch.randn(20, 30_000, requires_grad=True)
    target = torch.arange(20)
    for _ in range(2):
        cross_entropy(logits, target).backward()
    (once,) = torch.autograd.grad(F.cross_entropy(logits, target), logits)
    torch.testing.assert_close(logits.grad, 2 * once)


# -------------------------------------------------------------------------------------------------
# The module


def test_module_is_a_cross_entropy_loss():
    native = torch.nn.CrossEntropyLoss(torch.rand(10), ignore_index=3, reduction="sum")
    fused = fastnet.CrossEntropyLoss(torch.zeros(10), ignore_index=3, reduction="sum")
    assert isinstance(fused, torch.nn.CrossEntropyLoss)
    fused.load_state_dict(native.state_dict())
    logits, target = torch.randn(20, 10), torch.randint(10, (20,))
    torch.testing.assert_close(fused(logits, target), native(logits, target))
    again = copy.deepcopy(fused)
    torch.testing.assert_close(again(logits, target), native(logits, target))
