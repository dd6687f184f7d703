"""What can be said of a scene, and whether it is true. Knows `world`; knows nothing of files.

A statement is a small tree of words with a truth value in every scene. Its words of the four kinds (colour, shape,
count, relation) can be exchanged, which makes false statements, and shows whether a picture determines a masked word:
a caption is only used if no other word of the kind in its place would also be true.

Sentence frames fit every word of a kind alike ("further left than" / "further up than", no "an"), so that a hidden
word cannot be told from the words around it.
"""

from dataclasses import dataclass, replace

import numpy as np

from meter_fast.data.scenes.world import COLOURS, GRID, SHAPES, Scene, Thing

COUNTS = {"two": 2, "three": 3, "four": 4}
RELATIONS = {"left": (-1, 0), "right": (1, 0), "up": (0, -1), "down": (0, 1)}
WORD_KINDS: dict[str, tuple[str, ...]] = {
    "colour": tuple(COLOURS),
    "shape": SHAPES,
    "count": tuple(COUNTS),
    "relation": tuple(RELATIONS),
}
MIDDLE = (GRID / 2, GRID / 2)
CLEAR = 0.5  # cells: how much further a thing must be for "further left than" to be said


def plural(shape: str) -> str:
    return shape + ("es" if shape.endswith("s") else "s")


@dataclass(frozen=True)
class Description:
    """A colour and a shape, and perhaps a size."""

    colour: str
    shape: str
    size: str | None = None

    def fits(self, thing: Thing) -> bool:
        return (self.colour, self.shape) == (thing.colour, thing.shape) and self.size in (None, thing.size)

    def words(self) -> str:
        return " ".join(filter(None, (self.size, self.colour, self.shape)))


@dataclass(frozen=True)
class Presence:
    thing: Description
    background: str | None = None

    def true_of(self, scene: Scene) -> bool:
        return any(map(self.thing.fits, scene.things)) and self.background in (None, scene.background)


@dataclass(frozen=True)
class Count:
    count: str
    colour: str
    shape: str

    def true_of(self, scene: Scene) -> bool:
        return COUNTS[self.count] == sum((t.colour, t.shape) == (self.colour, self.shape) for t in scene.things)


@dataclass(frozen=True)
class Relation:
    """One thing is further left, right, up or down than another, or than the middle of the picture (`second` None)."""

    first: Description
    relation: str
    second: Description | None

    def true_of(self, scene: Scene) -> bool:
        dx, dy = RELATIONS[self.relation]
        others = [(t.x, t.y) for t in scene.things if self.second.fits(t)] if self.second else [MIDDLE]
        return any(
            (a.x - x) * dx + (a.y - y) * dy > CLEAR for a in filter(self.first.fits, scene.things) for x, y in others
        )


Statement = Presence | Count | Relation


def exchanges(statement: Statement) -> list[Statement]:
    """Every statement that differs in exactly one word of one kind."""

    def of(description: Description) -> list[Description]:
        return [replace(description, colour=c) for c in COLOURS if c != description.colour] + [
            replace(description, shape=s) for s in SHAPES if s != description.shape
        ]

    if isinstance(statement, Presence):
        return [replace(statement, thing=d) for d in of(statement.thing)]
    if isinstance(statement, Count):
        alone = of(Description(statement.colour, statement.shape))
        return [replace(statement, count=n) for n in COUNTS if n != statement.count] + [
            replace(statement, colour=d.colour, shape=d.shape) for d in alone
        ]
    return (
        [replace(statement, first=d) for d in of(statement.first)]
        + [replace(statement, second=d) for d in (of(statement.second) if statement.second else ())]
        + [replace(statement, relation=r) for r in RELATIONS if r != statement.relation]
    )


def determined(statement: Statement, scene: Scene) -> bool:
    """True of the scene, and with any one word of a kind exchanged no longer true of it."""
    return statement.true_of(scene) and not any(other.true_of(scene) for other in exchanges(statement))


def candidates(scene: Scene, rng: np.random.Generator) -> list[Statement]:
    """Statements to try on a scene, in random order: relations to each other and the middle, counts, presences."""
    found: list[Statement] = []
    things = scene.things
    for a in things:
        for b in things:
            if (a.colour, a.shape) != (b.colour, b.shape):
                first = Description(a.colour, a.shape, a.size if rng.random() < 0.25 else None)
                second = Description(b.colour, b.shape, b.size if rng.random() < 0.25 else None)
                found += [Relation(first, relation, second) for relation in RELATIONS]
    for thing in things:
        found += [Relation(Description(thing.colour, thing.shape), relation, None) for relation in RELATIONS]
    for thing in {(t.colour, t.shape): t for t in things}.values():
        found += [Count(count, thing.colour, thing.shape) for count in COUNTS]
        size = thing.size if rng.random() < 0.5 else None
        background = scene.background if rng.random() < 0.5 else None
        found.append(Presence(Description(thing.colour, thing.shape, size), background))
    unique = list(dict.fromkeys(found))
    return [unique[i] for i in rng.permutation(len(unique))]


PRESENCE = ("a {thing}", "there is a {thing}", "the picture shows a {thing}", "this is a {thing}")
WHERE = ("{} on a {background} background", "{} drawn on {background}")
COUNT = (
    "{count} {things}",
    "there are {count} {things}",
    "the picture shows {count} {things}",
    "exactly {count} {things}",
)
RELATION = (
    "a {first} further {relation} than {second}",
    "there is a {first} further {relation} than {second}",
    "a {first} is further {relation} than {second}",
    "the {first} is further {relation} than {second}",
)
CLAUSES = 2  # the first frames of each also read well after "in the left picture"


def phrase(statement: Statement, rng: np.random.Generator, clause: bool = False) -> str:
    """The statement as a sentence (or a `clause` of one); phrasing varies, its words of the four kinds do not."""

    def frame(frames: tuple[str, ...]) -> str:
        return frames[int(rng.integers(CLAUSES if clause else len(frames)))]

    if isinstance(statement, Presence):
        sentence = frame(PRESENCE).format(thing=statement.thing.words())
        where = WHERE[int(rng.integers(len(WHERE)))]
        return where.format(sentence, background=statement.background) if statement.background else sentence
    if isinstance(statement, Count):
        return frame(COUNT).format(count=statement.count, things=f"{statement.colour} {plural(statement.shape)}")
    second = f"a {statement.second.words()}" if statement.second else "the middle"
    return frame(RELATION).format(first=statement.first.words(), relation=statement.relation, second=second)
