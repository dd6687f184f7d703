"""Tables of questions, their label space, and the batches made of them."""

import json
import shutil
from collections import Counter
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
import torch
from golden_cases import GOLDEN
from making import BAD_PICTURES, WORDS, backend, picture, write_table
from transformers import PreTrainedTokenizerFast

from meter_fast.data.about_pictures import split_loader
from meter_fast.data.answers import Answers, AnswersError, find_answers, names_in_tables, read_answers
from meter_fast.data.batch import VqaBatch
from meter_fast.data.loader import TrainingLoader
from meter_fast.data.order import OrderError, SampleOrder, micro_slices
from meter_fast.data.question_tables import open_questions
from meter_fast.data.questions import QuestionAssembler
from meter_fast.data.samples import BadDataError
from meter_fast.data.sources import SourceError
from meter_fast.data.tables import TableError
from meter_fast.data.text import TextPipeline
from meter_fast.data.tokenizer import load_tokenizer

ARROW = GOLDEN / "arrow"
DATASETS = json.loads((GOLDEN / "datasets.json").read_text())["sets"]
NAMES = ("yes", "no", "red", "two", "2")
TYPES = {
    "image": pa.binary(),
    "questions": pa.list_(pa.string()),
    "answers": pa.list_(pa.list_(pa.string())),
    "answer_labels": pa.list_(pa.list_(pa.int64())),
    "answer_scores": pa.list_(pa.list_(pa.float64())),
    "image_id": pa.int64(),
    "question_id": pa.list_(pa.int64()),
    "split": pa.string(),
}


def rows_of_pictures(count: int, each: int = 3) -> list[dict]:
    """Pictures with `each` questions; the last question of every fourth picture has no answer."""
    rows = []
    for n in range(count):
        chance = np.random.default_rng(n)
        labels = [sorted({int(chance.integers(5)), int(chance.integers(5))}) for _ in range(each)]
        if n % 4 == 3:
            labels[-1] = []
        rows.append(
            {
                "image": picture(n),
                "questions": [
                    " ".join(chance.choice(WORDS, chance.integers(3, 9))) + f" {n} {k}?" for k in range(each)
                ],
                "answers": [[NAMES[label] for label in one] for one in labels],
                "answer_labels": labels,
                "answer_scores": [[float(chance.choice([0.3, 0.6, 1.0])) for _ in one] for one in labels],
                "image_id": n,
                "question_id": [1000 * n + k for k in range(each)],
                "split": "train",
            }
        )
    return rows


def write_questions(path: Path, rows: list[dict], rows_per_batch: int | None = None, **types: pa.DataType) -> Path:
    schema = pa.schema([(name, types.get(name, TYPES[name])) for name in rows[0]])
    return write_table(path, pa.Table.from_pylist(rows, schema=schema), rows_per_batch)


def assembler_of(sources, tokenizer: PreTrainedTokenizerFast, **options: object) -> QuestionAssembler:
    return QuestionAssembler(sources, TextPipeline(tokenizer, 16), backend(), 3, len(NAMES), **options)


def told(batches: list[VqaBatch]) -> list[tuple]:
    """What each question amounts to, free of padding and of how pictures are shared."""
    return [
        (
            int(batch.sample_ids[n]),
            int(batch.question_ids[n]),
            batch.text_ids[n][batch.text_mask[n]].tolist(),
            batch.targets[n].tolist(),
            batch.images[batch.image_rows[n]].numpy().tobytes(),
        )
        for batch in batches
        for n in range(len(batch))
    ]


def global_batches(sources, tokenizer, steps: tuple[int, int], world: int = 1, micro: int = 24, size: int = 24):
    """The global batches of a range of steps, put together from all ranks, and the loaders."""
    loaders = []
    for rank in range(world):
        order, slices = SampleOrder(sources.sizes, 3, size), micro_slices(size, world, micro, rank, pairs=False)
        loaders.append(TrainingLoader(order, assembler_of(sources, tokenizer), slices, 0, 1, max_bad_share=0.9))
    together = []
    for parts in zip(*(loader.steps(*steps) for loader in loaders), strict=True):
        together.append(told([batch for several in zip(*parts, strict=True) for batch in several]))
    return together, loaders


# ------------------------------------------------------------------------------------------------------------- tables


