"""Two thousand steps under random faults end with the weights of two thousand steps without one."""

import os
import random
import subprocess
import sys
import time
from pathlib import Path

import faults
import psutil
import pyarrow as pa
import pytest
from ranks import wait_until
from small_run import assert_same_bits, losses, make_data, settings, tensors

pytestmark = [pytest.mark.slow, pytest.mark.faults]

STEPS, EVERY = 2000, 50
SEED = 20


def damaged_data(root: Path) -> Path:
    """Tables in which two pictures of thirty cannot be read: one cut in its middle, one of no bytes."""
    root.mkdir()
    path = make_data(root) / "coco_caption_karpathy_train.arrow"
    with pa.OSFile(str(path)) as source:
        table = pa.ipc.open_file(source).read_all()
    images = table["image"].to_pylist()
    images[3], images[17] = images[3][: len(images[3]) // 2], b""
    table = table.set_column(table.schema.get_field_index("image"), "image", pa.array(images, pa.binary()))
    with pa.OSFile(str(path), "wb") as sink, pa.ipc.new_file(sink, table.schema) as writer:
        writer.write_table(table)
    return root


def schedule(ledger: Path, count: int) -> list[str]:
    """`count` faults of every kind in turn, at random places between step 20 and the last fifty, each once."""
    chance = random.Random(SEED)
    kinds = [
        "kill@rank={rank},step={step},place=step", "kill@rank={rank},step={step},place=forward",
        "kill@rank={rank},step={step},place=backward", "kill@step={save},place=write,file={file}",
        "kill@step={save},place=rename", "full-disk@step={save},file={file}",
        "term@rank={rank},step={step},place=forward",
    ]  # fmt: skip
    chosen = (kinds * (count // len(kinds) + 1))[:count]
    chance.shuffle(chosen)
    steps = sorted(chance.sample(range(20, STEPS - 2 * EVERY, 60), count))
    return [
        kind.format(rank=chance.randrange(2), step=step, save=(step // EVERY + 1) * EVERY, file=chance.randrange(5))
        + f",ledger={ledger}"
        for kind, step in zip(chosen, (step + chance.randrange(60) for step in steps), strict=True)
    ]


class Watch:
    """Memory and open files of processes, at a step soon after the start and at the end."""

    def __init__(self, run: Path) -> None:
        self.run = run
        self.early: list[tuple[int, int]] = []
        self.late: list[tuple[int, int]] = []

    def __call__(self, pids: list[int]) -> None:
        for step in (STEPS // 4, STEPS - 20):
            wait_until(lambda step=step: self._reached(step), 1500)
            seen = [(p.memory_info().rss, p.num_fds()) for p in map(psutil.Process, pids)]
            self.early, self.late = self.early or seen, seen

    def _reached(self, step: int) -> bool:
        path = self.run / "metrics.jsonl"
        time.sleep(0.2)
        return path.exists() and max(losses(self.run), default=0) >= step


@pytest.mark.scenario(
    5,
    "2,000 steps on two processes under random kills, requests to stop and full disks, with unreadable pictures, end "
    "bit for bit as without",
)
@pytest.mark.scenario(37, "2,000 steps without a fault: resident memory and open files of each process")
def test_two_thousand_steps_under_faults(ranks, tmp_path, record_property):
    data, ledger = damaged_data(tmp_path / "data"), tmp_path / "ledger"
    chosen = settings(
        data, "engine.dtype=bf16", "engine.zero=2", f"run.max_steps={STEPS}", f"run.save_every={EVERY}",
        "data.max_bad_share=0.2", "data.workers=1",
    )  # fmt: skip
    whole, run = tmp_path / "whole", tmp_path / "run"
    watch = Watch(whole)
    ranks.train(2, whole, chosen, meanwhile=watch, timeout=1500).check()
    planned = schedule(ledger, 14)
    environment = {
        **os.environ, "DS_ACCELERATOR": "cpu", "OMP_NUM_THREADS": "1", **faults.environment(";".join(planned)),
    }  # fmt: skip
    program = str(Path(sys.executable).parent / "meter-fast")
    command = [sys.executable, program, "train", "--max-restarts", "99", "--processes", "2", "pretrain", "size=tiny"]
    codes = []
    with open(tmp_path / "log", "w") as out:
        while not codes or codes[-1] in (75, 2):  # asked to stop, or no room: someone gives the same command again
            ended = subprocess.run([*command, f"run.dir={run}", *chosen], stdout=out, stderr=out, env=environment)
            codes.append(ended.returncode)
            assert len(codes) <= len(planned) + 1
    said = (tmp_path / "log").read_text()
    assert codes[-1] == 0, said[-3000:]
    happened = ledger.read_text().splitlines()
    assert len(happened) == len(planned)
    assert_same_bits(tensors(run, STEPS), tensors(whole, STEPS))
    assert losses(run) == losses(whole) and len(losses(run)) == STEPS
    redone = sum(line.startswith("step ") for line in said.splitlines()) - STEPS
    restarts = said.count("Restart ")
    assert 0 < redone <= len(planned) * (EVERY + 2) and restarts > 0
    assert sorted(p.name for p in (run / "checkpoints").iterdir()) == [f"step-{STEPS - EVERY:08d}", f"step-{STEPS:08d}"]
    for (rss_early, files_early), (rss_late, files_late) in zip(watch.early, watch.late, strict=True):
        assert rss_late < 1.05 * rss_early + 20e6 and files_late <= files_early + 2
    grown = max(late[0] - early[0] for early, late in zip(watch.early, watch.late)) / 1e6
    record_property(
        "figure",
        f"{len(happened)} faults survived, {restarts} automatic restarts and {len(codes) - 1} by hand, {redone} of "
        f"{STEPS} steps redone, largest difference of weights and moments 0; memory from step {STEPS // 4} on "
        f"{grown:+.1f} MB, open files {watch.late[0][1] - watch.early[0][1]:+d}",
    )
