"""Tables of statements about pictures, NLVR2 and SNLI-VE, and the batches made of them."""

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

from meter_fast.data.about_pictures import most_pictures, split_loader
from meter_fast.data.batch import StatementBatch
from meter_fast.data.loader import TrainingLoader
from meter_fast.data.order import OrderError, SampleOrder, micro_slices
from meter_fast.data.randaugment import RandAugment
from meter_fast.data.samples import BadDataError
from meter_fast.data.sources import SourceError
from meter_fast.data.statement_tables import TASKS, open_statements
from meter_fast.data.statements import StatementAssembler
from meter_fast.data.tables import TableError
from meter_fast.data.text import TextPipeline
from meter_fast.data.tokenizer import load_tokenizer

ARROW = GOLDEN / "arrow"
DATASETS = json.loads((GOLDEN / "datasets.json").read_text())["sets"]
PUBLISHED = {"nlvr2": "nlvr2", "snli_ve": "snli"}
STRINGS = pa.list_(pa.string())
TYPES = {
    "image": pa.binary(),
    "image_0": pa.binary(),
    "image_1": pa.binary(),
    "questions": STRINGS,
    "answers": STRINGS,
    "identifier": pa.string(),
    "sentences": pa.list_(STRINGS),
    "labels": pa.list_(pa.int64()),
}


