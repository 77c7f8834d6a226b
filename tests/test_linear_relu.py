from __future__ import annotations

import copy
import itertools

import pytest
import torch
import torch.nn.functional as F
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from support import assert_near, run_on_isa, threads

import fastnet
from fastnet.functional import linear_relu

# (leading dimensions, in_features, out_features)
SHAPES = [
    ((64,), 784, 28),  # the document networks' layers
    ((64,), 28, 10),
    ((64,), 784, 300),
    ((64,), 300, 100),
    ((16,), 3072, 40),
    ((), 5, 3),  # a vector: no leading dimension
    ((1,), 1, 1),
    ((2, 3, 4), 9, 7),  # several leading dimensions
    ((3,), 7, 5),  # narrower than a vector of any instruction set
    ((7,), 8, 4),  # exactly one AVX2 vector, no tail
    ((13,), 17, 31),  # tails in every direction
    ((130,), 61, 130),  # more than one block of rows
    ((5,), 200, 1),  # one output
    ((600,), 33, 11),  # sums over more rows than one pass of the weight gradient takes
    ((70_000,), 3, 2),  # several chunks in the bias gradient
    ((300,), 300, 200),  # large enough for the library's product,
    ((3, 100), 400, 300),  # and for that of oneDNN
    ((2,), 4100, 2050),  # a weight whose gradient lies in huge pages
]


def reference(input, weight, bias, grad):
    """The result and its gradients in float64, from torch's own operators."""
    leaves = [None if t is None else t.detach().cpu().double() for t in (input, weight, bias)]
    leaves = [None if t is None else t.requires_grad_() for t in leaves]
    output = torch.relu(F.linear(*leaves))
    gradients = torch.autograd.grad(
        output, [t for t in leaves if t is not None], grad.detach().cpu().double()
    )
    return output, gradients


def sample(shape, dtype, device="cpu", bias=True):
    leading, K, N = shape

    # Multiples of 1/8: small sums of products are exact, so no result changes its sign between
    # dtypes, which would make the mask, and the gradient with it, another one.
    def draw(*size):
        return (torch.randint(-8, 9, size, device=device) / 8).to(dtype)

    weight = draw(N, K).requires_grad_()
    input = draw(*leading, K).requires_grad_()
    return input, weight, (draw(N).requires_grad_() if bias else None), draw(*leading, N)


def check(input, weight, bias, grad, dtype):
    output = linear_relu(input, weight, bias)
    assert output.dtype == dtype
    expected, expected_gradients = reference(input, weight, bias, grad)
    assert_near(output, expected, dtype)
    leaves = [t for t in (input, weight, bias) if t is not None]
    for actual, wanted in zip(
        torch.autograd.grad(output, leaves, grad), expected_gradients, strict=True
    ):
        assert actual.dtype == dtype
        assert_near(actual, wanted, dtype)


@pytest.mark.parametrize("bias", [True, False], ids=["bias", "no bias"])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_matches_float64(shape, bias, device):
    leading, K, N = shape
    if device.name == "emulated" and leading and leading[0] > 5000:
        shape = ((1200,), K, N)  # several chunks in the CUDA kernels' bias gradient; quicker
    for dtype in device.dtypes:
        check(*sample(shape, dtype, device, bias), dtype)


@pytest.mark.parametrize(
    ("M", "K", "N"),
    [
        (1200, 3, 12),  # a sum over many rows and a short one over features, of few results
        (20, 3, 300),  # the other way round
        (2, 5000, 3),  # a long sum in the forward pass
        (128, 2, 33),  # as many rows as are summed at once, and columns that do not fill a block
        (129, 2, 33),  # one more: chunks of rows, the last one short
        (270, 1, 1000),  # chunks, as many blocks as fill a card
    ],
)
def test_sums_of_any_length(M, K, N, device):
    for dtype in device.dtypes:
        check(*sample(((M,), K, N), dtype, device), dtype)


