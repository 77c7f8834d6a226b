from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from support import assert_kernel_stops, threads

from fastnet.ops import gather_pictures


def drawn(count: int, *shape: int) -> torch.Tensor:
    return torch.randint(0, 256, (count, *shape), dtype=torch.uint8)


def expected(pictures, order, table):
    chosen = pictures if order is None else pictures[order]
    rows = table.expand(pictures.shape[1], 256)
    own = [row[chosen[:, c].long()] for c, row in enumerate(rows)]
    return torch.stack(own, 1) if own else chosen.float()


# One pixel; fewer than the eight that go together, and not a multiple; digits; no pixel axes; a
# channel longer than what is fetched ahead; more pictures than the CUDA kernel's grid has rows; no
# channel, and no pixel.
SHAPES = [
    (3, 1, 1, 1), (5, 3, 1, 7), (9, 3, 5, 5), (70, 1, 28, 28), (4, 6), (3, 2, 70, 70),
    (2100, 1, 1, 2), (3, 0, 4), (3, 2, 0),
]  # fmt: skip


@pytest.mark.parametrize("own", [False, True], ids=["one table", "a table for each channel"])
@pytest.mark.parametrize("shape", SHAPES, ids=lambda s: "x".join(map(str, s)))
def test_has_the_tables_bits(device, shape, own):
    pictures, table = drawn(*shape), torch.randn(shape[1] if own else 1, 256)
    for order in (None, torch.randint(shape[0], (shape[0] + 2,)), torch.arange(0)):
        got = device.ops.gather_pictures(
            pictures.to(device), None if order is None else order.to(device), table.to(device)
        )
        assert torch.equal(got.cpu(), expected(pictures, order, table))


@given(st.integers(1, 40), st.integers(1, 4), st.integers(0, 3000), st.integers(1, 3))
def test_any_shape(count, channels, pixels, thread_count):
    pictures, table = drawn(count, channels, pixels), torch.randn(channels, 256)
    order = torch.randperm(count)[: count // 2 + 1]
    with threads(thread_count):
        got = gather_pictures.apply(pictures, order, table)
    assert torch.equal(got, expected(pictures, order, table))


@pytest.mark.parametrize("chosen", [None, [5, 0, 0, 3, 1]], ids=["all", "some"])
def test_any_strides_and_no_kernel(chosen):
    pictures, table = drawn(6, 5, 4, 3).permute(0, 3, 1, 2), torch.randn(3, 256)
    order = None if chosen is None else torch.tensor(chosen).repeat_interleave(2)[::2]
    wanted = expected(pictures, order, table)
    assert torch.equal(gather_pictures.apply(pictures, order, table), wanted)
    assert torch.equal(gather_pictures.apply(pictures.contiguous(), order, table), wanted)
    some = pictures if order is None else pictures[order]
    assert torch.equal(gather_pictures.native(some, table), wanted)
    shared = expected(pictures, order, table[:1])
    assert torch.equal(gather_pictures.native(some, table[:1]), shared)


@pytest.mark.parametrize("index", [-1, 5, 1 << 40])
def test_a_picture_that_is_not_there(index):
    with pytest.raises(IndexError, match=rf"picture {index} at position 1, but there are 5"):
        gather_pictures.apply(drawn(5, 1, 2), torch.tensor([0, index]), torch.randn(1, 256))


def test_cuda_kernels_stop_at_a_picture_that_is_not_there(device):
    program = """
pictures = torch.zeros(5, 1, 2, dtype=torch.uint8, device=device)
order, table = (t.to(device) for t in (torch.tensor([0, 5]), torch.zeros(1, 256)))
ops.gather_pictures(pictures, order, table)
"""
    assert_kernel_stops(device, program, "names no picture")


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"pictures": torch.zeros(2, 3, 4)}, r"uint8, but are \(2, 3, 4\) of Float"),
        ({"pictures": drawn(2)}, r"are \(2\) of Byte"),
        ({"pictures": drawn(4, 3, 2).transpose(0, 2)}, "pictures must be contiguous"),
        ({"order": torch.zeros(2)}, r"int64, but is \(2\) of Float"),
        ({"order": torch.zeros(2, 1).long()}, r"one dimension and int64, but is \(2, 1\)"),
        ({"table": torch.zeros(2, 256)}, r"\(1 or 3, 256\) of float32, but is \(2, 256\)"),
        ({"table": torch.zeros(3, 255)}, r"is \(3, 255\)"),
        ({"table": torch.zeros(3, 256).double()}, "of Double"),
        ({"table": torch.zeros(256, 3).t()}, "table must be contiguous"),
    ],
    ids=["floats", "a row", "strides", "order of floats", "order of two dimensions", "two tables",
         "a byte short", "double", "a strided table"],
)  # fmt: skip
def test_wrong_arguments_are_named(device, change, words):
    arguments = {"pictures": drawn(2, 3, 4), "order": None, "table": torch.zeros(3, 256), **change}
    arguments = {k: v if v is None else v.to(device) for k, v in arguments.items()}
    with pytest.raises(RuntimeError, match=words):
        device.ops.gather_pictures(*arguments.values())


def test_tensors_on_two_devices_are_refused():
    if not torch.cuda.is_available():
        pytest.skip("no NVIDIA GPU here")
    pictures, table = drawn(2, 3, 4), torch.zeros(3, 256)
    for order, other in ((None, table), (torch.arange(2), table.cuda())):
        with pytest.raises(RuntimeError, match="different devices"):
            gather_pictures.apply(pictures.cuda(), order, other)


def test_opcheck():
    op = torch.ops.fastnet.gather_pictures.default
    arguments = drawn(5, 3, 4, 4), torch.tensor([4, 0]), torch.randn(3, 256)
    torch.library.opcheck(op, arguments)
    torch.library.opcheck(op, (arguments[0], None, arguments[2]))
