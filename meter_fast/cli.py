"""The command `meter-fast`: draw data, plan, train on one process, score, report, predict, convert, examine.

Knows arguments and messages; each command is carried out elsewhere, and heavy libraries are loaded inside it, so that
`--help` answers at once. A wrong argument ends with one line and exit code 2.
"""

import argparse
import errno
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import meter_fast
from meter_fast.cli_data import add_parsers as add_data_parsers
from meter_fast.cli_doctor import add_doctor
from meter_fast.cli_evaluate import add_evaluate
from meter_fast.cli_plan import add_plan
from meter_fast.cli_predict import add_predict

if TYPE_CHECKING:
    from collections.abc import Callable

    from meter_fast.training.world import World

EXIT_WRONG_INPUT = 2


def parser() -> argparse.ArgumentParser:
    """All commands and their options."""
    top = argparse.ArgumentParser(prog="meter-fast", description="Train METER vision-and-language transformers.")
    top.add_argument("--version", action="version", version=f"meter-fast {meter_fast.__version__}")
    top.add_argument("--traceback", action="store_true", help="show where an error came from")
    commands = top.add_subparsers(dest="command", required=True, metavar="COMMAND")

    data = commands.add_parser("data", help="make data").add_subparsers(dest="data", required=True, metavar="WHAT")
    scenes = data.add_parser("scenes", help="draw synthetic scenes, as the files of all tasks")
    scenes.add_argument("out", metavar="OUT", type=Path, help="folder to write")
    for name, count in (("train", 20000), ("val", 500), ("test", 1000)):
        scenes.add_argument(f"--{name}", type=int, default=count, metavar="N", help=f"pictures (default {count})")
    scenes.add_argument("--seed", type=int, default=0, metavar="N", help="default 0")
    scenes.set_defaults(run=data_scenes)
    add_data_parsers(data)

    train = commands.add_parser("train", help="train, in one process or several")
    train.add_argument("recipe", metavar="RECIPE", help="for example: pretrain; ablation, transfer: comparisons")
    train.add_argument("settings", nargs="*", metavar="KEY=VALUE", help="for example: size=tiny optim.lr=1e-4")
    train.add_argument("--max-restarts", type=int, default=0, metavar="N", help="start again after a crash, N times at "
                       "most; not where a step is not finite twice, or nothing was gained (default 0)")  # fmt: skip
    train.add_argument("--processes", type=int, metavar="N", help="through the deepspeed launcher, one for each GPU")
    train.add_argument("--hostfile", default="", metavar="F", help="through the deepspeed launcher, on these hosts")
    train.set_defaults(run=run_training)

    replay = commands.add_parser("replay", help="do one step of a run again and print what it read and gave")
    replay.add_argument("model", metavar="RUN_DIR", type=Path)
    replay.add_argument("step", metavar="STEP", type=int, help="as in metrics.jsonl")
    replay.set_defaults(run=replay_step)

    add_evaluate(commands)

    report = commands.add_parser("report", help="write a run's report.html and report.json")
    report.add_argument("model", metavar="RUN_DIR", type=Path)
    report.add_argument("settings", nargs="*", metavar="KEY=VALUE", help="for example: data.root=DATA")
    report.add_argument("--split", default="test", choices=["val", "test"], help="default test")
    report.add_argument("--pictures", type=int, default=500, metavar="N", help="score N pictures at most (default 500)")
    report.set_defaults(run=report_run)

    add_predict(commands)
    add_plan(commands)

    convert = commands.add_parser("convert", help="published METER checkpoint to export folder, or back")
    convert.add_argument("source", metavar="SRC", type=Path, help=".ckpt file, or export folder or run directory")
    convert.add_argument("out", metavar="OUT", type=Path, help="export folder, or .ckpt file")
    convert.add_argument("--tokenizer", metavar="NAME", help="tokenizer to put beside the model (hub name or folder)")
    for name in ("image-size", "text-heads", "fusion-heads"):
        convert.add_argument(f"--{name}", type=int, metavar="N", help="where the file does not tell, or to change it")
    convert.set_defaults(run=convert_model)

    add_doctor(commands)
    return top