@pytest.mark.parametrize(
    ("M", "K", "N"),
    [
        (40, 1100, 50),  # long rows of the weight, copied side by side for many rows of a result
        (70, 60, 1030),  # long rows of the gradient, the same
        (40, 130, 1100),  # and in blocks, as there are columns for it
        (300, 1030, 37),  # more rows and inputs than the forward takes at a time
        (1400, 70, 100),  # more rows than are masked at a time
        (33, 16, 17),  # a vector of outputs, and one more
        (97, 700, 33),  # of rows that go well as dot products
        (400, 50, 3),  # a gradient whose rows are shorter than a vector
        (20, 200, 90),  # few steps for the weight's gradient, and few rows for the input's
        (70, 0, 70),  # nothing to sum, for as many as are summed by panels
    ],
)
def test_every_way_of_the_products(M, K, N, device):
    for dtype in device.dtypes:
        check(*sample(((M,), K, N), dtype, device), dtype)


@pytest.mark.usefixtures("nodes")
@pytest.mark.parametrize("bias", [None, torch.ones(4, dtype=torch.bfloat16)], ids=["", "bias"])
def test_results_are_no_views(bias):
    """Which autograd lets nobody write to where an op returns them."""
    weight = torch.randn(7, 4).t()  # for the library
    for leading in ((5,), (2, 5)):
        input = torch.randn(*leading, 7, requires_grad=True)
        for x, w in ((input, weight), (input.bfloat16(), weight.bfloat16())):
            b = None if bias is None else bias.to(x.dtype)
            assert not linear_relu(x, w, b)._is_view()
            assert not linear_relu(x.detach(), w, b)._is_view()


@pytest.mark.parametrize("transposed", [False, True])
def test_half_types_are_rounded_once(transposed, device):
    """Numbers whose sums are exact in float32: a bias that is added to a rounded product shows."""
    M, K, N = 130, 300, 64  # what the library multiplies where it is faster
    x, w = torch.randint(-16, 17, (M, K)), torch.randint(-16, 17, (N, K))
    b = torch.randint(-64, 65, (N,)) / 128
    exact = torch.relu(F.linear(x.double(), w.double(), b.double()))
    for dtype in {torch.bfloat16, torch.float16} & set(device.dtypes):
        input, weight, bias = (t.to(device, dtype) for t in (x, w, b))
        if transposed:
            weight = weight.t().contiguous().t()
        assert torch.equal(linear_relu(input, weight, bias).cpu(), exact.to(dtype))


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture])  # the device stays as it is
@given(
    rows=st.integers(0, 40),
    K=st.integers(0, 70),
    N=st.integers(0, 40),
    dtype=st.sampled_from([torch.float32, torch.float64, torch.bfloat16]),
    bias=st.booleans(),
    layouts=st.tuples(*[st.sampled_from(["dense", "transposed", "strided", "offset"])] * 3),
)
def test_any_shape_and_strides(device, rows, K, N, dtype, bias, layouts):
    def lay_out(tensor, layout):
        """The same values, otherwise laid out in memory."""
        if layout == "transposed":
            return tensor.t().contiguous().t()
        if layout == "strided":
            return torch.stack([tensor, tensor], dim=-1)[..., 0]
        if layout == "offset":
            return torch.cat([tensor.new_zeros(1), tensor.reshape(-1)])[1:].view(tensor.shape)
        return tensor

    input, weight, b, grad = (
        None if t is None else t.detach() for t in sample(((rows,), K, N), dtype, device, bias)
    )
    input, weight, grad = map(lay_out, (input, weight, grad), layouts)
    leaves = [None if t is None else t.requires_grad_() for t in (input, weight, b)]
    check(*leaves, grad, dtype)


