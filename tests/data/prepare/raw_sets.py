"""Miniature copies of the raw downloads, made of the golden tables: their pictures as files, their content as
annotations. Helpers only, no tests."""

import json
from collections.abc import Callable
from pathlib import Path

import pyarrow as pa
from golden_cases import GOLDEN

SCHEMA = json.loads((GOLDEN / "arrow_schema.json").read_text())["files"]


def golden(name: str) -> pa.Table:
    """A golden table."""
    with pa.memory_map(str(GOLDEN / "arrow" / f"{name}.arrow")) as mapped:
        return pa.ipc.open_file(mapped).read_all()


def rows(name: str) -> list[dict]:
    """The rows of a golden table, pictures included."""
    return golden(name).to_pylist()


def put(path: Path, content: bytes | str | list | dict) -> Path:
    """Writes a file; lists and dicts as JSON."""
    path.parent.mkdir(parents=True, exist_ok=True)
    if not isinstance(content, bytes):
        content = (content if isinstance(content, str) else json.dumps(content)).encode()
    path.write_bytes(content)
    return path


def jsonl(entries: list[dict]) -> str:
    return "".join(json.dumps(entry) + "\n" for entry in entries)


def _karpathy(raw: Path, name: str, table: str, splits: tuple[str, ...], folder_of: Callable[[str], str]) -> None:
    images = []
    for split in splits:
        for row in rows(f"{table}_caption_karpathy_{split}"):
            sentences = [{"raw": text, "tokens": text.split()} for text in row["caption"]]
            images.append({"filename": row["image_id"], "split": split, "sentences": sentences, "sentids": [1, 2]})
            put(raw / folder_of(row["image_id"]) / row["image_id"], row["image"])
    images.append({"filename": "other.jpg", "split": "unused", "sentences": []})
    put(raw / "karpathy" / f"dataset_{name}.json", {"dataset": name, "images": images})
    put(raw / folder_of(images[0]["filename"]) / "not annotated.jpg", b"")


def coco(raw: Path) -> None:
    splits = ("train", "val", "restval", "test")
    _karpathy(raw, "coco", "coco", splits, lambda name: name.split("_")[1])


def f30k(raw: Path) -> None:
    _karpathy(raw, "flickr30k", "f30k", ("train", "val", "test"), lambda name: "flickr30k-images")


def vg(raw: Path) -> None:
    entries = []
    for number, row in enumerate(rows("vg")):
        columns = ("caption", "width", "height", "x", "y")
        regions = [
            {
                "region_id": k,
                "image_id": int(row["image_id"]),
                "phrase": phrase,
                "width": w,
                "height": h,
                "x": x,
                "y": y,
            }
            for k, (phrase, w, h, x, y) in enumerate(zip(*(row[name] for name in columns), strict=True))
        ]
        entries.append({"id": int(row["image_id"]), "regions": regions})
        put(raw / "images" / ("VG_100K", "VG_100K_2")[number % 2] / f"{row['image_id']}.jpg", row["image"])
    put(raw / "images" / "VG_100K_2" / "99.jpg", b"without regions")
    put(raw / "annotations" / "region_descriptions.json", [*entries, {"id": 99, "regions": []}])


def _web(raw: Path, table: str, split: str, annotations: str) -> None:
    pairs = []
    for row in rows(table):
        inner = f"images_{split}/{row['image_id'][:4]}/{row['image_id']}"
        pairs += [[inner, "the last caption of a name counts"], [inner, row["caption"][0]]]
        put(raw / inner, row["image"])
    put(raw / annotations, pairs)


def gcc(raw: Path) -> None:
    for split in ("train", "val"):
        _web(raw, f"conceptual_caption_{split}_0", split, f"{split}_annot.json")


def sbu(raw: Path) -> None:
    _web(raw, "sbu_0", "train", "annot.json")


