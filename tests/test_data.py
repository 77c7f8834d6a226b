from __future__ import annotations

import gzip
import struct

import numpy as np
import pytest
import torch
from torchvision import transforms

from fastnet.data import FASHION_MNIST, MNIST, Batches, Samples, load_fashion_mnist, load_mnist
from fastnet.data.mnist import FILES
from fastnet.errors import FastnetError


def idx_bytes(array: np.ndarray) -> bytes:
    return (
        bytes((0, 0, 8, array.ndim))
        + struct.pack(f">{array.ndim}I", *array.shape)
        + array.tobytes()
    )


@pytest.fixture
def mnist_folder(tmp_path):
    """A small MNIST in IDX files: the training set gzipped, the test set not."""
    random = np.random.default_rng(0)
    for train, count in ((True, 30), (False, 7)):
        images, labels = FILES[train]
        pixels = random.integers(0, 256, (count, 28, 28), dtype=np.uint8)
        digits = random.integers(0, 10, count, dtype=np.uint8)
        for name, array in ((images, pixels), (labels, digits)):
            content = idx_bytes(array)
            if train:
                (tmp_path / f"{name}.gz").write_bytes(gzip.compress(content))
            else:
                (tmp_path / name).write_bytes(content)
    return tmp_path


def test_idx_files_as_torchvision_reads_them(mnist_folder):
    from torchvision.datasets.mnist import read_image_file, read_label_file

    train, test = load_mnist(mnist_folder)
    assert train.inputs.shape == (30, 1, 28, 28)
    assert train.inputs.dtype == torch.uint8
    assert train.targets.dtype == torch.int64
    images, labels = (str(mnist_folder / name) for name in FILES[False])
    assert torch.equal(test.inputs[:, 0], read_image_file(images))
    assert torch.equal(test.targets, read_label_file(labels))


def test_torchvisions_own_folder_layout(mnist_folder, tmp_path_factory):
    root = tmp_path_factory.mktemp("root")
    (root / "MNIST").mkdir()
    mnist_folder.rename(root / "MNIST" / "raw")
    assert len(load_mnist(root)[0]) == 30


def test_fashion_mnist_is_found_where_it_may_lie(mnist_folder, tmp_path_factory, monkeypatch):
    train, test = load_fashion_mnist(mnist_folder)
    assert (len(train), len(test)) == (30, 7)
    assert train.classes[9] == "Ankle boot"
    assert "Fashion-MNIST" in train.source
    monkeypatch.chdir(tmp_path_factory.mktemp("elsewhere"))
    monkeypatch.setattr("fastnet.data.mnist.DEBIAN_FASHION_MNIST", mnist_folder)
    assert len(load_fashion_mnist()[0]) == 30
    # Digits in a folder of torchvision's are not clothes.
    root = tmp_path_factory.mktemp("root")
    (root / "MNIST").mkdir()
    mnist_folder.rename(root / "MNIST" / "raw")
    with pytest.raises(FastnetError, match="dataset-fashion-mnist"):
        load_fashion_mnist(root)
    (root / "MNIST").rename(root / "FashionMNIST")
    assert len(load_fashion_mnist(root)[0]) == 30
    with pytest.raises(FastnetError, match="no MNIST"):
        load_mnist(root)


def test_digits_are_not_taken_for_clothes(mnist_folder, tmp_path_factory, monkeypatch):
    """Whose files have the same names."""
    here = tmp_path_factory.mktemp("here")
    monkeypatch.chdir(here)
    monkeypatch.setattr("fastnet.data.mnist.DEBIAN_FASHION_MNIST", here / "nowhere")
    mnist_folder.rename(here / "data")
    assert len(load_mnist()[0]) == 30
    with pytest.raises(FastnetError, match=r"^The folder \./data has no Fashion-MNIST"):
        load_fashion_mnist()


@pytest.mark.parametrize("dataset", [MNIST, FASHION_MNIST], ids=lambda d: d.name)
def test_pixels_have_the_mean_and_deviation_that_are_subtracted(dataset):
    try:
        train, _ = dataset.load()
    except FastnetError as error:
        pytest.skip(str(error))
    pixels = train.inputs.float() / 255
    assert pixels.mean().item() == pytest.approx(dataset.mean[0], abs=5e-3)
    assert pixels.std().item() == pytest.approx(dataset.std[0], abs=5e-3)


def spoil(name, change):
    def apply(folder):
        path = folder / name
        content = path.read_bytes()
        path.write_bytes(change(content))

    return apply