@pytest.mark.parametrize("split", ["train", "val", "test"])
def test_items_are_those_of_the_published_data_set(split: str, tmp_path: Path) -> None:
    golden = DATASETS[f"vqa.{split}"]
    sources = open_questions(["vqa"], ARROW, split)
    assert len(sources) == golden["items"]
    assert sources.coverage()[0]["pictures"] == golden["images"]
    assert [file.stem for file in sources.tables[0].files] == golden["names"]
    shutil.copy(GOLDEN / "tokenizers" / "vocab.txt", tmp_path)
    text = TextPipeline(load_tokenizer(tmp_path), 16)
    compared = 0
    places = list(zip(sources.image_ids(np.arange(len(sources))).tolist(), _numbers(sources), strict=True))
    for row in golden["rows"]:
        question = sources.read(places.index(tuple(row["index"])))
        assert (question.text, question.question_id) == (row["text"], row["qid"])
        assert list(question.labels) == row["vqa_labels"] and list(question.scores) == row["vqa_scores"]
        assert list(question.answers) == row["vqa_answer"]
        [ids] = text.encode([question.text])
        assert ids + [0] * (16 - len(ids)) == row["input_ids"]
        compared += 1
    assert compared == min(12, golden["items"])


def _numbers(sources) -> list[int]:
    """The number of each question among those of its picture."""
    seen: Counter = Counter()
    numbers = []
    for picture_id in sources.image_ids(np.arange(len(sources))).tolist():
        numbers.append(seen[picture_id])
        seen[picture_id] += 1
    return numbers


@pytest.mark.parametrize("rows_per_batch", [None, 3, 1])
def test_questions_without_answers_are_left_out_of_training(tmp_path: Path, rows_per_batch: int | None) -> None:
    rows = rows_of_pictures(10)
    write_questions(tmp_path / "own.arrow", rows, rows_per_batch)
    everything = open_questions(["arrow:own"], tmp_path)
    answered = open_questions(["arrow:own"], tmp_path, answered_only=True)
    assert (len(everything), len(answered)) == (30, 28)
    assert answered.coverage()[0]["unanswered"] == 2 and everything.coverage()[0]["unanswered"] == 0
    flat = [(row["question_id"][k], row["questions"][k], n, row["answer_labels"][k]) for n, row in enumerate(rows)
            for k in range(3)]  # fmt: skip
    for sources, expected in ((everything, flat), (answered, [one for one in flat if one[3]])):
        ids = sources.image_ids(np.arange(len(sources)))
        for index, (identity, text, image, labels) in enumerate(expected):
            found = sources.read(index)
            assert (found.question_id, found.text, ids[index], list(found.labels)) == (identity, text, image, labels)
            assert found.image.tobytes() == rows[image]["image"]


def test_several_tables_are_one_list() -> None:
    both = open_questions(["arrow:vqav2_train", "arrow:vqav2_val"], ARROW)
    one = open_questions(["vqa"], ARROW, "train")
    assert len(both) == len(one) == 63 and both.sizes == [32, 31]
    for index in (0, 31, 32, 62):
        assert both.read(index).question_id == one.read(index).question_id


def test_tables_that_cannot_be_used(tmp_path: Path) -> None:
    rows = rows_of_pictures(2)
    write_questions(tmp_path / "short.arrow", [{**rows[0], "question_id": [1]}])
    write_questions(tmp_path / "uneven.arrow", [{**rows[0], "answer_scores": [[1.0, 1.0, 1.0]] * 3}])
    write_questions(tmp_path / "lacking.arrow", [{k: v for k, v in row.items() if k != "answers"} for row in rows])
    write_questions(
        tmp_path / "typed.arrow", [{**row, "question_id": [str(n) for n in row["question_id"]]} for row in rows],
        question_id=pa.list_(pa.string()),
    )  # fmt: skip
    write_questions(tmp_path / "mute.arrow", [{**row, "answers": [], "answer_labels": [], "answer_scores": []}
                                              for row in rows])  # fmt: skip
    (tmp_path / "torn.arrow").write_bytes((tmp_path / "short.arrow").read_bytes()[:200])
    for name, said in [
        ("short", "as many question_id as questions"),
        ("uneven", "differ in length"),
        ("lacking", "no column 'answers'"),
        ("typed", "'question_id' is list<.*string>, expected list<int64>"),
        ("torn", "not a complete Arrow"),
    ]:
        with pytest.raises(TableError, match=said):
            open_questions([f"arrow:{name}"], tmp_path)
    assert len(open_questions(["arrow:mute"], tmp_path)) == 6
    with pytest.raises(TableError, match="not one question with an answer"):
        open_questions(["arrow:mute"], tmp_path, answered_only=True)
    with pytest.raises(SourceError, match=r"no table absent.arrow"):
        open_questions(["arrow:absent"], tmp_path)
    with pytest.raises(SourceError, match=r"unknown data source 'coco' of questions: choose vqa"):
        open_questions(["coco"], tmp_path)


