"""What a run tells its user: start banner, progress line, TensorBoard, metrics.jsonl and end summary.

Knows numbers by name, the clock and the run directory. Knows nothing of models, data or DeepSpeed: the trainer hands
over plain floats, already averaged over the micro-batches and ranks. Only the main rank writes; on the others every
call returns at once.
"""

import json
import math
import os
import shutil
import sys
import time
from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path

import numpy as np

from meter_fast.training.fills import fills_figure
from meter_fast.training.phases import Slow

METRICS_FILE = "metrics.jsonl"
RUN_FILE = "run.json"
TENSORBOARD_FOLDER = "tensorboard"
DATA_BOUND = 0.5  # share of the steps' time
HINT = (
    "hint: steps wait for data more than half of their time. Where cores are idle, raise data.workers; else decode "
    "less: smaller pictures on disk, a lower resolution. python -m benchmarks.data_pipeline tells what a core decodes"
)
RECENT = 20  # intervals that throughput and ETA look back on


def duration(seconds: float) -> str:
    """Seconds as people say them: "8 s", "4 min 10 s", "3 h 05 min", "2 d 04 h"."""
    seconds = round(seconds)
    if seconds < 60:
        return f"{seconds} s"
    if seconds < 3600:
        return f"{seconds // 60} min {seconds % 60:02d} s"
    if seconds < 86400:
        return f"{seconds // 3600} h {seconds % 3600 // 60:02d} min"
    return f"{seconds // 86400} d {seconds % 86400 // 3600:02d} h"


def rate(samples_per_second: float) -> str:
    return f"{samples_per_second:,.0f}" if samples_per_second >= 100 else f"{samples_per_second:.3g}"


def aligned(rows: Sequence[tuple[str, str]]) -> list[str]:
    """Rows (label, value) as lines with the values in one column. An empty label continues the row above; a row without
    a value is a heading."""
    width = max((len(label) for label, value in rows if value), default=0)
    lines = []
    for label, value in rows:
        parts = str(value).split("\n") if value else []
        lines += [f"  {label:<{width}}  {parts[0]}" if parts else label]
        lines += [f"  {'':<{width}}  {part}" for part in parts[1:]]
    return lines


def keep_steps_up_to(path: Path, step: int) -> tuple[int, int]:
    """Drop the lines of a metrics file that a resumed run will write again: those with a later step, and torn lines of
    an interrupted write. The file is replaced in one rename. Returns (later lines dropped, torn lines dropped)."""
    if not path.is_file():
        return 0, 0
    kept, later, torn = [], 0, 0
    for line in path.read_text(encoding="utf-8", errors="replace").splitlines():
        try:
            line_step = int(json.loads(line)["step"])
        except (ValueError, KeyError, TypeError):
            torn += 1
            continue
        if line_step <= step:
            kept.append(line)
        else:
            later += 1
    if later or torn:
        replace_text(path, "".join(line + "\n" for line in kept))
    return later, torn


