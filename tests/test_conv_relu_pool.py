from __future__ import annotations

import copy
import itertools

import pytest
import torch
import torch.nn.functional as F
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from support import (
    MULTIPLIES_BFLOAT16,
    MULTIPLIES_TILES,
    assert_near,
    peak_memory,
    run_on_isa,
    threads,
)

import fastnet
from fastnet.functional import conv_relu_pool2d

# (N, in_channels, H, W, out_channels, kernel, padding)
SHAPES = [
    (4, 1, 28, 28, 32, 3, 1),  # the document networks' blocks
    (4, 3, 32, 32, 32, 3, 1),
    (4, 32, 14, 14, 64, 3, 1),
    (5, 64, 8, 8, 128, 3, 1),
    (1, 64, 8, 8, 128, 3, 1),  # too few windows to rearrange the filters for
    (1, 1, 4, 4, 1, 3, 0),  # one window
    (1, 4, 1, 1, 2, 3, 2),  # an image of one pixel
    (2, 3, 27, 27, 8, 5, 2),  # odd sizes: the last row and column are in no window
    (5, 8, 7, 7, 5, 3, 1),
    (2, 13, 6, 19, 7, 3, 0),  # tails in every direction
    (3, 5, 9, 12, 11, 5, 1),
    (1, 20, 5, 5, 3, 3, 4),  # more padding than kernel
    (7, 2, 6, 6, 33, 5, 0),  # one window an image
    (3, 16, 2, 2, 16, 3, 1),
    (1, 16, 40, 44, 9, 3, 1),  # several strips of an image, one image for all threads
    (2, 1, 100, 30, 3, 5, 2),  # too large for the own gradient of the input
    (40, 6, 4, 4, 17, 3, 1),  # several images in a list
    (6, 4, 7, 10, 7, 3, 1),  # very few channels, filters and windows in no round number
    (9, 2, 21, 18, 35, 3, 1),  # channels so few that their lists are none, and a block of filters
    (3, 3, 9, 514, 2, 3, 1),  # the same where a row of windows is too long for it
    (4, 512, 6, 6, 180, 3, 1),  # filters that are transformed some at a time
    (36, 16, 8, 8, 20, 3, 1),  # the gradients in Winograd's form
    (9, 20, 18, 21, 24, 3, 1),
    (140, 9, 4, 4, 9, 3, 1),
    (16, 40, 14, 10, 33, 3, 2),
    (9, 12, 18, 14, 10, 3, 1),  # half tiles at both ends, and at one
    (12, 9, 16, 14, 12, 3, 1),
]


def native(
    input,
    weight,
    bias=None,
    stride=1,
    padding=0,
    dilation=1,
    groups=1,
    *,
    pool_kernel_size=2,
    pool_stride=None,
    pool_padding=0,
    ceil_mode=False,
):
    z = F.conv2d(input, weight, bias, stride, padding, dilation, groups)
    return F.max_pool2d(
        torch.relu(z), pool_kernel_size, pool_stride, pool_padding, ceil_mode=ceil_mode
    )


def native_on_cuda(input, weight, bias=None, *args, **options):
    """The same as there: half types are rounded before the bias is added, and once more after."""
    z = F.conv2d(input, weight, None, *args, **options)
    return F.max_pool2d(torch.relu(z if bias is None else z + bias[:, None, None]), 2)


def on_cpu(device):
    return getattr(device, "name", "cpu") == "cpu"


def sample(shape, dtype, device="cpu", bias=True):
    N, C, H, W, K, kernel, padding = shape

    # Multiples of 1/8, whose sums of products are exact, on patches of 4 x 4, too: no result
    # changes its sign between dtypes, and equal elements of a window stay equal, as many are.
    def draw(*size):
        return (torch.randint(-8, 9, size, device=device) / 8).to(dtype)

    input, weight = draw(N, C, H, W), draw(K, C, kernel, kernel)
    return input, weight, draw(K) if bias else None, padding


def check(leaves, dtype, device, **options):
    """Against float64, the gradients too."""
    leaves = [None if t is None else t.detach().requires_grad_() for t in leaves]
    doubles = [None if t is None else t.detach().cpu().double().requires_grad_() for t in leaves]
    output, expected = conv_relu_pool2d(*leaves, **options), native(*doubles, **options)
    assert output.dtype == dtype
    assert_near(output, expected, dtype)
    if may_round(leaves[1], device, **options):
        # Equal elements of a window come out unequal, and zeros as more or less: any may win.
        expected = of_the_winners(leaves, doubles, options["padding"])
        assert_near(output, expected, dtype)
    rivals, wide = doubles, torch.float64
    is_half = dtype in (torch.bfloat16, torch.float16)
    if is_half and not has_own_kernel(leaves[1], device, **options):
        # The library rounds the sums before they are compared: elements of a window may come to be
        # equal, and another one wins.
        rivals, wide = [None if t is None else t.detach().requires_grad_() for t in leaves], dtype
        expected = (native if on_cpu(device) else native_on_cuda)(*rivals, **options)
    with torch.no_grad():  # which takes a way of its own
        assert torch.equal(conv_relu_pool2d(*leaves, **options), output)
    grad = (torch.randint(-8, 9, output.shape, device=output.device) / 8).to(dtype)
    grads = [
        torch.autograd.grad(result, [t for t in inputs if t is not None], g)
        for result, inputs, g in (
            (output, leaves, grad),
            (expected, rivals, grad.to(expected.device, wide)),
        )
    ]
    for actual, wanted in zip(*grads, strict=True):
        assert actual.dtype == dtype
        # What the library rounds on its way is its own affair: where the processor does not
        # multiply bfloat16, it sums in that type.
        rounds = 3 if MULTIPLIES_BFLOAT16 else 4
        assert_near(actual, wanted.cpu().double(), dtype, times=rounds if is_half else 1)
    if leaves[1].shape[1] <= 4:  # where no gradient of the input is a way of its own
        output = conv_relu_pool2d(leaves[0].detach(), *leaves[1:], **options)
        own = torch.autograd.grad(output, [t for t in leaves[1:] if t is not None], grad)
        for actual, wanted in zip(own, grads[1][1:], strict=True):
            assert_near(actual, wanted.cpu().double(), dtype, times=4 if is_half else 1)


def has_own_kernel(weight, device, stride=1, dilation=1, groups=1, **_):
    if on_cpu(device) and weight.dtype is torch.bfloat16 and MULTIPLIES_BFLOAT16:
        K, C = weight.shape[:2]
        if C * K > 8192 or (C > 4 and MULTIPLIES_TILES):
            return False
    return (
        stride == dilation == groups == 1
        and tuple(weight.shape[2:]) in ((3, 3), (5, 5))
        and (on_cpu(device) or weight.shape[1] <= 16)
    )