@pytest.mark.parametrize(
    ("M", "K", "N"), [(9, 37, 13), (300, 400, 300)], ids=["own kernel", "library"]
)
def test_nan_and_infinity_pass_as_in_torch(device, M, K, N):
    input, weight, bias, grad = (t.detach() for t in sample(((M,), K, N), torch.float32, device))
    input[0, 3] = float("nan")
    input[1, 36] = float("inf")  # in the tail behind the last full vector
    weight[2, 30] = -float("inf")  # in the lanes that the tail blanks
    bias[5] = float("nan")
    leaves = [t.requires_grad_() for t in (input, weight, bias)]
    output = linear_relu(*leaves)
    expected = torch.relu(F.linear(*leaves))
    torch.testing.assert_close(output, expected, equal_nan=True)
    for actual, wanted in zip(
        torch.autograd.grad(output, leaves, grad),
        torch.autograd.grad(expected, leaves, grad),
        strict=True,
    ):
        torch.testing.assert_close(actual, wanted, equal_nan=True, rtol=1e-3, atol=1e-3)


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture])  # the device stays as it is
@given(
    M=st.integers(1, 150),
    K=st.integers(20, 260),
    N=st.integers(1, 150),
    live=st.sampled_from([0.0, 0.02, 0.3, 0.6]),
    dtype=st.sampled_from([torch.float32, torch.float64]),
    needs=st.sampled_from([(True, True), (True, False), (False, True)]),
    seed=st.integers(0, 9),
)
def test_the_dead_are_passed_over(device, M, K, N, live, dtype, needs, seed):
    """Outputs of zero, of which no gradient goes on: few others, a few of them, or none."""
    torch.manual_seed(seed)
    output = torch.where(torch.rand(M, N) < live, torch.rand(M, N), 0.0)
    input, weight, grad = torch.randn(M, K), torch.randn(N, K), torch.randn(M, N)
    z = torch.where(output > 0, grad, 0.0).double()
    expected = (z @ weight.double(), z.T @ input.double(), z.sum(0))
    tensors = [t.to(device, dtype) for t in (grad, output, input, weight)]
    tensors[2:] = [t if need else None for t, need in zip(tensors[2:], needs, strict=True)]
    results = device.ops.linear_relu_backward(*tensors, True)
    with threads(1):
        alone = device.ops.linear_relu_backward(*tensors, True)
    for actual, again, wanted in zip(results, alone, expected, strict=True):
        if actual is not None:
            assert_near(actual, wanted, dtype, times=4)
            assert torch.equal(actual, again)


def test_the_dead_among_many_rows():
    """Sums of many numbers of one sign, in which one running sum would lose digits."""
    torch.manual_seed(0)
    M, K, N = 50_000, 64, 24
    output = torch.where(torch.rand(M, N) < 0.2, 1.0, 0.0)
    input, grad = torch.rand(M, K), torch.rand(M, N)
    z = torch.where(output > 0, grad, 0.0)
    _, grad_weight, _ = torch.ops.fastnet.linear_relu_backward(grad, output, input, None, False)
    expected = z.double().T @ input.double()
    assert ((grad_weight - expected).abs() / expected).max() < 2e-6


@pytest.mark.parametrize("live", [0.1, 0.9])
@pytest.mark.parametrize(
    "shape", [(80_001, 9, 30), (40_001, 9, 64), (9_001, 130, 300), (20, 3, 150_000)], ids=str
)
def test_so_many_rows_that_they_go_in_turns(shape, live):
    """By the dense and by the sparse loops; of weights that one block is, too."""
    M, K, N = shape
    torch.manual_seed(0)
    output = torch.where(torch.rand(M, N) < live, 1.0, 0.0)
    input, weight, grad = torch.randn(M, K), torch.randn(N, K), torch.randn(M, N)
    z = torch.where(output > 0, grad, 0.0).double()
    expected = (z @ weight.double(), z.T @ input.double(), z.sum(0))
    backward = torch.ops.fastnet.linear_relu_backward
    for dtype in (torch.float32, torch.float64):
        tensors = [t.to(dtype) for t in (grad, output, input, weight)]
        results = backward(*tensors, True)
        with threads(3):
            again = backward(*tensors, True)
        for actual, other, wanted in zip(results, again, expected, strict=True):
            assert_near(actual, wanted, dtype, times=4)
            assert_near(other, wanted, dtype, times=4)
    for needs in ((True, False), (False, True), (False, False)):
        some = [t if need else None for t, need in zip((input, weight), needs, strict=True)]
        grad_input, grad_weight, grad_bias = backward(grad, output, *some, True)
        assert (grad_input is None, grad_weight is None) == (not needs[1], not needs[0])
        assert_near(grad_bias, expected[2], torch.float32)


