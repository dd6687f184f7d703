"""Train a model: `deepspeed --module meter_fast.train RECIPE key=value ...`.

    deepspeed --module meter_fast.train pretrain size=base data.root=DATA run.dir=runs/base
    deepspeed --num_gpus 2 --no_local_rank --module meter_fast.train pretrain size=tiny data.root=SCENES

The loop is `fit`; what it works with is put together in `training/run.py`. Exit codes: 0 done; 75 asked to stop
(SIGTERM, SIGINT, SIGHUP) and saved, the same command goes on; 2 wrong settings, data or files; 1 anything else.
"""

import contextlib
import json
import os
import sys
import time
import traceback
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NoReturn

import torch
import torch.distributed as dist

from meter_fast.config import ConfigError, RunConfig
from meter_fast.data.batch import Batch
from meter_fast.host_memory import keep_freed_memory
from meter_fast.recipes import resolve
from meter_fast.score import glimpse
from meter_fast.training import checkpoint, slurm, world
from meter_fast.training.interruption import EXIT_INTERRUPTED, outlive_terminal
from meter_fast.training.peers import Peers
from meter_fast.training.progress import Interval, News, exchange
from meter_fast.training.record import StepRecord
from meter_fast.training.resume import describe_run, export
from meter_fast.training.run import Run, prepare
from meter_fast.training.tasks import task_of
from meter_fast.training.watchdog import LAST_RESORT, expect_progress, no_watchdog, watch_peers
from meter_fast.training.world import StoppedTogether, World

EXIT_DONE, EXIT_FAILED, EXIT_WRONG = 0, 1, 2
FAREWELL_SECONDS = 300
SAYS_WHY_SECONDS = 10.0


class NotFinite(RuntimeError):
    """The loss or the gradient of a step is NaN or infinite; the text names step, processes and samples."""


def fit(run: Run) -> int:
    """The training loop. Returns the exit code.

    Processes speak to each other once a step, here at its start: what the coming step holds (masked tokens, pairs),
    what the step before gave, whether anyone has failed or been asked to stop. So all log, save and stop at the
    same step.
    """
    options, begin = run.config.run, run.start.step
    record: StepRecord | None = None
    interval = Interval(run.engine.objectives)
    run.world.phases.enter("between steps")
    loaded = run.pairs.loader.steps(begin, options.max_steps)
    with contextlib.closing(run.world.phases.each("data", loaded)) as steps:
        for step in range(begin, options.max_steps + 1):
            expect_progress(options.hang_seconds)
            batches, failure = fetch(steps) if step < options.max_steps else ([], None)
            failed = failure is not None or run.saver.poll()
            news = exchange(run.world, run.engine.objectives, batches, record, run.stop.pending(), failed)
            if record is not None:
                stop_if_not_finite(run, record, news)
                report(run, interval, record, news, step)
            if news.failed:
                run.saver.wait()  # where it is a checkpoint that could not be written, all end here
            last = step == options.max_steps
            if record is not None:
                keep(run, step, last or news.stop or news.failed)
            if failure is not None:
                raise failure
            if news.failed:
                raise StoppedTogether("another process failed to read its data")
            if last:
                break
            if news.stop:
                run.monitor.message(f"stopped after step {step} ({run.stop.reason or 'another process was asked'}); "
                                    f"the same command goes on from here")  # fmt: skip
                return EXIT_INTERRUPTED
            record = advance(run, step, batches, news.counts)
            del batches  # before the next are fetched: see TrainingLoader.steps
    finish(run)
    return EXIT_DONE


def advance(run: Run, step: int, batches: list[Batch], counts: dict[str, float]) -> StepRecord:
    """One optimizer step. Whatever goes wrong in here is no mistake of the user's, so it keeps its stack."""
    try:
        return run.engine.step(step, batches, counts)
    except (ValueError, OSError) as error:
        raise RuntimeError(f"step {step} failed") from error


def fetch(steps: Iterator[list[Batch]]) -> tuple[list[Batch], ValueError | OSError | None]:
    """The next step's micro-batches, or what went wrong: the others have to hear of it first."""
    try:
        return next(steps), None
    except (ValueError, OSError) as error:
        return [], error