def may_round(weight, device, **options):
    """Whether the kernels are for more channels than whose sums of small fractions are exact."""
    return (
        on_cpu(device)
        and weight.shape[1] >= 5
        and weight.dtype is not torch.float64
        and not any(key.startswith("pool") or key == "ceil_mode" for key in options)
        and has_own_kernel(weight, device, **options)
    )


def of_the_winners(leaves, doubles, padding):
    """What the window's elements that won are in float64."""
    kernel = leaves[1].size(-1)
    padding = {"same": kernel // 2, "valid": 0}.get(padding, padding)
    padding = [padding] * 2 if isinstance(padding, int) else list(padding)
    input, *others = leaves
    if input.dim() == 3:
        input = input[None]
    _, codes = torch.ops.fastnet.conv_relu_pool_forward(input, *others, [1, 1], padding, [1, 1], 1)
    z = F.conv2d(*doubles, padding=padding)
    windows = z.unfold(-2, 2, 2).unfold(-2, 2, 2).flatten(-2)
    codes = codes.view(windows.shape[:-1])
    winners = windows.gather(-1, codes.long().clamp_max(3)[..., None])[..., 0]
    return torch.where(codes < 4, winners, 0.0)


def is_tiny(shape):
    """Few enough additions for the emulated device, which takes a microsecond for each."""
    N, C, H, W, K, kernel, _ = shape
    return N * C * H * W * K * kernel * kernel < 3_000_000


@pytest.mark.parametrize("bias", [True, False], ids=["bias", "no bias"])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_matches_float64(shape, bias, device):
    if device.name == "emulated" and not is_tiny(shape):
        shape = (1, *shape[1:4], 9, *shape[5:])
    for dtype in device.dtypes:
        *leaves, padding = sample(shape, dtype, device, bias)
        check(leaves, dtype, device, padding=padding)


@pytest.mark.parametrize("shape", SHAPES[:9], ids=str)
def test_normal_values(shape):
    """Whose rounding differs from form to form; windows whose first two are that close, or close to
    zero, are few, and their gradients may go either way."""
    N, C, H, W, K, kernel, padding = shape
    input, weight = torch.randn(N, C, H, W), torch.randn(K, C, kernel, kernel)
    output = conv_relu_pool2d(input, weight, None, padding=padding)
    reference = native(input.double(), weight.double(), None, padding=padding)
    assert_near(output, reference, torch.float32)
    theirs = native(input, weight, None, padding=padding)
    error, their_error = ((t - reference).abs().max() for t in (output, theirs))
    assert error <= 4 * their_error + 1e-6


FORMATS = [torch.contiguous_format, torch.channels_last]


def lay_out(tensor, layout):
    """The same values, otherwise laid out in memory."""
    if layout == "channels_last":
        return tensor.contiguous(memory_format=torch.channels_last)
    if layout == "transposed":
        return tensor.transpose(2, 3).contiguous().transpose(2, 3)
    if layout == "strided":
        return torch.stack([tensor, tensor], dim=-1)[..., 0]
    if layout == "expanded":
        return tensor[:, :, :, :1].expand(tensor.shape)
    return tensor


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture])  # the device stays as it is
@given(
    N=st.integers(0, 5),
    C=st.integers(1, 20),
    size=st.tuples(st.integers(1, 14), st.integers(1, 21)),
    K=st.integers(1, 20),
    kernel=st.sampled_from([(3, 3), (5, 5), (1, 1), (2, 3), (4, 4)]),
    stride=st.sampled_from([1, 1, 1, (2, 1), 3]),
    padding=st.sampled_from([0, 1, 2, (0, 3), "same", "valid"]),
    dilation=st.sampled_from([1, 1, 1, 2, (1, 2)]),
    groups=st.sampled_from([1, 1, 1, 2]),
    dtype=st.sampled_from([torch.float32, torch.float64, torch.bfloat16]),
    bias=st.booleans(),
    layouts=st.tuples(
        *[st.sampled_from(["dense", "channels_last", "transposed", "strided", "expanded"])] * 2
    ),
)
def test_any_shape_and_strides(
    device, N, C, size, K, kernel, stride, padding, dilation, groups, dtype, bias, layouts
):
    if device.name == "emulated":
        N, C, K = min(N, 2), min(C, 6), min(K, 6)
    C, K = C * groups, K * groups
    input, weight, b, _ = sample((N, C, *size, K, 1, 0), dtype, device, bias)
    weight = (torch.randint(-8, 9, (K, C // groups, *kernel), device=device) / 8).to(dtype)
    input, weight = lay_out(input, layouts[0]), lay_out(weight, layouts[1])
    options = {"stride": stride, "padding": padding, "dilation": dilation, "groups": groups}
    try:
        expected = native(input, weight, b, **options)
    except (RuntimeError, ValueError) as error:
        with pytest.raises(type(error)):
            conv_relu_pool2d(input, weight, b, **options)
        return
    check((input, weight, b), dtype, device, **options)
    # In the memory format of torch's result, where it has just one.
    actual = conv_relu_pool2d(input, weight, b, **options)
    for memory_format, other in (FORMATS, FORMATS[::-1]):
        if expected.is_contiguous(memory_format=memory_format) and not (
            expected.is_contiguous(memory_format=other)
        ):
            is_copied = "transposed" in layouts or "strided" in layouts or "expanded" in layouts
            assert is_copied or actual.is_contiguous(memory_format=memory_format)


@pytest.mark.parametrize(
    "pool",
    [
        {"pool_kernel_size": 2},
        {"pool_kernel_size": (2, 2), "pool_stride": (2, 2)},
        {"pool_kernel_size": 3, "pool_stride": 2, "pool_padding": 1},
        {"pool_kernel_size": 2, "pool_stride": 1},
        {"pool_kernel_size": (3, 2), "ceil_mode": True},
        {"pool_kernel_size": 2, "ceil_mode": True},
        {"pool_kernel_size": 2, "pool_padding": 1},
    ],
    ids=str,
)
@pytest.mark.parametrize("size", [(8, 8), (7, 9)], ids=str)
def test_any_window(pool, size, device):
    *leaves, _ = sample((2, 5, *size, 6, 3, 1), torch.float32, device)
    check(leaves, torch.float32, device, padding=1, **pool)


def test_unbatched(device):
    input, weight, bias, _ = sample((1, 16, 8, 10, 6, 3, 1), torch.float32, device)
    for channels in (4, 16):  # in both of Winograd's forms
        check((input[0, :channels], weight[:, :channels], bias), torch.float32, device, padding=1)
    assert conv_relu_pool2d(input[0], weight, bias).shape == (6, 3, 4)


@pytest.mark.usefixtures("nodes")
@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last], ids=str)
def test_results_are_no_views(memory_format):
    """Which autograd lets nobody write to where an op returns them. Without a batch they are dense,
    as torch's are."""
    images = torch.randn(2, 16, 8, 8).to(memory_format=memory_format)
    weight = torch.randn(6, 16, 3, 3).to(memory_format=memory_format).requires_grad_()
    for input in (images, images[0]):
        expected = F.max_pool2d(F.conv2d(input, weight).relu(), 2)
        for grad in (True, False):
            with torch.set_grad_enabled(grad):
                output = conv_relu_pool2d(input, weight)
            assert not output._is_view()
            assert output.stride() == expected.stride()
            output *= torch.ones((), requires_grad=True)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
def test_samples_of_the_operator(dtype, device):
    """torch's own samples for conv2d, each under five poolings."""
    pytest.importorskip("expecttest")
    from torch.testing._internal.common_methods_invocations import op_db

    op = next(op for op in op_db if op.name == "nn.functional.conv2d")
    poolings = [
        {"pool_kernel_size": 2},
        {"pool_kernel_size": 1},
        {"pool_kernel_size": 2, "ceil_mode": True},
        {"pool_kernel_size": (2, 1), "pool_stride": 1},
        {"pool_kernel_size": 3, "pool_padding": 1},
    ]
    compared = 0
    for s in op.sample_inputs(str(device), dtype, requires_grad=True):
        for pool in poolings:
            try:
                expected = native(s.input, *s.args, **s.kwargs, **pool)
            except RuntimeError:
                with pytest.raises(RuntimeError):
                    conv_relu_pool2d(s.input, *s.args, **s.kwargs, **pool)
                continue
            actual = conv_relu_pool2d(s.input, *s.args, **s.kwargs, **pool)
            torch.testing.assert_close(actual, expected)
            leaves = [t for t in (s.input, *s.args) if t is not None]
            for got, want in zip(
                torch.autograd.grad(actual.square().sum(), leaves),
                torch.autograd.grad(expected.square().sum(), leaves),
                strict=True,
            ):
                assert_near(got, want.double(), dtype)
            compared += 1
    assert compared >= 40


# -------------------------------------------------------------------------------------------------
# Which of a window's elements wins


@pytest.mark.parametrize("channels", [1, 8], ids=["very few", "more"])
@pytest.mark.parametrize("memory_format", FORMATS, ids=str)
def test_of_equals_the_first_wins_and_of_nan_the_last(channels, memory_format, device):
    """The filter passes on its middle, so that z is the input's first channel."""
    nan, inf = float("nan"), float("inf")
    windows = torch.tensor(
        list(itertools.product([0.0, 1.0, 2.0], repeat=4))
        + list(itertools.product([1.0, nan, inf, -inf], repeat=4))
    )
    z = windows.view(-1, 1, 1, 2, 2)
    input = torch.zeros(len(z), channels, 2, 2, device=device)
    input[:, :1] = z[:, 0]
    for some in (input[:81], input):  # with and without what is not finite
        x = some.contiguous(memory_format=memory_format)
        weight = torch.zeros(1, channels, 3, 3, device=device)
        weight[0, 0, 1, 1] = 1
        for fused, whole in ((conv_relu_pool2d, native),):
            got, want = fused(x, weight, padding=1), whole(x, weight, padding=1)
            finite = some.flatten(1).isfinite().all(1)
            torch.testing.assert_close(got[finite], want[finite])
            if len(some) > 81:
                # Zero times infinity is NaN, wherever a filter meets it.
                assert torch.equal(got.isnan(), want.isnan())
        _, codes = device.ops.conv_relu_pool_forward(x, weight, None, [1, 1], [1, 1], [1, 1], 1)
        for window, code in zip(windows[:81], codes[:81].flatten().tolist(), strict=True):
            best = int(window.clamp_min(0).argmax())
            assert code == (best if window.max() > 0 else 4)


@pytest.mark.parametrize("where", ["input", "weight", "bias", "huge input", "huge weight"])
@pytest.mark.parametrize(
    "shape",
    [
        (3, 1, 8, 8, 4, 3, 1),
        (5, 3, 8, 10, 8, 3, 1),
        (5, 8, 8, 10, 8, 3, 1),
        (2, 3, 9, 9, 4, 5, 2),
        (5, 3, 9, 9, 4, 5, 2),
        (5, 12, 9, 9, 8, 5, 2),
        (40, 8, 8, 8, 8, 3, 1),
    ],
    ids=str,
)
def test_nan_and_infinity_pass_as_in_torch(shape, where, device):
    input, weight, bias, padding = sample(shape, torch.float32, device)
    if shape[1] >= 5:  # of equals, rounding would decide which wins
        input += torch.rand_like(input)
    if where == "input":
        input[1, 0, 3, 3], input[0, 0, 0, 0] = float("inf"), float("nan")
    elif where == "weight":
        weight[1, 0, 1, 1], weight[2, 0, 0, 0] = -float("inf"), float("nan")
    elif where == "bias":
        bias[0], bias[1], bias[2] = float("nan"), float("inf"), -float("inf")
    elif where == "huge input":  # finite, and so are the sums, which Winograd's form overflows
        input[0, 0, 2, 2], input[0, 0, 2, 4], input[0, 0, 4, 2] = 1e38, -1e38, -1e38
    else:
        weight[0, 0] = 3e36
        input.mul_(1e-3)
    leaves = [t.requires_grad_() for t in (input, weight, bias)]
    output, expected = conv_relu_pool2d(*leaves, padding=padding), native(*leaves, padding=padding)
    # cuDNN multiplies the padding, too, and at some sizes only.
    pads = device.name == "cuda" and where == "weight" and shape[5] == 5
    reference = native(*(t.cpu() for t in leaves), padding=padding) if pads else expected
    assert_near(output, reference.double(), torch.float32)
    with torch.no_grad():
        evaluated = conv_relu_pool2d(*leaves, padding=padding)
    torch.testing.assert_close(evaluated, output.detach(), rtol=0, atol=0, equal_nan=True)
    if pads:
        return
    grad = (torch.randint(1, 9, output.shape, device=device) / 8).to(output)
    for actual, wanted in zip(
        torch.autograd.grad(output, leaves, grad),
        torch.autograd.grad(expected, leaves, grad),
        strict=True,
    ):
        if where.startswith("huge"):  # of equals, rounding decides which wins
            assert torch.equal(actual.isfinite(), wanted.isfinite())
        else:
            assert_near(actual, wanted.double(), torch.float32)


@pytest.mark.parametrize(("filters", "kernel"), [(2, 3), (8, 3), (12, 5)])
@pytest.mark.parametrize("channels", [4, 8])
def test_a_huge_element_that_the_filters_pass_over(channels, filters, kernel, device):
    """In Winograd's form it would enter every output of its window, and have to cancel."""
    is_wide = channels >= 5 and filters >= 8  # patches of 6 x 6, of smaller elements
    for size in (2.5e2, 2.6e2, 1e3, 1e5, 1e7, 1e9):
        input = torch.rand(80, channels, kernel + 1, kernel + 1, device=device)
        input[:, 0, 2, 2] = -size
        weight = torch.zeros(filters, channels, kernel, kernel, device=device)
        weight[1, 1, 1, 1] = weight[1, 0, 0, 0] = weight[0, 0, 0, 0] = 1
        output, expected = conv_relu_pool2d(input, weight), native(input.double(), weight.double())
        atol = 6e-4 if is_wide else 2e-4
        torch.testing.assert_close(output.double(), expected, rtol=0, atol=atol)


@pytest.mark.parametrize("shape", [(8, 16, 16, 16, 16, 3, 1), (8, 8, 9, 9, 12, 5, 2)], ids=str)
def test_large_activations_take_the_same_way_as_small_ones(shape, device):
    """A power of two scales every sum without rounding, if the sums are the same."""
    input, weight, bias, padding = sample(shape, torch.float32, device)
    results = []
    for scale in (1.0, 2.0**7, 2.0**20, 2.0**-20):
        leaves = [scale * input, weight.clone(), scale * bias]
        leaves = [t.requires_grad_() for t in leaves]
        output = conv_relu_pool2d(*leaves, padding=padding)
        grads = torch.autograd.grad(output, leaves, torch.ones_like(output))
        results.append((output / scale, grads[0], grads[1] / scale, grads[2]))
    for result in results[1:]:
        assert all(map(torch.equal, result, results[0]))


@pytest.mark.parametrize("channels", [1, 3, 8])
def test_a_huge_element_whose_windows_have_no_gradient(channels, device):
    """In Winograd's form it would enter every term of grad_weight, and have to cancel."""
    for size in (2.5e2, 1e3, 1e5, 1e7, 1e9):
        torch.manual_seed(0)
        N, K = (24, 8) if channels == 8 and device.name != "emulated" else (3, 4)
        input = torch.rand(N, channels, 12, 12, device=device)
        input[1, 0, 5, 5] = size
        weight = torch.rand(K, channels, 3, 3, device=device)
        grad = torch.rand(N, K, 6, 6, device=device)
        grad[1, :, 1:4, 1:4] = 0
        grads = []
        for f, cast in ((conv_relu_pool2d, torch.float32), (native, torch.float64)):
            leaf = weight.to(cast).requires_grad_()
            output = f(input.to(cast), leaf, padding=1)
            grads += torch.autograd.grad(output, leaf, grad.to(cast))
        torch.testing.assert_close(grads[0].double(), grads[1], rtol=1e-5, atol=1e-3)


@pytest.mark.parametrize("value", [float("inf"), float("nan"), -1e38, 1e31])
@pytest.mark.parametrize("channels", [1, 3, 8])
def test_gradients_that_are_not_finite(channels, value, device):
    N, K = (40, 8) if channels == 8 and device.name != "emulated" else (3, 4)
    input, weight, bias, _ = sample((N, channels, 10, 10, K, 3, 0), torch.float32, device)
    # No zeros, in a padding neither: torch's own kernels do not agree on zeros times infinity. And
    # no equals, of which rounding would decide which wins.
    input += 1.5 + torch.rand_like(input)
    leaves = [t.requires_grad_() for t in (weight, bias, *([input] if channels == 8 else []))]
    grads = []
    for f in (conv_relu_pool2d, native):
        output = f(input, weight, bias)
        alive = (output > 0).nonzero()
        grad = torch.ones_like(output)
        for i in (0, len(alive) // 2):
            grad[tuple(alive[i])] = value
        grads.append(torch.autograd.grad(output, leaves, grad))
    for actual, wanted in zip(*grads, strict=True):
        if value == value and abs(value) < float("inf"):
            torch.testing.assert_close(actual, wanted, rtol=1e-5, atol=abs(value) * 1e-6)
        else:
            assert torch.equal(actual.isfinite(), wanted.isfinite())


@pytest.mark.parametrize("channels", [1, 8])
def test_infinity_in_a_row_that_no_window_touches(channels, device):
    """Torch's weight gradient multiplies it by the zeros there."""
    for y, x in ((4, 4), (4, 0), (1, 4)):
        input = torch.ones(2, channels, 5, 5, device=device)
        input[1, 0, y, x] = float("inf")
        weight = torch.ones(3, channels, 3, 3, device=device, requires_grad=True)
        grads = [
            torch.autograd.grad(f(input, weight).sum(), weight)[0]
            for f in (conv_relu_pool2d, native)
        ]
        torch.testing.assert_close(*grads, equal_nan=True)


@pytest.mark.parametrize("name", ["stride", "padding", "dilation", "groups"])
def test_a_truth_is_no_number(name):
    input, weight, _, _ = sample((2, 3, 8, 8, 4, 3, 1), torch.float32)
    with pytest.raises(TypeError, match=name):
        conv_relu_pool2d(input, weight, **{name: True})
    with pytest.raises(TypeError, match="ceil_mode"):
        conv_relu_pool2d(input, weight, ceil_mode=1)


def test_codes_that_are_none_are_taken_for_dead():
    input, weight, _, _ = sample((2, 8, 8, 8, 4, 3, 1), torch.float32)
    convolution = ([1, 1], [1, 1], [1, 1], 1)
    output, codes = torch.ops.fastnet.conv_relu_pool_forward(input, weight, None, *convolution)
    grads = torch.ops.fastnet.conv_relu_pool_backward(
        torch.ones_like(output), codes.fill_(200), input, weight, *convolution, True, True, True
    )
    assert not any(grad.any() for grad in grads)


def test_bfloat16_has_kernels_of_its_own():
    """The library is many times slower, but where filters are many and windows few."""
    for C, K, is_own in ((1, 32, True), (3, 32, True), (32, 64, not MULTIPLIES_TILES),
                         (256, 512, not MULTIPLIES_BFLOAT16)):  # fmt: skip
        input, weight, bias, _ = sample((2, C, 8, 8, K, 3, 1), torch.bfloat16)
        leaves = [t.requires_grad_() for t in (input, weight, bias)]
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
            conv_relu_pool2d(*leaves, padding=1).sum().backward()
        assert any("convolution" in e.key for e in profile.key_averages()) != is_own


def test_an_infinite_gradient_leaves_the_padding_alone(device):
    """Where it is at the border, the weight's gradient is infinite, or as it was; never NaN for the
    zeros around the image."""
    for C, K, kernel in ((1, 4, 3), (3, 17, 5), (3, 4, 3), (8, 8, 3)):
        input, weight, bias, padding = sample((2, C, 8, 8, K, kernel, kernel // 2), torch.float32)
        input, weight = input.abs() + 0.125, weight.abs() + 0.125
        grad = torch.ones(2, K, 4, 4)
        grad[1, 0, 0, 0] = float("inf")
        grads = []
        for function, on in ((native, "cpu"), (conv_relu_pool2d, device)):
            leaves = [t.detach().to(on).requires_grad_() for t in (input, weight, bias)]
            output = function(*leaves, padding=padding)
            grads.append([g.cpu() for g in torch.autograd.grad(output, leaves, grad.to(on))])
        for actual, expected in zip(*reversed(grads), strict=True):
            assert torch.equal(actual.isnan(), expected.isnan())
            assert torch.equal(actual.isinf(), expected.isinf())


def test_an_output_of_one_channel_is_laid_out_as_torchs(device):
    for K in (1, 2):
        input, weight, bias, _ = sample((2, 3, 8, 8, K, 3, 1), torch.float32, device)
        input = input.contiguous(memory_format=torch.channels_last)
        output, expected = conv_relu_pool2d(input, weight, bias), native(input, weight, bias)
        assert output.stride() == expected.stride()
        torch.testing.assert_close(output, expected)


def test_scratch_memory_has_a_limit():
    """Beyond it the library takes over; what a thread keeps stays below 10 MB."""
    setup = """
from fastnet.functional import conv_relu_pool2d
def step(x, w, p):
    conv_relu_pool2d(x, w, padding=p).sum().backward()
step(torch.randn(1, 3, 8, 8), torch.randn(2, 3, 3, 3, requires_grad=True), 1)
x = torch.randn(1, 16, 512, 512)
w = torch.randn(4, 16, 3, 3, requires_grad=True)
"""
    outputs = 2 * 4 * 256 * 256 * 4 + 4 * 256 * 256
    assert peak_memory(setup, "step(x, w, 1)") < outputs + 25e6
    for shape, padding in (((1, 64, 1, 1), 300), ((1, 300, 90, 90), 1)):
        input = torch.randn(shape, requires_grad=True)
        weight = torch.randn(4, shape[1], 3, 3, requires_grad=True)
        grads = [
            torch.autograd.grad(f(input, weight, padding=padding).sum(), (input, weight))
            for f in (conv_relu_pool2d, native)
        ]
        torch.testing.assert_close(*grads, rtol=1e-3, atol=1e-3)


def test_integers_of_other_kinds(device):
    numpy = pytest.importorskip("numpy")
    input, weight, bias, _ = sample((2, 3, 8, 8, 4, 3, 1), torch.float32, device)
    expected = native(input, weight, bias, padding=1)
    for one, two in ((numpy.int64(1), numpy.int64(2)), (torch.tensor(1), torch.tensor(2))):
        actual = conv_relu_pool2d(input, weight, bias, padding=one, pool_kernel_size=two)
        torch.testing.assert_close(actual, expected)


@pytest.mark.parametrize(
    "shape", [(1, 32, 3), (3, 8, 3), (8, 8, 3), (20, 9, 3), (36, 20, 3), (24, 8, 5)], ids=str
)
@pytest.mark.parametrize("filled", ["all", "rows", "columns"])
@pytest.mark.parametrize("size", [12, 14])  # of whole tiles, and with half ones
def test_a_background_of_one_value_has_its_gradient_at_the_first(size, filled, shape, device):
    """As images of digits do: whole windows of equal sums, whatever form they were made in, next to
    others, and to the padding. The same of stripes."""
    C, K, kernel = shape
    if device.name == "emulated":
        C, K = min(C, 6), 3
    torch.manual_seed(0)
    drawn = {"all": (1, 1), "rows": (size, 1), "columns": (1, size)}[filled]
    input = torch.randn(1 if filled == "all" else 3, C, *drawn, device=device)
    input = input.expand(3, C, size, size).clone()
    input[0, :, 5, 6] += torch.randn(C, device=device)
    weight, bias = torch.randn(K, C, kernel, kernel, device=device), torch.randn(K, device=device)
    _, codes = device.ops.conv_relu_pool_forward(input, weight, bias, [1, 1], [1, 1], [1, 1], 1)
    patches = F.pad(input, (1, 1, 1, 1)).unfold(2, kernel, 1).unfold(3, kernel, 1)
    patches = patches[:, :, : 2 * codes.size(2), : 2 * codes.size(3)]
    windows = patches.unfold(2, 2, 2).unfold(3, 2, 2).flatten(6).permute(0, 2, 3, 6, 1, 4, 5)
    compared = 0
    for n, p, q in itertools.product(*(range(size) for size in windows.shape[:3])):
        window = windows[n, p, q]
        for later, earlier in ((1, 0), (3, 2), (2, 0), (3, 1)):
            if torch.equal(window[later], window[earlier]):
                compared += 1
                assert later not in codes[n, :, p, q]
    assert compared > 50


# -------------------------------------------------------------------------------------------------
# Gradients


@pytest.mark.parametrize("needs", list(itertools.product([False, True], repeat=3)), ids=str)
def test_only_wanted_gradients(needs, device):
    input, weight, bias, padding = sample((2, 3, 8, 8, 4, 3, 1), torch.float64, device)
    leaves = [input, weight, bias]
    for tensor, wanted in zip(leaves, needs, strict=True):
        tensor.requires_grad_(wanted)
    output = conv_relu_pool2d(*leaves, padding=padding)
    assert output.requires_grad == any(needs)
    if any(needs):
        output.sum().backward()
    assert tuple(t.grad is not None for t in leaves) == needs


@pytest.mark.parametrize("memory_format", FORMATS, ids=str)
def test_gradients_have_the_layout_of_what_they_are_of(memory_format, device):
    for shape in ((2, 8, 10, 10, 8, 3, 1), (2, 3, 12, 12, 4, 5, 2)):
        input, weight, bias, padding = sample(shape, torch.float32, device)
        leaves = [
            t.contiguous(memory_format=memory_format).requires_grad_() for t in (input, weight)
        ]
        output = conv_relu_pool2d(*leaves, bias, padding=padding)
        assert output.is_contiguous(memory_format=memory_format)
        for grad, leaf in zip(torch.autograd.grad(output.sum(), leaves), leaves, strict=True):
            assert grad.is_contiguous(memory_format=memory_format) or leaf.size(1) == 1


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("layouts", itertools.product(["dense", "channels_last"], repeat=2))
def test_gradients_of_many_channels_from_any_strides(layouts, dtype):
    """Also from one value expanded, which a sum gives."""
    convolution = ([1, 1], [1, 1], [1, 1], 1)
    input, weight, bias, _ = sample((20, 24, 11, 12, 17, 3, 1), dtype)
    input = lay_out(input, layouts[0])
    _, codes = torch.ops.fastnet.conv_relu_pool_forward(input, weight, bias, *convolution)
    doubles = [t.double().requires_grad_() for t in (input, weight, bias)]
    expected = of_the_winners((input, weight, bias), doubles, 1)
    for grad in (
        lay_out((torch.randint(-8, 9, codes.shape) / 8).to(dtype), layouts[1]),
        torch.tensor(0.75, dtype=dtype).expand(codes.shape),
    ):
        grads = torch.ops.fastnet.conv_relu_pool_backward(
            grad, codes, input, weight, *convolution, True, True, True
        )
        wanted = torch.autograd.grad(expected, doubles, grad.double(), retain_graph=True)
        for actual, reference in zip(grads, wanted, strict=True):
            assert_near(actual, reference, dtype, times=1 if dtype is torch.float32 else 3)


def test_inputs_are_not_written_to(device):
    input, weight, bias, padding = sample((3, 8, 12, 12, 8, 3, 1), torch.float32, device)
    leaves = [t.requires_grad_() for t in (input, weight, bias)]
    before = [t.detach().clone() for t in leaves]
    output = conv_relu_pool2d(*leaves, padding=padding)
    grad = torch.ones_like(output)
    output.backward(grad)
    assert all(map(torch.equal, before, leaves))
    assert torch.equal(grad, torch.ones_like(grad))


@pytest.mark.parametrize("needs_input", [True, False])
@pytest.mark.parametrize("shape", [SHAPES[0], SHAPES[2], (2, 20, 9, 9, 12, 5, 2)], ids=str)
def test_same_bits_every_time(shape, needs_input, device):
    input, weight, bias, padding = sample(shape, torch.float32, device)
    leaves = [t + torch.randn_like(t) for t in (input, weight, bias)]
    wanted = [t.requires_grad_() for t in leaves[0 if needs_input else 1 :]]

    def run():
        output = conv_relu_pool2d(*leaves, padding=padding)
        return [output.detach(), *torch.autograd.grad(output.square().sum(), wanted)]

    first = run()
    for again in (run() for _ in range(5 if device.name == "cpu" else 1)):
        assert all(map(torch.equal, first, again))


@pytest.mark.parametrize("count", [1, 3, 7])
@pytest.mark.parametrize("shape", [SHAPES[2], SHAPES[1], (1, 12, 30, 30, 20, 3, 1)], ids=str)
def test_any_number_of_threads(shape, count):
    *leaves, padding = sample(shape, torch.float32)
    with threads(count):
        check(leaves, torch.float32, "cpu", padding=padding)


def test_peak_memory_of_a_training_step():
    """SimpleCNN's first block, 64 x 3 x 32 x 32 to 32 channels: at most 45 % of eager's."""
    setup = """
from fastnet.functional import conv_relu_pool2d
def eager(x, w, b):
    return F.max_pool2d(F.relu(F.conv2d(x, w, b, padding=1)), 2)
def fused(x, w, b):
    return conv_relu_pool2d(x, w, b, padding=1)
def step(function, N):
    x, w, b = torch.randn(N, 3, 32, 32), torch.randn(32, 3, 3, 3), torch.randn(32)
    function(x, w.requires_grad_(), b.requires_grad_()).sum().backward()
for function in (eager, fused):
    step(function, 1)
"""
    eager = peak_memory(setup, "step(eager, 64)")
    fused = peak_memory(setup, "step(fused, 64)")
    assert fused <= 0.45 * eager, f"{fused / 1e6:.1f} MB of {eager / 1e6:.1f} MB"


# -------------------------------------------------------------------------------------------------
# torch's machinery


def spread(device, shape=(2, 3, 6, 8, 4, 3, 1)):
    """float64 leaves such that no two elements of a window come within 1e-3, nor one of zero."""
    N, C, H, W, K, kernel, padding = shape
    for _ in range(200):
        leaves = [
            torch.randn(size, dtype=torch.float64, device=device)
            for size in ((N, C, H, W), (K, C, kernel, kernel), (K,))
        ]
        z = F.conv2d(*leaves, padding=padding).cpu()
        windows = z.unfold(2, 2, 2).unfold(3, 2, 2).flatten(4)
        sorted_ = torch.cat([windows, torch.zeros_like(windows[..., :1])], -1).sort(-1).values
        if sorted_.diff(dim=-1).min() > 1e-3:
            return [t.requires_grad_() for t in leaves]
    raise AssertionError("no such leaves in 200 draws")


@pytest.mark.parametrize("shape", [(1, 2, 4, 4, 3, 3, 1), (2, 1, 6, 4, 2, 5, 2)], ids=str)
def test_gradcheck_and_gradgradcheck(shape, device):
    leaves = spread(device, shape)

    def function(*inputs):
        return conv_relu_pool2d(*inputs, padding=shape[-1])

    assert torch.autograd.gradcheck(function, leaves)
    assert torch.autograd.gradgradcheck(function, leaves)


def test_gradgradcheck_of_strided_and_grouped():
    """Whose output leaves a row over."""
    input = torch.randn(1, 4, 9, 8, dtype=torch.float64, requires_grad=True)
    weight = torch.randn(4, 2, 3, 3, dtype=torch.float64, requires_grad=True)

    def function(*inputs):
        return conv_relu_pool2d(*inputs, None, (1, 2), 1, 1, 2)

    assert torch.autograd.gradcheck(function, (input, weight))
    assert torch.autograd.gradgradcheck(function, (input, weight))


def test_batched_gradients(device):
    leaves = spread(device, (1, 2, 4, 4, 3, 3, 1))
    output, expected = conv_relu_pool2d(*leaves, padding=1), native(*leaves, padding=1)
    grads = torch.randn(3, *output.shape, dtype=torch.float64, device=device)
    torch.testing.assert_close(
        torch.autograd.grad(output, leaves, grads, is_grads_batched=True),
        torch.autograd.grad(expected, leaves, grads, is_grads_batched=True),
    )


def test_many_small_images_of_few_channels(device):
    """On CUDA a block goes on with the next filters there, the last one with fewer."""
    for channels in (1, 3):
        for dtype in (torch.float32, torch.bfloat16):
            input = torch.randint(-4, 5, (600, channels, 4, 3), device=device).to(dtype)
            weight = torch.randint(-4, 5, (70, channels, 3, 3), device=device).to(dtype) / 4
            bias = torch.randint(-4, 5, (70,), device=device).to(dtype)
            output = conv_relu_pool2d(input, weight, bias, padding=1)
            z = F.conv2d(input.double(), weight.double(), bias.double(), padding=1)
            assert_near(output, F.max_pool2d(z.relu(), 2), dtype)


@pytest.mark.parametrize("memory_format", FORMATS, ids=str)
@pytest.mark.parametrize("stride", [1, 2])
def test_opcheck(memory_format, stride, device):
    input, weight, bias, _ = sample((2, 5, 9, 10, 4, 3, 1), torch.float64, device)
    input = input.contiguous(memory_format=memory_format)
    convolution = ([stride, stride], [1, 1], [1, 1], 1)
    torch.library.opcheck(
        device.ops.conv_relu_pool_forward.default, (input, weight, bias, *convolution)
    )
    torch.library.opcheck(
        device.ops.conv_relu_pool_inference.default,
        (input.detach(), weight.detach(), bias.detach(), *convolution),
    )
    output, codes = device.ops.conv_relu_pool_forward(input, weight, bias, *convolution)
    for needs in ((True, True, True), (False, True, False), (True, False, True)):
        torch.library.opcheck(
            device.ops.conv_relu_pool_backward.default,
            (torch.randn_like(output), codes, input, weight, *convolution, *needs),
        )


@pytest.mark.parametrize("dynamic", [False, True], ids=["static", "dynamic"])
def test_compile_without_graph_breaks(dynamic):
    torch._dynamo.reset()
    module = fastnet.ConvReLUPool2d(3, 8, 3, padding=1)
    compiled = torch.compile(module, fullgraph=True, dynamic=dynamic)
    for rows in (3, 8):
        input = torch.randn(rows, 3, 10, 12, requires_grad=True)
        expected, actual = module(input), compiled(input)
        torch.testing.assert_close(actual, expected)
        leaves = [input, module.weight, module.bias]
        torch.testing.assert_close(
            torch.autograd.grad(actual.square().sum(), leaves),
            torch.autograd.grad(expected.square().sum(), leaves),
        )


def test_export():
    module = fastnet.ConvReLUPool2d(3, 8, 3, padding="same")
    input = torch.randn(4, 3, 10, 12)
    torch.testing.assert_close(torch.export.export(module, (input,)).module()(input), module(input))


def functional_cases():
    from torch.func import grad, jacrev, jvp, vmap

    def loss(f, x, w, b):
        return f(x, w, b, padding=1).square().sum()

    return {
        "grad": lambda f, x, w, b: grad(loss, argnums=(1, 2, 3))(f, x, w, b),
        "grad of grad": lambda f, x, w, b: grad(
            lambda v: grad(lambda u: loss(f, x, u, b))(v).square().sum()
        )(w),
        "per-sample grad": lambda f, x, w, b: vmap(
            lambda image: grad(lambda v: loss(f, image, v, b))(w)
        )(x),
        "jacrev": lambda f, x, w, b: jacrev(lambda v: f(x, w, v).sum((0, 2, 3)))(b),
        "jvp": lambda f, x, w, b: jvp(lambda v: f(x, v, b), (w,), (torch.ones_like(w),)),
    }


@pytest.mark.parametrize("case", functional_cases())
def test_torch_func(case):
    inputs = [t.detach() for t in spread("cpu")]
    run = functional_cases()[case]
    torch.testing.assert_close(run(conv_relu_pool2d, *inputs), run(native, *inputs))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_autocast_casts_as_conv2d_does(dtype, device):
    conv = torch.nn.Conv2d(3, 8, 3, padding=1, device=device)
    fused = fastnet.ConvReLUPool2d(3, 8, 3, padding=1, device=device)
    fused.load_state_dict(conv.state_dict())
    input = torch.randn(4, 3, 8, 8, device=device)
    with torch.autocast(device, dtype=dtype):
        expected, actual = F.max_pool2d(torch.relu(conv(input)), 2), fused(input)
    assert actual.dtype == expected.dtype == dtype
    torch.testing.assert_close(actual, expected, rtol=2e-2, atol=2e-2)
    expected.sum().backward()
    with torch.autocast(device, dtype=dtype):
        actual.sum().backward()
    assert fused.bias.grad.dtype == torch.float32
    torch.testing.assert_close(fused.bias.grad, conv.bias.grad, rtol=5e-2, atol=5e-2)


def test_autocast_leaves_float64_alone():
    double = [torch.randn(2, 3, 8, 8).double(), torch.randn(4, 3, 3, 3).double()]
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert conv_relu_pool2d(*double).dtype == torch.float64


# -------------------------------------------------------------------------------------------------
# Inputs that the kernels do not take


@pytest.mark.parametrize(
    "make",
    [
        lambda: (torch.randn(2, 3, 8, 8).half(), torch.randn(4, 3, 3, 3).half()),
        lambda: (torch.randn(2, 3, 8, 8, device="meta"), torch.randn(4, 3, 3, 3, device="meta")),
        lambda: (torch.randn(0, 3, 8, 8), torch.randn(4, 3, 3, 3)),
    ],
    ids=["float16", "meta", "no images"],
)
def test_what_torch_takes_is_taken(make):
    inputs = make()
    expected, actual = native(*inputs), conv_relu_pool2d(*inputs)
    assert (actual.device, actual.dtype) == (expected.device, expected.dtype)
    assert actual.shape == expected.shape
    if not expected.is_meta:
        torch.testing.assert_close(actual, expected)


@pytest.mark.parametrize(
    ("make", "options"),
    [
        (lambda: (torch.randn(2, 3, 8, 8), torch.randn(4, 2, 3, 3)), {}),
        (lambda: (torch.randn(2, 3, 8, 8), torch.randn(4, 3, 3, 3).double()), {}),
        (lambda: (torch.randn(2, 3, 8, 8), torch.randn(4, 3, 3, 3), torch.randn(5)), {}),
        (lambda: (torch.randn(2, 3, 2, 2), torch.randn(4, 3, 3, 3)), {}),
        (lambda: (torch.randn(2, 3, 3, 3), torch.randn(4, 3, 3, 3)), {}),  # nothing to pool
        (lambda: (torch.randn(3, 8), torch.randn(4, 3, 3, 3)), {}),
        (lambda: (torch.randn(2, 3, 0, 8), torch.randn(4, 3, 3, 3)), {"padding": 2}),
        (lambda: (torch.randn(2, 3, 8, 8), torch.randn(4, 3, 3, 3)), {"stride": 0}),
        (lambda: (torch.randn(2, 3, 8, 8), torch.randn(4, 3, 3, 3)), {"padding": -1}),
        # twice of which, in 64 bits, is -2
        (lambda: (torch.randn(2, 3, 8, 8), torch.randn(4, 3, 3, 3)), {"padding": 2**63 - 1}),
        (lambda: (torch.randn(2, 3, 8, 8), torch.randn(4, 3, 3, 3)), {"dilation": 0}),
        (lambda: (torch.randn(2, 3, 8, 8), torch.randn(4, 3, 3, 3)), {"groups": 2}),
        (lambda: (torch.randn(2, 3, 8, 8), torch.randn(4, 3, 3, 3)), {"padding": "some"}),
        (
            lambda: (torch.randn(2, 3, 8, 8), torch.randn(4, 3, 3, 3)),
            {"padding": "same", "stride": 2},
        ),
        (lambda: (torch.randn(2, 3, 8, 8), torch.randn(4, 3, 3, 3)), {"pool_kernel_size": 0}),
        (lambda: (torch.randn(2, 3, 8, 8), torch.randn(4, 3, 3, 3)), {"pool_padding": 2}),
    ],
)
def test_what_torch_rejects_is_rejected(make, options):
    inputs = make()
    with pytest.raises((RuntimeError, ValueError)) as native_error:
        native(*inputs, **options)
    with pytest.raises(native_error.type):
        conv_relu_pool2d(*inputs, **options)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"weight": torch.randn(4, 2, 3, 3)}, ["(2, 3, 8, 8)", "(4, 2, 3, 3)"]),
        ({"weight": torch.randn(4, 3, 3, 3).double()}, ["Float", "Double"]),
        ({"bias": torch.randn(5)}, ["(5)", "(4"]),
        ({"stride": [0, 1]}, ["stride", "0"]),
        ({"padding": [1, -2]}, ["padding", "-2"]),
        ({"padding": [1, 2**63 - 1]}, ["padding", str(2**63 - 1)]),
        ({"input": torch.randn(2, 3, 8)}, ["(2, 3, 8)"]),
        ({"input": torch.randn(2, 3, 3, 8)}, ["1 x 6", "2 x 2"]),
        ({"groups": 3}, ["groups", "3"]),
    ],
)
def test_raw_op_says_what_is_wrong(change, words, device):
    arguments = {
        "input": torch.randn(2, 3, 8, 8),
        "weight": torch.randn(4, 3, 3, 3),
        "bias": None,
        "stride": [1, 1],
        "padding": [0, 0],
        "dilation": [1, 1],
        "groups": 1,
    }
    arguments.update(change)
    for name in ("input", "weight", "bias"):
        if arguments[name] is not None:
            arguments[name] = arguments[name].to(device)
    with pytest.raises(RuntimeError) as caught:
        device.ops.conv_relu_pool_forward(*arguments.values())
    for word in words:
        assert word in str(caught.value)
    with pytest.raises(RuntimeError) as of_inference:
        device.ops.conv_relu_pool_inference(*arguments.values())
    assert str(of_inference.value) == str(caught.value)


