from __future__ import annotations

import os
import shutil
import sys

import numpy as np
import pytest
import torch
from PIL import Image
from torchvision import transforms

from fastnet.data import (
    CATS_DOGS_150,
    IMAGENET_150,
    IMAGENET_224,
    folders,
    load_folder,
    split_folder,
)
from fastnet.errors import FastnetError

RED, BLUE = (200, 30, 20), (20, 40, 210)


def draw(path, colour, width, height, mode="RGB"):
    """A picture of about one colour, no two rows and columns the same."""
    path.parent.mkdir(parents=True, exist_ok=True)
    across = np.linspace(-20, 20, width)[None, :, None]
    down = np.linspace(-15, 15, height)[:, None, None]
    pixels = (np.array(colour) + across + down).clip(0, 255).astype(np.uint8)
    Image.fromarray(pixels).convert(mode).save(path)
    return path


@pytest.fixture
def pictures(tmp_path):
    """Landscape and portrait, odd sizes, smaller and larger than what they become."""
    root = tmp_path / "pictures"
    draw(root / "training" / "cat" / "1.jpg", RED, 61, 40)
    draw(root / "training" / "cat" / "2.PNG", RED, 33, 57, "L")
    draw(root / "training" / "dog" / "1.png", BLUE, 45, 45, "P")
    draw(root / "training" / "dog" / "2.jpeg", BLUE, 17, 31)
    draw(root / "training" / "dog" / "3.png", BLUE, 40, 24, "RGBA")
    draw(root / "validation" / "cat" / "3.jpg", RED, 24, 24)
    draw(root / "validation" / "dog" / "4.jpg", BLUE, 25, 24)
    return root


def test_pictures_are_what_torchvision_makes_of_them(pictures):
    train, validation = load_folder(pictures, size=24)
    transform = transforms.Compose(
        [transforms.Resize(24), transforms.CenterCrop(24), transforms.PILToTensor()]
    )
    for samples, part, count in ((train, "training", 5), (validation, "validation", 2)):
        files = sorted((pictures / part).glob("*/*"))
        expected = torch.stack([transform(Image.open(file).convert("RGB")) for file in files])
        assert samples.inputs.dtype == torch.uint8
        assert samples.inputs.shape == (count, 3, 24, 24)
        assert torch.equal(samples.inputs, expected)
        assert samples.targets.dtype == torch.int64
        assert samples.classes == ("cat", "dog")
        assert [samples.classes[target] for target in samples.targets] == [
            file.parent.name for file in files
        ]
        assert str(pictures / part) in samples.source
    red, _, blue = validation.inputs.float().mean((2, 3)).T
    assert (red > blue).tolist() == [True, False]


def test_short_names_of_the_parts_will_do(pictures):
    expected, _ = load_folder(pictures, size=24)
    (pictures / "training").rename(pictures / "train")
    (pictures / "validation").rename(pictures / "val")
    train, validation = load_folder(pictures, size=24)
    assert torch.equal(train.inputs, expected.inputs)
    assert len(validation) == 2


@pytest.mark.parametrize(
    ("dataset", "size"), [(CATS_DOGS_150, 150), (IMAGENET_150, 150), (IMAGENET_224, 224)]
)
def test_data_sets_have_their_sizes(pictures, dataset, size):
    train, _ = dataset.load(pictures, download=False)
    assert train.inputs.shape == (5, 3, size, size)


def test_many_pictures_stay_in_their_order(tmp_path):
    """Several threads read them."""
    for part in ("training", "validation"):
        for number in range(60):
            Image.new("RGB", (9, 9), (number, 0, 0)).save(
                draw(tmp_path / part / "grey" / f"{number:02}.png", RED, 9, 9)
            )
    train, _ = load_folder(tmp_path, size=9)
    assert train.inputs[:, 0, 4, 4].tolist() == list(range(60))


def test_downloads_are_refused_with_the_layout(pictures):
    with pytest.raises(FastnetError, match=r"cannot be downloaded.*training/CLASS/.*validation"):
        load_folder(pictures, download=True, size=24)