def stop_if_not_finite(run: Run, record: StepRecord, news: News) -> None:
    """All processes raise NotFinite together if any of them had a loss or gradient that is not a number."""
    if not news.not_finite:
        return
    numbers = record.read()
    mine = [
        {
            "rank": run.world.rank,
            "micro_batch": i,
            "losses": repr(record.losses(i)),
            "samples": record.sample_ids[i].tolist(),
        }
        for i in numbers.bad
    ]
    found = [entry for entries in run.world.share(mine) for entry in entries]
    what = (
        f"the loss of step {record.step} is not finite"
        if found
        else f"the gradient of step {record.step} is not finite"
    )
    lines = [
        f"  rank {e['rank']}, micro-batch {e['micro_batch']}: {e['losses']}, samples {e['samples']}" for e in found
    ]
    if not found:
        samples = run.world.share([ids.tolist() for ids in record.sample_ids])
        lines = [f"  rank {rank}: samples {ids}" for rank, ids in enumerate(samples)]
    if run.world.is_main:
        path = Path(run.config.run.dir) / f"not-finite-step-{record.step}.json"
        path.write_text(json.dumps({"step": record.step, "found": lines}, indent=1))
        lines.append(f"  written to {path}; no checkpoint was made of this step")
    raise NotFinite("\n".join([what, *lines]))


def report(run: Run, interval: Interval, record: StepRecord, news: News, step: int) -> None:
    """Add a step to the interval and, at its end, show the interval's means."""
    interval.add(news)
    options = run.config.run
    loss = sum(news.losses.values()) / (run.engine.accumulation * run.world.size)
    if (usual := run.spikes.usual(loss)) is not None:
        run.monitor.message(f"warning: the loss of step {step} is {loss:.4g} after {usual:.4g}; "
                            f"meter-fast replay {options.dir} {step} shows what it read")  # fmt: skip
    if step % options.log_every == 0 or step == options.max_steps or step == 1:
        skipped = run.skipped()
        shown = interval.close(run.engine.accumulation * run.world.size)
        run.monitor.step(
            step,
            shown.losses,
            shown.accuracies,
            record.rates,
            news.grad_norm,
            shown.data_wait_share,
            skipped,
            shown.slow,
        )


def keep(run: Run, step: int, must_save: bool) -> None:
    """Evaluate, show a picture and save where `step` says so; `must_save` in any case."""
    options = run.config.run
    with run.monitor.pause(), run.world.phases.aside("evaluation or saving"):
        look(run, step)
        due = options.eval_every and (step % options.eval_every == 0 or step == options.max_steps)
        score = evaluate(run, step) if due and run.pairs.validation is not None else None
        best = score is not None and run.world.together(lambda: score < checkpoint.best(run.checkpoints)[1])
        if not (must_save or best or step % options.save_every == 0):
            return
        expect_progress(options.hang_seconds)
        description = describe_run(run.config, run.world, run.pairs.identity())
        run.saver.save(step, {**description, "skipped": run.skipped()})
        if must_save or best:
            run.saver.wait()
        if best:
            write_model(run, Path(options.dir) / "best")
            run.world.together(lambda: checkpoint.mark_best(run.checkpoints, step, score))
            run.monitor.message(f"the best so far: step {step}")


def evaluate(run: Run, step: int) -> float:
    """Score the held-out pairs or questions. Returns what the best step is chosen by, lower is better."""
    expect_progress(run.config.run.hang_seconds)
    task = task_of(run.config.objectives.names)
    scores = task.score(run.engine.evaluated(), run.pairs.validation, run.world.device, run.engine.dtype)
    run.monitor.evaluation(step, scores)
    return task.loss(scores)


