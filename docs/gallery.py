"""The pictures of the README's gallery: every training, run, and what it drew.

    python docs/gallery.py [NAME ...] [--fashion-mnist DIR] [--cifar-10 DIR] [--pictures DIR]

In place of CIFAR-10 and of a folder of pictures that are not named, shapes are drawn, and the
titles say so. A training whose data cannot be had keeps the picture that it has.
"""

from __future__ import annotations

import argparse
import math
import random
import tempfile
from dataclasses import replace
from pathlib import Path

import torch
from PIL import Image, ImageDraw

from fastnet.data import Samples
from fastnet.errors import FastnetError
from fastnet.recipes import COMPARISONS, RECIPES
from fastnet.recipes.run import compare_recipes, run
from fastnet.recipes.runtime import ONE_PROCESS

FOLDER = Path(__file__).parent / "gallery"
WIDTH = 720  # pixels that a picture is shrunk to
# Less than a training's own, where a picture needs no more: on drawn pictures, and on two cores.
EPOCHS = {"cats-dogs": 4, "resnet18-transfer": 4, "vgg16-transfer": 3, "vgg16-features": 10}
SHAPES = ("disc", "square", "triangle", "cross", "ring", "bar", "diamond", "frame", "half", "star")
TEMPERATURES = ("warm", "cold")


def draw(kind: str, size: int, chance: random.Random) -> Image.Image:
    """A shape of any colour, place and size before another colour; or any shape of such colours."""

    def any_colour() -> tuple[int, int, int]:
        low, high = chance.randrange(0, 100), chance.randrange(156, 256)
        channels = (high, chance.randrange(256), low)
        if kind not in TEMPERATURES:
            return tuple(chance.sample(channels, 3))
        return channels if kind == "warm" else channels[::-1]

    background, colour = any_colour(), any_colour()
    while sum(abs(a - b) for a, b in zip(background, colour, strict=True)) < 120:
        colour = any_colour()
    kind = chance.choice(SHAPES) if kind in TEMPERATURES else kind
    picture = Image.new("RGB", (size, size), background)
    pen = ImageDraw.Draw(picture)
    radius = size * chance.uniform(0.22, 0.38)
    x, y = (chance.uniform(radius, size - radius) for _ in range(2))
    box = (x - radius, y - radius, x + radius, y + radius)
    third = radius / 3

    def star(points: int, inner: float, turn: float = 0.0) -> list[tuple[float, float]]:
        corners = []
        for number in range(2 * points):
            length = radius if number % 2 == 0 else inner * radius
            angle = math.pi * number / points + turn - math.pi / 2
            corners.append((x + length * math.cos(angle), y + length * math.sin(angle)))
        return corners

    if kind == "disc":
        pen.ellipse(box, colour)
    elif kind == "square":
        pen.rectangle(box, colour)
    elif kind == "triangle":
        pen.polygon([(x, y - radius), (x - radius, y + radius), (x + radius, y + radius)], colour)
    elif kind == "cross":
        pen.rectangle((x - radius, y - third, x + radius, y + third), colour)
        pen.rectangle((x - third, y - radius, x + third, y + radius), colour)
    elif kind == "ring":
        pen.ellipse(box, outline=colour, width=max(2, int(third)))
    elif kind == "bar":
        pen.rectangle((x - radius, y - third, x + radius, y + third), colour)
    elif kind == "diamond":
        pen.polygon(star(2, math.sqrt(0.5)), colour)
    elif kind == "frame":
        pen.rectangle(box, outline=colour, width=max(2, int(third)))
    elif kind == "half":
        pen.pieslice(box, 0, 180, colour)
    else:
        pen.polygon(star(5, 0.45), colour)
    return picture


def drawn(kinds: tuple[str, ...], size: int, count: int, seed: int) -> Samples:
    """So many pictures of shapes, uint8 `(count, 3, size, size)`."""
    chance = random.Random(seed)
    targets = [chance.randrange(len(kinds)) for _ in range(count)]
    pictures = [draw(kinds[target], size, chance).tobytes() for target in targets]
    inputs = torch.frombuffer(bytearray(b"".join(pictures)), dtype=torch.uint8)
    inputs = inputs.view(count, size, size, 3).permute(0, 3, 1, 2).contiguous()
    return Samples(inputs, torch.tensor(targets), kinds, "drawn shapes")


def data_of(name: str, folders: dict[str, Path | None]) -> tuple[Samples, Samples]:
    """A training's own data set where it can be had, shapes where it cannot."""
    recipe = RECIPES[name]
    if name == "cifar-mlp" and folders["cifar-10"] is None:
        return drawn(SHAPES, 32, 8000, 0), drawn(SHAPES, 32, 1000, 1)
    if recipe.data.name in ("cats-dogs", "folder") and folders["pictures"] is None:
        size = 224 if name in ("resnet18-transfer", "vgg16-transfer") else 150
        return drawn(TEMPERATURES, size, 160, 0), drawn(TEMPERATURES, size, 60, 1)
    kind = "pictures" if recipe.data.name in ("cats-dogs", "folder") else recipe.data.name
    # Where it lies is nobody else's business.
    return tuple(
        replace(samples, source=samples.source.partition(" in ")[0])
        for samples in recipe.data.load(folders.get(kind))
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("names", nargs="*", metavar="NAME")
    for option in ("fashion-mnist", "cifar-10", "pictures"):
        parser.add_argument(f"--{option}", type=Path, metavar="DIR")
    chosen = vars(parser.parse_args())
    folders = {name.replace("_", "-"): value for name, value in chosen.items() if name != "names"}
    FOLDER.mkdir(exist_ok=True)
    for name in chosen["names"] or (*RECIPES, *COMPARISONS):
        with tempfile.TemporaryDirectory() as out:
            try:
                picture = make(name, Path(out), folders)
            except FastnetError as error:
                print(f"{name}: left out. {error}")
                continue
            shrink(picture, FOLDER / f"{name}.png")
            print(f"{name}: {FOLDER / name}.png")


def make(name: str, out: Path, folders: dict[str, Path | None]) -> Path:
    """Runs a training; returns the picture."""
    if name in COMPARISONS:
        recipes = COMPARISONS[name]
        pairs = {recipe.name: (recipe, recipe.settings(log_every=0)) for recipe in recipes}
        compare_recipes(pairs, ONE_PROCESS, out, data_of(recipes[0].name, folders))
        return out / "comparison.png"
    recipe = RECIPES[name]
    drawn_ones = {"epochs": EPOCHS.get(name), "weights": "none" if recipe.pretrained else None}
    run(
        recipe, recipe.settings(log_every=0, **drawn_ones), ONE_PROCESS, out, data_of(name, folders)
    )
    templates = out / "templates.png"
    return templates if templates.exists() else out / "overview.png"


def shrink(source: Path, target: Path) -> None:
    """Of a width and a palette that a repository can keep."""
    picture = Image.open(source).convert("RGB")
    height = round(picture.height * WIDTH / picture.width)
    picture = picture.resize((WIDTH, height), Image.Resampling.LANCZOS)
    picture.quantize(128, dither=Image.Dither.NONE).save(target, optimize=True)


if __name__ == "__main__":
    main()
