from __future__ import annotations

import pickle
import struct
from itertools import chain

import numpy as np
import pytest
import torch

from fastnet.data import CIFAR10, Batches, load_cifar10
from fastnet.data.cifar import FILES, THINGS
from fastnet.errors import FastnetError


def batch(seed: int, count: int) -> tuple[np.ndarray, list[int]]:
    random = np.random.default_rng(seed)
    pixels = random.integers(0, 256, (count, 3072), dtype=np.uint8)
    return pixels, random.integers(0, 10, count).tolist()


def python_2_pickle(pixels: np.ndarray, labels: list[int]) -> bytes:
    """What the files themselves are: text is bytes, and numpy's names are the old ones."""

    def text(content: bytes) -> bytes:
        return b"U" + bytes((len(content),)) + content

    def integer(value: int) -> bytes:
        return b"J" + struct.pack("<i", value)

    one = integer(1)
    raw = b"T" + struct.pack("<i", pixels.nbytes) + pixels.tobytes()
    array = b"cnumpy.core.multiarray\n_reconstruct\n"
    array += b"(cnumpy\nndarray\n(" + integer(0) + b"t" + text(b"b") + b"tR"
    dtype = b"cnumpy\ndtype\n(" + text(b"u1") + integer(0) + one + b"tR"
    dtype += b"(" + integer(3) + text(b"|") + b"NNN" + integer(-1) * 2 + integer(0) + b"tb"
    shape = b"(" + b"".join(map(integer, pixels.shape)) + b"t"
    array += b"(" + one + shape + dtype + b"\x89" + raw + b"tb"
    numbers = b"](" + b"".join(map(integer, labels)) + b"e"
    return b"\x80\2}(" + text(b"data") + array + text(b"labels") + numbers + b"u."


def python_3_pickle(pixels: np.ndarray, labels: list[int]) -> bytes:
    return pickle.dumps({b"data": pixels, b"labels": labels}, protocol=2)


def binary(pixels: np.ndarray, labels: list[int]) -> bytes:
    return np.column_stack([np.array(labels, np.uint8), pixels]).tobytes()


def write(folder, encode=python_2_pickle, suffix=""):
    folder.mkdir(parents=True, exist_ok=True)
    for seed, name in enumerate(FILES):
        (folder / f"{name}{suffix}").write_bytes(encode(*batch(seed, 4 + seed)))


def test_as_torchvision_reads_it(tmp_path, monkeypatch):
    from torchvision import datasets

    write(tmp_path / "cifar-10-batches-py")
    # That would want the real files' checksums.
    monkeypatch.setattr(datasets.CIFAR10, "_check_integrity", lambda _: True)
    monkeypatch.setattr(datasets.CIFAR10, "_load_meta", lambda _: None)
    for samples, train in zip(load_cifar10(tmp_path), (True, False), strict=True):
        expected = datasets.CIFAR10(str(tmp_path), train=train)
        assert samples.inputs.dtype == torch.uint8
        assert samples.inputs.shape == ((30 if train else 9), 3, 32, 32)
        assert samples.inputs.is_contiguous()
        assert torch.equal(samples.inputs, torch.tensor(expected.data).permute(0, 3, 1, 2))
        assert samples.targets.dtype == torch.int64
        assert samples.targets.tolist() == expected.targets
        assert samples.classes == THINGS
        assert len(THINGS) == 10
        assert "CIFAR-10" in samples.source


@pytest.mark.parametrize(
    ("encode", "place", "suffix"),
    [
        (python_2_pickle, ".", ""),
        (python_3_pickle, ".", ""),
        (python_3_pickle, "cifar-10-batches-py", ""),
        (binary, ".", ".bin"),
        (binary, "cifar-10-batches-bin", ".bin"),
    ],
)
def test_every_layout_holds_the_same(tmp_path, monkeypatch, encode, place, suffix):
    monkeypatch.chdir(tmp_path)
    write(tmp_path / "data" / place, encode, suffix)
    for train, test in (load_cifar10(tmp_path / "data"), load_cifar10()):
        for samples, seeds in ((train, range(5)), (test, [5])):
            pixels, labels = zip(*(batch(seed, 4 + seed) for seed in seeds), strict=True)
            assert np.array_equal(samples.inputs.flatten(1).numpy(), np.concatenate(pixels))
            assert samples.targets.tolist() == [*chain(*labels)]


