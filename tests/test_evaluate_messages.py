"""`meter-fast evaluate` with wrong paths, models and data: one line that says what to do, and exit code 2."""

import json
from pathlib import Path

import pytest
from fine_tuned import answering, answers_of_scenes, write_caption_run, write_vqa_run
from scene_run import make_run

from meter_fast.cli import main
from meter_fast.models.export import save_export


@pytest.fixture(scope="module")
def places(scenes: Path, scene_model, scene_tokenizer, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A run of each kind, and things that are no models."""
    tmp = tmp_path_factory.mktemp("places")
    answers = answers_of_scenes(scenes)
    model = answering(scenes, scene_tokenizer, scene_model, answers)
    vqa = write_vqa_run(tmp / "vqa", scenes, model, answers)
    save_export(model, tmp / "nameless", scenes / "tokenizer")
    (tmp / "empty").mkdir()
    (tmp / "text.ckpt").write_text("no checkpoint")
    (tmp / "broken.json").write_text("{")
    spans = write_caption_run(tmp / "spans", scenes)
    config = json.loads((spans / "config.json").read_text())
    config["objectives"]["names"] = ["span_denoising", "itm"]
    (spans / "config.json").write_text(json.dumps(config))
    return {
        "tmp": tmp,
        "data": scenes,
        "pairs": make_run(tmp / "pairs", scenes, scene_model),
        "vqa": vqa,
        "spans": spans,
        "caption": write_caption_run(tmp / "caption", scenes),
    }


TASKS = ("pretrain", "vqa", "caption", "retrieval")
COMMANDS = [
    *([["{tmp}/nowhere", task], "nowhere does not exist: give an export folder, a run"] for task in TASKS),
    *([["{tmp}/empty", task], "empty has no model: neither model.safetensors nor export/"] for task in TASKS),
    *([["{tmp}/text.ckpt", task], "text.ckpt"] for task in TASKS),
    # a model of another task
    [["{pairs}", "vqa"], "was not trained on vqa (it has no vqa_head): fine-tune it first, meter-fast train vqa"],
    [["{pairs}", "caption"], "{pairs} writes no captions: it has no decoder (fusion=encoder_decoder). Fine-tune"],
    [["{spans}", "caption"], "{spans} writes no captions: it was trained on objectives.names=span_denoising,itm. Fine"],
    [["{vqa}", "pretrain"], "is a run of vqa, not of pretrain: meter-fast evaluate {vqa} vqa"],
    [["{vqa}", "caption"], "is a run of vqa, not of caption: meter-fast evaluate {vqa} vqa"],
    [["{caption}", "vqa"], "was not trained on vqa"],
    [["{caption}", "retrieval"], "retrieval"],
    [["{vqa}/export", "pretrain"], "was not trained on mlm, itm (no mlm_head): meter-fast evaluate {vqa}/export vqa"],
    [["{pairs}/export", "pretrain", "objectives.names=mlm,caption"], "objectives.names=mlm,caption"],
    # missing answers
    [["{vqa}", "vqa", "data.answers={tmp}/absent.json"], "absent.json"],
    [["{vqa}", "vqa", "data.answers={tmp}/broken.json"], "cannot read {tmp}/broken.json"],
    [["{vqa}", "vqa", "data.val_sources=arrow:vqav2_test"], "or write the evaluation server's file: --submission"],
    # no held-out data
    [["{vqa}", "vqa", "data.val_sources="], "name held-out questions, for example data.val_sources=arrow:vqav2_val"],
    [
        ["{pairs}", "pretrain", "data.val_sources=", "data.sources=vg"],
        "name held-out data, for example data.val_sources",
    ],
    [
        ["{pairs}", "pretrain", "data.val_split=train", "data.val_sources="],
        "no train split that was kept from training",
    ],
    [["{caption}", "caption", "data.val_sources=", "data.sources=vg"], "name held-out data"],
    [["{pairs}", "pretrain", "data.val_sources=arrow:absent"], "no table absent.arrow"],
    [["{vqa}", "vqa", "data.root={tmp}/empty"], "no table vqav2_val.arrow"],
    [["{caption}", "caption", "data.root={tmp}/nowhere"], "is not a folder"],
    # settings and options
    [["{pairs}", "pretrain", "data.rot=x"], "data.root"],
    [
        ["{pairs}", "pretrain", "--submission", "{tmp}/a.json"],
        "--submission goes with the task vqa, nlvr2 or snli_ve, not with pretrain",
    ],
    [["{vqa}", "vqa", "--captions", "{tmp}/a.json"], "--captions goes with the task caption, not with vqa"],
    [["{vqa}", "vqa", "--json", "{tmp}/absent/a.json"], "there is no folder {tmp}/absent"],
    [["{caption}", "caption", "--captions", "{tmp}/absent/c.json"], "there is no folder {tmp}/absent"],
    [["{caption}", "caption", "--captions", "{tmp}"], "{tmp} is a folder: name a file"],
    [["{caption}", "caption", "--beams", "0"], "--beams 0: give 1 or more"],
    [
        ["{caption}", "caption", "--pairs", "5"],
        "--pairs goes with the task pretrain, vqa, nlvr2 or snli_ve, not with caption",
    ],
    [["{pairs}", "pretrain", "--pairs", "1"], "--pairs 1: give 2 or more"],
    [["{pairs}", "pretrain", "--pairs", "2", "data.rot=x"], "did you mean data.root?"],  # settings behind an option
    [["{pairs}", "pretrain", "size=tiny"], "unknown setting 'size': known: model.*, data.*, objectives.*, optim.*, "],
    [["{pairs}", "retrieval", "--pictures", "2", "--scores", "{tmp}/broken.json"], "as a file is in its way: name an"],
]


@pytest.mark.parametrize(("command", "said"), COMMANDS, ids=[" ".join(words) for words, _ in COMMANDS])
def test_one_line_and_exit_code_2(places: dict[str, Path], capsys, command: list[str], said: str) -> None:
    assert main(["evaluate", *(word.format(**places) for word in command)]) == 2
    error = capsys.readouterr().err
    assert said.format(**places) in error and error.startswith("meter-fast evaluate: ")
    assert error.count("\n") == 1 and "Traceback" not in error
