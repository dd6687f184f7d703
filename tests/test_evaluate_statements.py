"""Accuracy on NLVR2 and SNLI-VE: by label, with other pictures, over a split on the command line; what is refused."""

import copy
import dataclasses
import json
from pathlib import Path

import pytest
import torch
from fine_tuned import damaged_table
from torch import nn

from meter_fast import evaluate, evaluate_texts
from meter_fast.cli import main
from meter_fast.config import override, to_dict
from meter_fast.data.about_pictures import split_loader
from meter_fast.data.batch import StatementBatch
from meter_fast.data.images import image_transform, open_backend
from meter_fast.data.statement_tables import TASKS, open_statements
from meter_fast.data.statements import StatementAssembler
from meter_fast.data.text import TextPipeline
from meter_fast.exchanged import other_pictures
from meter_fast.models.export import save_export
from meter_fast.models.heads import AnswerHead
from meter_fast.models.meter import Meter
from meter_fast.objectives.joint import OBJECTIVES, JointLoss
from meter_fast.recipes import resolve
from meter_fast.score_statements import score_statements

DEV = {"nlvr2": "nlvr2_dev", "snli_ve": "snli_dev"}


@pytest.fixture(scope="module", params=TASKS)
def task(request: pytest.FixtureRequest) -> str:
    return request.param


def batches(scenes: Path, tokenizer, task: str, size: int, limit: int | None = None) -> list[StatementBatch]:
    sources = open_statements(task, [f"arrow:{DEV[task]}"], scenes)
    backend = open_backend("torchvision", image_transform("clip", 64), "cpu", torch.float32)
    assembler = StatementAssembler(sources, TextPipeline(tokenizer, 40), backend, 0, replace=False)
    return list(split_loader(assembler, batch_size=size, limit=limit))


@pytest.fixture(scope="module")
def task_model(scenes: Path, scene_tokenizer, scene_model: Meter, task: str) -> Meter:
    """The untrained model, its head's biases such that it chooses now this, now that label."""
    model, classes = copy.deepcopy(scene_model), len(TASKS[task].labels)
    torch.manual_seed(4)
    model.mlm_head = model.itm_head = None
    config = dataclasses.replace(model.config, mlm_head=False, itm_head=False)
    if task == "nlvr2":
        model.fusion.token_types = nn.Embedding(3, config.fusion.width)
        config = dataclasses.replace(config, fusion=dataclasses.replace(config.fusion, token_types=3))
    head = OBJECTIVES[task].HEAD
    model.config = dataclasses.replace(config, **{head: True})
    setattr(model, head, AnswerHead(config.cls_width * (2 if task == "nlvr2" else 1), config.fusion.width, classes))
    (batch,) = batches(scenes, scene_tokenizer, task, 100)
    seen: list[torch.Tensor] = []
    hook = getattr(model, head).register_forward_hook(lambda _m, _i, output: seen.append(output))
    with torch.no_grad():
        JointLoss(model, (task,))(batch)
        hook.remove()
        getattr(model, head).out.bias -= seen[0].mean(0)
    assert len((seen[0] - seen[0].mean(0)).argmax(1).unique()) == classes
    return model


def alone(batch: StatementBatch, n: int, rows: torch.Tensor) -> StatementBatch:
    """Statement `n` of a batch by the pictures of `rows`."""
    own = {name: getattr(batch, name)[n : n + 1] for name in ("text_ids", "text_mask", "labels", "sample_ids")}
    return StatementBatch(images=batch.images[rows], image_rows=torch.arange(len(rows))[None], **own)


def test_other_pictures() -> None:
    """The next text that shares no picture, round the batch."""
    rows, there = other_pictures(torch.tensor([[0, 1], [1, 0], [2, 3], [3, 4], [0, 5]]))
    assert there.all()
    assert rows.tolist() == [[2, 3], [2, 3], [0, 5], [0, 5], [2, 3]]
    rows, there = other_pictures(torch.tensor([[0, 1], [1, 2], [2, 3]]))
    assert there.tolist() == [True, False, True] and rows[[0, 2]].tolist() == [[2, 3], [0, 1]]
    rows, there = other_pictures(torch.tensor([[0], [0], [1], [2]]))
    assert rows.flatten().tolist() == [1, 1, 2, 0] and there.all()
    assert not other_pictures(torch.zeros(3, 1, dtype=torch.int64))[1].any()


