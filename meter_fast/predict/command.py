"""`meter-fast predict`: rows in, predictions out, in the same order, none left out. Knows rows and a predictor.

Pictures of a block of rows are read once. The file of results appears complete or not at all.
"""

import os
import sys
import warnings
from argparse import Namespace
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path

import meter_fast
from meter_fast.predict.pictures import Picture, WrongImage
from meter_fast.predict.predictor import PICTURES_PER_BLOCK, Predictor
from meter_fast.predict.progress import Progress
from meter_fast.predict.results import ERROR, RESULTS, Result, in_order_of_rank, line_of, summary, table_of
from meter_fast.predict.rows import TABLES, Problem, Row, read_rows
from meter_fast.predict.texts import TextCut, WrongText, filled
from meter_fast.training.monitor import replace_text

BATCHES_PER_BLOCK = 4  # rows are taken in blocks of so many batches, which share pictures and padding
FAILED = 2  # exit code where no row gave a result


def predict(arguments: Namespace) -> int:
    """Carry out the command; returns the exit code. Raises ValueError for whatever is wrong before a row is asked."""
    out, task = arguments.out, arguments.task
    check_out(out, arguments.input)
    rows, others = read_rows(arguments.input, task, arguments.text)
    check_columns(rows, task, arguments.input[0])
    k = check_k(arguments.k, task)
    predictor = meter_fast.load(
        arguments.model, tokenizer=arguments.tokenizer, transform=arguments.transform, answers=arguments.answers,
        device=arguments.device, dtype=arguments.dtype, batch=arguments.batch,
    )  # fmt: skip
    predictor.require(task)
    progress = Progress(len(rows))
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always", TextCut)
        try:
            results, causes = predict_rows(predictor, task, rows, k, progress)
        finally:
            progress.close()
    if task == "rank":
        results = in_order_of_rank(results)
    if out is not None:
        replace_text(out, table_of(results, task, out.suffix.lower()))
    else:
        print("\n".join(line_of(task, result) for result in results))
    notes = [str(warning.message) for warning in caught]
    print("\n".join(summary(progress.seconds, results, causes, notes, others, out)), file=sys.stderr)
    return FAILED if causes.total() == len(results) else 0


def check_out(out: Path | None, inputs: Sequence[Path]) -> None:
    """Raise ValueError for a file that could not be written in the end."""
    if out is None:
        return
    if out.suffix.lower() not in TABLES:
        raise ValueError(f"--out {out}: give a name that ends with .csv or .jsonl")
    if not out.parent.is_dir():
        raise ValueError(f"--out {out}: the folder {out.parent} does not exist: make it first")
    if not os.access(out.parent, os.W_OK):
        raise ValueError(f"--out {out}: the folder {out.parent} does not allow it: give another one")
    if out.is_dir() or any(out.exists() and path.exists() and out.samefile(path) for path in inputs):
        raise ValueError(f"--out {out} is a folder or the input itself: give another name")


def check_k(k: int | None, task: str) -> int:
    """How many answers or fills are asked for. Raises ValueError for a wrong number, or where there is only one."""
    if k is not None and task not in ("answer", "fill"):
        raise ValueError(f"--k {k} has no meaning for {task}: it goes with answer and fill")
    if k is not None and k < 1:
        raise ValueError(f"--k {k}: give 1 or more")
    return 5 if k is None else k


def check_columns(rows: Sequence[Row], task: str, path: Path) -> None:
    """Raise ValueError for a column of the input that a result would replace."""
    for name in (*RESULTS[task], ERROR):
        if any(name in row.columns for row in rows):
            raise ValueError(f"{path} has a column {name}, which is the name of a result of {task}: rename it")


def predict_rows(
    predictor: Predictor, task: str, rows: Sequence[Row], k: int, progress: Callable[[int, int], None]
) -> tuple[list[Result], Counter[str]]:
    """A result for each row, in order: its own columns, those of RESULTS, and "error", empty where there is none; how
    many rows have one, by cause."""
    problems: dict[int, Problem] = {}
    found: dict[int, Result] = {}
    done = 0
    for block in _blocks(rows, _block_size(predictor, task, rows)):
        asked = []
        pictures: dict[Path, Picture | Problem] = {}
        for number in block:
            request = _prepared(predictor, task, rows[number], pictures)
            if isinstance(request, Problem):
                problems[number] = request
            else:
                asked.append((number, *request))
        if asked:
            numbers, images, texts = (list(column) for column in zip(*asked))
            found |= dict(zip(numbers, ask(predictor, task, images, texts, k), strict=True))
        done += len(block)
        progress(done, len(problems))
    if task == "rank":
        _add_ranks(rows, found)
    results = [
        {**row.columns, **found.get(number, {}), ERROR: problems[number].message if number in problems else ""}
        for number, row in enumerate(rows)
    ]
    return results, Counter(problem.cause for problem in problems.values())