IMAGES, LABELS = FILES[False]


@pytest.mark.parametrize(
    ("damage", "words"),
    [
        (lambda f: (f / LABELS).unlink(), ["missing", LABELS]),
        (spoil(IMAGES, lambda c: c[:-5]), [IMAGES, "5483", "5488"]),
        (spoil(IMAGES, lambda c: c[:9]), [IMAGES, "header"]),
        (spoil(IMAGES, lambda c: c + b"x"), [IMAGES, "5489"]),
        (spoil(IMAGES, lambda _: b""), [IMAGES, "nothing"]),
        (spoil(IMAGES, lambda c: b"\0\0\x08\1" + c[4:]), [IMAGES, "0x00000801", "0x00000803"]),
        (spoil(f"{FILES[True][0]}.gz", lambda c: c[:100]), [".gz", "cannot be read"]),
        (spoil(f"{FILES[True][0]}.gz", lambda c: c[:60] + b"\0" * 9 + c[69:]), [".gz"]),
        (spoil(LABELS, lambda c: c[:-1] + b"\x0b"), [LABELS, "11"]),
        (spoil(LABELS, lambda c: c[:7] + b"\6" + c[8:-1]), ["7 pictures", "6 labels"]),
    ],
    ids=[
        "missing", "truncated", "header", "too long", "empty", "magic", "gzip cut", "gzip broken",
        "label", "counts",
    ],
)  # fmt: skip
def test_damaged_files_are_named(mnist_folder, damage, words):
    damage(mnist_folder)
    with pytest.raises(FastnetError) as caught:
        load_mnist(mnist_folder)
    for word in words:
        assert word in str(caught.value)
    assert "\n" not in str(caught.value)


def test_empty_folder_says_what_to_put_there(tmp_path):
    with pytest.raises(FastnetError, match="train-images-idx3-ubyte"):
        load_mnist(tmp_path)


def test_failed_download_says_what_to_do(tmp_path, monkeypatch):
    import torchvision.datasets.mnist as module

    def no_network(*_args, **_kwargs):
        raise OSError("no route to host")

    monkeypatch.setattr(module, "download_and_extract_archive", no_network)
    with pytest.raises(FastnetError, match=r"could not be downloaded.*yourself"):
        load_mnist(tmp_path, download=True)


@pytest.fixture(scope="session")
def digits():
    return load_mnist()


def test_the_digits_that_are_always_there(digits):
    train, test = digits
    assert (len(train), len(test)) == (4000, 1000)
    assert train.inputs.shape[1:] == (1, 28, 28)
    assert 20 < train.inputs.float().mean() < 50  # mostly paper, some ink
    counts = torch.bincount(torch.cat([train.targets, test.targets]))
    assert counts.tolist() == [500] * 10
    # None is in both sets.
    rows = torch.cat([train.inputs, test.inputs]).flatten(1)
    assert len({bytes(row.numpy()) for row in rows}) >= 4990


def test_batches_are_torchvisions_transforms_bit_for_bit(digits):
    _, test = digits
    transform = transforms.Compose(
        [transforms.ToTensor(), transforms.Normalize(MNIST.mean, MNIST.std)]
    )
    pictures, labels = next(iter(Batches(test, 100, MNIST.mean, MNIST.std)))
    expected = torch.stack([transform(image[0].numpy()) for image in test.inputs[:100]])
    assert torch.equal(pictures, expected)
    assert torch.equal(labels, test.targets[:100])


def small_set(count: int) -> Samples:
    images = torch.arange(count, dtype=torch.uint8).view(-1, 1, 1, 1)
    return Samples(images, torch.arange(count), ("?",) * count, "test")


def test_batches_cover_the_set_once_in_a_new_order_each_epoch():
    batches = Batches(small_set(10), 4, generator=torch.Generator().manual_seed(3))
    first, second = (torch.cat([labels for _, labels in batches]) for _ in range(2))
    assert [len(labels) for _, labels in batches] == [4, 4, 2]
    assert len(batches) == 3
    assert sorted(first.tolist()) == sorted(second.tolist()) == list(range(10))
    assert first.tolist() != second.tolist()
    for pictures, labels in batches:  # picture and label stay together
        assert torch.equal((pictures.flatten() * 255).round().long(), labels)


def test_batches_leave_the_set_as_it_was():
    images = small_set(10)
    before = images.inputs.clone()
    for pictures, _ in Batches(images, 10, (0.5,), (0.5,)):
        pictures.zero_()
    assert torch.equal(images.inputs, before)


