from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from support import threads

from fastnet.ops import gather_pictures


def drawn(count: int, *shape: int) -> torch.Tensor:
    return torch.randint(0, 256, (count, *shape), dtype=torch.uint8)


def expected(pictures, order, table):
    chosen = pictures if order is None else pictures[order]
    rows = table.expand(pictures.shape[1], 256)
    return torch.stack([row[chosen[:, c].long()] for c, row in enumerate(rows)], 1)


# One pixel; fewer than the eight that go together, and not a multiple; digits; no pixel axes;
# more pictures than a grid has rows.
SHAPES = [(3, 1, 1, 1), (5, 3, 1, 7), (9, 3, 5, 5), (70, 1, 28, 28), (4, 6), (70_000, 1, 1, 2)]


@pytest.mark.parametrize("own", [False, True], ids=["one table", "a table for each channel"])
@pytest.mark.parametrize("shape", SHAPES, ids=lambda s: "x".join(map(str, s)))
def test_has_the_tables_bits(device, shape, own):
    pictures, table = drawn(*shape), torch.randn(shape[1] if own else 1, 256)
    for order in (None, torch.randint(shape[0], (shape[0] + 2,)), torch.arange(0)):
        got = device.ops.gather_pictures(
            pictures.to(device), None if order is None else order.to(device), table.to(device)
        )
        assert torch.equal(got.cpu(), expected(pictures, order, table))


@given(st.integers(1, 40), st.integers(1, 4), st.integers(0, 70), st.integers(1, 3))
def test_any_shape(count, channels, pixels, thread_count):
    pictures, table = drawn(count, channels, pixels), torch.randn(channels, 256)
    order = torch.randperm(count)[: count // 2 + 1]
    with threads(thread_count):
        got = gather_pictures.apply(pictures, order, table)
    assert torch.equal(got, expected(pictures, order, table))


def test_strides_elsewhere_than_in_order():
    """Of pictures the native operators take them, of an order the kernel does."""
    pictures, table = drawn(6, 5, 4, 3), torch.randn(3, 256)
    turned, order = pictures.permute(0, 3, 1, 2), torch.arange(6).repeat(2)[::3]
    assert not turned.is_contiguous()
    for given_order in (None, order):
        got = gather_pictures.apply(turned, given_order, table)
        assert torch.equal(got, expected(turned, given_order, table))
    got = gather_pictures.apply(turned.contiguous(), order, table)
    assert torch.equal(got, expected(turned, order, table))


@pytest.mark.parametrize("index", [-1, 5, 1 << 40])
def test_a_picture_that_is_not_there(index):
    with pytest.raises(IndexError, match=rf"picture {index} at position 1, but there are 5"):
        gather_pictures.apply(drawn(5, 1, 2), torch.tensor([0, index]), torch.randn(1, 256))


@pytest.mark.parametrize(
    ("pictures", "order", "table", "words"),
    [
        (torch.zeros(2, 1, 3), None, torch.zeros(1, 256), "uint8"),
        (torch.zeros(2, dtype=torch.uint8), None, torch.zeros(1, 256), r"are \(2\)"),
        (drawn(2, 1, 3), torch.zeros(2), torch.zeros(1, 256), "order must be int64"),
        (drawn(2, 3, 3), None, torch.zeros(2, 256), r"\(1 or 3, 256\).* is \(2, 256\)"),
        (drawn(2, 3, 3), None, torch.zeros(3, 255), r"is \(3, 255\)"),
        (drawn(2, 3, 3), None, torch.zeros(3, 256).double(), "float32"),
    ],
    ids=["floats", "a row", "order of floats", "two tables", "a byte short", "double"],
)  # fmt: skip
def test_wrong_arguments_are_named(device, pictures, order, table, words):
    order = None if order is None else order.to(device)
    with pytest.raises(RuntimeError, match=words):
        device.ops.gather_pictures(pictures.to(device), order, table.to(device))


def test_opcheck():
    op = torch.ops.fastnet.gather_pictures.default
    arguments = drawn(5, 3, 4, 4), torch.tensor([4, 0]), torch.randn(3, 256)
    torch.library.opcheck(op, arguments)
    torch.library.opcheck(op, (arguments[0], None, arguments[2]))