@pytest.mark.parametrize("shape", [(64, 784, 28), (70, 300, 129), (300, 600, 200)], ids=str)
def test_the_dead_times_infinity(shape, device):
    """Is NaN, as in torch, wherever infinity stands: at the end of a row, in a row of which all
    outputs are dead, in one of several blocks."""
    M, K, N = shape
    torch.manual_seed(0)
    output = torch.where(torch.rand(M, N) < 0.2, 1.0, 0.0)
    output[5] = 0
    input, weight, grad = torch.randn(M, K), torch.randn(N, K), torch.randn(M, N)
    input[5, 7], input[M - 1, K - 1], weight[2, 9] = float("inf"), -float("inf"), float("nan")
    z = torch.where(output > 0, grad, 0.0)
    tensors = [t.to(device) for t in (grad, output, input, weight)]
    grad_input, grad_weight, _ = device.ops.linear_relu_backward(*tensors, False)
    for actual, wanted in ((grad_input, z @ weight), (grad_weight, z.T @ input)):
        torch.testing.assert_close(actual.cpu(), wanted, equal_nan=True, rtol=1e-4, atol=1e-4)
    assert grad_weight[:, 7].isnan().sum() == N


@pytest.mark.parametrize("needs", list(itertools.product([False, True], repeat=3)), ids=str)
def test_only_wanted_gradients(needs, device):
    inputs = [t.detach() for t in sample(((6,), 20, 5), torch.float64, device)[:3]]
    for tensor, wanted in zip(inputs, needs, strict=True):
        tensor.requires_grad_(wanted)
    output = linear_relu(*inputs)
    assert output.requires_grad == any(needs)
    if any(needs):
        output.sum().backward()
    assert tuple(t.grad is not None for t in inputs) == needs

    plain = [t.detach() for t in inputs]
    raw = device.ops.linear_relu_backward(
        torch.ones_like(output),
        output.detach(),
        plain[0] if needs[1] else None,
        plain[1] if needs[0] else None,
        needs[2],
    )
    assert tuple(g is not None for g in raw) == needs


def test_only_what_a_gradient_needs_is_kept(device):
    """As in torch: what no wanted gradient depends on may be changed in place before backward."""
    input, weight, bias, grad = (t.detach() for t in sample(((6,), 20, 5), torch.float32, device))
    first_layer = [input, weight.clone().requires_grad_(), bias]
    frozen = [input.clone().requires_grad_(), weight, bias]
    for leaves, changed in ((first_layer, 1), (frozen, 0)):
        for function in (lambda *a: torch.relu(F.linear(*a)), linear_relu):
            output = function(*leaves)
            with torch.no_grad():
                leaves[changed].mul_(1.5)
            output.backward(grad)
        fresh = linear_relu(*leaves)  # and what one does depend on may not
        with torch.no_grad():
            leaves[1 - changed].mul_(1.5)
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            fresh.backward(grad)


@pytest.mark.parametrize("shape", [(3, 0, 5), (3, 4, 0), (0, 4, 5)], ids=str)
def test_second_derivatives_of_nothing(shape):
    M, K, N = shape
    leaves = [torch.randn(size, requires_grad=True) for size in ((M, K), (N, K), (N,))]
    results = []
    for function in (lambda *a: torch.relu(F.linear(*a)), linear_relu):
        first = torch.autograd.grad(function(*leaves).sum(), leaves, create_graph=True)
        results.append([*first, *torch.autograd.grad(sum(g.sum() for g in first), leaves[1],
                                                     allow_unused=True)])  # fmt: skip
    for expected, actual in zip(*results, strict=True):
        assert (expected is None) == (actual is None)
        if expected is not None:
            torch.testing.assert_close(actual, expected)


def test_batched_gradients(device):
    *leaves, grad = sample(((3,), 7, 4), torch.float64, device)
    grads = torch.stack([grad, 2 * grad])
    expected = torch.autograd.grad(
        torch.relu(F.linear(*leaves)), leaves, grads, is_grads_batched=True
    )
    actual = torch.autograd.grad(linear_relu(*leaves), leaves, grads, is_grads_batched=True)
    torch.testing.assert_close(actual, expected)


