"""The commands `meter-fast data prepare`, `import` and `check`: arguments and messages.

Knows what each command needs; heavy libraries are loaded inside it.
"""

import argparse
import os
from pathlib import Path

EXIT_STOPPED = 75  # as a training run that was stopped: the same command goes on
EXIT_BROKEN = 2
SETS = ("coco", "vg", "gcc", "sbu", "f30k", "vqav2", "nlvr2", "snli_ve")


def add_parsers(data: argparse._SubParsersAction) -> None:
    """Adds the commands below `meter-fast data`."""
    prepare = data.add_parser("prepare", help="Arrow tables from the downloads of a published data set")
    prepare.add_argument("set", metavar="SET", choices=SETS, help=", ".join(SETS))
    prepare.add_argument("raw", metavar="RAW", type=Path, help="folder with the downloaded files")
    prepare.add_argument("out", metavar="OUT", type=Path, help="folder to write")
    prepare.add_argument("--splits", metavar="A,B", default="", help="default: all")
    _add_reading(prepare, "missing", "default 0.01; gcc, sbu 0.5")
    prepare.set_defaults(run=data_prepare)


def _add_reading(parser: argparse.ArgumentParser, gone: str, default: str) -> None:
    parser.add_argument(
        f"--max-{gone}", type=float, metavar="SHARE", help=f"of pictures that cannot be used ({default})"
    )
    parser.add_argument("--workers", type=int, metavar="N", help="processes that read pictures (default: as cores)")


def data_prepare(arguments: argparse.Namespace) -> int | None:
    from meter_fast.data.prepare import SETS, plan_set

    splits = tuple(split.strip() for split in arguments.splits.split(",") if split.strip())
    max_missing = SETS[arguments.set].max_missing if arguments.max_missing is None else arguments.max_missing
    _check_reading(arguments.workers, "--max-missing", max_missing)
    return _carry_out(plan_set(arguments.set, arguments.raw, splits), arguments, max_missing)


def _check_reading(workers: int | None, name: str, share: float) -> None:
    if not 0 <= share <= 1:
        raise ValueError(f"{name} {share:g}: give a share from 0 to 1")
    if workers is not None and workers < 0:
        raise ValueError(f"--workers {workers}: give 0 or more")


def _carry_out(plan, arguments: argparse.Namespace, max_missing: float) -> int | None:
    """Writes a plan's tables and says what is in them."""
    from meter_fast.config import DataConfig
    from meter_fast.data.prepare import carry_out, left_out_lines

    try:
        manifest = carry_out(
            plan,
            arguments.out,
            workers=min(8, os.cpu_count() or 1) if arguments.workers is None else arguments.workers,
            max_missing=max_missing,
            max_pixels=DataConfig.max_image_pixels,
            say=lambda line: print(line, flush=True),
        )
    except KeyboardInterrupt:
        print("stopped; finished tables stay, and the same command goes on from there")
        return EXIT_STOPPED
    for line in left_out_lines(manifest):
        print(f"  {line}")
    print(f"{arguments.out / plan.name}.manifest.json has counts and hashes")
    return None
