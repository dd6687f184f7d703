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
PAIRS = 0.6  # share of scenes that show single things; the others show a group of things alike
EXTRA = 0.3  # share of scenes with one more thing than the text is mostly about
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
    """Most scenes hold two single things that share a row or a column, others a group of two to four alike; some hold
    one more thing. With `novel`, one of the combinations shown is a held-out one."""
    background = _pick(rng, tuple(BACKGROUNDS))
    first = _combination(rng, novel)
    second = first
    while second == first:
        second = _combination(rng, False)
    if rng.random() < PAIRS:
        line, (a, b) = int(rng.integers(GRID)), rng.permutation(GRID)[:2]
        cells = [line * GRID + a, line * GRID + b] if rng.random() < 0.5 else [a * GRID + line, b * GRID + line]
        combinations = [first, second]
        if rng.random() < EXTRA:
            third = _combination(rng, False)
            while third in combinations:
                third = _combination(rng, False)
            combinations.append(third)
            cells.append(_pick(rng, [c for c in range(GRID * GRID) if c not in cells]))
        things = [_place(rng, c, p, _pick(rng, tuple(SIZES))) for c, p in zip(cells, combinations)]
    else:
        count = int(rng.integers(2, 5))
        extra = int(rng.random() < EXTRA)
        cells = rng.permutation(GRID * GRID)[: count + extra]
        size = _pick(rng, tuple(SIZES))
        things = [_place(rng, c, first, size) for c in cells[:count]]
        things += [_place(rng, c, second, _pick(rng, tuple(SIZES))) for c in cells[count:]]
    return Scene(background, tuple(things))


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
