"""What a scene is, how one is sampled and how it is drawn. Knows nothing of language.

A scene is a background and a few things on a 3 x 3 grid of cells, each thing moved a little off its cell's centre.
Coordinates are in cells (0..3), so a scene can be drawn at any number of pixels.
"""

import io
import math
from dataclasses import dataclass, replace

import numpy as np
from PIL import Image, ImageDraw

GRID = 3
COLOURS = {
    "red": (225, 45, 45),
    "green": (50, 185, 80),
    "blue": (60, 110, 245),
    "yellow": (250, 215, 50),
    "purple": (185, 80, 225),
    "white": (245, 245, 245),
}
SHAPES = ("circle", "square", "triangle", "star", "cross", "diamond")
SIZES = {"small": 0.28, "large": 0.42}  # half the width, in cells
BACKGROUNDS = {"black": (12, 12, 14), "grey": (52, 54, 60), "navy": (16, 24, 60)}
CURTAIN = ((120, 80, 50), (160, 112, 72))
JITTER = 0.07  # cells; small against half a cell, so that "same row" and "same column" stay clear
LAYOUTS = {"single": 0.35, "pair": 0.35, "group": 0.3}  # shares of the kinds of scene
SIDES = (1, 3, 5, 7)  # cells that are further to one side only than the middle
OPPOSITE = 0.5  # share of pairs that face each other across the middle: told by where either is, so learned first
EXTRA = 0.3  # share of pairs and groups with one more thing beside them
OVERSAMPLING = 4  # drawn larger and reduced: edges are smooth at 64 px

# Never drawn for training: what a model says of these shows whether colour and shape were learned apart.
NOVEL_COMBINATIONS = frozenset({("red", "triangle"), ("blue", "star"), ("green", "cross"), ("yellow", "circle")})


@dataclass(frozen=True)
class Thing:
    colour: str
    shape: str
    size: str
    x: float  # cells, from the left
    y: float  # cells, from the top


@dataclass(frozen=True)
class Scene:
    background: str
    things: tuple[Thing, ...]
    curtain: int | None = None  # a cell that is covered, so that nobody can tell what is there

    @property
    def signature(self) -> tuple:
        """What the scene shows, less the small shifts: two scenes of one signature count as the same scene."""
        cells = sorted((int(t.y) * GRID + int(t.x), t.colour, t.shape, t.size) for t in self.things)
        return self.background, tuple(cells), self.curtain


def _pick(rng: np.random.Generator, options):
    return options[int(rng.integers(len(options)))]


def _combination(rng: np.random.Generator, novel: bool) -> tuple[str, str]:
    """A colour and a shape; of the held-out combinations if `novel`, never of them otherwise."""
    if novel:
        return _pick(rng, sorted(NOVEL_COMBINATIONS))
    while True:
        pair = _pick(rng, tuple(COLOURS)), _pick(rng, SHAPES)
        if pair not in NOVEL_COMBINATIONS:
            return pair


def _place(rng: np.random.Generator, cell: int, combination: tuple[str, str], size: str) -> Thing:
    row, column = divmod(int(cell), GRID)
    x, y = rng.uniform(-JITTER, JITTER, 2)
    return Thing(*combination, size, column + 0.5 + float(x), row + 0.5 + float(y))