def test_scores_are_those_of_each_statement_alone(scenes, scene_tokenizer, task_model, task) -> None:
    parts = batches(scenes, scene_tokenizer, task, 16, limit=33)
    assert len(parts) == 3
    task_model.train()
    scores = score_statements(task_model, parts, task, "cpu")
    assert task_model.training
    task_model.eval()
    module, own, other, labels = JointLoss(task_model, (task,)), [], [], []
    with torch.inference_mode():
        for batch in parts:
            others, there = other_pictures(batch.image_rows)
            for n in range(len(batch)):
                own.append(module(alone(batch, n, batch.image_rows[n])).metrics[task][0].item())
                if there[n]:
                    other.append(module(alone(batch, n, others[n])).metrics[task][0].item())
                labels.append(int(batch.labels[n]))
    assert len(other) > len(own) // 2
    whole = scores["all"]
    assert whole["accuracy"] == pytest.approx(sum(own) / len(own)) and whole["count"] == len(own)
    assert whole["exchanged"] == pytest.approx(sum(other) / len(other))
    assert whole["chance"] == pytest.approx(max(labels.count(label) for label in set(labels)) / len(labels))
    assert set(scores) == {"all", *(TASKS[task].labels[label] for label in set(labels))}
    for number in set(labels):
        chosen = [right for right, label in zip(own, labels, strict=True) if label == number]
        row = scores[TASKS[task].labels[number]]
        assert row["accuracy"] == pytest.approx(sum(chosen) / len(chosen)) and row["count"] == len(chosen)


def test_batches_of_the_same_pictures_have_no_other(scenes, scene_tokenizer, task_model, task) -> None:
    batch = batches(scenes, scene_tokenizer, task, 16)[0]
    rows = score_statements(task_model, [alone(batch, n, batch.image_rows[n]) for n in range(4)], task, "cpu")
    assert rows["all"]["exchanged"] is None and rows["all"]["count"] == 4
    with pytest.raises(ValueError, match="gave no batch"):
        score_statements(task_model, [], task, "cpu")


@pytest.fixture
def task_run(tmp_path: Path, scenes: Path, task_model: Meter, task: str) -> Path:
    """A run directory as training leaves it."""
    folder = tmp_path / "run"
    save_export(task_model, folder / "export", scenes / "tokenizer")
    config = override(resolve([task, "size=tiny"]), [f"data.root={scenes}", "data.workers=0"])
    (folder / "config.json").write_text(json.dumps(to_dict(dataclasses.replace(config, model=task_model.config))))
    (folder / "run.json").write_text(json.dumps({"world_size": 1}))
    return folder


def test_command_line(scenes, scene_tokenizer, task_model, task, task_run, tmp_path, capsys) -> None:
    assert main(["evaluate", str(task_run), task, "--json", str(tmp_path / "scores.json")]) == 0
    said, written = capsys.readouterr().out, json.loads((tmp_path / "scores.json").read_text())
    expected = score_statements(task_model, batches(scenes, scene_tokenizer, task, 32), task, "cpu")
    assert written[task] == expected
    assert written["split"] == f"arrow:{DEV[task]}" and written["pairs"] == written[task]["all"]["count"]
    for label, row in expected.items():
        assert f"{task} {label}" in said and f"accuracy {100 * row['accuracy']:.2f} %" in said
    assert f"chance {100 * expected['all']['chance']:.2f} %" in said
    assert f"split arrow:{DEV[task]}, {expected['all']['count']} {TASKS[task].texts}, skipped none" in said
    more = [f"data.root={scenes}", f"data.val_sources={task}", "--pairs", "20"]
    assert main(["evaluate", str(task_run / "export"), task, *more]) == 0
    said = capsys.readouterr().out
    files = ", ".join(TASKS[task].splits["val"])
    assert f"split {task}, val ({files}), 20 {TASKS[task].texts}" in said