# -------------------------------------------------------------------------------------------------------- label space


def test_label_space_is_read_back_from_the_tables(tmp_path: Path) -> None:
    answers = find_answers(open_questions(["vqa"], ARROW, "train").tables)
    assert answers.names == ("no", "2", "black and white", "yes") and answers.unnamed == 0
    (tmp_path / "answers.json").write_text(answers.text())
    assert read_answers(tmp_path / "answers.json") == answers
    again = find_answers(open_questions(["vqa"], ARROW, "train").tables, str(tmp_path / "answers.json"))
    assert again.hash() == answers.hash() != Answers(answers.names[::-1]).hash()


def test_a_label_that_no_question_has_stays_unnamed(tmp_path: Path) -> None:
    row = {**rows_of_pictures(1, 1)[0], "answers": [["x", "z"]], "answer_labels": [[0, 2]], "answer_scores": [[1, 0.3]]}
    write_questions(tmp_path / "own.arrow", [row])
    tables = open_questions(["arrow:own"], tmp_path).tables
    answers = find_answers(tables)
    assert answers.names == ("x", None, "z") and answers.unnamed == 1
    Answers(("x", "y", "z")).check(names_in_tables(tables), "own")


def test_label_spaces_that_contradict_are_refused(tmp_path: Path) -> None:
    row = rows_of_pictures(1, 2)[0]
    for name, answers, labels in [("twice", [["yes"], ["no"]], [[1], [1]]), ("below", [["yes"], ["no"]], [[-1], [1]])]:
        scores = [[1.0], [1.0]]
        write_questions(
            tmp_path / f"{name}.arrow", [{**row, "answers": answers, "answer_labels": labels, "answer_scores": scores}]
        )
    with pytest.raises(AnswersError, match=r"twice.arrow: label 1 is both '\w+' and '\w+'"):
        find_answers(open_questions(["arrow:twice"], tmp_path).tables)
    with pytest.raises(AnswersError, match="label -1 of 'yes': labels are 0 or more"):
        find_answers(open_questions(["arrow:below"], tmp_path).tables)
    tables = open_questions(["vqa"], ARROW, "train").tables
    for content, said in [
        ("[]", "not a JSON list of texts"), ('{"a": 1}', "not a JSON list of texts"), ("[1]", "not a JSON list"),
        ("[", "cannot read"), ('["no", "2"]', r"label 2 \('black and white'\), but there are 2 answers"),
        ('["no", "two", "black and white", "yes"]', "calls label 1 '2', where it should be 'two'"),
    ]:  # fmt: skip
        (tmp_path / "answers.json").write_text(content)
        with pytest.raises(AnswersError, match=said):
            find_answers(tables, str(tmp_path / "answers.json"))
    with pytest.raises(AnswersError, match=r"cannot read .*absent"):
        read_answers(tmp_path / "absent.json")
    with pytest.raises(AnswersError, match="the tables hold no answers"):
        find_answers(open_questions(["vqa"], ARROW, "test").tables)


# ------------------------------------------------------------------------------------------------------------ batches


@pytest.fixture
def asked(tmp_path: Path):
    """40 pictures with three questions each."""
    write_questions(tmp_path / "own.arrow", rows_of_pictures(40))
    return open_questions(["arrow:own"], tmp_path, answered_only=True)


@pytest.fixture
def spoilt(tmp_path: Path):
    """As `asked`, with every fifth picture bad, in turn by each cause, and two questions that are no text."""
    rows = rows_of_pictures(40)
    for number, place in enumerate(range(0, 40, 5)):
        rows[place]["image"] = list(BAD_PICTURES.values())[number % 4]
    rows[7]["questions"][1], rows[8]["questions"][0] = "", "\n"
    write_questions(tmp_path / "own.arrow", rows)
    return open_questions(["arrow:own"], tmp_path, answered_only=True)


