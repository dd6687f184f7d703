"""The synthetic scenes: every label is checked against the scene itself, and no text tells its label."""

import io
import json
from collections import Counter, defaultdict
from itertools import pairwise

import numpy as np
import pyarrow as pa
import pytest
from golden_cases import GOLDEN
from PIL import Image

from meter_fast.data.scenes import WORD_KINDS, language, tables, world, write_scenes


def read(path):
    return pa.ipc.open_file(pa.memory_map(str(path))).read_all()


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    out = tmp_path_factory.mktemp("scenes")
    write_scenes(out, train=400, val=60, test=100, seed=3)
    return out


@pytest.fixture(scope="module")
def pool():
    return tables.sample_told(300, np.random.default_rng(5), 64, set())


def test_same_seed_same_files_other_seed_other_files(folder, tmp_path):
    write_scenes(tmp_path / "again", train=400, val=60, test=100, seed=3)
    write_scenes(tmp_path / "other", train=400, val=60, test=100, seed=4)
    for path in folder.rglob("*.arrow"):
        name = path.relative_to(folder)
        assert path.read_bytes() == (tmp_path / "again" / name).read_bytes()
        assert path.read_bytes() != (tmp_path / "other" / name).read_bytes()


def test_columns_and_types_are_the_published_ones(folder):
    published = json.loads((GOLDEN / "arrow_schema.json").read_text())["files"]
    for path in folder.glob("*.arrow"):
        expected = published[path.name.replace("_0.arrow", ".arrow")]["columns"]
        written = [[f.name, str(f.type)] for f in read(path).schema]
        assert [n for n, _ in written] == [n for n, _ in expected], path.name
        for (name, ours), (_, theirs) in zip(written, expected):
            # a published table without answers has the type null; ours keeps the type of the column
            assert ours == theirs or ("test" in path.name and "null" in theirs), (path.name, name)


def test_pictures_open_and_have_the_asked_size(folder):
    for blob in read(folder / "coco_caption_karpathy_val.arrow")["image"].to_pylist()[:20]:
        picture = Image.open(io.BytesIO(blob))
        assert picture.size == (96, 96) and picture.mode == "RGB"


def test_a_picture_determines_every_word_of_a_kind(pool):
    for told in pool:
        for statement in told.statements:
            assert statement.true_of(told.scene)
            assert not any(other.true_of(told.scene) for other in language.exchanges(statement))


def test_exchanges_cover_every_word_of_the_kinds():
    thing = language.Description("red", "circle")
    relation = language.Relation(thing, "left", language.Description("blue", "star"))
    colours, shapes = len(WORD_KINDS["colour"]) - 1, len(WORD_KINDS["shape"]) - 1
    assert len(set(language.exchanges(relation))) == 2 * (colours + shapes) + len(WORD_KINDS["relation"]) - 1
    assert len(set(language.exchanges(language.Count("two", "red", "star")))) == colours + shapes + 2


def test_relations_and_counts_on_a_known_scene():
    def thing(colour, shape, x, y):
        return world.Thing(colour, shape, "small", x, y)

    scene = world.Scene(
        "grey", (thing("red", "star", 0.5, 0.5), thing("blue", "cross", 2.5, 0.55), thing("blue", "cross", 2.5, 2.5))
    )
    star, cross = language.Description("red", "star"), language.Description("blue", "cross")
    truth = {r: language.Relation(star, r, cross).true_of(scene) for r in WORD_KINDS["relation"]}
    assert truth == {"left": True, "right": False, "up": True, "down": False}
    assert language.Count("two", "blue", "cross").true_of(scene)
    assert not language.Count("three", "blue", "cross").true_of(scene)
    assert not language.Presence(star, "white").true_of(scene)


def test_words_of_a_kind_are_equally_frequent(pool):
    """So that always giving one answer scores no more than chance."""
    rng = np.random.default_rng(0)
    words = Counter(w for told in pool for text in tables.captions(told, rng) for w in text.split())
    for kind, members in WORD_KINDS.items():
        share = max(words[w] for w in members) / sum(words[w] for w in members)
        assert share < 1.45 / len(members), (kind, {w: words[w] for w in members})