def test_batch_size_must_be_positive():
    with pytest.raises(ValueError, match="not 0"):
        Batches(small_set(3), 0)


def test_channels_are_normalised_as_torchvision_does():
    transforms = pytest.importorskip("torchvision.transforms")
    pictures = torch.randint(0, 256, (4, 3, 5, 6), dtype=torch.uint8)
    samples = Samples(pictures, torch.arange(4), tuple("abcd"), "test")
    mean, std = (0.4914, 0.4822, 0.4465), (0.2470, 0.2435, 0.2616)
    transform = transforms.Compose([transforms.ToTensor(), transforms.Normalize(mean, std)])
    expected = torch.stack([transform(p.permute(1, 2, 0).numpy()) for p in pictures])
    (batch,) = Batches(samples, 4, mean, std)
    assert torch.equal(batch[0], expected)


@pytest.mark.parametrize("shuffled", [False, True])
def test_features_stay_as_they_are(shuffled):
    samples = Samples(torch.randn(6, 2), torch.arange(6), (), "test")
    generator = torch.Generator().manual_seed(3) if shuffled else None
    for inputs, numbers in Batches(samples, 4, (0.5,), (0.5,), generator):
        assert torch.equal(inputs, samples.inputs[numbers])


def test_a_set_in_any_memory_format_under_any_default_device():
    pictures = torch.randint(0, 256, (6, 5, 4, 3), dtype=torch.uint8).permute(0, 3, 1, 2)
    samples = Samples(pictures, torch.arange(6), (), "test")
    with torch.device("meta"):
        batches = Batches(samples, 4, (0.5,), (0.25,), torch.Generator().manual_seed(3))
    for batch, numbers in batches:
        assert torch.equal(batch, pictures[numbers].float().div(255).sub(0.5).div(0.25))


@pytest.mark.parametrize("shuffled", [False, True])
@pytest.mark.parametrize("count", [12, 13, 9])
def test_processes_share_the_batches_of_one(count, shuffled):
    def batches(**share):
        generator = torch.Generator().manual_seed(3) if shuffled else None
        return Batches(small_set(count), 4, generator=generator, **share)

    whole = batches()
    shares = [batches(rank=rank, world_size=3) for rank in range(3)]
    for number, ((_, targets), *parts) in enumerate(zip(whole, *shares, strict=True)):
        weights = [share.weight(number) for share in shares]
        held = [part for (_, part), weight in zip(parts, weights, strict=True) if weight]
        assert sorted(torch.cat(held).tolist()) == sorted(targets.tolist())
        # The mean over processes of weighted means is the mean over the batch.
        means = [w * part.double().mean() for (_, part), w in zip(parts, weights, strict=True)]
        assert sum(means).item() / 3 == pytest.approx(targets.double().mean().item())
        assert all(len(part) for _, part in parts)


@pytest.mark.parametrize("shuffled", [False, True])
def test_augmentation_sees_the_pixels(shuffled):
    seen = []

    def turn_over(pictures):
        seen.append(pictures.dtype)
        return pictures.flip(3)

    pictures = torch.randint(0, 256, (6, 1, 3, 4), dtype=torch.uint8)
    images = Samples(pictures, torch.arange(6), tuple("abcdef"), "test")
    generator = torch.Generator().manual_seed(3) if shuffled else None
    for batch, labels in Batches(images, 4, generator=generator, augment=turn_over):
        assert torch.equal(batch, pictures[labels].flip(3).float().div(255))
    assert seen == [torch.uint8] * 2
    with pytest.raises(TypeError, match=r"augment must give .* uint8, but gave torch\.float32"):
        next(iter(Batches(images, 4, augment=torch.Tensor.float)))


def test_a_few_from_everywhere():
    chosen = small_set(10).spread(4)
    assert chosen.targets.tolist() == [0, 2, 5, 7]
    assert small_set(3).spread(9).targets.tolist() == [0, 1, 2]


def test_fingerprints_tell_content_and_order():
    samples = small_set(10)
    other = Samples(samples.inputs.flip(0), samples.targets, samples.classes, "test")
    elsewhere = Samples(samples.inputs, samples.targets, samples.classes, "elsewhere")
    assert samples.fingerprint() == elsewhere.fingerprint()
    assert len({samples.fingerprint(), other.fingerprint(), samples.first(9).fingerprint()}) == 3