def test_a_batch_holds_what_it_says(asked, tokenizer) -> None:
    samples = np.array([0, 1, 50, 2, 7, 50])
    batch = assembler_of(asked, tokenizer).micro_batch(samples, np.arange(6)).batch
    questions = [asked.read(int(index)) for index in samples]
    assert batch.sample_ids.tolist() == samples.tolist() and len(batch) == 6
    assert batch.question_ids.tolist() == [question.question_id for question in questions]
    pictures = asked.image_ids(samples).tolist()
    assert len(batch.images) == len(set(pictures)) == 3 and batch.images.dtype == torch.float32
    rows = batch.image_rows.tolist()
    for one in range(6):
        for other in range(6):
            assert (rows[one] == rows[other]) == (pictures[one] == pictures[other])
    assert batch.targets.shape == (6, len(NAMES)) and batch.targets.dtype == torch.float32
    for row, question in zip(batch.targets, questions, strict=True):
        expected = dict(zip(question.labels, question.scores, strict=True))
        assert row.tolist() == pytest.approx([expected.get(label, 0.0) for label in range(len(NAMES))])
    assert (batch.text_ids[~batch.text_mask] == tokenizer.pad_token_id).all()
    assert torch.equal(batch.text_rows, batch.text_mask.flatten().nonzero().flatten())
    text = TextPipeline(tokenizer, 16)
    for n, ids in enumerate(text.encode([question.text for question in questions])):
        assert batch.text_ids[n][batch.text_mask[n]].tolist() == ids


@pytest.mark.parametrize("kind", ["asked", "spoilt"])
def test_every_division_gives_the_same_global_batches(request, tokenizer, kind: str) -> None:
    sources = request.getfixturevalue(kind)
    whole, (plain,) = global_batches(sources, tokenizer, (0, 7))  # over an epoch's end
    assert (plain.skipped.total() > 0) == (kind == "spoilt")
    for world, micro in [(1, 3), (2, 12), (3, 4), (8, 1)]:
        divided, loaders = global_batches(sources, tokenizer, (0, 7), world, micro)
        assert divided == whole, (world, micro)
        assert sum((loader.skipped for loader in loaders), Counter()) == plain.skipped
    assert global_batches(sources, tokenizer, (5, 7))[0] == whole[5:]
    if kind == "spoilt":
        causes = {"truncated", "not an image", "zero bytes", "undecodable", "empty caption"}
        assert set(plain.skipped) <= causes and len(plain.skipped) >= 3, plain.skipped


def test_a_pass_reads_each_answered_question_once(asked, tokenizer) -> None:
    size = len(asked) // 2
    batches, _ = global_batches(asked, tokenizer, (0, 2), micro=size, size=size)
    assert len(asked) == 110
    assert sorted(row[0] for rows in batches for row in rows) == list(range(110))


@pytest.mark.parametrize("world", [1, 2, 3])
def test_evaluation_reads_each_question_once(asked, tokenizer, world: int) -> None:
    seen: list[tuple] = []
    lengths = set()
    for rank in range(world):
        reader = assembler_of(asked, tokenizer, replace=False)
        loader = split_loader(reader, batch_size=20, rank=rank, world=world)
        batches = list(loader)
        lengths.add(len(batches))
        assert max(map(len, batches)) <= 20
        seen += told(batches)
    assert len(lengths) == 1
    assert sorted(row[0] for row in seen) == list(range(len(asked)))


def test_evaluation_leaves_the_bad_out_and_draws_fairly(spoilt, tokenizer) -> None:
    loader = split_loader(assembler_of(spoilt, tokenizer, replace=False), batch_size=16, max_bad_share=0.9)
    batches = list(loader)
    seen = [int(sample) for batch in batches for sample in batch.sample_ids]
    assert len(set(seen)) == len(seen) == len(spoilt) - loader.skipped.total() < len(spoilt)
    part = split_loader(assembler_of(spoilt, tokenizer, replace=False), batch_size=8, limit=30, max_bad_share=0.9)
    drawn = [int(sample) for batch in part for sample in batch.sample_ids]
    assert len(drawn) + part.skipped.total() == 30
    assert drawn == sorted(drawn) and drawn[-1] > len(spoilt) // 2
    with pytest.raises(OrderError, match="2 questions on 3 ranks"):
        split_loader(assembler_of(spoilt, tokenizer), batch_size=8, limit=2, world=3)


def test_labels_beyond_the_answers_are_refused(asked, tokenizer) -> None:
    few = QuestionAssembler(asked, TextPipeline(tokenizer, 16), backend(), 3, 2)
    with pytest.raises(AnswersError, match=r"own.arrow row \d+ question \d has labels .*there are 2 answers"):
        few.micro_batch(np.arange(20), np.arange(20))


def test_a_table_of_bad_pictures_stops_the_run(tmp_path: Path, tokenizer) -> None:
    rows = [{**row, "image": b""} for row in rows_of_pictures(4)]
    write_questions(tmp_path / "own.arrow", rows)
    sources = open_questions(["arrow:own"], tmp_path)
    with pytest.raises(BadDataError, match="100 samples in a row could not be used"):
        assembler_of(sources, tokenizer).micro_batch(np.arange(3), np.arange(3))
