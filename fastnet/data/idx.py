"""The IDX format that MNIST and Fashion-MNIST come in."""

from __future__ import annotations

import gzip
import math
import struct
import zlib
from pathlib import Path

import torch
from torch import Tensor

from fastnet.errors import FastnetError


def read_idx(path: Path, dimensions: int) -> Tensor:
    """Reads an IDX file of unsigned bytes, gzipped or not.

    The header is big-endian: two zero bytes, the element type (8: unsigned byte), the number of
    dimensions, then each dimension's size as 32 bits.

    Args:
        path: the file.
        dimensions: how many the content must have: 3 for pictures, 1 for labels.

    Returns:
        A uint8 tensor of that many dimensions.

    Raises:
        FastnetError: for a file that cannot be read, is not IDX, or is cut short.
    """
    try:
        content = path.read_bytes()
        if content[:2] == b"\x1f\x8b":
            content = gzip.decompress(content)
    except (OSError, EOFError, zlib.error) as error:
        raise FastnetError(
            f"{path} cannot be read ({error}): delete it and get it again."
        ) from error

    header = 4 + 4 * dimensions
    expected = bytes((0, 0, 8, dimensions))
    if content[:4] != expected:
        raise FastnetError(
            f"{path} is not the IDX file that it should be: it begins with "
            f"0x{content[:4].hex() or '(nothing)'}, not 0x{expected.hex()}; get it again."
        )
    if len(content) < header:
        raise FastnetError(f"{path} is cut short in its header; get it again.")
    shape = struct.unpack(f">{dimensions}I", content[4:header])
    if len(content) - header != math.prod(shape):
        raise FastnetError(
            f"{path} should hold {math.prod(shape)} bytes of data after its header, but holds "
            f"{len(content) - header}; get it again."
        )
    values = torch.frombuffer(bytearray(content), dtype=torch.uint8)
    return values[header:].view(shape)
