"""The VQA score: by kind, with other pictures, over a split on the command line; what is refused."""

import dataclasses
import json
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch
from fine_tuned import answering, answers_of_scenes, batches, damaged_table, write_vqa_run

from meter_fast.cli import main
from meter_fast.data.answers import Answers
from meter_fast.data.batch import VqaBatch
from meter_fast.data.question_tables import open_questions
from meter_fast.models.meter import Meter
from meter_fast.objectives.joint import JointLoss
from meter_fast.score_vqa import NO_ANSWER, ask, kind_of, score_questions


@pytest.fixture(scope="module")
def answers(scenes: Path):
    return answers_of_scenes(scenes)


@pytest.fixture(scope="module")
def vqa_model(scenes: Path, scene_tokenizer, scene_model: Meter, answers) -> Meter:
    return answering(scenes, scene_tokenizer, scene_model, answers)


def alone(batch: VqaBatch, n: int, shift: int) -> VqaBatch:
    """Question `n` of a batch with the picture `shift` places further than its own."""
    row = (int(batch.image_rows[n]) + shift) % len(batch.images)
    fields = ("text_ids", "text_mask", "targets", "question_ids", "sample_ids")
    own = {name: getattr(batch, name)[n : n + 1] for name in fields}
    return VqaBatch(images=batch.images[row : row + 1], image_rows=torch.zeros(1, dtype=torch.int64), **own)


def one_by_one(model: Meter, parts: list[VqaBatch], shift: int) -> list[float]:
    """The objective's own score of each question alone."""
    module = JointLoss(model, ("vqa",))
    return [module(alone(batch, n, shift)).metrics["vqa"][0].item() for batch in parts for n in range(len(batch))]


def test_kinds() -> None:
    said = {"yes": "yes/no", "no": "yes/no", "2": "number", "12": "number", "three": "number", "red": "other",
            "two red things": "other", None: "other"}  # fmt: skip
    assert {answer: kind_of(answer) for answer in said} == said


def test_scores_are_those_of_each_question_alone(scenes, scene_tokenizer, vqa_model, answers) -> None:
    parts = batches(scenes, scene_tokenizer, answers, 16)
    vqa_model.train()
    scores = score_questions(vqa_model, parts, answers, "cpu")
    assert vqa_model.training
    vqa_model.eval()
    with torch.inference_mode():
        own, other = one_by_one(vqa_model, parts, 0), one_by_one(vqa_model, parts, 1)
    assert own != other
    assert scores["all"]["score"] == pytest.approx(sum(own) / len(own), abs=1e-6)
    assert scores["all"]["exchanged"] == pytest.approx(sum(other) / len(other), abs=1e-6)
    sources = open_questions(["vqa"], scenes, "val")
    best = {}
    for index in range(len(sources)):
        question = sources.read(index)
        ranked = sorted(zip(question.scores, question.answers, strict=True), reverse=True)
        best[question.question_id] = kind_of(ranked[0][1])
    ids = [int(identity) for batch in parts for identity in batch.question_ids]
    assert set(scores) == {"all", *best.values()} and scores["all"]["count"] == len(best) == len(ids)
    for kind in set(best.values()):
        chosen = [score for score, identity in zip(own, ids, strict=True) if best[identity] == kind]
        assert scores[kind]["score"] == pytest.approx(sum(chosen) / len(chosen), abs=1e-6)
        assert scores[kind]["count"] == len(chosen)


def test_batches_of_one_picture_have_no_other(scenes, scene_tokenizer, vqa_model, answers) -> None:
    whole = score_questions(vqa_model, batches(scenes, scene_tokenizer, answers, 64), answers, "cpu")
    (batch,) = batches(scenes, scene_tokenizer, answers, 100)
    pieces = score_questions(vqa_model, [alone(batch, n, 0) for n in range(len(batch))], answers, "cpu")
    assert pieces["all"]["exchanged"] is None
    for kind, row in whole.items():
        assert pieces[kind]["score"] == pytest.approx(row["score"], abs=1e-6)


def test_questions_without_known_answer_score_nothing(scenes, scene_tokenizer, vqa_model, answers) -> None:
    parts = batches(scenes, scene_tokenizer, answers, 16, limit=32)
    silent = dataclasses.replace(parts[0], targets=torch.zeros_like(parts[0].targets))
    scores = score_questions(vqa_model, [silent, *parts[1:]], answers, "cpu")
    assert scores[NO_ANSWER] == {"score": 0.0, "exchanged": 0.0, "count": len(silent)}
    assert scores["all"]["count"] == 32
    with pytest.raises(ValueError, match="no question of this split has an answer"):
        score_questions(vqa_model, batches(scenes, scene_tokenizer, answers, 16, split="test"), answers, "cpu")
    with pytest.raises(ValueError, match="gave no batch"):
        score_questions(vqa_model, [], answers, "cpu")