def rows_of(task: str, count: int, each: int = 3) -> list[dict]:
    """Rows of `each` statements. Of NLVR2 the pictures of rows 2i and 2i+1 are the same, exchanged, as in drawn scenes;
    of SNLI-VE each has its own."""
    rows = []
    for n in range(count):
        chance = np.random.default_rng(n)
        texts = [" ".join(chance.choice(WORDS, chance.integers(3, 9))) + f" {n} {k}" for k in range(each)]
        labels = chance.integers(0, len(TASKS[task].labels), each).tolist()
        if task == "nlvr2":
            pair = [picture(n // 2), picture(1000 + n // 2)]
            pair = pair[::-1] if n % 2 else pair
            answers = [str(bool(label)) for label in labels]
            rows.append({"image_0": pair[0], "image_1": pair[1], "questions": texts, "answers": answers,
                         "identifier": f"train-{n}-0"})  # fmt: skip
        else:
            pairs = [[f"premise {n}", f" {text} "] for text in texts]
            rows.append({"image": picture(n), "sentences": pairs, "labels": labels})
    return rows


def write_statements(path: Path, rows: list[dict], rows_per_batch: int | None = None, **types: pa.DataType) -> Path:
    schema = pa.schema([(name, types.get(name, TYPES[name])) for name in rows[0]])
    return write_table(path, pa.Table.from_pylist(rows, schema=schema), rows_per_batch)


def flat(task: str, rows: list[dict]) -> list[tuple]:
    """(pictures, text, label, row) of each statement, told from the rows as they were written."""
    if task == "nlvr2":
        return [((row["image_0"], row["image_1"]), text, int(answer == "True"), n) for n, row in enumerate(rows)
                for text, answer in zip(row["questions"], row["answers"], strict=True)]  # fmt: skip
    return [((row["image"],), hypothesis.strip(), label, n) for n, row in enumerate(rows)
            for (_, hypothesis), label in zip(row["sentences"], row["labels"], strict=True)]  # fmt: skip


def assembler_of(sources, tokenizer: PreTrainedTokenizerFast, **options: object) -> StatementAssembler:
    return StatementAssembler(sources, TextPipeline(tokenizer, 16), backend(), 3, **options)


def told(batches: list[StatementBatch]) -> list[tuple]:
    """What each statement amounts to, free of padding and of how pictures are shared."""
    return [
        (
            int(batch.sample_ids[n]),
            int(batch.labels[n]),
            batch.text_ids[n][batch.text_mask[n]].tolist(),
            *(batch.images[row].numpy().tobytes() for row in batch.image_rows[n]),
        )
        for batch in batches
        for n in range(len(batch))
    ]


def global_batches(
    sources, tokenizer, steps: tuple[int, int], world: int = 1, micro: int = 24, size: int = 24, **options: object
):
    """The global batches of a range of steps, put together from all ranks, and the loaders."""
    loaders = []
    for rank in range(world):
        order, slices = SampleOrder(sources.sizes, 3, size), micro_slices(size, world, micro, rank, pairs=False)
        loaders.append(
            TrainingLoader(order, assembler_of(sources, tokenizer, **options), slices, 0, 1, max_bad_share=0.9)
        )
    together = []
    for parts in zip(*(loader.steps(*steps) for loader in loaders), strict=True):
        together.append(told([batch for several in zip(*parts, strict=True) for batch in several]))
    return together, loaders


# ------------------------------------------------------------------------------------------------------------- tables


@pytest.mark.parametrize("split", ["train", "val", "test"])
@pytest.mark.parametrize("task", TASKS)
def test_items_are_those_of_the_published_data_set(task: str, split: str, tmp_path: Path) -> None:
    golden = DATASETS[f"{PUBLISHED[task]}.{split}"]
    sources = open_statements(task, [task], ARROW, split)
    assert len(sources) == golden["items"]
    assert sources.coverage()[0]["pictures"] == golden["images"]
    assert [file.stem for file in sources.tables[0].files] == golden["names"]
    shutil.copy(GOLDEN / "tokenizers" / "vocab.txt", tmp_path)
    text = TextPipeline(load_tokenizer(tmp_path), 16)
    rows = sources.image_ids(np.arange(len(sources))).tolist()
    places = [(row, rows[:n].count(row)) for n, row in enumerate(rows)]
    for item in golden["rows"]:
        statement = sources.read(places.index(tuple(item["index"])))
        assert statement.text == item["text"] and statement.name.startswith(f"{item['table_name']}.arrow row ")
        assert statement.label == int(item["answers"] if task == "nlvr2" else item["labels"])
        assert len(statement.images) == sum(key.startswith("image") for key in item["keys"])
        [ids] = text.encode([statement.text])
        assert ids + [0] * (16 - len(ids)) == item["input_ids"]
    assert len(golden["rows"]) == min(12, golden["items"])


@pytest.mark.parametrize("rows_per_batch", [None, 3, 1])
@pytest.mark.parametrize("task", TASKS)
def test_statements_are_read_from_any_batches(task: str, rows_per_batch: int | None, tmp_path: Path) -> None:
    rows = rows_of(task, 7)
    for name, part in (("one", rows[:4]), ("other", rows[4:])):
        write_statements(tmp_path / f"{name}.arrow", part, rows_per_batch)
    for names in (["arrow:one,other"], ["arrow:one", "arrow:other"]):
        sources = open_statements(task, names, tmp_path)
        ids = sources.image_ids(np.arange(len(sources))).tolist()
        for index, (images, text, label, row) in enumerate(flat(task, rows)):
            found = sources.read(index)
            assert (found.text, found.label, ids[index]) == (text, label, row)
            assert tuple(image.tobytes() for image in found.images) == images
            assert found.image.tobytes() == images[0]
    assert sources.read(12).name == "other.arrow row 0 statement 0"
    assert sources.coverage()[0]["texts"] == TASKS[task].texts
    with pytest.raises(IndexError, match="21 of 21"):
        sources.read(21)


def test_rows_without_statements_and_slices(tmp_path: Path) -> None:
    """Statements are those of their rows where a table begins in the middle of its columns, and rows may be empty."""
    for task in TASKS:
        rows = rows_of(task, 5, 2)
        for name in rows[2].keys() & {"questions", "answers", "sentences", "labels"}:
            rows[2][name] = []
        schema = pa.schema([(name, TYPES[name]) for name in rows[0]])
        table = pa.Table.from_pylist(rows, schema=schema).slice(1)
        write_table(tmp_path / "cut.arrow", table)
        sources = open_statements(task, ["arrow:cut"], tmp_path)
        expected = flat(task, rows)[2:]
        assert [sources.read(i).text for i in range(len(sources))] == [text for _, text, _, _ in expected]
        assert sources.image_ids(np.arange(6)).tolist() == [row - 1 for *_, row in expected]


@pytest.mark.parametrize(
    ("task", "change", "types", "said"),
    [
        ("nlvr2", {"answers": ["True", "yes", "False"]}, {}, "an answer is 'yes', where it should be 'True' or 'False"),
        ("nlvr2", {"answers": ["True", None, "False"]}, {}, "an answer is None"),
        ("nlvr2", {"answers": ["True"]}, {}, "as many answers as questions"),
        ("nlvr2", {"answers": None}, {}, "no column 'answers'; a table of statements has image_0"),
        ("nlvr2", {"image_1": None}, {}, "no column 'image_1'"),
        ("nlvr2", {"answers": [1, 0, 1]}, {"answers": pa.list_(pa.int64())}, "expected list<string>"),
        ("nlvr2", {"questions": [], "answers": []}, {}, "1 pairs of pictures and not one of the statements"),
        ("snli_ve", {"labels": [0, 1, 3]}, {}, r"labels are 0 \(contradiction\)"),
        ("snli_ve", {"labels": [0, 1, -1]}, {}, r"labels are 0 \(contradiction\)"),
        ("snli_ve", {"labels": [0, None, 1]}, {}, r"labels are 0 \(contradiction\)"),
        ("snli_ve", {"labels": [0]}, {}, "as many labels as sentences"),
        ("snli_ve", {"sentences": [["a"], ["b", "c"], ["d", "e"]]}, {}, "no pair of premise and hypothesis"),
        ("snli_ve", {"sentences": None}, {}, "no column 'sentences'; a table of hypotheses has image"),
        ("snli_ve", {"labels": ["0", "1", "2"]}, {"labels": STRINGS}, "expected list<int64>"),
        ("snli_ve", {"sentences": ["a", "b", "c"]}, {"sentences": STRINGS}, "expected list<list<string>>"),
    ],
)
def test_tables_that_cannot_be_used(task: str, change: dict, types: dict, said: str, tmp_path: Path) -> None:
    row = {name: value for name, value in (rows_of(task, 1)[0] | change).items() if value is not None}
    write_statements(tmp_path / "own.arrow", [row], **types)
    with pytest.raises(TableError, match=said):
        open_statements(task, ["arrow:own"], tmp_path)


@pytest.mark.parametrize("task", TASKS)
def test_damaged_tables(task: str, tmp_path: Path) -> None:
    """Offsets that lead out of a column, a torn and a compressed file."""
    table = pa.Table.from_pylist(rows_of(task, 3)).to_batches()[0]
    strings = table.column("questions").values if task == "nlvr2" else table.column("sentences").values.values
    path = write_statements(tmp_path / "own.arrow", rows_of(task, 3))
    content = path.read_bytes()
    offsets = np.frombuffer(strings.buffers()[1], np.int32, count=len(strings) + 1)
    at = content.index(offsets.tobytes())
    wrong = offsets.copy()
    wrong[2] = 1 << 30
    path.write_bytes(content[:at] + wrong.tobytes() + content[at + wrong.nbytes :])
    with pytest.raises(TableError, match="damaged"):
        open_statements(task, ["arrow:own"], tmp_path)
    path.write_bytes(content[:300])
    with pytest.raises(TableError, match="not a complete Arrow"):
        open_statements(task, ["arrow:own"], tmp_path)
    rows = rows_of(task, 3)
    schema = pa.schema([(name, TYPES[name]) for name in rows[0]])
    write_table(path, pa.Table.from_pylist(rows, schema=schema), compression="zstd")
    with pytest.raises(TableError, match="compressed"):
        open_statements(task, ["arrow:own"], tmp_path)


def test_names_that_are_not_there(tmp_path: Path) -> None:
    for names, said in [
        (["arrow:absent"], "no table absent.arrow"),
        (["coco"], "unknown data source 'coco' of statements: choose nlvr2 or arrow"),
        (["nlvr2"], "no table nlvr2_train.arrow"),
        ([], "for example data.sources=arrow:nlvr2_train"),
    ]:
        with pytest.raises(SourceError, match=said):
            open_statements("nlvr2", names, tmp_path)
    with pytest.raises(SourceError, match="split 'dev': choose one of train, val, test"):
        open_statements("snli_ve", ["snli_ve"], ARROW, "dev")


# ------------------------------------------------------------------------------------------------------------ batches


@pytest.fixture(params=TASKS)
def task(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture
def said(task: str, tmp_path: Path):
    """40 rows with three statements each."""
    write_statements(tmp_path / "own.arrow", rows_of(task, 40))
    return open_statements(task, ["arrow:own"], tmp_path)


@pytest.fixture
def spoilt(task: str, tmp_path: Path):
    """As `said`, with every fifth row's picture bad, of NLVR2 now the left, now the right one, in turn by each cause,
    and two statements that are no text."""
    rows = rows_of(task, 40)
    for number, place in enumerate(range(0, 40, 5)):
        name = f"image_{number // 4}" if task == "nlvr2" else "image"
        rows[place][name] = list(BAD_PICTURES.values())[number % 4]
    for place, text in ((7, ""), (8, "\n")):
        if task == "nlvr2":
            rows[place]["questions"][1] = text
        else:
            rows[place]["sentences"][1] = ["premise", text]
    write_statements(tmp_path / "own.arrow", rows)
    return open_statements(task, ["arrow:own"], tmp_path)


def test_a_batch_holds_what_it_says(said, task: str, tokenizer) -> None:
    samples = np.array([0, 1, 50, 3, 7, 50])  # of NLVR2: rows 0 and 1 show the same pictures, exchanged
    batch = assembler_of(said, tokenizer).micro_batch(samples, np.arange(6)).batch
    statements = [said.read(int(index)) for index in samples]
    assert batch.sample_ids.tolist() == samples.tolist() and len(batch) == 6
    assert batch.labels.tolist() == [statement.label for statement in statements]
    assert batch.labels.dtype == batch.image_rows.dtype == torch.int64
    shown = [[image.tobytes() for image in statement.images] for statement in statements]
    assert batch.image_rows.shape == (6, len(shown[0]))
    distinct = {image for images in shown for image in images}
    assert len(batch.images) == len(distinct) == (6 if task == "nlvr2" else 4)
    rows = dict(zip((i for images in shown for i in images), batch.image_rows.flatten().tolist(), strict=True))
    assert [[rows[image] for image in images] for images in shown] == batch.image_rows.tolist()
    assert len(set(rows.values())) == len(distinct)
    decoded = backend().decode([np.frombuffer(image, np.uint8) for image in rows])
    for number, row in enumerate(rows.values()):
        assert torch.equal(batch.images[row], decoded[number])
    if task == "nlvr2":
        assert batch.image_rows[3].tolist() == batch.image_rows[0].flip(0).tolist()
    text = TextPipeline(tokenizer, 16)
    for n, ids in enumerate(text.encode([statement.text for statement in statements])):
        assert batch.text_ids[n][batch.text_mask[n]].tolist() == ids
    assert torch.equal(batch.text_rows, batch.text_mask.flatten().nonzero().flatten())


@pytest.mark.parametrize("kind", ["said", "spoilt"])
def test_every_division_gives_the_same_global_batches(request, task: str, tokenizer, kind: str) -> None:
    sources = request.getfixturevalue(kind)
    whole, (plain,) = global_batches(sources, tokenizer, (0, 6))  # over an epoch's end
    assert (plain.skipped.total() > 0) == (kind == "spoilt")
    for world, micro in [(1, 3), (2, 12), (8, 1)]:
        divided, loaders = global_batches(sources, tokenizer, (0, 6), world, micro)
        assert divided == whole, (world, micro)
        assert sum((loader.skipped for loader in loaders), Counter()) == plain.skipped
    assert global_batches(sources, tokenizer, (4, 6))[0] == whole[4:]
    if kind == "spoilt":
        causes = {"truncated", "not an image", "zero bytes", "undecodable", "empty caption"}
        assert set(plain.skipped) <= causes and len(plain.skipped) >= 3, plain.skipped


def test_every_division_augments_a_picture_alike(task: str, tokenizer, tmp_path: Path) -> None:
    """In a step a picture looks the same in whichever row and place it stands, and others are augmented otherwise."""
    rows = rows_of(task, 8)
    names = ["image_0", "image_1"] if task == "nlvr2" else ["image"]
    again = [{**row, **dict(zip(names, [row[name] for name in reversed(names)]))} for row in rows]
    write_statements(tmp_path / "own.arrow", rows + again)
    sources, draw = open_statements(task, ["arrow:own"], tmp_path), RandAugment("randaugment_published", 3, 24)
    whole, _ = global_batches(sources, tokenizer, (0, 6), augment=draw)
    for world, micro in [(1, 3), (2, 12), (8, 1)]:
        assert global_batches(sources, tokenizer, (0, 6), world, micro, augment=draw)[0] == whole, (world, micro)
    plain, _ = global_batches(sources, tokenizer, (0, 6))
    changed: dict[bytes, set[bytes]] = {}
    for before, after in zip(plain, whole, strict=True):
        seen: dict[bytes, bytes] = {}
        for bare, augmented in zip(before, after, strict=True):
            for one, other in zip(bare[3:], augmented[3:], strict=True):
                assert seen.setdefault(one, other) == other
                changed.setdefault(one, set()).add(other)
    assert all(len(looks) > 1 for looks in changed.values())


@pytest.mark.parametrize("world", [1, 3])
def test_evaluation_reads_each_statement_once(said, tokenizer, world: int) -> None:
    seen: list[tuple] = []
    lengths = set()
    for rank in range(world):
        batches = list(
            split_loader(assembler_of(said, tokenizer, replace=False), batch_size=20, rank=rank, world=world)
        )
        lengths.add(len(batches))
        seen += told(batches)
    assert len(lengths) == 1 and sorted(row[0] for row in seen) == list(range(120))


def test_no_batch_holds_more_pictures_than_the_back_end_is_opened_for(said, tokenizer) -> None:
    reader = assembler_of(said, tokenizer, replace=False)
    for size in (1, 8, 40):
        assert max(len(batch.images) for batch in split_loader(reader, batch_size=size)) <= most_pictures(size)
    samples = np.arange(0, 120, 6)  # 20 statements, none about the same pictures
    images = reader.micro_batch(samples, samples).batch.images
    assert len(images) == len(samples) * len(said.read(0).images) <= most_pictures(len(samples))


def test_evaluation_leaves_the_bad_out(spoilt, tokenizer) -> None:
    """Every statement of a row whose picture, left or right, is bad, and those without text."""
    loader = split_loader(assembler_of(spoilt, tokenizer, replace=False), batch_size=16, max_bad_share=0.9)
    seen = {int(sample) for batch in loader for sample in batch.sample_ids}
    bad = {3 * row + k for row in range(0, 40, 5) for k in range(3)} | {22, 25}
    assert seen == set(range(120)) - bad and loader.skipped.total() == len(bad)
    with pytest.raises(OrderError, match=r"2 (statements|hypotheses) on 3 ranks"):
        split_loader(assembler_of(spoilt, tokenizer), batch_size=8, limit=2, world=3)


def test_a_table_of_bad_pictures_stops_the_run(tmp_path: Path, tokenizer) -> None:
    """The right ones alone are bad."""
    write_statements(tmp_path / "own.arrow", [{**row, "image_1": b""} for row in rows_of("nlvr2", 4)])
    sources = open_statements("nlvr2", ["arrow:own"], tmp_path)
    with pytest.raises(BadDataError, match="100 samples in a row could not be used"):
        assembler_of(sources, tokenizer).micro_batch(np.arange(3), np.arange(3))
