"""Questions and statements about pictures from the downloads of VQAv2, NLVR2 and SNLI-VE.

Knows where these downloads keep files (VQAv2, NLVR2: the folders that ViLT's DATA.md describes) and which columns METER
and ViLT make of them. Each function gives a plan and reads annotations only. Rows of NLVR2 and SNLI-VE are in the
annotations' order, as published; those of VQAv2 in the order of the pictures' numbers: the published writer shuffles.
"""

from collections import Counter
from collections.abc import Iterator, Sequence
from functools import lru_cache
from pathlib import Path
from sys import intern

import pyarrow as pa

from meter_fast.data.answers import Answers
from meter_fast.data.prepare.json_stream import elements, lines
from meter_fast.data.prepare.plan import (
    Folders,
    LeftOut,
    Part,
    Plan,
    PrepareError,
    Row,
    Table,
    field_of,
    first_of,
)
from meter_fast.data.prepare.vqa_words import normalize_word, score

MIN_COUNT = 9  # majority answers given so often in train and val are the labels: 3129
REST_VAL = 1000  # pictures of val in vqav2_rest_val, the last ones; vqav2_trainable_val holds the others
VQA_FOLDERS = {"train": "train2014", "val": "val2014", "test": "test2015", "test-dev": "test2015"}
VQA_YEARS = {"train": "train2014", "val": "val2014", "test": "test2015", "test-dev": "test-dev2015"}
SNLI_LABELS = {"contradiction": 0, "neutral": 1, "entailment": 2}

PAIR_COLUMNS = pa.schema(
    [
        ("image_0", pa.binary()),
        ("image_1", pa.binary()),
        ("questions", pa.list_(pa.string())),
        ("answers", pa.list_(pa.string())),
        ("identifier", pa.string()),
    ]
)
SNLI_COLUMNS = pa.schema(
    [("image", pa.binary()), ("sentences", pa.list_(pa.list_(pa.string()))), ("labels", pa.list_(pa.int64()))]
)

# Of one question: its number, its text, and label and score of each of its answers that has a label.
Asked = tuple[int, str, tuple[int, ...], tuple[float, ...]]


def question_columns(answered: bool) -> pa.Schema:
    """Of a table of questions; without answers, as in a test split, their lists are of type null, as published."""
    inner = {"answers": pa.string(), "answer_labels": pa.int64(), "answer_scores": pa.float64()}
    return pa.schema(
        [
            ("image", pa.binary()),
            ("questions", pa.list_(pa.string())),
            *((name, pa.list_(pa.list_(kind) if answered else pa.null())) for name, kind in inner.items()),
            ("image_id", pa.int64()),
            ("question_id", pa.list_(pa.int64())),
            ("split", pa.string()),
        ]
    )


def question_values(asked: Sequence[Asked], names: Sequence[str], image_id: int, split: str, answered: bool) -> dict:
    """All columns but the picture. names: text of each label."""
    return {
        "questions": [text for _, text, _, _ in asked],
        "answers": [[names[label] for label in labels] for _, _, labels, _ in asked] if answered else [],
        "answer_labels": [list(labels) for _, _, labels, _ in asked] if answered else [],
        "answer_scores": [list(scores) for _, _, _, scores in asked] if answered else [],
        "image_id": image_id,
        "question_id": [number for number, _, _, _ in asked],
        "split": split,
    }


def vqav2(raw: Path, splits: Sequence[str]) -> Plan:
    """v2_*_questions.json and v2_*_annotations.json with train2014/, val2014/ and test2015/ -> vqav2_{split}, and of
    val vqav2_trainable_val and vqav2_rest_val. The label space is that of train and val together, whatever is written.

    Questions of train and val none of whose answers has a label are left out, and pictures without questions.
    """
    plan, where = Plan("vqav2"), Folders()
    labels: dict[str, int] = {}
    given: dict[str, dict[int, Counter[str]]] = {}
    if {"train", "val"} & set(splits):
        labels = _label_space(raw, plan, given)
    names = list(labels)
    for split in splits:
        answered = split in given
        asked = _questions(raw, split, plan, labels, given.pop(split, None))
        rows, lost = [], []
        for image in sorted(asked):
            file = f"COCO_{VQA_FOLDERS[split]}_{image:012d}.jpg"
            path = where.find([raw / VQA_FOLDERS[split]], file, lost)
            if path is not None:
                rows.append((path, image))

        def make(rows=rows, asked=asked, split=split, answered=answered) -> Iterator[Row]:
            for path, image in rows:
                yield Row((path,), question_values(asked[image], names, image, split, answered))

        plan.add(Table(f"vqav2_{split}", split, question_columns(answered), [path for path, _ in rows], make), lost)
    if "val" in splits:
        for name, last in (("vqav2_trainable_val", False), ("vqav2_rest_val", True)):
            plan.parts.append(Part(name, "vqav2_val", REST_VAL, last))
    if labels:
        plan.notes["answers"] = len(names)
        plan.files["vqav2_answers.json"] = Answers(tuple(names)).text()
    return plan


def _label_space(raw: Path, plan: Plan, given: dict[str, dict[int, Counter[str]]]) -> dict[str, int]:
    """Answer -> label. What people answered each question goes to `given`, by split and question."""
    majority: Counter[str] = Counter()  # in order of first appearance
    normalized = lru_cache(None)(normalize_word)
    for split in ("train", "val"):
        path = first_of(raw, f"v2_mscoco_{VQA_YEARS[split]}_annotations.json")
        plan.annotations.append(path)
        answers = given[split] = {}
        for number, (entry, _, _) in enumerate(elements(path, "annotations")):
            place = f"annotation {number}"
            majority[normalized(field_of(entry, "multiple_choice_answer", path, place))] += 1
            ten = field_of(entry, "answers", path, place)
            answers[field_of(entry, "question_id", path, place)] = Counter(
                intern(field_of(one, "answer", path, place)) for one in ten
            )
    frequent = [answer for answer, count in majority.items() if count >= MIN_COUNT]
    return {answer: label for label, answer in enumerate(frequent)}


