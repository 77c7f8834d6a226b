"""A linear layer without an activation: kernels of our own for small ones on the CPU, F.linear for
all else, with the same results."""

from __future__ import annotations

import itertools

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from support import assert_near, run_on_isa, threads
from test_linear_relu import SHAPES, sample

import fastnet
from fastnet.functional import linear

NODES = fastnet._library.NODES
needs_nodes = pytest.mark.skipif(NODES is None, reason="fastnet was built with another torch")


def is_own(output: torch.Tensor) -> bool:
    return output.grad_fn.name() == "LinearBackward"


def check(input, weight, bias, grad, dtype):
    """Against float64, the gradients too."""
    given = (input, weight, bias)
    output = linear(*given)
    leaves = [t for t in given if t is not None]
    doubles = [None if t is None else t.detach().double().requires_grad_() for t in given]
    expected = F.linear(*doubles)
    assert output.dtype == dtype
    assert_near(output, expected, dtype)
    actual = torch.autograd.grad(output, leaves, grad)
    wanted = torch.autograd.grad(expected, [t for t in doubles if t is not None], grad.double())
    for of_ours, of_doubles in zip(actual, wanted, strict=True):
        assert of_ours.dtype == dtype
        assert_near(of_ours, of_doubles, dtype)


@pytest.mark.parametrize("bias", [True, False], ids=["bias", "no bias"])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_matches_float64(shape, bias):
    for dtype in (torch.float32, torch.float64, torch.bfloat16):
        check(*sample(shape, dtype, bias=bias), dtype)


@given(
    rows=st.integers(0, 40),
    K=st.integers(0, 70),
    N=st.integers(0, 40),
    dtype=st.sampled_from([torch.float32, torch.float64]),
    bias=st.booleans(),
    transposed=st.tuples(st.booleans(), st.booleans(), st.booleans()),
)
def test_any_shape_and_strides(rows, K, N, dtype, bias, transposed):
    input, weight, b, grad = (
        None if t is None else t.detach() for t in sample(((rows,), K, N), dtype, bias=bias)
    )
    input, weight, grad = (
        t.t().contiguous().t() if turned else t
        for t, turned in zip((input, weight, grad), transposed, strict=True)
    )
    check(*(t if t is None else t.requires_grad_() for t in (input, weight, b)), grad, dtype)


@needs_nodes
def test_routing():
    """What is small and plain is ours, all else torch's."""

    def own(M, K, N, **options):
        input, weight = torch.randn(M, K, **options), torch.randn(N, K, **options)
        return is_own(linear(input, weight.requires_grad_()))

    assert own(64, 28, 10)
    assert own(64, 784, 10)
    assert own(64, 300, 100, dtype=torch.float64)
    assert own(1024, 784, 10)
    assert own(2, 4096, 2048)  # a gradient that lies in huge pages
    assert not own(256, 1024, 1024, dtype=torch.float64)
    assert own(256, 1024, 1024) == (fastnet.build_info()["cpu_products"] == "oneDNN")
    assert own(64, 28, 10, dtype=torch.bfloat16)
    assert not own(64, 28, 40, dtype=torch.bfloat16)
    assert not own(64, 28, 10, dtype=torch.float16)
    assert not is_own(linear(torch.randn(64, 28), torch.randn(28, 10).requires_grad_().t()))
    with torch.autocast("cpu", torch.bfloat16):
        assert linear(torch.randn(6, 20), torch.randn(5, 20)).dtype == torch.bfloat16
    with torch.no_grad():
        assert linear(torch.randn(6, 20), torch.randn(5, 20).requires_grad_()).grad_fn is None


def test_nan_and_infinity_pass_as_in_torch():
    input, weight, bias, grad = (t.detach() for t in sample(((9,), 37, 13), torch.float32))
    input[0, 3] = float("nan")
    input[1, 36] = float("inf")  # in the tail behind the last full vector
    weight[2, 30] = -float("inf")  # in the lanes that the tail blanks
    bias[5] = float("nan")
    grad[3, 4] = float("nan")
    leaves = [t.requires_grad_() for t in (input, weight, bias)]
    output, expected = linear(*leaves), F.linear(*leaves)
    torch.testing.assert_close(output, expected, equal_nan=True)
    torch.testing.assert_close(
        torch.autograd.grad(output, leaves, grad),
        torch.autograd.grad(expected, leaves, grad),
        equal_nan=True,
    )


