"""Writes scenes as the Arrow files that METER's and ViLT's writers make, for every task.

Files, columns and types are the published ones, so the same code reads scenes and real data. Every text is true of some
pictures and false of others with the same words; labels follow from the scene. Knows `world` and `language`.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow as pa

from meter_fast.data.scenes import language as say
from meter_fast.data.scenes.world import NOVEL_COMBINATIONS, Scene, cover, draw, png, sample_scene

CAPTIONS = 5
QUESTIONS = 4
VQA_ANSWERS = ("yes", "no", *say.WORD_KINDS["colour"], *say.WORD_KINDS["shape"], *say.COUNTS, "2", "3", "4")
NLVR2_QUESTIONS = 2
SNLI_LABELS = {"contradiction": 0, "neutral": 1, "entailment": 2}

TYPES = {
    "image": pa.binary(),
    "image_0": pa.binary(),
    "image_1": pa.binary(),
    "image_id": pa.string(),
    "caption": pa.list_(pa.string()),
    "questions": pa.list_(pa.string()),
    "identifier": pa.string(),
    "sentences": pa.list_(pa.list_(pa.string())),
    "labels": pa.list_(pa.int64()),
    "question_id": pa.list_(pa.int64()),
    "answer_labels": pa.list_(pa.list_(pa.int64())),
    "answer_scores": pa.list_(pa.list_(pa.float64())),
    "split": pa.string(),
}


@dataclass(frozen=True)
class Told:
    """A scene, the statements that its picture determines word for word, and its picture as PNG."""

    scene: Scene
    statements: tuple[say.Statement, ...]
    image: bytes


def _kind(statement: say.Statement) -> str:
    if isinstance(statement, say.Relation):
        return "place" if statement.second is None else "relation"
    return "count" if isinstance(statement, say.Count) else "presence"


def _determined(scene: Scene, rng: np.random.Generator) -> tuple[say.Statement, ...]:
    """The determined statements of a scene in the order they are told: kinds take turns, where a thing is comes twice a
    turn, as all that is said of directions rests on it."""
    by_kind: dict[str, list[say.Statement]] = {}
    for statement in say.candidates(scene, rng):
        if say.determined(statement, scene):
            by_kind.setdefault(_kind(statement), []).append(statement)
    told: list[say.Statement] = []
    while any(by_kind.values()):
        for kind in ("place", "count", "presence", "place", "relation"):
            if by_kind.get(kind):
                told.append(by_kind[kind].pop())
    return tuple(told)


def _shows_novel(scene: Scene) -> bool:
    return any((t.colour, t.shape) in NOVEL_COMBINATIONS for t in scene.things)


def sample_told(
    count: int, rng: np.random.Generator, pixels: int, exclude: set[tuple], novel: bool = False
) -> list[Told]:
    """`count` scenes of which something can be told, none with a signature in `exclude`."""
    told: list[Told] = []
    tries = 0
    while len(told) < count:
        tries += 1
        if tries > 100 * count + 1000:
            raise ValueError(f"found only {len(told)} of {count} scenes that are not in another split; ask for fewer")
        scene = sample_scene(rng, novel)
        if scene.signature in exclude or _shows_novel(scene) != novel:
            continue
        statements = _determined(scene, rng)
        if statements:
            told.append(Told(scene, statements, png(draw(scene, pixels))))
    return told


def captions(told: Told, rng: np.random.Generator, count: int = CAPTIONS) -> list[str]:
    """Up to `count` different captions, all true; when statements run out they are said again in other words."""
    texts: dict[str, None] = {}
    for turn in range(3 * count):
        if len(texts) == count:
            break
        texts[say.phrase(told.statements[turn % len(told.statements)], rng)] = None
    return list(texts)


def caption_rows(pool: list[Told], split: str, rng: np.random.Generator) -> Iterator[dict]:
    for number, told in enumerate(pool):
        name = f"scene_{split}_{number:07d}.png"
        yield {"image": told.image, "caption": captions(told, rng), "image_id": name, "split": split}


def _sayable(statement: say.Statement) -> bool:
    """Names no held-out combination: of training pictures it could only be false, so its words would tell the label."""
    if isinstance(statement, say.Relation):
        named = [d for d in (statement.first, statement.second) if d]
    else:
        named = [statement.thing if isinstance(statement, say.Presence) else statement]
    return all((d.colour, d.shape) not in NOVEL_COMBINATIONS for d in named)


def _yes_no(statement: say.Statement, scene: Scene, rng: np.random.Generator) -> tuple[str, str]:
    """A yes/no question whose answer is yes or no with equal chance: half the time one word is exchanged."""
    if rng.random() < 0.5:
        others = [s for s in say.exchanges(statement) if _sayable(s)]
        statement = others[int(rng.integers(len(others)))]
    if isinstance(statement, say.Presence):
        question = f"is there a {statement.thing.words()}?"
        statement = say.Presence(statement.thing)
    elif isinstance(statement, say.Count):
        question = f"are there exactly {statement.count} {statement.colour} {say.plural(statement.shape)}?"
    else:
        second = statement.second.words() if statement.second else "middle"
        question = f"is the {statement.first.words()} further {statement.relation} than the {second}?"
    return question, "yes" if statement.true_of(scene) else "no"


def _questions(told: Told, rng: np.random.Generator) -> list[tuple[str, dict[str, float]]]:
    """Questions with soft scores: the answer scores 1; a number in figures 0.3, as if one in ten had given it so."""
    scene = told.scene
    found: list[tuple[str, dict[str, float]]] = []
    shapes = [t.shape for t in scene.things]
    colours = [t.colour for t in scene.things]
    for thing in scene.things:
        if shapes.count(thing.shape) == 1:
            found.append((f"what colour is the {thing.shape}?", {thing.colour: 1.0}))
        if colours.count(thing.colour) == 1:
            found.append((f"what shape is the {thing.colour} thing?", {thing.shape: 1.0}))
    for statement in told.statements:
        if isinstance(statement, say.Count):
            question = f"how many {statement.colour} {say.plural(statement.shape)} are there?"
            found.append((question, {statement.count: 1.0, str(say.COUNTS[statement.count]): 0.3}))
    for statement in told.statements[:QUESTIONS]:
        question, answer = _yes_no(statement, scene, rng)
        found.append((question, {answer: 1.0}))
    unique = list(dict(found).items())
    return [unique[i] for i in rng.permutation(len(unique))[:QUESTIONS]]


def vqa_rows(pool: list[Told], split: str, rng: np.random.Generator) -> Iterator[dict]:
    """As the published files: the test split has no answers."""
    first = {"train": 0, "val": 1_000_000, "test": 2_000_000}[split]
    for number, told in enumerate(pool):
        questions = _questions(told, rng)
        scores = [list(answers.items()) for _, answers in questions] if split != "test" else []
        yield {
            "image": told.image,
            "questions": [question for question, _ in questions],
            "answers": [[answer for answer, _ in one] for one in scores],
            "answer_labels": [[VQA_ANSWERS.index(answer) for answer, _ in one] for one in scores],
            "answer_scores": [[score for _, score in one] for one in scores],
            "image_id": first + number,
            "question_id": [(first + number) * 1000 + k for k in range(len(questions))],
            "split": split,
        }


def nlvr2_rows(pool: list[Told], split: str, rng: np.random.Generator) -> Iterator[dict]:
    """Rows in twos: a pair of pictures with statements, then the same statements with the pictures swapped, where each
    is true if it was false and false if it was true. So no statement tells its label."""
    for number in range(len(pool) // 2):
        one, other = pool[2 * number], pool[2 * number + 1]
        left = [s for s in one.statements if not s.true_of(other.scene)][:NLVR2_QUESTIONS]
        right = [s for s in other.statements if not s.true_of(one.scene)][:NLVR2_QUESTIONS]
        said = [(f"in the left picture {say.phrase(s, rng, clause=True)}", True) for s in left[:1]]
        said += [(f"in the right picture {say.phrase(s, rng, clause=True)}", True) for s in right[:1]]
        said += [(f"in the right picture {say.phrase(s, rng, clause=True)}", False) for s in left[1:]]
        said += [(f"in the left picture {say.phrase(s, rng, clause=True)}", False) for s in right[1:]]
        if not said:
            continue
        for swapped, images in enumerate(((one.image, other.image), (other.image, one.image))):
            yield {
                "image_0": images[0],
                "image_1": images[1],
                "questions": [text for text, _ in said],
                "answers": [str(truth != bool(swapped)) for _, truth in said],
                "identifier": f"{split}-{number}-{swapped}",
            }


def snli_rows(pool: list[Told], rng: np.random.Generator, pixels: int) -> Iterator[dict]:
    """Hypotheses about a thing: entailed if it shows; if not, contradicted where all is visible, and neutral where a
    curtain covers a cell. Half of the pictures have a curtain, so the words alone leave all three possible."""
    for number, told in enumerate(pool):
        covered = number % 2 == 1
        scene = cover(told.scene, rng) if covered else told.scene
        image = png(draw(scene, pixels)) if covered else told.image
        hypotheses, labels = [], []
        for thing in scene.things[:2]:
            shown = say.Presence(say.Description(thing.colour, thing.shape))
            absent = [s for s in say.exchanges(shown) if _sayable(s) and not s.true_of(scene)]
            wanted = [(shown, "entailment")] if rng.random() < 1 / 3 else []
            if len(wanted) == 0 or rng.random() < 0.5:
                wanted.append((absent[int(rng.integers(len(absent)))], "neutral" if covered else "contradiction"))
            for statement, label in wanted:
                text = say.phrase(statement, rng)
                if text not in hypotheses:
                    hypotheses.append(text)
                    labels.append(SNLI_LABELS[label])
        premise = captions(told, rng, 1)[0]
        yield {"image": image, "sentences": [[premise, text] for text in hypotheses], "labels": labels}


def write_table(path: Path, rows: Iterator[dict]) -> int:
    """Writes rows as one Arrow IPC file; appears under its name only when complete. Returns the number of rows."""
    rows = list(rows)
    if not rows:
        raise ValueError(f"no rows for {path}: ask for more scenes")
    types = dict(TYPES)
    if path.name.startswith("vqav2"):
        types["image_id"] = pa.int64()
        types["answers"] = pa.list_(pa.list_(pa.string()))
    else:
        types["answers"] = pa.list_(pa.string())
    schema = pa.schema([(name, types[name]) for name in rows[0]])
    hidden = path.with_name(f".{path.name}.part")
    with pa.OSFile(str(hidden), "wb") as sink, pa.RecordBatchFileWriter(sink, schema) as writer:
        writer.write_table(pa.Table.from_pylist(rows, schema=schema))
    hidden.rename(path)
    return len(rows)


def _write_tasks(out: Path, pool: list[Told], split: str, rng: np.random.Generator, pixels: int) -> dict[str, int]:
    files = {}
    if split == "train":
        cut = max(1, len(pool) // 10)  # as Karpathy's split: a part of the training pictures is called restval
        files["coco_caption_karpathy_restval"] = caption_rows(pool[:cut], "restval", rng)
        files["coco_caption_karpathy_train"] = caption_rows(pool[cut:], "train", rng)
    else:
        files[f"coco_caption_karpathy_{split}"] = caption_rows(pool, split, rng)
    files[f"vqav2_{split}"] = vqa_rows(pool, split, rng)
    nlvr2 = {"train": "train", "val": "dev", "test": "test1"}[split]
    files[f"nlvr2_{nlvr2}"] = nlvr2_rows(pool, nlvr2, rng)
    files[f"snli_{'dev' if split == 'val' else split}"] = snli_rows(pool, rng, pixels)
    return {name: write_table(out / f"{name}.arrow", rows) for name, rows in files.items()}


def write_scenes(
    out: str | Path, *, train: int = 20000, val: int = 500, test: int = 1000, seed: int = 0, pixels: int = 96
) -> dict[str, int]:
    """Writes the scenes' Arrow files of all tasks to the folder `out`, deterministic in `seed`.

    `train`, `val` and `test` are numbers of pictures, `pixels` their width and height. `out/novel/` holds a test split
    of `test` pictures, each of which shows a combination of colour and shape that no training picture shows. No scene
    is in two splits. Returns file -> rows. Raises ValueError for numbers that cannot be met.
    """
    if min(train, val, test) < 20 or pixels < 32:
        raise ValueError(
            f"train={train} val={val} test={test} pixels={pixels}: a split needs at least 20 pictures of 32 pixels"
        )
    out = Path(out)
    (out / "novel").mkdir(parents=True, exist_ok=True)
    written: dict[str, int] = {}
    seen: set[tuple] = set()
    splits = (("test", test, False, out), ("test", test, True, out / "novel"), ("val", val, False, out))
    for index, (split, count, novel, folder) in enumerate((*splits, ("train", train, False, out))):
        rng = np.random.Generator(np.random.Philox(key=[seed, index]))
        pool = sample_told(count, rng, pixels, seen, novel)
        rows = _write_tasks(folder, pool, split, rng, pixels)
        seen.update(told.scene.signature for told in pool)
        written.update({f"{folder.relative_to(out) / name}.arrow": n for name, n in rows.items()})
    return written