def test_fortran_order_is_understood(tmp_path):
    write(tmp_path)
    pixels, labels = batch(0, 4)
    (tmp_path / FILES[0]).write_bytes(python_3_pickle(np.asfortranarray(pixels), labels))
    train, _ = load_cifar10(tmp_path)
    assert np.array_equal(train.inputs[:4].flatten(1).numpy(), pixels)


def test_a_whole_layout_is_taken_before_a_part_of_one(tmp_path):
    write(tmp_path / "cifar-10-batches-py")
    (tmp_path / "cifar-10-batches-py" / FILES[2]).unlink()
    write(tmp_path / "cifar-10-batches-bin", binary, ".bin")
    assert len(load_cifar10(tmp_path)[0]) == 30


def test_channels_are_normalised_each(tmp_path):
    write(tmp_path)
    train, _ = CIFAR10.load(tmp_path, download=False)
    ((inputs, _),) = Batches(train, 100, CIFAR10.mean, CIFAR10.std)
    pixels = train.inputs[:, 2].double() / 255
    assert torch.allclose(inputs[:, 2].double(), (pixels - 0.4465) / 0.2616, atol=1e-5)


class Malicious:
    """Makes a folder, where it is unpickled."""

    def __init__(self, folder) -> None:
        self.folder = str(folder)

    def __reduce__(self):
        import os

        return os.mkdir, (self.folder,)


@pytest.mark.parametrize("protocol", [0, 2, 4])
def test_a_malicious_file_runs_nothing(tmp_path, protocol):
    write(tmp_path)
    victim = tmp_path / "victim"
    content = pickle.dumps({b"data": Malicious(victim), b"labels": [1]}, protocol)
    (tmp_path / FILES[3]).write_bytes(content)
    with pytest.raises(FastnetError, match=r"data_batch_4.*asks for \w+\.mkdir"):
        load_cifar10(tmp_path)
    assert not victim.exists()
    pickle.loads(content)  # which a plain reader runs
    assert victim.is_dir()


def test_attributes_of_what_is_allowed_are_refused(tmp_path):
    write(tmp_path)
    # Protocol 4 has names with dots: here ndarray.tofile.
    (tmp_path / FILES[0]).write_bytes(b"\x80\4\x8c\5numpy\x8c\x0endarray.tofile\x93.")
    with pytest.raises(FastnetError, match=r"asks for numpy\.ndarray\.tofile"):
        load_cifar10(tmp_path)


def of(**values):
    pixels, labels = batch(0, 4)
    return pickle.dumps({b"data": pixels, b"labels": labels} | {
        name.encode(): value for name, value in values.items()
    }, 2)  # fmt: skip