def vqav2(raw: Path) -> None:
    """Ten answers of each question that give the golden scores; answers without a label fill them up."""
    years = {"train": "train2014", "val": "val2014", "test": "test2015", "test-dev": "test-dev2015"}
    people = {0.3: 1, 0.6: 2, 0.9: 3, 1.0: 4}
    majority: dict[str, list[str]] = {split: [] for split in years}
    for split, year in years.items():
        questions, annotations = [], []
        for row in rows(f"vqav2_{split}"):
            folder = year.replace("test-dev", "test")
            put(raw / folder / f"COCO_{folder}_{row['image_id']:012d}.jpg", row["image"])
            for place, (identity, text) in enumerate(zip(row["question_id"], row["questions"], strict=True)):
                about = {"image_id": row["image_id"], "question_id": identity}
                questions.append({**about, "question": text})
                if row["answers"]:
                    given = []
                    for answer, score in zip(row["answers"][place], row["answer_scores"][place], strict=True):
                        given += [answer] * people[score]
                    given += [f"Rare {identity} {n}" for n in range(10 - len(given))]
                    answers = [{"answer": answer, "answer_id": n} for n, answer in enumerate(given, 1)]
                    annotations.append({**about, "answers": answers, "multiple_choice_answer": f"Rare {identity}"})
        if annotations:
            _majority(annotations, majority[split])
            lost = {"image_id": 2 if split == "train" else 5, "question_id": 77 if split == "train" else 78}
            questions.insert(0, {**lost, "question": "what is left out?"})
            answers = [{"answer": "Yes", "answer_id": 1}]  # the label is "yes": looked up as given, it has none
            annotations.append({**lost, "answers": answers, "multiple_choice_answer": "Rare"})
            put(raw / f"v2_mscoco_{year}_annotations.json", {"info": {}, "annotations": annotations})
        put(raw / f"v2_OpenEnded_mscoco_{year}_questions.json", {"info": {"version": "2.0"}, "questions": questions})


def _majority(annotations: list[dict], majority: list[str]) -> None:
    """Majority answers in the golden order of labels: no, 2, black and white, yes. Each is written in several ways that
    are normalised to it, nine times or more over both splits."""
    ways = (["No", "no."], ["two", "2"], ["black-and-white", "Black and white!"], ["yes", "the yes"])
    named = [way[n % 2] for way in ways for n in range(6)] + ["8 times only"] * 4
    for annotation, answer in zip(annotations, named, strict=False):
        annotation["multiple_choice_answer"] = answer
    majority += named


def nlvr2(raw: Path) -> None:
    for split in ("train", "dev", "test1", "balanced_dev", "balanced_test1", "unbalanced_dev", "unbalanced_test1"):
        lines = []
        for number, row in enumerate(rows(f"nlvr2_{split}")):
            folder = raw / split.split("_")[-1]
            directory = {}
            if split == "train":
                directory = {"directory": 7 + number}
                folder = raw / "images" / "train" / str(7 + number)
            for side in (0, 1):
                put(folder / f"{row['identifier']}-img{side}.png", row[f"image_{side}"])
            for n, (text, answer) in enumerate(zip(row["questions"], row["answers"], strict=True)):
                identifier = f"{row['identifier']}-{n}"
                lines.append({"sentence": text, "label": answer, "identifier": identifier, **directory})
        inner = split.split("_")[0] if "_" in split else ""
        put(raw / "nlvr2" / "data" / inner / f"{split}.json", jsonl(lines))


def snli_ve(raw: Path) -> None:
    label_of = ("contradiction", "neutral", "entailment")
    number = {"train": 1000, "dev": 2000, "test": 3000}
    for split in ("train", "dev", "test"):
        lines = []
        for place, row in enumerate(rows(f"snli_{split}")):
            image = str(number[split] + place)
            put(raw / "flickr30k_images" / f"{image}.jpg", row["image"])
            for (first, second), label in zip(row["sentences"], row["labels"], strict=True):
                texts = {"sentence1": first, "sentence2": second}
                lines.append({"Flickr30K_ID": image, "gold_label": label_of[label], **texts})
        put(raw / f"snli_ve_{split}.jsonl", jsonl(lines))


MAKERS = {
    "coco": coco,
    "vg": vg,
    "gcc": gcc,
    "sbu": sbu,
    "f30k": f30k,
    "vqav2": vqav2,
    "nlvr2": nlvr2,
    "snli_ve": snli_ve,
}
TABLES = {
    "coco": [f"coco_caption_karpathy_{split}" for split in ("train", "val", "restval", "test")],
    "vg": ["vg"],
    "gcc": ["conceptual_caption_train_0", "conceptual_caption_val_0"],
    "sbu": ["sbu_0"],
    "f30k": [f"f30k_caption_karpathy_{split}" for split in ("train", "val", "test")],
    "vqav2": [f"vqav2_{split}" for split in ("train", "val", "test", "test-dev", "trainable_val", "rest_val")],
    "nlvr2": [name.removesuffix(".arrow") for name in SCHEMA if name.startswith("nlvr2")],
    "snli_ve": [f"snli_{split}" for split in ("train", "dev", "test")],
}
SHUFFLED = {"coco": "image_id", "f30k": "image_id", "vg": "image_id", "gcc": "image_id", "sbu": "image_id",
            "vqav2": "image_id"}  # fmt: skip