def sample_scene(rng: np.random.Generator, novel: bool = False) -> Scene:
    """A single thing, or a pair of different things that share a row or a column, or a group of two to four alike, by
    the shares in `LAYOUTS`; pairs and groups may have one more thing beside them. With `novel`, one of the combinations
    shown is a held-out one."""
    background = _pick(rng, tuple(BACKGROUNDS))
    combinations = [_combination(rng, novel)]
    while len(combinations) < 3:
        other = _combination(rng, False)
        if other not in combinations:
            combinations.append(other)
    layout = rng.choice(list(LAYOUTS), p=list(LAYOUTS.values()))
    if layout == "single":
        cells = [_pick(rng, SIDES) if rng.random() < 0.75 else int(rng.integers(GRID * GRID))]
        shown = combinations[:1]
    elif layout == "pair":
        line, (a, b) = int(rng.integers(GRID)), rng.permutation(GRID)[:2].tolist()
        if rng.random() < OPPOSITE:
            line, (a, b) = GRID // 2, rng.permutation((0, GRID - 1)).tolist()
        cells = [line * GRID + a, line * GRID + b] if rng.random() < 0.5 else [a * GRID + line, b * GRID + line]
        shown = combinations[:2]
    else:
        count = int(rng.integers(2, 5))
        cells = rng.permutation(GRID * GRID)[:count].tolist()
        shown = combinations[:1] * count
    if layout != "single" and rng.random() < EXTRA:
        cells.append(_pick(rng, [c for c in range(GRID * GRID) if c not in cells]))
        shown = [*shown, combinations[2]]
    alike = _pick(rng, tuple(SIZES))
    sizes = [alike if layout == "group" else _pick(rng, tuple(SIZES)) for _ in shown]
    return Scene(background, tuple(_place(rng, *thing) for thing in zip(cells, shown, sizes)))


def cover(scene: Scene, rng: np.random.Generator) -> Scene:
    """The scene with a curtain over one of its empty cells."""
    taken = {int(t.y) * GRID + int(t.x) for t in scene.things}
    return replace(scene, curtain=_pick(rng, [c for c in range(GRID * GRID) if c not in taken]))


def _polygon(shape: str, x: float, y: float, r: float) -> list[tuple[float, float]]:
    if shape == "square":
        s = 0.86 * r
        return [(x - s, y - s), (x + s, y - s), (x + s, y + s), (x - s, y + s)]
    if shape == "diamond":
        return [(x, y - r), (x + 0.72 * r, y), (x, y + r), (x - 0.72 * r, y)]
    if shape == "triangle":
        return [(x, y - r), (x + r, y + 0.8 * r), (x - r, y + 0.8 * r)]
    if shape == "cross":
        w = 0.34 * r
        return [
            (x - w, y - r), (x + w, y - r), (x + w, y - w), (x + r, y - w), (x + r, y + w), (x + w, y + w),
            (x + w, y + r), (x - w, y + r), (x - w, y + w), (x - r, y + w), (x - r, y - w), (x - w, y - w),
        ]  # fmt: skip
    radii = (r, 0.42 * r)
    angles = [math.pi * k / 5 - math.pi / 2 for k in range(10)]
    return [(x + radii[k % 2] * math.cos(a), y + radii[k % 2] * math.sin(a)) for k, a in enumerate(angles)]


def draw(scene: Scene, pixels: int) -> Image.Image:
    """The scene as an RGB picture of `pixels` x `pixels`."""
    side = pixels * OVERSAMPLING
    scale = side / GRID
    picture = Image.new("RGB", (side, side), BACKGROUNDS[scene.background])
    pen = ImageDraw.Draw(picture)
    for thing in scene.things:
        x, y, r = thing.x * scale, thing.y * scale, SIZES[thing.size] * scale
        if thing.shape == "circle":
            pen.ellipse((x - r, y - r, x + r, y + r), fill=COLOURS[thing.colour])
        else:
            pen.polygon(_polygon(thing.shape, x, y, r), fill=COLOURS[thing.colour])
    if scene.curtain is not None:
        row, column = divmod(scene.curtain, GRID)
        for stripe in range(8):
            left = (column + stripe / 8) * scale
            pen.rectangle((left, row * scale, left + scale / 8, (row + 1) * scale), fill=CURTAIN[stripe % 2])
    return picture.reduce(OVERSAMPLING)


def png(picture: Image.Image) -> bytes:
    out = io.BytesIO()
    picture.save(out, "PNG", compress_level=1)
    return out.getvalue()