def look(run: Run, step: int) -> None:
    """Show TensorBoard a held-out picture with what the model fills in, or what the task shows. Collective."""
    every, pairs = run.config.run.picture_every, run.pairs
    show = task_of(run.config.objectives.names).show
    if not every or step % every or pairs.held_out is None or (show is None and "mlm" not in run.engine.objectives):
        return
    expect_progress(run.config.run.hang_seconds)
    if show is not None:
        run.monitor.image(step, show(run.engine.module, pairs, run.world.device, run.engine.dtype).numpy())
        return
    seen = glimpse(run.engine.module.model, pairs.tokenizer, pairs.held_out, pairs.backend, step // every)
    if seen is not None:
        run.monitor.picture(step, seen.image, seen.caption, seen.words, seen.fills)


def write_model(run: Run, folder: Path) -> None:
    """Write the model as an export folder. Collective."""
    write = task_of(run.config.objectives.names).write
    export(run.engine.state, run.world, lambda tensors: write(run.config, folder, tensors, run.pairs))


def finish(run: Run) -> None:
    """Write the model for use elsewhere and say what to do next."""
    folder = Path(run.config.run.dir) / "export"
    run.world.phases.enter("writing the export")
    write_model(run, folder)
    described = describe_run(run.config, run.world, run.pairs.identity())
    facts = {
        "steps": run.config.run.max_steps,
        "world_size": run.world.size,
        "zero_stage": run.config.engine.zero,
        "dtype": run.config.engine.dtype,
        "device": torch.cuda.get_device_name(run.world.device) if run.world.device.type == "cuda" else "CPU",
        "skipped": run.skipped(),
        "versions": described["versions"],
    }
    run.monitor.record_run(facts)
    rows = [("done", f"{run.config.run.max_steps:,} steps"), ("model", str(folder))]
    run.monitor.summary(rows, task_of(run.config.objectives.names).next_command.format(run=run.config.run.dir))


def watched(config: RunConfig, this: World) -> Peers | None:
    """Let the watchdog look after the other processes; None for one that is alone. Collective."""
    if this.size == 1:
        return None
    peers = Peers(this)
    watch_peers(peers, config.run.peer_seconds)
    for line in peers.unwatched:
        print(f"warning: {line}; it is not watched: is there a firewall?", file=sys.stderr, flush=True)
    return peers


def main(argv: Sequence[str] | None = None) -> int:
    """Run one training. Returns the exit code; messages go to standard error, from the process that knows best."""
    rank = slurm.rank(os.environ)
    try:
        config = resolve([a for a in (sys.argv[1:] if argv is None else argv) if not a.startswith("--local_rank")])
    except ConfigError as error:
        if rank != 0:  # the launcher ends all with the first that ends: let it be the one that says why
            time.sleep(SAYS_WHY_SECONDS)
            return EXIT_WRONG
        return complain(error, EXIT_WRONG)
    run: Run | None = None
    peers: Peers | None = None
    outlive_terminal()
    try:
        expect_progress(config.run.hang_seconds)
        this = world.start(config.run.hang_seconds + LAST_RESORT)  # the watchdog, which knows more, speaks first
        peers = watched(config, this)
        run = prepare(config, this)
        run.stop.listen()
        if run.world.device.type == "cpu":
            keep_freed_memory()
        return fit(run)
    except StoppedTogether:
        return EXIT_WRONG
    except NotFinite as error:
        return complain(error, EXIT_FAILED) if rank == 0 else EXIT_FAILED
    except (ValueError, OSError) as error:
        return complain(error, EXIT_WRONG, f"rank {rank}: " if rank else "")
    except Exception:
        traceback.print_exc()
        gone = [f"\n  {text}" for text in peers.missing()] if peers else []
        print(
            f"error: rank {rank} ended by the above. Where another process ended first, its message tells the cause. "
            f"The same command goes on from the last checkpoint{''.join(gone)}",
            file=sys.stderr,
            flush=True,
        )
        return EXIT_FAILED
    finally:
        watch_peers(None, 0)
        if run is not None:
            run.saver.close()
            run.monitor.close()
            run.pairs.close()
        no_watchdog()


def complain(error: Exception, code: int, who: str = "") -> int:
    """Print an error for people, without a stack, and pass the exit code on."""
    print(f"\nerror: {who}{error}", file=sys.stderr, flush=True)
    return code


def leave(code: int) -> NoReturn:
    """End the process. After a failure peers may be gone or stuck: no collective farewell that would wait for them."""
    if code == EXIT_DONE:
        expect_progress(FAREWELL_SECONDS)
        dist.destroy_process_group()
        sys.exit(code)
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


if __name__ == "__main__":
    leave(main())