@pytest.mark.parametrize("needs", list(itertools.product([False, True], repeat=3)), ids=str)
def test_only_wanted_gradients(needs):
    inputs = [t.detach() for t in sample(((6,), 20, 5), torch.float64)[:3]]
    for tensor, wanted in zip(inputs, needs, strict=True):
        tensor.requires_grad_(wanted)
    output = linear(*inputs)
    assert output.requires_grad == any(needs)
    if any(needs):
        output.sum().backward()
    assert tuple(t.grad is not None for t in inputs) == needs
    raw = torch.ops.fastnet.linear_backward(
        torch.ones_like(output),
        inputs[0].detach() if needs[1] else None,
        inputs[1].detach() if needs[0] else None,
        needs[2],
    )
    assert tuple(g is not None for g in raw) == needs


def test_only_what_a_gradient_needs_is_kept():
    input, weight, bias, grad = (t.detach() for t in sample(((6,), 20, 5), torch.float32))
    leaves = [input, weight.requires_grad_(), bias]
    output = linear(*leaves)
    with torch.no_grad():
        weight.mul_(1.5)  # no gradient of the input is wanted
    output.backward(grad)
    output = linear(*leaves)
    input.mul_(1.5)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        output.backward(grad)


@needs_nodes  # torch's product may depend on their number
@pytest.mark.parametrize("shape", [((64,), 784, 10), ((3000,), 30, 9)], ids=str)
def test_same_bits_on_any_number_of_threads(shape):
    *leaves, grad = sample(shape, torch.float32)
    leaves = [(t.detach() + torch.randn_like(t)).requires_grad_() for t in leaves]

    def run():
        output = linear(*leaves)
        return [output.detach(), *torch.autograd.grad(output, leaves, grad)]

    first = run()
    with threads(1):
        assert all(map(torch.equal, first, run()))


# -------------------------------------------------------------------------------------------------
# torch's machinery


@pytest.fixture(params=[True, False], ids=["bias", "no bias"])
def doubles(request):
    sizes = [(2, 3, 6), (5, 6), (5,)] if request.param else [(2, 3, 6), (5, 6)]
    return [torch.randn(size, dtype=torch.float64, requires_grad=True) for size in sizes]


def test_gradients(doubles):
    assert torch.autograd.gradcheck(linear, doubles, check_forward_ad=True)
    assert torch.autograd.gradgradcheck(linear, doubles)


def test_batched_gradients():
    *leaves, grad = sample(((3,), 7, 4), torch.float64)
    grads = torch.stack([grad, 2 * grad])
    actual, expected = (
        torch.autograd.grad(function(*leaves), leaves, grads, is_grads_batched=True)
        for function in (linear, F.linear)
    )
    torch.testing.assert_close(actual, expected)


@pytest.mark.parametrize(("M", "K", "N"), [(1, 1, 1), (7, 5, 3), (70, 33, 130), (300, 64, 40)])
def test_any_shape_into_memory_at_hand(M, K, N):
    """The gradient of the weight gets its new part added."""
    input, weight, bias, grad = (t.detach() for t in sample(((M,), K, N), torch.float32))
    before = torch.randint(-8, 9, (N, K)) / 8
    out, grad_input, grad_weight = torch.empty(M, N), torch.empty(M, K), before.clone()
    ops = torch.ops.fastnet
    for transposed in (False, True):
        w = weight.t().contiguous().t() if transposed else weight
        for b in (bias, None):
            ops.linear_forward.out(input, w, b, out=out)
            wanted = F.linear(input.double(), w.double(), b if b is None else b.double())
            assert_near(out, wanted, torch.float32)
        ops.linear_backward.out(grad, input, w, grad_input=grad_input, grad_weight=None)
        assert_near(grad_input, grad.double() @ w.double(), torch.float32)
    ops.linear_backward.out(grad, input, weight, grad_input=None, grad_weight=grad_weight)
    wanted = before.double() + grad.double().t() @ input.double()
    assert_near(grad_weight, wanted, torch.float32)