def predictions(scenes, tokenizer, model: Meter, task: str) -> dict[int, str]:
    """What the model says of each statement of the held-out table, by number."""
    module, found, classes = JointLoss(model.eval(), (task,)), {}, TASKS[task].labels
    with torch.inference_mode():
        for batch in batches(scenes, tokenizer, task, 16):
            right = {}
            for label in range(len(classes)):
                asked = [dataclasses.replace(alone(batch, n, batch.image_rows[n]), labels=torch.tensor([label]))
                         for n in range(len(batch))]  # fmt: skip
                right[label] = [module(one).metrics[task][0].item() for one in asked]
            for n, sample in enumerate(batch.sample_ids.tolist()):
                found[sample] = next(classes[label] for label in right if right[label][n])
    return found


def written(file: Path, task: str) -> list[tuple[str, str]]:
    """Name and label of each statement; NLVR2's as its official script takes a line apart."""
    if task == "nlvr2":
        return [tuple(line.strip().split(",")) for line in file.read_text().splitlines()]
    rows = [json.loads(line) for line in file.read_text().splitlines()]
    return [(row["statement"], row["prediction"]) for row in rows]


def test_submission(scenes, scene_tokenizer, task_model, task, task_run, tmp_path, capsys) -> None:
    """Every statement once, with what the model says of it; those whose pictures cannot be read with a likely label."""
    sources = open_statements(task, [f"arrow:{DEV[task]}"], scenes)
    said, file = predictions(scenes, scene_tokenizer, task_model, task), tmp_path / "file"
    statements = [sources.read(n) for n in range(len(sources))]
    names = [f"{one.pair}-{one.number}" if task == "nlvr2" else one.name for one in statements]
    expected = [(name, said[n]) for n, name in enumerate(names)]
    assert main(["evaluate", str(task_run), task, "--submission", str(file)]) == 0
    assert f"{file}: {len(names)} judgements" in capsys.readouterr().out
    assert [(name, label.lower()) for name, label in written(file, task)] == expected
    assert len(set(names)) == len(names) and len({label for _, label in expected}) > 1
    assert {label for _, label in written(file, task)} <= {"True", "False", *TASKS["snli_ve"].labels}

    data = tmp_path / "data"
    data.mkdir()
    column = TASKS[task].images[0]
    damaged_table(scenes / f"{DEV[task]}.arrow", data / f"{DEV[task]}.arrow", (3,), column)
    lost = [n for n in range(len(sources)) if sources.image_ids([n])[0] == 3]
    more = [f"data.root={data}", "data.max_bad_share=1", "--submission", str(file), "--json", str(tmp_path / "scores")]
    assert main(["evaluate", str(task_run), task, *more]) == 0
    likely = {"nlvr2": "true", "snli_ve": "entailment"}[task]
    expected = [(name, likely if n in lost else said[n]) for n, name in enumerate(names)]
    assert [(name, label.lower()) for name, label in written(file, task)] == expected and lost
    assert f"; {len(lost)} could not be judged, with '{likely}'" in capsys.readouterr().out
    scores = json.loads((tmp_path / "scores").read_text())
    assert scores["submission"]["filled"] == len(lost) and scores["submission"]["statements"] == len(names)
    assert scores[task]["all"]["count"] == len(names) - len(lost)


@pytest.fixture
def annotated(scenes: Path, tmp_path: Path) -> tuple[Path, list[dict]]:
    """Annotations of NLVR2's held-out table in which sentences have other numbers than places, and one statement more
    than the table."""
    sources = open_statements("nlvr2", ["arrow:nlvr2_dev"], scenes)
    lines = [{"identifier": f"{one.pair}-{2 * one.number + 1}", "sentence": f" {one.text} ", "label": "True"}
             for one in map(sources.read, range(len(sources)))]  # fmt: skip
    lines.insert(2, {"identifier": "dev-900-0-0", "sentence": "of a picture that is lost", "label": "True"})
    path = tmp_path / "dev.json"
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return path, lines


def test_annotations_name_the_statements(scenes, scene_tokenizer, task_model, task, task_run, annotated, tmp_path):
    path, lines = annotated
    command = ["evaluate", str(task_run), task, "--submission", str(tmp_path / "file"), "--annotations", str(path)]
    if task != "nlvr2":
        assert main(command) == 2
        return
    assert main(command) == 0
    said = list(predictions(scenes, scene_tokenizer, task_model, task).items())
    labels = [label for _, label in sorted(said)]
    labels.insert(2, "true")
    found = [(name, label.lower()) for name, label in written(tmp_path / "file", task)]
    assert found == [(line["identifier"], label) for line, label in zip(lines, labels, strict=True)]


