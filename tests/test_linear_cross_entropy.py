from __future__ import annotations

import itertools
import sys

import pytest
import torch
import torch.nn.functional as F
from support import TOLERANCES, peak_memory
from test_cross_entropy import sample, to_double

from fastnet.functional import linear_cross_entropy
from fastnet.ops.cross_entropy import REDUCTIONS


def draw(dtype, device="cpu", probabilities=False, N=100, K=16, C=37):
    """Multiples of 1/8, so that the logits are the same in every dtype, but for bfloat16's."""
    x, w, b = (
        (torch.randint(-8, 9, size, device=device) / 8).to(dtype).requires_grad_()
        for size in ((N, K), (C, K), (C,))
    )
    _, target, class_weight = sample(
        (N, C), dtype, device, weight=True, probabilities=probabilities
    )
    return x, w, b, target, class_weight


@pytest.fixture(autouse=True)
def _small_chunks(monkeypatch):
    monkeypatch.setattr("fastnet.ops.linear_cross_entropy.CHUNK_BYTES", 1)  # 32 rows


@pytest.fixture(params=[False, True], ids=["torch's products", "own products"])
def _both_products(request, monkeypatch):
    """The second are taken on processors where they are the faster ones."""
    monkeypatch.setattr("fastnet.ops.linear_cross_entropy.HAS_OWN_PRODUCTS", request.param)


def reference(x, w, target, b, class_weight, grad, **options):
    leaves = [t.requires_grad_() for t in to_double(x, w, b) if t is not None]
    _, t, cw = to_double(x, target, class_weight)
    logits = F.linear(*leaves)
    loss = F.cross_entropy(logits, t, cw, **options)
    return loss.detach(), torch.autograd.grad(loss, leaves, grad.detach().cpu().double())


@pytest.mark.usefixtures("_both_products")
@pytest.mark.parametrize("reduction", REDUCTIONS)
@pytest.mark.parametrize("probabilities", [False, True], ids=["classes", "probabilities"])
@pytest.mark.parametrize("bias", [False, True], ids=["no bias", "bias"])
def test_matches_float64(reduction, probabilities, bias, device):
    for dtype in device.dtypes:
        x, w, b, target, class_weight = draw(dtype, device, probabilities)
        b = b if bias else None
        for cw, smoothing in ((None, 0.0), (class_weight, 0.1)):
            options = {"reduction": reduction, "label_smoothing": smoothing}
            loss = linear_cross_entropy(x, w, target, b, cw, **options)
            assert loss.dtype == dtype
            grad = torch.rand(loss.shape, device=loss.device).to(dtype)
            leaves = [t for t in (x, w, b) if t is not None]
            expected, expected_gradients = reference(x, w, target, b, cw, grad, **options)
            scale = 3 if dtype in (torch.bfloat16, torch.float16) else 1  # rounded in between
            for actual, wanted in zip(
                (loss, *torch.autograd.grad(loss, leaves, grad)),
                (expected, *expected_gradients),
                strict=True,
            ):
                assert actual.dtype == dtype
                error = (actual.detach().cpu().double() - wanted).abs().max() / wanted.abs().max()
                assert error <= scale * TOLERANCES[dtype]


@pytest.mark.usefixtures("_both_products")
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_only_wanted_gradients(dtype):
    for needs in itertools.product([False, True], repeat=3):
        *leaves, target, _ = draw(dtype)
        x, w, b = (t.detach().requires_grad_(n) for t, n in zip(leaves, needs, strict=True))
        loss = linear_cross_entropy(x, w, target, b)
        assert loss.requires_grad == any(needs)
        if any(needs):
            loss.backward()
        assert tuple(t.grad is not None for t in (x, w, b)) == needs