def test_memory_at_hand_must_fit():
    input, weight = torch.randn(4, 6), torch.randn(3, 6)
    ops = torch.ops.fastnet
    for out in (torch.empty(4, 2), torch.empty(3, 4).t(), torch.empty(4, 3, dtype=torch.float64)):
        with pytest.raises(RuntimeError, match="out must be a dense float32 4x3"):
            ops.linear_forward.out(input, weight, None, out=out)
    with pytest.raises(RuntimeError, match="must be a dense float32 3x6"):
        ops.linear_backward.out(
            torch.randn(4, 3), input, weight, grad_input=None, grad_weight=torch.empty(6, 3).t()
        )
    with pytest.raises(RuntimeError, match="only for float32"):
        ops.linear_forward.out(input.double(), weight.double(), None, out=torch.empty(4, 3))


def test_opcheck_into_memory_at_hand():
    input, weight, grad = torch.randn(4, 6), torch.randn(3, 6), torch.randn(4, 3)
    torch.library.opcheck(
        torch.ops.fastnet.linear_forward.out,
        (input, weight, torch.randn(3)),
        {"out": torch.empty(4, 3)},
    )
    torch.library.opcheck(
        torch.ops.fastnet.linear_backward.out,
        (grad, input, weight),
        {"grad_input": torch.empty(4, 6), "grad_weight": torch.zeros(3, 6)},
    )


@pytest.mark.parametrize("needs", list(itertools.product([False, True], repeat=3)), ids=str)
def test_opcheck(doubles, needs):
    input, weight, *bias = (t.detach() for t in doubles)
    torch.library.opcheck(
        torch.ops.fastnet.linear_forward.default, (input, weight, bias[0] if bias else None)
    )
    torch.library.opcheck(
        torch.ops.fastnet.linear_backward.default,
        (
            torch.randn(2, 3, 5, dtype=torch.float64),
            input if needs[1] else None,
            weight if needs[0] else None,
            needs[2],
        ),
    )


@pytest.mark.parametrize("dynamic", [False, True], ids=["static", "dynamic"])
def test_compile_without_graph_breaks(dynamic):
    module = fastnet.Linear(20, 7)
    compiled = torch.compile(module, fullgraph=True, dynamic=dynamic)
    for rows in (3, 8):
        input = torch.randn(rows, 20, requires_grad=True)
        leaves = [input, module.weight, module.bias]
        actual, expected = compiled(input), module(input)
        torch.testing.assert_close(actual, expected)
        torch.testing.assert_close(
            torch.autograd.grad(actual.square().sum(), leaves),
            torch.autograd.grad(expected.square().sum(), leaves),
        )


def test_torch_func_and_export():
    module, input = fastnet.Linear(6, 3), torch.randn(4, 6)
    parameters = dict(module.named_parameters())

    def loss(parameters, input):
        return torch.func.functional_call(module, parameters, (input,)).square().sum()

    actual = torch.func.grad(loss)(parameters, input)
    wanted = torch.autograd.grad(F.linear(input, **parameters).square().sum(), parameters.values())
    torch.testing.assert_close(tuple(actual.values()), wanted)
    per_row = torch.func.vmap(torch.func.grad(loss), (None, 0))(parameters, input)
    torch.testing.assert_close(tuple(g.sum(0) for g in per_row.values()), wanted)
    torch.testing.assert_close(torch.export.export(module, (input,)).module()(input), module(input))


def test_what_torch_rejects_is_rejected():
    for shapes in (((6, 21), (5, 20)), ((6, 20), (5, 20, 1)), ((6, 20), (5, 20), (4,))):
        given = [torch.randn(shape) for shape in shapes]
        for function in (F.linear, linear):
            with pytest.raises(RuntimeError):
                function(*given)


@pytest.mark.parametrize("isa", ["baseline", "avx2", "avx512"])
def test_every_instruction_set(isa):
    run_on_isa(isa, __file__, "test_matches_float64 or test_any_shape or test_nan")