GOOD = python_2_pickle(*batch(0, 4))
SIZE = struct.pack("<i", 4 * 3072)
LENGTH = struct.pack("<i", 4) + b"J" + struct.pack("<i", 3072)


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"", ["cannot be read", "Ran out of input"]),
        (GOOD[:-500], ["cannot be read"]),
        (GOOD[:40], ["cannot be read"]),
        (b"<html>404\n</html>", ["cannot be read"]),
        (b"\x80\4\x8c\3a\nb\x8c\1c\x93.", ["cannot be read", "asks for"]),
        (pickle.dumps([1, 2]), ["no batch of CIFAR-10"]),
        (pickle.dumps({"data": 1, "labels": 2}), ["no batch of CIFAR-10"]),
        (pickle.dumps({b"data": 1, b"fine_labels": 2}), ["no batch of CIFAR-10"]),
        (of(data=[1, 2, 3]), ["'u1' (N, 3072)", "a list"]),
        (of(data=np.zeros((4, 3072))), ["'u1' (N, 3072)", "'f8' (4, 3072)"]),
        (of(data=np.zeros((4, 3072), np.int8)), ["'u1' (N, 3072)", "'i1' (4, 3072)"]),
        (of(data=np.zeros((4, 3, 32, 32), np.uint8)), ["(4, 3, 32, 32)"]),
        (of(data=np.zeros((0, 3072), np.uint8)), ["cannot be read", "bytes"]),
        (GOOD.replace(LENGTH, b"\5" + LENGTH[1:]), ["'u1' (5, 3072) in 12288 bytes"]),
        (GOOD.replace(SIZE, b"\1" + SIZE[1:] + b"x"), ["'u1' (4, 3072) in 12289 bytes"]),
        (of(data=np.array(7, np.uint8)), ["'u1' () in 1 bytes"]),
        (of(labels=b"\1\2\3\4"), ["no list of whole numbers"]),
        (of(labels=[1, 2.0, 3, 4]), ["no list of whole numbers"]),
        (of(labels=[1, 2, 3]), ["4 pictures", "3 labels"]),
        (of(labels=[1, 2, 3, 10]), ["label 10"]),
        (of(labels=[1, -1, 3, 4]), ["label -1"]),
    ],
    ids=[
        "empty", "truncated", "cut early", "no pickle", "line break", "list", "other keys",
        "CIFAR-100", "no array", "dtype", "sign", "dimensions", "no pictures", "length", "size",
        "number", "label bytes", "label type", "counts", "label", "negative",
    ],
)  # fmt: skip
def test_damaged_files_are_named(tmp_path, content, words):
    write(tmp_path)
    (tmp_path / FILES[1]).write_bytes(content)
    with pytest.raises(FastnetError) as caught:
        load_cifar10(tmp_path)
    for word in [str(tmp_path / FILES[1]), *words]:
        assert word in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_wrong_byte_does_no_harm(tmp_path):
    """Whatever it is: the file is read, or refused in one sentence."""
    write(tmp_path)
    content = of(data=np.zeros((1, 3072), np.uint8), labels=[3])
    ends = [*range(330), *range(len(content) - 60, len(content))]  # the rest are pixels
    random = np.random.default_rng(0)
    refusals = []
    for place in ends:
        changed = bytearray(content)
        changed[place] ^= int(random.integers(1, 256))
        (tmp_path / FILES[0]).write_bytes(changed)
        try:
            load_cifar10(tmp_path)
        except FastnetError as error:
            refusals.append(str(error))
    assert len(refusals) > len(ends) / 2
    assert all(FILES[0] in words and "\n" not in words for words in refusals)


@pytest.mark.parametrize(
    ("content", "words"), [(b"", "3073 bytes, but holds 0"), (bytes(6147), "but holds 6147")]
)
def test_damaged_binary_files_are_named(tmp_path, content, words):
    write(tmp_path, binary, ".bin")
    (tmp_path / "test_batch.bin").write_bytes(content)
    with pytest.raises(FastnetError, match=rf"test_batch\.bin .*{words}"):
        load_cifar10(tmp_path)


def test_wrong_labels_in_binary_files_are_named(tmp_path):
    write(tmp_path, binary, ".bin")
    (tmp_path / "data_batch_2.bin").write_bytes(b"\x0a" + bytes(3072))
    with pytest.raises(FastnetError, match=r"data_batch_2\.bin has the label 10"):
        load_cifar10(tmp_path)


def test_missing_files_are_named(tmp_path):
    write(tmp_path)
    (tmp_path / "data_batch_3").unlink()
    (tmp_path / "test_batch").unlink()
    with pytest.raises(FastnetError, match=r"4 of .* six files; missing: data_batch_3, test_batch"):
        load_cifar10(tmp_path)


def test_empty_folder_says_what_to_put_there(tmp_path, monkeypatch):
    with pytest.raises(FastnetError, match=r"data_batch_1, .*cifar-10-batches-py.*--download"):
        load_cifar10(tmp_path)
    monkeypatch.chdir(tmp_path)
    with pytest.raises(FastnetError, match=r"^The folder \./data has no CIFAR-10"):
        load_cifar10()


def test_what_torchvision_downloads_is_read(tmp_path, monkeypatch):
    from torchvision import datasets

    calls = []

    def download(root, download):
        calls.append((root, download))
        write(tmp_path / "cifar-10-batches-py")

    monkeypatch.setattr(datasets, "CIFAR10", download)
    assert len(load_cifar10(tmp_path, download=True)[0]) == 30
    # What is there is not downloaded again.
    load_cifar10(tmp_path, download=True)
    assert calls == [(str(tmp_path), True)]


def test_failed_download_says_what_to_do(tmp_path, monkeypatch):
    import torchvision.datasets.cifar as module

    def no_network(*_args, **_kwargs):
        raise OSError("no route to host")

    monkeypatch.setattr(module, "download_and_extract_archive", no_network)
    with pytest.raises(FastnetError, match=r"no route to host\): put data_batch_1.*yourself"):
        load_cifar10(tmp_path, download=True)