@pytest.mark.usefixtures("_both_products")
@pytest.mark.parametrize("transposed", ["input", "weight"])
def test_any_strides(transposed):
    x, w, b, target, _ = draw(torch.float32)
    grads = []
    for make in (torch.Tensor.contiguous, lambda t: t.t().contiguous().t()):
        given = {"input": x.detach(), "weight": w.detach()}
        given[transposed] = make(given[transposed])
        leaves = [t.requires_grad_() for t in given.values()]
        loss = linear_cross_entropy(*leaves, target, b)
        grads.append(torch.autograd.grad(loss, leaves))
    torch.testing.assert_close(*grads)


def test_backward_twice_with_other_factors():
    x, w, b, target, _ = draw(torch.float64)
    loss = linear_cross_entropy(x, w, target, b)
    gradients = [
        torch.autograd.grad(loss, w, torch.tensor(g, dtype=torch.float64), retain_graph=True)[0]
        for g in (3.0, 1.0, 1.0)
    ]
    torch.testing.assert_close(gradients[0], 3 * gradients[1])
    torch.testing.assert_close(gradients[1], gradients[2])
    assert gradients[1].data_ptr() != gradients[2].data_ptr()


@pytest.mark.parametrize("reduction", ["none", "mean"])
def test_batched_gradients(reduction):
    x, w, b, target, _ = draw(torch.float64)
    jacobians = [
        torch.autograd.functional.jacobian(f, (x.detach(), w.detach()), vectorize=True)
        for f in (
            lambda x, w: linear_cross_entropy(x, w, target, b, reduction=reduction),
            lambda x, w: F.cross_entropy(F.linear(x, w, b), target, reduction=reduction),
        )
    ]
    torch.testing.assert_close(*jacobians)


def test_a_gradient_that_is_not_finite_leaves_ignored_rows_alone():
    x, w, b, target, _ = draw(torch.float32)
    target[0] = -100
    for factor in (float("inf"), float("nan")):
        loss = linear_cross_entropy(x, w, target, b)
        (gradient,) = torch.autograd.grad(loss, x, torch.tensor(factor))
        assert torch.equal(gradient.isnan().all(1), target != -100)
        assert not gradient[target == -100].any()
        assert not gradient.requires_grad


def test_tied_weights_and_hooks_under_create_graph():
    """As in torch: what the input owes to the weight counts once, and hooks run once."""
    ids = torch.tensor([0, 3, 5, 3])
    target = torch.tensor([1, 2, 3, 4])
    results = []
    for function in (lambda x, w: F.cross_entropy(F.linear(x, w), target),
                     lambda x, w: linear_cross_entropy(x, w, target)):  # fmt: skip
        torch.manual_seed(0)
        w = torch.randn(7, 3, dtype=torch.float64, requires_grad=True)
        w.register_hook(lambda gradient: 2 * gradient)
        (first,) = torch.autograd.grad(function(F.embedding(ids, w), w), w, create_graph=True)
        results.append((first, torch.autograd.grad(first.square().sum(), w)[0]))
    torch.testing.assert_close(results[1], results[0])


def test_ignored_rows_need_no_weight():
    x, w, b, target, class_weight = draw(torch.float64)
    target[target == 0] = -100
    class_weight[0] = float("inf")  # 1 / frequency of a class that does not occur
    expected = F.cross_entropy(F.linear(x, w, b), target, class_weight)
    assert expected.isfinite()
    torch.testing.assert_close(linear_cross_entropy(x, w, target, b, class_weight), expected)


def test_evaluation_makes_no_gradients(monkeypatch):
    x, w, b, target, class_weight = draw(torch.float64)
    expected = linear_cross_entropy(x, w, target, b, class_weight)
    monkeypatch.setattr("fastnet.ops.cross_entropy._backward_out", None)
    with torch.no_grad():
        torch.testing.assert_close(
            linear_cross_entropy(x, w, target, b, class_weight), expected.detach()
        )


@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_gradgradcheck(reduction):
    x, w, b, target, class_weight = draw(torch.float64, N=5, K=3, C=4)

    def function(x, w, b):
        return linear_cross_entropy(x, w, target, b, class_weight, reduction=reduction)

    assert torch.autograd.gradcheck(function, (x, w, b))
    assert torch.autograd.gradgradcheck(function, (x, w, b))