def _block_size(predictor: Predictor, task: str, rows: Sequence[Row]) -> int:
    """Rows of a block. Of a ranking, whose texts are encoded for each block, those of many pictures."""
    if task == "rank":
        return PICTURES_PER_BLOCK * len({row.text for row in rows if isinstance(row.text, str)})
    return BATCHES_PER_BLOCK * predictor.batch // (2 if task == "compare" else 1)


def _blocks(rows: Sequence[Row], size: int) -> Iterator[list[int]]:
    """Numbers of rows in blocks of about `size`; all about one (first) picture are in one block."""
    of_picture: dict[tuple[Path, ...], list[int]] = {}
    for number, row in enumerate(rows):
        of_picture.setdefault(row.images[:1], []).append(number)
    block: list[int] = []
    for numbers in of_picture.values():
        if block and len(block) + len(numbers) > size:
            yield block
            block = []
        block = block + numbers
    yield block


def _prepared(
    predictor: Predictor, task: str, row: Row, pictures: dict[Path, Picture | Problem]
) -> tuple[list[Picture], str | None] | Problem:
    """Pictures and text of a row, or why it has none. pictures: those that the block has read."""
    if row.problem is not None:
        return row.problem
    for path in row.images:
        if path not in pictures:
            try:
                pictures[path] = predictor.read(path)
            except WrongImage as error:
                pictures[path] = Problem(error.cause, str(error))
    images = [pictures[path] for path in row.images]
    wrong = [image for image in images if isinstance(image, Problem)]
    if wrong:
        return wrong[0]
    try:
        return images, None if task == "caption" else predictor.check(task, row.text)
    except WrongText as error:
        return Problem(error.cause, str(error))


def ask(
    predictor: Predictor, task: str, images: Sequence[Sequence[Picture]], texts: Sequence[str | None], k: int
) -> list[Result]:
    """The columns of the results of one block."""
    first, texts = [pictures[0] for pictures in images], list(texts)
    if task == "answer":
        rows = predictor.answer(first, texts, k)
        return [{"answer": row[0][0], "score": _short(row[0][1]), "answers": _listed(row)} for row in rows]
    if task == "match":
        return [{"probability": _short(p)} for p in predictor.match(first, texts)]
    if task == "rank":
        return _scores(predictor, first, texts)
    if task == "fill":
        found = predictor.fill(first, texts, k)
        best = [filled(predictor.tokenizer, text, [mask[0][0] for mask in row]) for text, row in zip(texts, found)]
        return [{"filled": text, "fills": [*map(_listed, row)]} for text, row in zip(best, found)]
    if task == "entails":
        rows = predictor.entails(first, texts)
        return [{"label": max(row, key=row.get), **{name: _short(p) for name, p in row.items()}} for row in rows]
    if task == "compare":
        second = [pictures[1] for pictures in images]
        return [{"probability": _short(p)} for p in predictor.compare(first, second, texts)]
    return [{"caption": text} for text in predictor.caption(first)]


def _scores(predictor: Predictor, images: Sequence[Picture], texts: Sequence[str]) -> list[Result]:
    """Of pairs that are each picture with each text."""
    row = {picture: n for n, picture in enumerate(dict.fromkeys(images))}
    column = {text: n for n, text in enumerate(dict.fromkeys(texts))}
    scores = predictor.rank(list(row), list(column)).scores
    return [{"score": _short(scores[row[image], column[text]])} for image, text in zip(images, texts)]


def _add_ranks(rows: Sequence[Row], found: Mapping[int, Result]) -> None:
    """text_rank: place of the text among those of its picture, 1 is best; image_rank: the other way round."""
    for name, key in (("text_rank", lambda row: row.images), ("image_rank", lambda row: row.text)):
        groups: dict[object, list[int]] = {}
        for number in sorted(found):
            groups.setdefault(key(rows[number]), []).append(number)
        for numbers in groups.values():
            for place, number in enumerate(sorted(numbers, key=lambda n: -found[n]["score"]), 1):
                found[number][name] = place


def _short(number: float) -> float:
    """With as many digits as float32 has."""
    return float(f"{number:.7g}")


def _listed(scored: Sequence[tuple[str, float]]) -> list[list]:
    return [[word, _short(score)] for word, score in scored]