def test_without_a_folder_the_option_is_named():
    with pytest.raises(FastnetError, match=r"--data-dir.*fastnet split"):
        load_folder(None, size=24)


def test_missing_parts_are_named(pictures, tmp_path):
    with pytest.raises(FastnetError, match=r"nowhere has no folder training \(or train\)"):
        load_folder(tmp_path / "nowhere", size=24)
    shutil.rmtree(pictures / "validation")
    with pytest.raises(FastnetError, match=r"no folder validation \(or val\).*fastnet split"):
        load_folder(pictures, size=24)


def test_classes_without_pictures_are_named(pictures):
    (pictures / "training" / "emu").mkdir()
    with pytest.raises(FastnetError, match=r"training must have .*for the classes emu\)\.$"):
        load_folder(pictures, size=24)
    shutil.rmtree(pictures / "training")
    (pictures / "training").mkdir()
    with pytest.raises(FastnetError, match=r"training must have a folder for each class"):
        load_folder(pictures, size=24)


def test_classes_of_the_parts_must_agree(pictures):
    draw(pictures / "validation" / "emu" / "1.png", BLUE, 9, 9)
    with pytest.raises(FastnetError, match=r"same classes.*: emu\."):
        load_folder(pictures, size=24)


@pytest.mark.parametrize("name", ["training/cat/1.jpg", "training/dog/1.png"])
@pytest.mark.parametrize("damage", [lambda c: c[: len(c) // 2], lambda _: b"words", lambda _: b""])
def test_damaged_pictures_are_named(pictures, name, damage):
    path = pictures / name
    path.write_bytes(damage(path.read_bytes()))
    with pytest.raises(FastnetError) as caught:
        load_folder(pictures, size=24)
    assert str(path) in str(caught.value)
    assert "\n" not in str(caught.value)


def test_too_large_a_set_says_how_large(pictures):
    # 1.5 * 10^15 bytes are more than a process can address.
    with pytest.raises(FastnetError, match=r"5 pictures .*memory: 1,500,000 GB"):
        load_folder(pictures, size=10_000_000)


@pytest.mark.parametrize(("module", "extra"), [("torchvision.datasets", "vision"),
                                               ("tqdm.auto", "train")])  # fmt: skip
def test_what_is_not_installed_is_named(pictures, monkeypatch, module, extra):
    monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(FastnetError, match=rf"pip install 'fastnet\[{extra}\]'"):
        load_folder(pictures, size=24)


def contents(folder) -> dict[str, bytes]:
    return {
        str(path.relative_to(folder)): path.read_bytes()
        for path in folder.rglob("*")
        if path.is_file()
    }


@pytest.fixture
def flat(tmp_path):
    """Ten cats, five dogs, two emus, and what is not to be split. Content tells them apart."""
    source = tmp_path / "flat"
    source.mkdir()
    for name, count in (("cat", 10), ("dog", 5), ("emu", 2)):
        for number in range(count):
            suffix = ("jpg", "JPG", "jpeg", "Png")[number % 4]
            (source / f"{name}.{number}.{suffix}").write_text(f"{name} {number}")
    for other in ("readme.txt", "cat.jpg", "cat.0.txt", "._cat.0.jpg"):
        (source / other).write_text(other)
    (source / "cat.11.jpg").mkdir()
    return source


OTHERS = {"readme.txt", "cat.jpg", "cat.0.txt", "._cat.0.jpg"}


def test_copies_leave_the_source_as_it_is(flat, tmp_path):
    before = contents(flat)
    out = tmp_path / "new" / "out"
    counts = split_folder(flat, out)
    assert counts == {"cat": (8, 2), "dog": (4, 1), "emu": (1, 1)}
    assert contents(flat) == before
    made = contents(out)
    # Every picture is in one part only, in its class's folder, whole.
    assert {os.path.basename(path): content for path, content in made.items()} == {
        name: content for name, content in before.items() if name not in OTHERS
    }
    assert len(made) == 17
    for path in made:
        part, name, file = path.split(os.sep)
        assert part in ("training", "validation")
        assert file.startswith(f"{name}.")
    for name, (training, validation) in counts.items():
        assert len(list((out / "training" / name).iterdir())) == training
        assert len(list((out / "validation" / name).iterdir())) == validation


def test_the_seed_decides(flat, tmp_path):
    first, again, other = (tmp_path / name for name in ("first", "again", "other"))
    split_folder(flat, first, seed=3)
    split_folder(flat, again, seed=3)
    split_folder(flat, other, seed=4)
    assert contents(first) == contents(again)
    assert contents(first).keys() != contents(other).keys()
    # A shuffle, not the first or the last ones.
    held_out = {tuple(sorted(os.listdir(out / "validation" / "cat"))) for out in (first, other)}
    assert len(held_out) == 2


@pytest.mark.parametrize("links", [True, False], ids=["links", "no links"])
def test_moving_takes_all_pictures_out(flat, tmp_path, monkeypatch, links):
    copied, moved = tmp_path / "copied", tmp_path / "moved"
    split_folder(flat, copied)
    before = contents(flat)
    cat = (flat / "cat.0.jpg").stat()
    if not links:

        def refuse(*_):
            raise OSError("Invalid cross-device link")

        monkeypatch.setattr(os, "link", refuse)
    counts = split_folder(flat, moved, move=True)
    assert counts["cat"] == (8, 2)
    assert contents(moved) == contents(copied)
    assert contents(flat) == {name: before[name] for name in OTHERS}
    (now,) = moved.rglob("cat.0.jpg")
    assert (now.stat().st_ino == cat.st_ino) is links  # no second copy, where there need not be one


def test_pictures_that_are_links_are_followed(flat, tmp_path):
    elsewhere = tmp_path / "elsewhere.jpg"
    elsewhere.write_text("emu 2")
    (flat / "emu.2.jpg").symlink_to("../elsewhere.jpg")
    split_folder(flat, tmp_path / "out", move=True)
    assert "emu 2" in (path.read_text() for path in (tmp_path / "out").rglob("emu.2.jpg"))
    assert elsewhere.read_text() == "emu 2"
    assert not (flat / "emu.2.jpg").is_symlink()


@pytest.mark.parametrize("inside", [".", "split"])
@pytest.mark.parametrize("move", [False, True])
def test_the_parts_may_lie_in_the_source(flat, inside, move):
    before = contents(flat)
    out = flat / inside
    assert split_folder(flat, out, move=move)["cat"] == (8, 2)
    made = {path: content for path, content in contents(flat).items() if os.sep in path}
    assert sorted(made.values()) == sorted(before[name] for name in before.keys() - OTHERS)
    flat_now = {path for path in contents(flat) if os.sep not in path}
    assert flat_now == (OTHERS if move else before.keys())


@pytest.mark.parametrize("validation", [0.01, 0.5, 0.99])
def test_each_class_is_in_both_parts(flat, tmp_path, validation):
    counts = split_folder(flat, tmp_path / "out", validation=validation)
    assert counts["emu"] == (1, 1)
    assert counts["cat"] == {0.01: (9, 1), 0.5: (5, 5), 0.99: (1, 9)}[validation]


def test_what_is_split_can_be_loaded(tmp_path):
    for number in range(4):
        draw(tmp_path / "flat" / f"cat.{number}.jpg", RED, 20 + number, 30)
        draw(tmp_path / "flat" / f"dog.{number}.PNG", BLUE, 30, 20 + number)
    split_folder(tmp_path / "flat", tmp_path, validation=0.25)
    train, validation = load_folder(tmp_path, size=16)
    assert train.targets.tolist() == [0, 0, 0, 1, 1, 1]
    assert validation.targets.tolist() == [0, 1]


@pytest.mark.parametrize("part", ["training", "validation"])
@pytest.mark.parametrize("as_file", [False, True])
def test_nothing_is_written_over(flat, tmp_path, part, as_file):
    out = tmp_path / "out"
    own = out / part if as_file else out / part / "mine.txt"
    own.parent.mkdir(parents=True)
    own.write_text("mine")
    before = contents(tmp_path)
    with pytest.raises(FastnetError, match=rf"{part} is there already"):
        split_folder(flat, out, move=True)
    assert contents(tmp_path) == before
    assert {path.name for path in out.iterdir()} == {part}


def test_empty_parts_are_filled(flat, tmp_path):
    (tmp_path / "out" / "training").mkdir(parents=True)
    assert split_folder(flat, tmp_path / "out")["emu"] == (1, 1)


def test_a_file_that_comes_in_between_is_kept(tmp_path):
    """As on a file system to which Cat.0.jpg and cat.0.jpg are the same."""
    new, old = tmp_path / "new.jpg", tmp_path / "old.jpg"
    new.write_text("new")
    old.write_text("old")
    for link in (False, True):
        with pytest.raises(FileExistsError):
            folders._bring(new, old, link=link)
    assert (new.read_text(), old.read_text()) == ("new", "old")


@pytest.mark.parametrize("stop", [OSError("No space left on device"), KeyboardInterrupt()])
@pytest.mark.parametrize("move", [False, True])
def test_interrupted_work_leaves_the_source_whole(flat, tmp_path, monkeypatch, stop, move):
    before = contents(flat)
    copyfile, calls = shutil.copyfile, []

    def interrupted(source, target):
        calls.append(source)
        if len(calls) == 9:
            target.write_text("hal")
            raise stop
        return copyfile(source, target)

    def refuse(*_):
        raise OSError("Invalid cross-device link")

    monkeypatch.setattr(os, "link", refuse)
    monkeypatch.setattr(shutil, "copyfile", interrupted)
    out = tmp_path / "out"
    if isinstance(stop, OSError):
        with pytest.raises(FastnetError, match="No space left on device"):
            split_folder(flat, out, move=move)
    else:
        with pytest.raises(KeyboardInterrupt):
            split_folder(flat, out, move=move)
    assert contents(flat) == before
    # A part of the pictures would pass for the whole.
    assert not contents(out)
    monkeypatch.undo()
    assert split_folder(flat, out)


@pytest.mark.parametrize("validation", [0, 1, -0.5, 20, float("nan")])
def test_the_share_must_be_one(flat, tmp_path, validation):
    with pytest.raises(FastnetError, match=f"between 0 and 1, not {validation}"):
        split_folder(flat, tmp_path / "out", validation=validation)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("names", "words"),
    [
        ([], "but has nothing"),
        ([".DS_Store", "IMG_1.jpg", "IMG_2.jpg"], r"cat\.0\.jpg.*but has IMG_1\.jpg"),
        (["cat.0.txt", "dog.0.txt"], r"but has cat\.0\.txt"),
        (["cat.0.jpg", "cat.1.jpg"], "one class only, cat"),
        (["cat.0.jpg", "cat.1.jpg", "dog.0.jpg"], r"one picture of dog only, dog\.0\.jpg"),
    ],
    ids=["empty", "other names", "no pictures", "one class", "one picture"],
)
def test_what_cannot_be_split_is_told(tmp_path, names, words):
    source, out = tmp_path / "flat", tmp_path / "out"
    source.mkdir()
    for name in names:
        (source / name).write_text("picture")
    with pytest.raises(FastnetError, match=words) as caught:
        split_folder(source, out)
    assert str(source) in str(caught.value)
    assert not out.exists()


def test_a_missing_folder_is_named(tmp_path):
    with pytest.raises(FastnetError, match=r"nowhere is no folder .*No such file"):
        split_folder(tmp_path / "nowhere", tmp_path / "out")
    (tmp_path / "file").write_text("")
    with pytest.raises(FastnetError, match=r"file is no folder .*Not a directory"):
        split_folder(tmp_path / "file", tmp_path / "out")