@pytest.fixture
def vqa_run(tmp_path: Path, scenes: Path, vqa_model: Meter, answers) -> Path:
    """A run directory as training leaves it."""
    return write_vqa_run(tmp_path / "run", scenes, vqa_model, answers)


def test_command_line(scenes, scene_tokenizer, vqa_model, answers, vqa_run, tmp_path, capsys) -> None:
    assert main(["evaluate", str(vqa_run), "vqa", "--json", str(tmp_path / "scores.json")]) == 0
    said, written = capsys.readouterr().out, json.loads((tmp_path / "scores.json").read_text())
    expected = score_questions(vqa_model, batches(scenes, scene_tokenizer, answers, 32), answers, "cpu")
    assert written["vqa"]["all"]["score"] == pytest.approx(expected["all"]["score"], abs=1e-6)
    assert written["split"] == "arrow:vqav2_val" and written["pairs"] == written["vqa"]["all"]["count"]
    for kind, row in written["vqa"].items():
        assert f"vqa {kind}" in said and f"score {100 * row['score']:.2f} %" in said
    assert main(["evaluate", str(vqa_run / "export"), "vqa", f"data.root={scenes}", "--pairs", "10"]) == 0
    assert "10 questions" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("command", "said"),
    [
        (["evaluate", "{run}", "pretrain"], "is a run of vqa, not of pretrain: meter-fast evaluate {run} vqa"),
        (
            ["evaluate", "{run}/export", "pretrain", "data.val_sources=coco"],
            "evaluate {run}/export vqa or objectives.names=",
        ),
        (["evaluate", "{run}", "vqa", "data.val_sources=arrow:vqav2_test"], "no question of this split has an answer"),
        (["evaluate", "{run}", "vqa", "data.val_sources="], "name held-out questions"),
        (["evaluate", "{run}", "vqa", "data.val_sources=arrow:absent"], "no table absent.arrow"),
        (["evaluate", "{run}", "vqa", "data.answers={run}/few.json"], "2 answers, the model has 20"),
        (["evaluate", "{run}", "vqa", "data.answers={run}/other.json"], "calls label 0 'yes', where it should be 'si'"),
        (["report", "{run}"], "reports are of pre-training: meter-fast evaluate {run} vqa"),
    ],
)
def test_refusals(command: list[str], said: str, vqa_run: Path, answers, scenes: Path, capsys) -> None:
    (vqa_run / "metrics.jsonl").write_text('{"step": 1}\n')
    (vqa_run / "few.json").write_text('["yes", "no"]')
    (vqa_run / "other.json").write_text(json.dumps(["si", *answers.names[1:]]))
    arguments = [part.format(run=vqa_run) for part in command]
    if "export" in arguments[1]:
        arguments.append(f"data.root={scenes}")
    assert main(arguments) == 2
    assert said.format(run=vqa_run) in capsys.readouterr().err


# ---------------------------------------------------------------------------------------------------- the server's file


def first_choices(scenes, tokenizer, model, answers, split: str) -> dict[int, str]:
    """question_id -> the answer of the highest logit, question by question."""
    chosen = {}
    for batch in batches(scenes, tokenizer, answers, 16, split=split):
        for n in range(len(batch)):
            one = alone(batch, n, 0)
            with torch.inference_mode():
                text = model.encode_text(one.text_ids, one.text_mask)
                cls = model.fuse(text, model.encode_image(one.images), one.text_mask).cls
                chosen[int(one.question_ids)] = answers.names[int(model.vqa_head(cls).argmax())]
    return chosen


def submit(capsys, run: Path, file: Path, *more: str) -> tuple[list[dict], str]:
    assert main(["evaluate", str(run), "vqa", *more, "--submission", str(file)]) == 0
    return json.loads(file.read_text(encoding="utf-8")), capsys.readouterr().out


def test_submission_of_a_split_with_answers(scenes, scene_tokenizer, vqa_model, answers, vqa_run, tmp_path, capsys):
    rows, said = submit(capsys, vqa_run, tmp_path / "answers.json", "--json", str(tmp_path / "scores.json"))
    expected = first_choices(scenes, scene_tokenizer, vqa_model, answers, "val")
    assert [set(row) for row in rows] == [{"question_id", "answer"}] * len(expected)
    assert {row["question_id"]: row["answer"] for row in rows} == expected and len(set(expected.values())) > 3
    scores = json.loads((tmp_path / "scores.json").read_text())
    made = {"file": str(tmp_path / "answers.json"), "questions": len(rows), "filled": 0, "filled_with": None}
    assert scores["submission"] == made and scores["vqa"]["all"]["count"] == len(rows)
    assert scores["task"] == "vqa" and scores["world_size"] == 1 and scores["model"] == str(vqa_run)
    assert scores["tables"] == ["vqav2_val.arrow"] and scores["versions"]["torch"] == torch.__version__
    assert f"answers.json: {len(rows):,} answers\n" in said and "vqa all" in said