def test_torchs_machinery():
    x, w, b, target, _ = draw(torch.float32)
    expected = F.cross_entropy(F.linear(x, w, b), target)
    gradients = torch.autograd.grad(expected, (x, w, b))
    compiled = torch.compile(linear_cross_entropy, fullgraph=True)(x, w, target, b)
    torch.testing.assert_close(compiled, expected)
    torch.testing.assert_close(torch.autograd.grad(compiled, (x, w, b)), gradients)
    grad = torch.func.grad(lambda v: linear_cross_entropy(x, v, target, b))(w)
    torch.testing.assert_close(grad, gradients[1])
    with torch.autocast("cpu", dtype=torch.bfloat16):
        loss = linear_cross_entropy(x, w, target, b)
        wanted = F.cross_entropy(F.linear(x, w, b), target)
    assert loss.dtype == wanted.dtype == torch.float32
    torch.testing.assert_close(loss, wanted, rtol=1e-2, atol=1e-2)
    loss.backward()
    assert w.grad.dtype == torch.float32
    torch.testing.assert_close(w.grad, gradients[1], rtol=5e-2, atol=1e-3)


def test_takes_and_rejects_as_the_two_ops_do():
    x, w, b, target, _ = draw(torch.float32)
    one = linear_cross_entropy(x[0], w, target[0], b)
    torch.testing.assert_close(one, F.cross_entropy(F.linear(x[0], w, b), target[0]))
    empty = linear_cross_entropy(x[:0], w, target[:0], b, reduction="sum")
    assert empty == 0
    half = [t.detach().half() for t in (x, w, b)]
    torch.testing.assert_close(
        linear_cross_entropy(half[0], half[1], target, half[2]),
        F.cross_entropy(F.linear(*half), target),
    )
    for wrong in ({"input": None}, {"weight": [1.0]}, {"ignore_index": None}, {"target": [1]}):
        given = {"input": x, "weight": w, "target": target} | wrong
        with pytest.raises(TypeError):
            linear_cross_entropy(**given)
    with pytest.raises(ValueError, match=r"\(2, 50, 16\)"):
        linear_cross_entropy(x.view(2, 50, 16), w, target.view(2, 50))
    with pytest.raises(IndexError, match="37"):
        linear_cross_entropy(x, w, torch.full_like(target, 37), b)
    with pytest.raises(ValueError, match="100"):
        linear_cross_entropy(x, w, target[:50], b)
    with pytest.raises(RuntimeError, match="100x16"):
        linear_cross_entropy(x, w[:, :10], target, b)


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc")
def test_peak_memory_is_below_a_quarter_of_the_two_ops():
    fused, two = (
        peak_memory(
            f"""
def leaves(N, K, C):
    x, w = torch.randn(N, K, requires_grad=True), torch.randn(C, K, requires_grad=True)
    return x, w, torch.randint(C, (N,))

function = {function}
function(*leaves(600, 300, 700)).backward()  # what is allocated once
inputs = leaves(2048, 256, 16_000)
""",
            "function(*inputs).backward()",
        )
        for function in (
            "linear_cross_entropy",
            "lambda x, w, t: cross_entropy(F.linear(x, w), t)",
        )
    )
    assert fused < two / 4


def test_saved_tensors_may_change_where_torch_lets_them():
    input, weight = (torch.randn(size, requires_grad=True) for size in ((6, 7), (5, 7)))
    target = torch.randint(5, (6,))
    with torch.autograd.graph.allow_mutation_on_saved_tensors():
        losses = (
            F.cross_entropy(F.linear(input, weight), target),
            linear_cross_entropy(input, weight, target),
        )
        torch.testing.assert_close(*(torch.autograd.grad(loss, (input, weight)) for loss in losses))