def replace_text(path: Path, text: str) -> None:
    """Write a file complete or not at all: beside it, then one rename. Raises OSError naming it."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        with open(temporary, "w", encoding="utf-8") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except OSError as error:  # a full disk is told without a name
        raise OSError(error.errno, error.strerror, str(path)) from error
    finally:
        temporary.unlink(missing_ok=True)


def last_seconds(path: Path) -> float:
    """Run time at the last line of a metrics file; 0 without one."""
    rows = read_metrics(path) if path.is_file() else []
    return float(rows[-1].get("seconds", 0.0)) if rows else 0.0


def read_metrics(path: Path) -> list[dict]:
    """The objects of a metrics file in order, each with its "step". Raises ValueError naming the file and line."""
    rows = []
    for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1):
        try:
            rows.append(json.loads(line))
        except ValueError as error:
            raise ValueError(f"{path}, line {number}: not JSON ({error}); remove that line") from None
    return rows


def _json_number(value: float | None) -> float | None:
    """JSON knows neither NaN nor infinity: both become null."""
    return float(value) if value is not None and math.isfinite(value) else None


def _json_value(value):
    if isinstance(value, Mapping):
        return {str(key): _json_value(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_json_value(item) for item in value]
    if isinstance(value, (bool, str, int)) or value is None:
        return value
    return _json_number(value)


def _scalars(value: Mapping, prefix: str) -> Iterator[tuple[str, float]]:
    """Nested numbers as (path, value), for TensorBoard."""
    for key, item in value.items():
        if isinstance(item, Mapping):
            yield from _scalars(item, f"{prefix}/{key}")
        elif isinstance(item, (int, float)) and not isinstance(item, bool):
            yield f"{prefix}/{key}", float(item)


class Monitor:
    """Shows a run as it goes and records it in `run_dir`.

    `total_steps` and `samples` (of a step, on average) give throughput and ETA. `stream` is where people read (standard
    output); on a terminal the progress line is rewritten in place, elsewhere each is a line of its own.
    """

    def __init__(
        self, run_dir: str | Path, total_steps: int, samples: float, is_main: bool, stream=None, clock=time.monotonic
    ):
        self.run_dir = Path(run_dir)
        self.total_steps = total_steps
        self.samples = samples
        self.is_main = is_main
        self._stream = sys.stdout if stream is None else stream
        self._in_place = bool(getattr(self._stream, "isatty", lambda: False)())
        self._line_open = False
        self._clock = clock
        self._paused = 0.0
        self._marks: deque[tuple[float, int]] = deque(maxlen=RECENT + 1)
        self._first_mark = True
        self._began = clock()
        self._earlier = 0.0  # seconds that former runs of this directory took up to the step that this one resumes
        self._board = None
        self._first_shown = self._hinted = False

    # Text for people

    def message(self, text: str) -> None:
        """Print a line of its own, below the progress line."""
        if not self.is_main:
            return
        if self._line_open:
            self._stream.write("\n")
            self._line_open = False
        self._stream.write(text + "\n")
        self._stream.flush()

    def banner(self, rows: Sequence[tuple[str, str]]) -> None:
        """Print aligned rows (label, value); a row without a value is a heading."""
        self.message("\n".join(aligned(rows)))

    def summary(self, rows: Sequence[tuple[str, str]], next_command: str | None = None) -> None:
        """Print the end of a run: aligned rows, the time it took, and the command to run next."""
        rows = [*rows, ("time", duration(self.seconds()))]
        if next_command:
            rows.append(("next", next_command))
        self.banner(rows)

    # Recording

    def start(self, step: int) -> None:
        """Begin (step 0) or resume after `step`: open the files, drop what a former run recorded beyond it, start the
        clock of throughput and ETA."""
        self._marks.clear()
        self._first_mark = True
        self._marks.append((self._active_time(), step))
        if not self.is_main:
            return
        from torch.utils.tensorboard import SummaryWriter

        self.run_dir.mkdir(parents=True, exist_ok=True)
        path = self.run_dir / METRICS_FILE
        later, torn = keep_steps_up_to(path, step)
        if later or torn:
            self.message(f"{METRICS_FILE}: {later} lines after step {step} and {torn} damaged lines dropped")
        self._earlier = last_seconds(path)
        self._board = SummaryWriter(str(self.run_dir / TENSORBOARD_FOLDER), purge_step=step + 1, flush_secs=30)

    def step(
        self,
        step: int,
        losses: Mapping[str, float],
        metrics: Mapping[str, float],
        lrs: Mapping[str, float] | Sequence[float] = (),
        grad_norm: float | None = None,
        data_wait_share: float = 0.0,
        skipped: Mapping[str, int] | None = None,
        slow: Slow | None = None,
    ) -> None:
        """Record `step` optimizer steps done. `losses`: mean loss per objective (and "total"); `metrics`: accuracy per
        objective, 0..1; `lrs`: per parameter group; `data_wait_share`: share of the steps' time since the last call
        that was spent waiting for data, 0..1; `skipped`: cause -> samples replaced since the run began; `slow`: a
        process that keeps the others waiting."""
        if not self.is_main:
            return
        assert self._board is not None, "Monitor.step before Monitor.start"
        self._marks.append((self._active_time(), step))
        if self._first_mark and len(self._marks) > 2:  # the first interval also filled queues and compiled
            self._marks.popleft()
            self._first_mark = False
        speed = self.samples_per_second()
        lrs = dict(lrs) if isinstance(lrs, Mapping) else {str(i): lr for i, lr in enumerate(lrs)}
        skipped = dict(skipped or {})
        record = {
            "step": step,
            "seconds": self.seconds(),
            "loss": losses,
            "accuracy": metrics,
            "lr": lrs,
            "grad_norm": grad_norm,
            "samples_per_second": speed,
            "data_wait": data_wait_share,
            "skipped": skipped,
            "slow": asdict(slow) if slow else None,
        }
        self._write(record)
        for name, value in _scalars({"loss": losses, "accuracy": metrics, "lr": lrs}, "train"):
            self._board.add_scalar(name, value, step)
        extra = {"samples_per_second": speed, "data_wait": data_wait_share, "skipped": sum(skipped.values())}
        if grad_norm is not None:
            self._board.add_scalar("train/grad_norm", float(grad_norm), step)
        for name, value in _scalars({k: v for k, v in extra.items() if v is not None}, "run"):
            self._board.add_scalar(name, value, step)
        self._progress(self.line(step, losses, metrics, data_wait_share, skipped, slow))
        if data_wait_share >= DATA_BOUND and self._first_shown and not self._hinted:
            self._hinted = True
            self.message(HINT)
        self._first_shown = True

    def evaluation(self, step: int, scores: Mapping[str, Mapping[str, float]]) -> None:
        """Record held-out scores, e.g. {"mlm": {"loss": 1.2, "accuracy": 0.6}, "itm": {...}}, and print them."""
        if not self.is_main:
            return
        self._write({"step": step, "seconds": self.seconds(), "evaluation": scores})
        for name, value in _scalars(scores, "held_out"):
            self._board.add_scalar(name, value, step)
        said = [
            f"{objective} " + ", ".join(f"{name} {value:.4g}" for name, value in parts.items())
            for objective, parts in scores.items()
        ]
        self.message(f"held out at step {step}: " + "; ".join(said))

    def picture(
        self,
        step: int,
        image: np.ndarray,
        masked_caption: str,
        words: Sequence[str],
        fills: Sequence[Sequence[tuple[str, float]]],
        tag: str = "held_out/picture",
    ) -> None:
        """Put a held-out picture into TensorBoard: `image` [H,W,3] uint8, its caption with masks, the hidden `words`,
        and for each of them the model's best fills (word, probability)."""
        if not self.is_main:
            return
        self._board.add_figure(tag, fills_figure(image, masked_caption, words, fills), step)

    def image(self, step: int, pixels: np.ndarray, tag: str = "held_out/reconstructions") -> None:
        """Put pixels [3,H,W] uint8 into TensorBoard."""
        if self.is_main:
            self._board.add_image(tag, pixels, step)

    def record_run(self, facts: Mapping) -> None:
        """Write run.json, what the report says of the run: `facts` and the seconds it took so far. The report reads
        steps, world_size, zero_stage, dtype, device, skipped (cause -> count) and versions (name -> version)."""
        if self.is_main:
            replace_text(
                self.run_dir / RUN_FILE, json.dumps(_json_value({**facts, "seconds": self.seconds()}), indent=2) + "\n"
            )

    @contextmanager
    def pause(self) -> Iterator[None]:
        """Time spent inside (evaluation, saving) counts neither in throughput nor in the ETA."""
        began = self._clock()
        try:
            yield
        finally:
            self._paused += self._clock() - began

    def close(self) -> None:
        """Close the files; a later call on another rank or a second call does nothing."""
        if self._line_open:
            self._stream.write("\n")
            self._line_open = False
        if self._board is not None:
            self._board.close()
            self._board = None

    # Figures

    def seconds(self) -> float:
        """Time this run has taken, with that of the runs it resumes."""
        return round(self._earlier + self._clock() - self._began, 3)

    def _active_time(self) -> float:
        return self._clock() - self._paused

    def seconds_per_step(self) -> float | None:
        """From the recent steps of this process; None before the first."""
        (t0, s0), (t1, s1) = self._marks[0], self._marks[-1]
        return (t1 - t0) / (s1 - s0) if s1 > s0 else None

    def samples_per_second(self) -> float | None:
        per_step = self.seconds_per_step()
        return self.samples / per_step if per_step else None

    def line(
        self,
        step: int,
        losses: Mapping,
        metrics: Mapping,
        data_wait_share: float,
        skipped: Mapping,
        slow: Slow | None = None,
    ) -> str:
        """The progress line."""
        width = len(str(self.total_steps))
        parts = [f"step {step:>{width}}/{self.total_steps}"]
        for name, value in losses.items():
            if name == "total":
                continue
            accuracy = f" ({100 * metrics[name]:.1f} %)" if name in metrics else ""
            parts.append(f"{name} {value:.3f}{accuracy}")
        per_step = self.seconds_per_step()
        if per_step:
            parts.append(f"{rate(self.samples / per_step)} samples/s")
        data = "data-bound" if data_wait_share >= DATA_BOUND else "data wait"
        parts.append(f"{data} {100 * data_wait_share:.0f} %")
        if slow is not None:
            parts.append(f"rank {slow.rank} slow: {slow.phase}, +{100 * slow.share:.0f} % of a step")
        parts.append(f"skipped {sum(skipped.values())}")
        if per_step:
            parts.append(f"ETA {duration((self.total_steps - step) * per_step)}")
        return "  ".join(parts)

    def _progress(self, line: str) -> None:
        if self._in_place:
            columns = shutil.get_terminal_size().columns
            self._stream.write("\r" + line[: columns - 1] + "\x1b[K")
            self._line_open = True
        else:
            self._stream.write(line + "\n")
        self._stream.flush()

    def _write(self, record: Mapping) -> None:
        with open(self.run_dir / METRICS_FILE, "a", encoding="utf-8") as file:
            file.write(json.dumps(_json_value(record)) + "\n")
