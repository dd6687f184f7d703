"""The VQA score: by kind, with other pictures, over a split on the command line; what is refused."""

import copy
import dataclasses
import json
from pathlib import Path

import pytest
import torch

from meter_fast.cli import main
from meter_fast.config import override, to_dict
from meter_fast.data.answers import find_answers
from meter_fast.data.batch import VqaBatch
from meter_fast.data.images import image_transform, open_backend
from meter_fast.data.question_tables import open_questions
from meter_fast.data.questions import QuestionAssembler, question_split_loader
from meter_fast.data.text import TextPipeline
from meter_fast.models.export import save_export
from meter_fast.models.heads import AnswerHead
from meter_fast.models.meter import Meter
from meter_fast.objectives.joint import JointLoss
from meter_fast.recipes import resolve
from meter_fast.score_vqa import NO_ANSWER, kind_of, score_questions


@pytest.fixture(scope="module")
def answers(scenes: Path):
    return find_answers(open_questions(["vqa"], scenes, "train").tables)


@pytest.fixture(scope="module")
def vqa_model(scenes: Path, scene_tokenizer, scene_model: Meter, answers) -> Meter:
    """The untrained model, its head's biases such that it chooses now this, now that answer."""
    model = copy.deepcopy(scene_model)
    torch.manual_seed(4)
    model.mlm_head = model.itm_head = None
    model.vqa_head = AnswerHead(model.config.cls_width, model.config.fusion.width, len(answers))
    model.config = dataclasses.replace(model.config, mlm_head=False, itm_head=False, vqa_answers=len(answers))
    (batch,) = batches(scenes, scene_tokenizer, answers, 100)
    with torch.no_grad():
        image, text = model.encode_image(batch.images), model.encode_text(batch.text_ids, batch.text_mask)
        cls = model.fuse(text, image[batch.image_rows], batch.text_mask).cls
        model.vqa_head.out.bias -= model.vqa_head(cls).mean(0)
    assert len(model.vqa_head(cls).argmax(1).unique()) > 5
    return model


def batches(scenes: Path, tokenizer, answers, size: int, limit: int | None = None, split: str = "val"):
    sources = open_questions(["vqa"], scenes, split)
    backend = open_backend("torchvision", image_transform("clip", 64), "cpu", torch.float32)
    assembler = QuestionAssembler(sources, TextPipeline(tokenizer, 40), backend, 0, len(answers), replace=False)
    return list(question_split_loader(assembler, batch_size=size, limit=limit))


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
    folder = tmp_path / "run"
    save_export(vqa_model, folder / "export", scenes / "tokenizer", answers=answers.text())
    config = override(resolve(["vqa", "size=tiny"]), [f"data.root={scenes}", "data.workers=0"])
    (folder / "config.json").write_text(json.dumps(to_dict(dataclasses.replace(config, model=vqa_model.config))))
    (folder / "run.json").write_text(json.dumps({"world_size": 1}))
    return folder


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