def test_refusals_of_a_submission(task: str, task_run: Path, annotated, tmp_path: Path, capsys) -> None:
    path, lines = annotated
    part, double, odd, torn = (tmp_path / name for name in ("part.json", "double.json", "odd.json", "torn.json"))
    part.write_text("".join(json.dumps(line) + "\n" for line in lines[:10]))
    double.write_text("".join(json.dumps(line) + "\n" for line in [*lines, lines[5]]))
    odd.write_text('{"identifier": "dev-0-0-0"}\n')
    torn.write_text('{"identifier": "dev-')
    table = DEV[task]
    of_nlvr2 = [
        (["--annotations", str(part)], "part.json does not have "),
        (["--annotations", str(double)], f"double.json: {lines[5]['identifier']} is there more than once"),
        (["--annotations", str(odd)], "odd.json, line 1: no 'sentence'"),
        (["--annotations", str(torn)], "torn.json line 1: no JSON"),
        (["--annotations", str(tmp_path / "absent")], "absent: cannot read it (No such file"),
    ]
    for more, said in [
        (["--pairs", "10"], "every statement of the split: leave out --pairs"),
        ([f"data.val_sources=arrow:{table},arrow:{table}"], "is there more than once"),
        (["--submission", str(tmp_path)], "is a folder"),
        (["--submission", str(tmp_path / "absent" / "file")], "there is no folder"),
        *(of_nlvr2 if task == "nlvr2" else [(["--annotations", str(path)], "goes with the task nlvr2, not with")]),
    ]:
        assert main(["evaluate", str(task_run), task, "--submission", str(tmp_path / "file"), *more]) == 2, more
        assert said in capsys.readouterr().err, more
        assert not (tmp_path / "file").exists()
    if task == "nlvr2":
        assert main(["evaluate", str(task_run), task, "--annotations", str(path)]) == 2
        assert "give --submission FILE, too" in capsys.readouterr().err


def test_the_back_end_is_opened_for_all_pictures_of_a_batch(task, task_run, monkeypatch: pytest.MonkeyPatch) -> None:
    opened = []

    def opening(*given: object, max_batch: int):
        backend = open_backend(*given, max_batch=max_batch)
        decode = backend.decode
        monkeypatch.setattr(
            backend, "decode", lambda encoded, *rest: opened.append((len(encoded), max_batch)) or decode(encoded, *rest)
        )
        return backend

    monkeypatch.setattr(evaluate_texts, "open_backend", opening)
    evaluate.evaluate_split(task_run, task, ["engine.micro_batch=1"])
    assert opened and max(count for count, _ in opened) > 1
    assert all(count <= most for count, most in opened)


def test_refusals(task: str, task_run: Path, scenes: Path, run_dir: Path, capsys) -> None:
    other = next(name for name in TASKS if name != task)
    (task_run / "metrics.jsonl").write_text('{"step": 1}\n')
    own, head = f"meter-fast evaluate {task_run} {task}", OBJECTIVES[other].HEAD
    for command, said in [
        (["evaluate", f"{task_run}", "vqa"], f"is a run of {task}, not of vqa: {own}"),
        (["evaluate", f"{task_run}", other], f"is a run of {task}, not of {other}: {own}"),
        (["evaluate", f"{task_run}", "pretrain"], f"is a run of {task}, not of pretrain: {own}"),
        (["evaluate", f"{run_dir}", task], f"no {OBJECTIVES[task].HEAD}): fine-tune it first, meter-fast train {task}"),
        (
            ["evaluate", f"{task_run}/export", other, f"data.root={scenes}"],
            f"not trained on {other} (it has no {head})",
        ),
        (["evaluate", f"{task_run}", task, "data.val_sources="], f"for example data.val_sources=arrow:{DEV[task]}"),
        (["evaluate", f"{task_run}", task, "data.val_sources=arrow:absent"], "no table absent.arrow"),
        (["report", f"{task_run}"], f"reports are of pre-training: {own}"),
    ]:
        assert main(command) == 2, command
        assert said in capsys.readouterr().err, command