def test_splits_share_no_scene_and_novel_combinations_are_held_out(folder):
    pictures = {}
    for name in ("coco_caption_karpathy_train", "coco_caption_karpathy_restval", "coco_caption_karpathy_test",
                 "coco_caption_karpathy_val", "novel/coco_caption_karpathy_test"):  # fmt: skip
        pictures[name] = read(folder / f"{name}.arrow")
    novel = {f"{colour} {shape}" for colour, shape in world.NOVEL_COMBINATIONS}
    for name, table in pictures.items():
        told = [any(n in caption for caption in captions for n in novel) for captions in table["caption"].to_pylist()]
        assert any(told) == name.startswith("novel"), name
    rng = np.random.default_rng(2)
    first = tables.sample_told(200, rng, 64, set())
    signatures = {t.scene.signature for t in first}
    second = tables.sample_told(200, rng, 64, signatures)
    assert not signatures & {t.scene.signature for t in second}


def test_vqa_answers_are_right_and_scored_as_published(pool):
    rows = list(tables.vqa_rows(pool, "train", np.random.default_rng(1)))
    yes = Counter()
    for told, row in zip(pool, rows):
        assert len(row["questions"]) == len(row["answers"]) == len(row["question_id"])
        for question, answers, labels, scores in zip(
            row["questions"], row["answers"], row["answer_labels"], row["answer_scores"]
        ):
            assert [tables.VQA_ANSWERS[label] for label in labels] == answers and scores[0] == 1.0
            words = question.rstrip("?").split()
            if question.startswith("what colour"):
                assert [t.colour for t in told.scene.things if t.shape == words[-1]] == [answers[0]]
            elif question.startswith("how many"):
                shown = sum(t.colour == words[2] and language.plural(t.shape) == words[3] for t in told.scene.things)
                assert language.COUNTS[answers[0]] == shown and answers[1] == str(shown) and scores[1] == 0.3
            elif question.startswith("is there"):
                size = words[3] if words[3] in world.SIZES else None
                shown = language.Presence(language.Description(words[-2], words[-1], size)).true_of(told.scene)
                assert answers == ["yes" if shown else "no"]
            if answers[0] in ("yes", "no"):
                yes[answers[0]] += 1
    assert 0.4 < yes["yes"] / yes.total() < 0.6
    assert all(not row["answers"] for row in tables.vqa_rows(pool[:5], "test", np.random.default_rng(1)))


def test_nlvr2_statements_are_true_as_often_as_false(folder):
    answers = defaultdict(list)
    for row in read(folder / "nlvr2_dev.arrow").to_pylist():
        for question, answer in zip(row["questions"], row["answers"]):
            answers[row["identifier"].rsplit("-", 1)[0], question].append(answer)
    assert len(answers) > 30
    assert all(sorted(both) == ["False", "True"] for both in answers.values())


def test_snli_labels_follow_from_the_picture(pool):
    rows = tables.snli_rows(pool, np.random.default_rng(1), 64)
    labels = Counter()
    for number, (told, row) in enumerate(zip(pool, rows)):
        for (_, text), label in zip(row["sentences"], row["labels"]):
            words = text.split()
            colour, shape = next((a, b) for a, b in pairwise(words) if a in world.COLOURS and b in world.SHAPES)
            shown = any((t.colour, t.shape) == (colour, shape) for t in told.scene.things)
            assert label == (2 if shown else 1 if number % 2 else 0)
            labels[label] += 1
    assert min(labels.values()) > 0.2 * labels.total()


def test_a_curtain_covers_an_empty_cell_only(pool):
    rng = np.random.default_rng(0)
    for told in pool[:50]:
        covered = world.cover(told.scene, rng)
        assert covered.curtain not in {int(t.y) * 3 + int(t.x) for t in told.scene.things}
        before, after = (np.asarray(world.draw(s, 96)).astype(int) for s in (told.scene, covered))
        row, column = divmod(covered.curtain, 3)
        changed = np.abs(before - after).sum(-1) > 0
        assert changed[row * 32 + 2 : row * 32 + 30, column * 32 + 2 : column * 32 + 30].all()


def test_numbers_that_cannot_be_met_are_refused(tmp_path):
    with pytest.raises(ValueError, match="train=3"):
        write_scenes(tmp_path, train=3)