def test_submission_of_a_test_split_has_no_score(
    scenes, scene_tokenizer, vqa_model, answers, vqa_run, tmp_path, capsys
):
    file, scores = tmp_path / "answers.json", tmp_path / "scores.json"
    rows, said = submit(capsys, vqa_run, file, "data.val_sources=arrow:vqav2_test", "--json", str(scores))
    assert {row["question_id"]: row["answer"] for row in rows} == first_choices(
        scenes, scene_tokenizer, vqa_model, answers, "test"
    )
    assert "vqa" not in json.loads(scores.read_text()) and "score" not in said


@pytest.mark.parametrize("trained", [True, False])
def test_questions_that_cannot_be_asked_are_answered_all_the_same(
    scenes, scene_tokenizer, vqa_model, answers, vqa_run, tmp_path, capsys, trained
) -> None:
    """With the most frequent answer of training, or "yes" where the training tables are not there."""
    data = tmp_path / "data"
    data.mkdir()
    damaged_table(scenes / "vqav2_val.arrow", data / "vqav2_val.arrow", (3, 7))
    if trained:
        (data / "vqav2_train.arrow").symlink_to(scenes / "vqav2_train.arrow")
    more = [f"data.root={data}", "data.max_bad_share=1", "--json", str(tmp_path / "scores.json")]
    rows, said = submit(capsys, vqa_run, tmp_path / "answers.json", *more)
    sources = open_questions(["vqa"], data, "val")
    lost = {sources.read(n).question_id for n in range(len(sources)) if sources.image_ids(np.array([n]))[0] in (3, 7)}
    tables = open_questions(["arrow:vqav2_train"], scenes)
    counts = Counter(name for n in range(len(tables)) for name in tables.read(n).answers)
    likely = max(counts, key=lambda name: (counts[name], name)) if trained else "yes"
    expected = first_choices(scenes, scene_tokenizer, vqa_model, answers, "val") | dict.fromkeys(lost, likely)
    assert {row["question_id"]: row["answer"] for row in rows} == expected and len(rows) == len(sources)
    scores = json.loads((tmp_path / "scores.json").read_text())
    assert scores["submission"]["filled"] == len(lost) > 1 and scores["submission"]["filled_with"] == likely
    assert sum(scores["skipped"].values()) == len(lost) and scores["vqa"]["all"]["count"] == len(rows) - len(lost)
    assert f"{len(lost)} could not be asked, with {likely!r}" in said


def test_names_of_a_model_that_knows_numbers_only(
    scenes, scene_tokenizer, vqa_model, answers, vqa_run, tmp_path, capsys
):
    """As of a published checkpoint: they are those of the published tables of training and validation."""
    (vqa_run / "export" / "answers.json").unlink()
    rows, _ = submit(capsys, vqa_run, tmp_path / "answers.json", "data.val_sources=arrow:vqav2_test")
    expected = first_choices(scenes, scene_tokenizer, vqa_model, answers, "test")
    assert {row["question_id"]: row["answer"] for row in rows} == expected
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "vqav2_test.arrow").symlink_to(scenes / "vqav2_test.arrow")
    command = ["evaluate", str(vqa_run), "vqa", "data.val_sources=arrow:vqav2_test", f"data.root={tmp_path / 'data'}"]
    assert main([*command, "--submission", str(tmp_path / "other.json")]) == 2
    assert "knows its 20 answers by number only" in capsys.readouterr().err and not (tmp_path / "other.json").exists()
    (tmp_path / "names.json").write_text(answers.text())
    rows, _ = submit(capsys, vqa_run, tmp_path / "other.json", *command[3:], f"data.answers={tmp_path / 'names.json'}")
    assert {row["question_id"]: row["answer"] for row in rows} == expected


def test_an_answer_without_a_name_is_never_given(scenes, scene_tokenizer, vqa_model, answers) -> None:
    parts = batches(scenes, scene_tokenizer, answers, 16)
    labels = [one.label for one in ask(vqa_model, parts, "cpu", answers)]
    nameless = Answers(tuple(None if n == labels[0] else name for n, name in enumerate(answers.names)))
    assert labels[0] not in {one.label for one in ask(vqa_model, parts, "cpu", nameless)}
    no_names = Answers((None,) * len(answers))
    assert [one.label for one in ask(vqa_model, parts, "cpu", no_names)] == labels


@pytest.mark.parametrize(
    ("more", "said"),
    [
        (["--pairs", "10"], "every question of the split: leave out --pairs"),
        (["data.val_sources=arrow:vqav2_val,arrow:vqav2_val"], "there more than once"),
        (["--submission", "{run}"], "is a folder"),
        (["--submission", "{run}/absent/answers.json"], "there is no folder"),
    ],
)
def test_refusals_of_a_submission(vqa_run, tmp_path, capsys, more, said) -> None:
    file = tmp_path / "answers.json"
    more = [word.format(run=vqa_run) for word in more]
    command = ["evaluate", str(vqa_run), "vqa", *more, *([] if "--submission" in more else ["--submission", str(file)])]
    assert main(command) == 2
    assert said in capsys.readouterr().err and not file.exists()