def test_inputs_are_not_written_to(device):
    input, weight, bias, grad = sample(((64,), 100, 28), torch.float32, device)
    before = [t.detach().clone() for t in (input, weight, bias, grad)]
    linear_relu(input, weight, bias).backward(grad)
    for old, new in zip(before, (input, weight, bias, grad), strict=True):
        assert torch.equal(old, new)


@pytest.mark.parametrize(
    "shape",
    [
        ((64,), 784, 28),
        ((300,), 300, 200),
        ((3000,), 30, 9),
        ((40,), 1100, 60),
        ((40,), 200, 300),
        ((1000,), 16, 10),
    ],
    ids=str,
)
def test_same_bits_every_time_and_on_any_number_of_threads(shape, device):
    *leaves, grad = sample(shape, torch.float32, device)
    leaves = [(t.detach() + torch.randn_like(t)).requires_grad_() for t in leaves]

    def run():
        output = linear_relu(*leaves)
        return [output.detach(), *torch.autograd.grad(output, leaves, grad)]

    first = run()
    for again in (run() for _ in range(5 if device.name == "cpu" else 1)):
        assert all(map(torch.equal, first, again))
    if device.name != "cpu" or shape[0][0] * shape[1] * shape[2] > 1 << 24:
        return  # no threads of ours; the library's product may depend on their number
    for count in (1, 4, 5):
        with threads(count):
            assert all(map(torch.equal, first, run()))


# -------------------------------------------------------------------------------------------------
# torch's machinery


@pytest.fixture(params=[True, False], ids=["bias", "no bias"])
def doubles(request, device):
    """Random float64 leaves. That one lies within 1e-6 of a kink is out of the question."""
    sizes = [(2, 3, 6), (5, 6), (5,)] if request.param else [(2, 3, 6), (5, 6)]
    return [
        torch.randn(size, dtype=torch.float64, device=device, requires_grad=True) for size in sizes
    ]


def test_gradcheck(doubles):
    assert torch.autograd.gradcheck(linear_relu, doubles)


def test_gradgradcheck(doubles):
    assert torch.autograd.gradgradcheck(linear_relu, doubles)


def test_forward_mode(doubles):
    assert torch.autograd.gradcheck(linear_relu, doubles, check_forward_ad=True)


def test_opcheck_forward(doubles, device):
    input, weight, *bias = (t.detach() for t in doubles)
    torch.library.opcheck(
        device.ops.linear_relu_forward.default, (input, weight, bias[0] if bias else None)
    )


@pytest.mark.parametrize("needs", list(itertools.product([False, True], repeat=3)), ids=str)
def test_opcheck_backward(doubles, needs, device):
    input, weight, *_ = (t.detach() for t in doubles)
    output = torch.relu(F.linear(input, weight))
    torch.library.opcheck(
        device.ops.linear_relu_backward.default,
        (
            torch.randn_like(output),
            output,
            input if needs[1] else None,
            weight if needs[0] else None,
            needs[2],
        ),
    )


@pytest.mark.parametrize("dynamic", [False, True], ids=["static", "dynamic"])
def test_compile_without_graph_breaks(dynamic):
    module = fastnet.Linear(20, 7, activation="relu")
    compiled = torch.compile(module, fullgraph=True, dynamic=dynamic)
    for rows in (3, 8):
        input = torch.randn(rows, 20, requires_grad=True)
        expected = module(input)
        actual = compiled(input)
        torch.testing.assert_close(actual, expected)
        leaves = [input, module.weight, module.bias]
        torch.testing.assert_close(
            torch.autograd.grad(actual.square().sum(), leaves),
            torch.autograd.grad(expected.square().sum(), leaves),
        )


def test_an_activation_is_given_by_name():
    with pytest.raises(TypeError, match=r"bias must be True or False, not 'relu'; .*=\"relu\""):
        fastnet.Linear(4, 3, "relu")
    with pytest.raises(ValueError, match="activation must be None or \"relu\", not 'tanh'"):
        fastnet.Linear(4, 3, activation="tanh")


def test_export():
    module = fastnet.Linear(6, 3, activation="relu")
    input = torch.randn(4, 6)
    torch.testing.assert_close(torch.export.export(module, (input,)).module()(input), module(input))