def _questions(
    raw: Path, split: str, plan: Plan, labels: dict[str, int], given: dict[int, Counter[str]] | None
) -> dict[int, list[Asked]]:
    """Picture -> its questions, in the file's order. given: None for a split without answers."""
    path = first_of(raw, f"v2_OpenEnded_mscoco_{VQA_YEARS[split]}_questions.json")
    plan.annotations.append(path)
    asked: dict[int, list[Asked]] = {}
    unlabelled = 0
    for number, (entry, _, _) in enumerate(elements(path, "questions")):
        place = f"question {number}"
        image, identity, text = (field_of(entry, name, path, place) for name in ("image_id", "question_id", "question"))
        known: list[tuple[int, float]] = []
        if given is not None:
            if identity not in given:
                raise PrepareError(f"{path}: question {identity} has no annotation; take questions and annotations of "
                                   f"the same version")  # fmt: skip
            # Looked up as they were given, not normalised: as published.
            known = [(labels[answer], score(count)) for answer, count in given[identity].items() if answer in labels]
            if not known:
                unlabelled += 1
                continue
        labelled = tuple(label for label, _ in known), tuple(soft for _, soft in known)
        asked.setdefault(image, []).append((identity, text, *labelled))
    if given is not None:
        plan.notes[f"questions of {split} without a label, left out"] = unlabelled
    return asked


NLVR2_SPLITS = ("train", "dev", "test1", "balanced_dev", "balanced_test1", "unbalanced_dev", "unbalanced_test1")


def nlvr2(raw: Path, splits: Sequence[str]) -> Plan:
    """nlvr2/data/ with images/train/, dev/ and test1/ -> nlvr2_{split}: two pictures with all statements about them."""
    plan, where = Plan("nlvr2"), Folders()
    for split in splits:
        inner = f"{split.split('_')[0]}/" if "_" in split else ""
        path = first_of(raw, f"nlvr2/data/{inner}{split}.json", f"nlvr/nlvr2/data/{inner}{split}.json")
        said: dict[str, list[tuple[str, str]]] = {}
        folder_of: dict[str, Path] = {}
        seen: set[str] = set()
        for number, entry in lines(path):
            place = f"line {number}"
            identifier = str(field_of(entry, "identifier", path, place))
            if identifier in seen:
                raise PrepareError(f"{path}, {place}: {identifier} is there before; download the file again")
            seen.add(identifier)
            pair, _, _ = identifier.rpartition("-")
            label = str(field_of(entry, "label", path, place))
            if label not in ("True", "False"):
                raise PrepareError(f"{path}, {place}: label {label!r}, expected True or False")
            said.setdefault(pair, []).append((str(field_of(entry, "sentence", path, place)), label))
            if pair not in folder_of:
                own = pair.split("-")[0]
                training = own == "train"
                inside = str(field_of(entry, "directory", path, place)) if training else ""
                folder_of[pair] = raw / "images" / "train" / inside if training else raw / own
        rows: list[Row] = []
        lost: list[LeftOut] = []
        for pair, statements in said.items():
            gaps: list[LeftOut] = []
            paths = [where.find([folder_of[pair]], f"{pair}-img{side}.png", gaps) for side in (0, 1)]
            lost += gaps[:1]  # a row is lost once
            if not gaps:
                texts, labels = [text for text, _ in statements], [label for _, label in statements]
                rows.append(Row(tuple(paths), {"questions": texts, "answers": labels, "identifier": pair}))
        plan.annotations.append(path)
        plan.add_rows(f"nlvr2_{split}", split, PAIR_COLUMNS, rows, lost)
    return plan


def snli_ve(raw: Path, splits: Sequence[str]) -> Plan:
    """snli_ve_{split}.jsonl with the pictures of Flickr30k -> snli_{split}: [premise, hypothesis] pairs and labels."""
    plan, where = Plan("snli_ve"), Folders()
    folders = [first_of(raw, "flickr30k_images", "flickr30k-images", "Flickr30K/images")]
    for split in splits:
        path = first_of(raw, f"snli_ve_{split}.jsonl")
        said: dict[str, tuple[list[list[str]], list[int]]] = {}
        for number, entry in lines(path):
            place = f"line {number}"
            label = field_of(entry, "gold_label", path, place)
            if label not in SNLI_LABELS:
                raise PrepareError(f"{path}, {place}: gold_label {label!r}, expected {', '.join(SNLI_LABELS)}")
            sentences, labels = said.setdefault(str(field_of(entry, "Flickr30K_ID", path, place)), ([], []))
            sentences.append([str(field_of(entry, name, path, place)) for name in ("sentence1", "sentence2")])
            labels.append(SNLI_LABELS[label])
        rows, lost = [], []
        for image, (sentences, labels) in said.items():
            picture = where.find(folders, f"{image}.jpg", lost)
            if picture is not None:
                rows.append(Row((picture,), {"sentences": sentences, "labels": labels}))
        plan.annotations.append(path)
        plan.add_rows(f"snli_{split}", split, SNLI_COLUMNS, rows, lost)
    return plan