# -------------------------------------------------------------------------------------------------
# Instruction sets


@pytest.mark.parametrize("isa", ["baseline", "avx2", "avx512"])
def test_every_instruction_set(isa):
    run_on_isa(isa, __file__, "cpu and (float64 or strides or nan or bits)")


# -------------------------------------------------------------------------------------------------
# The module


def test_module_is_a_convolution_whose_state_dict_loads_both_ways():
    conv, fused = torch.nn.Conv2d(3, 8, 3, padding=1), fastnet.ConvReLUPool2d(3, 8, 3, padding=1)
    assert isinstance(fused, torch.nn.Conv2d)
    fused.load_state_dict(conv.state_dict())
    conv.load_state_dict(fused.state_dict())
    input = torch.randn(5, 3, 10, 10)
    expected = F.max_pool2d(torch.relu(conv(input)), 2)
    torch.testing.assert_close(fused(input), expected)
    torch.testing.assert_close(copy.deepcopy(fused)(input), expected)
    assert "pool_kernel_size=2" in repr(fused)


@pytest.mark.parametrize("mode", ["zeros", "reflect", "replicate", "circular"])
@pytest.mark.parametrize("padding", [1, (1, 2), "same"], ids=str)
def test_padding_modes(mode, padding):
    conv = torch.nn.Conv2d(3, 8, 3, padding=padding, padding_mode=mode)
    fused = fastnet.ConvReLUPool2d(3, 8, 3, padding=padding, padding_mode=mode)
    fused.load_state_dict(conv.state_dict())
    input = torch.randn(2, 3, 8, 9)
    torch.testing.assert_close(fused(input), F.max_pool2d(torch.relu(conv(input)), 2))


def test_module_pools_as_told():
    pool = {"pool_kernel_size": 3, "pool_stride": 2, "pool_padding": 1, "ceil_mode": True}
    fused = fastnet.ConvReLUPool2d(3, 8, 5, stride=2, bias=False, dtype=torch.float64, **pool)
    input = torch.randn(2, 3, 20, 21, dtype=torch.float64)
    expected = F.max_pool2d(torch.relu(F.conv2d(input, fused.weight, stride=2)), 3, 2, 1, 1, True)
    torch.testing.assert_close(fused(input), expected)
    for words in ("pool_stride=2", "pool_padding=1", "ceil_mode=True"):
        assert words in repr(fused)
