"""Evaluation by several processes: the scores, files and refusals of one process."""

import json
from pathlib import Path

import pytest
import torch
from fine_tuned import answering, answers_of_scenes, damaged_table, write_caption_run, write_vqa_run
from ranks import RankServer
from scene_run import make_run

from meter_fast.cli import main

PRETRAIN = ["pretrain", "data.val_sources=coco", "data.val_split=test"]
TASKS = {
    "pretrain": [*PRETRAIN, "--pairs", "37"],
    "vqa": ["vqa", "--submission", "{out}/file.json"],
    "test": ["vqa", "data.val_sources=arrow:vqav2_test", "--submission", "{out}/file.json"],
    "caption": ["caption", "data.val_split=test", "--captions", "{out}/file.json", "--beams", "2"],
    "retrieval": ["retrieval", "data.val_sources=coco", "data.val_split=test", "--pictures", "20"],
}


@pytest.fixture(scope="module")
def damaged(scenes: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The drawn tables, those that are evaluated with a few pictures cut off."""
    root = tmp_path_factory.mktemp("damaged")
    for table in scenes.glob("*.arrow"):
        (root / table.name).symlink_to(table)
    for name, rows in (("vqav2_val", (0, 1, 2, 7)), ("vqav2_test", (5,)), ("coco_caption_karpathy_test", (0, 3))):
        (root / f"{name}.arrow").unlink()
        damaged_table(scenes / f"{name}.arrow", root / f"{name}.arrow", rows)
    return root


@pytest.fixture(scope="module")
def models(scenes: Path, scene_tokenizer, scene_model, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A run directory for each task."""
    folder = tmp_path_factory.mktemp("runs")
    answers = answers_of_scenes(scenes)
    asked = write_vqa_run(folder / "vqa", scenes, answering(scenes, scene_tokenizer, scene_model, answers), answers)
    writer = write_caption_run(folder / "caption", scenes)
    pretrained = make_run(folder / "pretrain", scenes, scene_model)
    return {
        "pretrain": pretrained,
        "retrieval": pretrained,
        "vqa": asked,
        "test": asked,
        "caption": writer,
    }


def command(task: str, models: dict[str, Path], data: Path, out: Path) -> list[str]:
    """The arguments of an evaluation that writes its scores to OUT/scores.json. Batches are small, so that each process
    has some."""
    out.mkdir()
    name, *more = (word.format(out=out) for word in TASKS[task])
    settings = [word for word in more if "=" in word]
    options = [word for word in more if "=" not in word]
    rules = [f"data.root={data}", "engine.micro_batch=2", "engine.global_batch=4", "data.max_bad_share=1"]
    return [str(models[task]), name, *settings, *rules, *options, "--json", str(out / "scores.json")]


@pytest.mark.parametrize(("task", "world"), [(task, 2) for task in TASKS] + [("caption", 3)])
def test_any_number_of_processes_gives_what_one_gives(
    ranks: RankServer, models: dict[str, Path], damaged: Path, tmp_path: Path, task: str, world: int
) -> None:
    """To the last digit: the same batches are scored, and none twice."""
    assert main(["evaluate", *command(task, models, damaged, tmp_path / "one")]) == 0
    argv = [*command(task, models, damaged, tmp_path / "all"), "--local_rank=0"]
    ended = ranks.run(world, tmp_path / "logs", "meter_fast.evaluate:main", argv=argv).check()
    one, both = (json.loads((tmp_path / who / "scores.json").read_text()) for who in ("one", "all"))
    assert (one.pop("world_size"), both.pop("world_size")) == (1, world)
    for scores in (one, both):
        for made in (scores.get("submission"), scores.get("captions")):
            if isinstance(made, dict):  # of retrieval it is a number of captions
                made.pop("file")
    assert both == one and sum(one["skipped"].values()) > 0
    if "{out}/file.json" in TASKS[task]:
        files = [(tmp_path / who / "file.json").read_bytes() for who in ("one", "all")]
        assert files[0] == files[1] and len(json.loads(files[0])) > 30
    assert "split " in ended.logs[0] and all("split " not in log for log in ended.logs[1:])


def test_more_processes_than_batches(ranks: RankServer, models, scenes: Path, tmp_path: Path) -> None:
    """Those without a batch wait for the others."""
    rules = ["data.val_sources=coco", "data.val_split=test", f"data.root={scenes}"]
    argv = [str(models["pretrain"]), "pretrain", *rules, "--pairs", "4", "--json", str(tmp_path / "all.json")]
    ranks.run(3, tmp_path / "logs", "meter_fast.evaluate:main", argv=argv).check()
    assert json.loads((tmp_path / "all.json").read_text())["itm"]["count"] == 4


@pytest.mark.parametrize(
    ("argv", "said"),
    [
        (["{run}", "vqa", "data.root={tmp}/absent"], "is not a folder"),
        (["{run}", "vqa", "data.root={data}", "--beams", "2"], "--beams goes with the task caption"),
        (["{run}", "vqa", "data.root={data}", "--scores", "{tmp}"], "--scores goes with the task retrieval"),
        (["{run}", "retrieval", "data.root={data}"], "retrieval ranks by the ITM head"),
        (["{run}", "vqa", "--nonsense"], "unrecognized arguments"),
    ],
)
def test_wrong_input_ends_all_processes(ranks: RankServer, models, scenes: Path, tmp_path: Path, argv, said) -> None:
    words = [word.format(run=models["vqa"], tmp=tmp_path, data=scenes) for word in argv]
    ended = ranks.run(2, tmp_path / "logs", "evaluate_workers:evaluate", argv=words, timeout=60).check(2)
    assert said in ended.logs[0]


def test_a_failure_of_one_process_ends_all(ranks: RankServer, models, scenes: Path, tmp_path: Path) -> None:
    argv = [str(models["vqa"]), "vqa", f"data.root={scenes}", "--json", str(tmp_path / "scores.json")]
    ended = ranks.run(2, tmp_path / "logs", "evaluate_workers:fail_on", rank=1, argv=argv, timeout=60).check(2)
    assert "meter-fast evaluate (process 1): the table has gone" in ended.logs[1]
    assert "gone" not in ended.logs[0] and not (tmp_path / "scores.json").exists()


def test_scores_of_an_alone_process_need_no_group(models, scenes: Path) -> None:
    """`meter-fast evaluate` joins no group of processes, in which it would stay."""
    assert main(["evaluate", str(models["vqa"]), "vqa", f"data.root={scenes}", "--pairs", "20"]) == 0
    assert not torch.distributed.is_initialized()
