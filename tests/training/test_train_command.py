"""The command as people type it: real launcher, two processes, interrupted and started again; refusals with reasons."""

import os
import pickle
import signal
import subprocess
import sys
from pathlib import Path

import psutil
import pytest
import torch
from ranks import RankServer, stop, wait_until
from small_run import Payload, losses, settings, write_table

import meter_fast
from meter_fast.training import checkpoint

COMMAND = [
    sys.executable, str(Path(sys.executable).parent / "deepspeed"), "--num_gpus", "2", "--no_local_rank",
    "--master_port",
]  # fmt: skip


def launch(log: Path, run: Path, *more: str) -> subprocess.Popen:
    """deepspeed --module meter_fast.train in a session of its own; output to `log`."""
    from rank_server import free_port

    env = {**os.environ, "DS_ACCELERATOR": "cpu", "OMP_NUM_THREADS": "1"}
    argv = [
        *COMMAND,
        str(free_port()),
        "--module",
        "meter_fast.train",
        "pretrain",
        "size=tiny",
        f"run.dir={run}",
        *more,
    ]
    with open(log, "w") as out:
        return subprocess.Popen(argv, stdout=out, stderr=out, env=env, start_new_session=True, cwd=log.parent)


@pytest.mark.slow
@pytest.mark.scenario(6, "SIGTERM to the launcher alone: processes save and end, the same command goes on")
def test_launcher_interrupted_and_started_again(data, tmp_path):
    run, log = tmp_path / "run", tmp_path / "log"
    chosen = settings(
        data, "engine.dtype=bf16", "engine.micro_batch=2", "data.val_sources=coco", "data.val_pairs=12",
        "data.workers=1",
        "run.max_steps=40", "run.eval_every=20", "run.save_every=1000", "data.tokenizer=trained",
    )  # fmt: skip
    first = launch(log, run, *chosen, "run.max_steps=100000", "optim.warmup=4")
    wait_until(lambda: first.poll() is not None or ((run / "metrics.jsonl").exists() and len(losses(run)) > 2), 180)
    family = psutil.Process(first.pid).children(recursive=True)
    assert len(family) >= 3, log.read_text()
    stop(first.pid, signal.SIGTERM)  # to the launcher alone, which passes nothing on
    _, alive = psutil.wait_procs(family, timeout=60)
    assert not alive, log.read_text()
    first.wait(30)
    said = log.read_text()
    assert "stopped after step" in said and "Traceback" not in said, said
    [step] = checkpoint.steps(run / "checkpoints")

    end = 20 * (step // 20 + 2)
    second = launch(log, run, *chosen, f"run.max_steps={end}", "optim.warmup=4")
    assert second.wait(240) == 0, log.read_text()
    said = log.read_text()
    for part in (
        f"starts from   {run}/checkpoints/step-{step:08d}", "2 x CPU", "8 pairs = 2 processes x 2 x 2 accumulated",
        "ZeRO 2, bf16 with fp32 master weights", "coco: 1 files, 30 pictures, 60 captions", "held out at step",
        "the best so far", "changed since the checkpoint: run.max_steps: 100000 ->", "trained",
    ):  # fmt: skip
        assert part in said, (part, said)
    assert list(losses(run)) == list(range(1, end + 1))
    assert max(checkpoint.steps(run / "checkpoints")) == end
    images = torch.zeros(1, 3, 32, 32)
    for folder in (run, run / "best"):
        assert torch.isfinite(meter_fast.load_model(folder).encode_image(images)).all()
    assert (run / "export" / "tokenizer" / "tokenizer.json").is_file() and (run / "config.json").is_file()


@pytest.mark.slow
def test_launcher_gives_the_exit_code_of_wrong_settings(data, tmp_path):
    log = tmp_path / "log"
    assert launch(log, tmp_path / "run", *settings(data), "optim.lrr=1").wait(120) == 2
    assert "unknown setting 'optim.lrr': did you mean optim.lr?" in log.read_text()
    assert not (tmp_path / "run").exists()


def evil(path: Path, marker: Path) -> Path:
    path.write_bytes(pickle.dumps({"state_dict": Payload(marker)}))
    return path


@pytest.mark.scenario(
    40,
    "pickles as run.init and as encoder weights, and 12 other wrong inputs: one message, exit code 2, nothing is run",
)
def test_refusals_say_why(ranks: RankServer, data: Path, tmp_path: Path):
    """Each ends with code 2, one message, no stack, before anything is trained."""
    marker = tmp_path / "it ran"
    torch.save({"state_dict": Payload(marker)}, tmp_path / "saved.ckpt")
    (tmp_path / "file").write_text("")
    (tmp_path / "empty").mkdir()
    write_table(tmp_path / "empty" / "coco_caption_karpathy_train.arrow", 0, 0)
    cases = [
        ([f"data.root={tmp_path / 'nowhere'}"], "nowhere"),
        (["data.sources=vg"], "no table vg.arrow"),
        (["data.sources=flickr"], "unknown data source 'flickr'"),
        ([f"data.root={tmp_path / 'empty'}"], "coco_caption_karpathy_train.arrow"),
        ([f"data.tokenizer={tmp_path / 'empty'}"], "no tokenizer folder"),
        ([f"run.init={evil(tmp_path / 'evil.ckpt', marker)}"], "evil.ckpt"),
        ([f"run.init={tmp_path / 'saved.ckpt'}"], "saved.ckpt"),
        ([f"run.init={tmp_path / 'absent'}"], "does not exist"),
        ([f"run.init={tmp_path / 'empty'}"], "config.json"),
        ([f"run.dir={tmp_path / 'file' / 'run'}"], "Not a directory"),
        (["data.max_text_length=70"], "data.max_text_length=70"),
        (["engine.global_batch=10"], "engine.global_batch=10 is not a multiple of 4"),
        (["run.resume=somewhere"], "run.resume=somewhere"),
        ([f"model.vision.weights={tmp_path / 'absent.pt'}"], "absent.pt"),
    ]
    for number, (change, said) in enumerate(cases):
        run = tmp_path / f"run-{number}"
        ended = ranks.run(
            1, tmp_path / f"log-{number}", "workers:train",
            argv=["pretrain", "size=tiny", f"run.dir={run}", *settings(data), *change],
        ).check(2)  # fmt: skip
        assert said in ended.logs[0] and "error:" in ended.logs[0] and "Traceback" not in ended.logs[0], (
            change,
            ended.logs,
        )
        assert not checkpoint.steps(run / "checkpoints")
    assert not marker.exists()


@pytest.mark.scenario(16, "refused with what would divide")
def test_three_processes_do_not_divide_eight_pairs(ranks: RankServer, data: Path, tmp_path: Path):
    """All processes end with the code for wrong settings, and one says what would divide."""
    ended = ranks.train(3, tmp_path / "run", settings(data)).check(2)
    assert "8 is not a multiple of 12 = 4 (engine.micro_batch) x 3 (processes)" in "".join(ended.logs)