def functional_cases():
    from torch.func import grad, hessian, jacrev, jvp, vmap

    def loss(f, x, w, b):
        return f(x, w, b).square().sum()

    return {
        "grad": lambda f, x, w, b: grad(loss, argnums=(1, 2, 3))(f, x, w, b),
        "grad of grad": lambda f, x, w, b: grad(
            lambda v: grad(lambda u: loss(f, x, u, b))(v).square().sum()
        )(w),
        "per-sample grad": lambda f, x, w, b: vmap(
            lambda row: grad(lambda v: loss(f, row, v, b))(w)
        )(x),
        "jacrev": lambda f, x, w, b: jacrev(lambda v: f(x, v, b).sum(0))(w),
        "jvp": lambda f, x, w, b: jvp(lambda v: f(x, v, b), (w,), (torch.ones_like(w),)),
        "hessian": lambda f, x, w, b: hessian(lambda v: loss(f, x, w, v))(b),
        # Dynamo looks through autograd.Functions under torch.func, and would find an op that it
        # cannot differentiate.
        "compiled grad": lambda f, x, w, b: torch.compile(
            lambda v: grad(lambda u: loss(f, x, u, b))(v), fullgraph=True
        )(w),
    }


@pytest.mark.parametrize("case", functional_cases())
def test_torch_func(case):
    inputs = [t.detach() for t in sample(((4,), 6, 5), torch.float64)[:3]]
    run = functional_cases()[case]
    actual = run(linear_relu, *inputs)
    expected = run(lambda *a: torch.relu(F.linear(*a)), *inputs)
    torch.testing.assert_close(actual, expected)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_autocast_casts_as_linear_does(dtype, device):
    native, fused = (
        torch.nn.Linear(40, 12, device=device),
        fastnet.Linear(40, 12, device=device, activation="relu"),
    )
    fused.load_state_dict(native.state_dict())
    input = torch.randn(8, 40, device=device)
    with torch.autocast(device, dtype=dtype):
        expected, actual = torch.relu(native(input)), fused(input)
    assert actual.dtype == expected.dtype == dtype
    torch.testing.assert_close(actual, expected, rtol=2e-2, atol=2e-2)
    expected.sum().backward()
    # Outside, as the documentation has it; and inside, where a stray cast would change the dtype.
    with torch.autocast(device, dtype=dtype):
        actual.sum().backward()
    assert fused.weight.grad.dtype == torch.float32
    torch.testing.assert_close(fused.weight.grad, native.weight.grad, rtol=5e-2, atol=5e-2)


def test_autocast_leaves_float64_and_disabled_regions_alone():
    double = [torch.randn(3, 4).double(), torch.randn(2, 4).double()]
    single = [t.float().requires_grad_() for t in double]
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert linear_relu(*double).dtype == torch.float64
        assert linear_relu(*(t.to("meta") for t in single)).is_meta  # a device without autocast
        with torch.autocast("cpu", enabled=False):
            output = linear_relu(*single)
        assert output.dtype == torch.float32
        output.sum().backward()  # float32 saved, autocast on: the native products must stay float32
    assert single[1].grad.dtype == torch.float32


# -------------------------------------------------------------------------------------------------
# Inputs that the kernels do not take