def parse(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """The arguments of a command line; settings may stand behind options, too. Exits where some are wrong."""
    top = parser()
    arguments, more = top.parse_known_args(argv)
    if more and (not hasattr(arguments, "settings") or any(word.startswith("-") or "=" not in word for word in more)):
        top.error(f"unrecognized arguments: {' '.join(more)}")
    if more:
        arguments.settings = [*arguments.settings, *more]
    return arguments


def main(argv: Sequence[str] | None = None, world: "World | None" = None) -> int:
    """Carry out a command line; returns the exit code. world: the processes that do it together, where they are more
    than this one (`evaluate`)."""
    arguments = parse(argv)
    arguments.world = world
    try:
        return arguments.run(arguments) or 0
    except (ValueError, OSError) as error:
        if arguments.traceback:
            raise
        who = f" (process {world.rank})" if world is not None and not world.is_main else ""
        room = "; make room there" if isinstance(error, OSError) and error.errno == errno.ENOSPC else ""
        print(f"meter-fast {arguments.command}{who}: {error}{room}", file=sys.stderr)
        return EXIT_WRONG_INPUT


def data_scenes(arguments: argparse.Namespace) -> None:
    from meter_fast.data.scenes import write_scenes

    counts = {"train": arguments.train, "val": arguments.val, "test": arguments.test}
    written = write_scenes(arguments.out, seed=arguments.seed, **counts)
    for name, rows in written.items():
        print(f"  {name:<40} {rows:>8,} rows")


def run_training(arguments: argparse.Namespace) -> int | None:
    most, processes, hostfile = arguments.max_restarts, arguments.processes, arguments.hostfile
    launched = bool(most or processes is not None or hostfile)
    if most < 0 or (processes is not None and processes < 1):
        raise ValueError("--max-restarts: give 0 or more; --processes: give 1 or more")
    if hostfile and processes is not None:
        raise ValueError("--processes: the hostfile tells how many, as slots")
    if arguments.recipe in ("ablation", "transfer"):
        if launched:
            raise ValueError(f"{arguments.recipe} starts runs of its own: give processes=N or hostfile=F as settings")
        from meter_fast.ablation import main as compare

        return compare(arguments.recipe, arguments.settings)
    from meter_fast.recipes import resolve

    command = [arguments.recipe, *arguments.settings]
    config = resolve(command)  # a wrong setting is told before anything heavy is loaded
    if launched:
        from meter_fast.restarts import train_with_restarts

        return train_with_restarts(command, Path(config.run.dir), processes or 1, hostfile, most)
    from meter_fast.train import main as train

    return _alone(lambda: train(command))


def replay_step(arguments: argparse.Namespace) -> int:
    from meter_fast.replay import replay

    return _alone(lambda: replay(arguments.model, arguments.step))


def _alone(work: "Callable[[], int]") -> int:
    """Carry out `work` as a run of one process, whatever launcher's variables there are."""
    import torch.distributed

    from meter_fast.training.ports import free_port

    alone = {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "127.0.0.1"}
    os.environ.update(alone, MASTER_PORT=str(free_port()))
    code = work()
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()
    return code


def report_run(arguments: argparse.Namespace) -> None:
    from meter_fast.report import write_report

    if arguments.pictures < 2:
        raise ValueError(f"--pictures {arguments.pictures}: give 2 or more")
    report = write_report(arguments.model, arguments.settings, arguments.split, max_pictures=arguments.pictures)
    print_scores(report)
    print(f"open {arguments.model / 'report.html'}")


def print_scores(report: dict) -> None:
    """Held-out scores as a table."""
    print(
        f"{'held out (' + report['split']['name'] + ')':<22}{'accuracy':>10}{'exchanged':>11}{'chance':>9}{'asked':>8}"
    )
    novel = report["scores"].get("novel", {})
    for title, scores in (("", report["scores"]), ("unseen, ", novel)):
        rows = {"ITM": scores["itm"]} if "itm" in scores else {}
        rows.update(scores.get("mlm", {}))
        rows.update({name: scores[name] for name in ("span_denoising", "caption") if name in scores})
        for name, row in rows.items():
            exchanged = f"{100 * row['shuffled']:.1f} %" if "shuffled" in row else ""
            print(
                f"{title + name:<22}{100 * row['accuracy']:>8.1f} %{exchanged:>11}{100 * row['chance']:>7.1f} %"
                f"{row['count']:>8,}"
            )


def convert_model(arguments: argparse.Namespace) -> None:
    from meter_fast.convert import to_checkpoint, to_export

    if arguments.source.is_dir():
        given = [name for name in ("tokenizer", "image_size", "text_heads", "fusion_heads") if vars(arguments)[name]]
        if given:
            raise ValueError(f"--{given[0].replace('_', '-')} has no meaning where {arguments.source} is an export")
        count = to_checkpoint(arguments.source, arguments.out)
        print(f"{arguments.out}: {count} tensors under the published names")
        return
    report = to_export(
        arguments.source,
        arguments.out,
        arguments.tokenizer,
        arguments.image_size,
        arguments.text_heads,
        arguments.fusion_heads,
    )
    print(report)
    needed = "" if arguments.tokenizer else ", tokenizer=NAME"
    print(f"{arguments.out}: open it with meter_fast.load({str(arguments.out)!r}{needed})")


if __name__ == "__main__":
    sys.exit(main())