@pytest.mark.parametrize(
    "make",
    [
        lambda: (torch.randn(3, 4).half(), torch.randn(2, 4).half(), torch.randn(2).half()),
        lambda: (torch.randint(-3, 3, (3, 4)), torch.randint(-3, 3, (2, 4)), None),
        lambda: (torch.randn(3, 4), torch.randn(4), None),  # a weight without out_features
        lambda: (torch.randn(3, 4), torch.randn(2, 4), torch.randn(1)),  # a bias that broadcasts
        lambda: (torch.randn(3, 4), torch.randn(2, 4), torch.randn(3, 2)),
        lambda: (torch.randn(3, 4).to_sparse_csr(), torch.randn(2, 4), None),
        lambda: (torch.randn(3, 4, device="meta"), torch.randn(2, 4, device="meta"), None),
    ],
    ids=[
        "float16",
        "integers",
        "1-d weight",
        "bias of 1",
        "2-d bias",
        "sparse",
        "meta",
    ],
)
def test_what_torch_takes_is_taken(make):
    inputs = make()
    expected, actual = torch.relu(F.linear(*inputs)), linear_relu(*inputs)
    assert actual.device == expected.device
    assert actual.dtype == expected.dtype
    assert actual.shape == expected.shape
    if not expected.is_meta:
        torch.testing.assert_close(actual, expected)


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda: (torch.randn(3, 4), torch.randn(2, 5), None), ["(3, 4)", "(2, 5)"]),
        (lambda: (torch.randn(3, 4), torch.randn(2, 4).double(), None), ["Float", "Double"]),
        (lambda: (torch.randn(3, 4), torch.randn(2, 4), torch.randn(2).double()), ["Double"]),
        (lambda: (torch.randn(3, 4), torch.randn(2, 4), torch.randn(7)), ["2", "7"]),
        (lambda: (torch.randn(3, 4), torch.randn(2, 4, 1), None), []),
    ],
    ids=["features", "weight dtype", "bias dtype", "bias size", "3-d weight"],
)
def test_what_torch_rejects_is_rejected(make, words):
    inputs = make()
    with pytest.raises(RuntimeError):
        torch.relu(F.linear(*inputs))
    with pytest.raises(RuntimeError) as caught:
        linear_relu(*inputs)
    for word in words:
        assert word in str(caught.value)


def test_raw_backward_rejects_scalars():
    rows = torch.randn(2, 3)
    with pytest.raises(RuntimeError, match="linear_relu_backward: input must have"):
        torch.ops.fastnet.linear_relu_backward(rows, rows, torch.randn(()), None, False)


def test_devices_must_agree(device):
    if device != "cuda":
        pytest.skip("it takes two devices")
    with pytest.raises(RuntimeError, match="device"):
        linear_relu(torch.randn(3, 4, device=device), torch.randn(2, 4))


def test_tensor_subclasses_keep_their_behaviour():
    class Loud(torch.Tensor):
        pass

    weight = torch.randn(2, 4)
    output = linear_relu(torch.randn(3, 4).as_subclass(Loud), weight)
    assert isinstance(output, Loud)


# -------------------------------------------------------------------------------------------------
# Instruction sets


@pytest.mark.parametrize("isa", ["baseline", "avx2", "avx512"])
def test_every_instruction_set(isa):
    run_on_isa(isa, __file__, "cpu and (float64 or strides or nan or bits or dead)")


# -------------------------------------------------------------------------------------------------
# The module


def test_module_is_a_linear_whose_state_dict_loads_both_ways():
    native, fused = torch.nn.Linear(9, 4), fastnet.Linear(9, 4, activation="relu")
    assert isinstance(fused, torch.nn.Linear)
    fused.load_state_dict(native.state_dict())
    native.load_state_dict(fused.state_dict())
    input = torch.randn(5, 9)
    torch.testing.assert_close(fused(input), native(input).relu())
    assert "activation='relu'" in repr(fused)
    again = copy.deepcopy(fused)
    torch.testing.assert_close(again(input), fused(input))


def test_module_without_activation_is_linear():
    module = fastnet.Linear(9, 4, bias=False, dtype=torch.float64)
    input = torch.randn(5, 9, dtype=torch.float64)
    torch.testing.assert_close(module(input), F.linear(input, module.weight))


def test_module_rejects_other_activations():
    with pytest.raises(ValueError, match="'gelu'"):
        fastnet.Linear(9, 4, activation="gelu")


def test_what_torch_said_is_passed_on(device):
    if device.name == "cpu":
        pytest.skip("who fails there first depends on the processor")
    input = torch.zeros(1, 1, device=device).expand(1 << 24, 1)
    weight = torch.zeros(1 << 22, 1, device=device)
    with pytest.raises(RuntimeError, match="could not allocate a tensor of 2 dimensions") as raised:
        device.ops.linear_relu_forward(input, weight, None)
    if tuple(map(int, torch.__version__.split(".")[:2])) >= (2, 13):
        assert "memory" in str(raised.value)
