"""The commands `meter-fast data prepare`, `import` and `check`: arguments and messages.

Knows what each command needs; heavy libraries are loaded inside it.
"""

import argparse
import os
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Callable

    from meter_fast.data.prepare.plan import Plan

EXIT_STOPPED = 75  # as a training run that was stopped: the same command goes on
EXIT_BROKEN = 2
KINDS = ("captions", "vqa", "retrieval")
SETS = ("coco", "vg", "gcc", "sbu", "f30k", "vqav2", "nlvr2", "snli_ve")


def add_parsers(data: argparse._SubParsersAction) -> None:
    """Adds the commands below `meter-fast data`."""
    prepare = data.add_parser("prepare", help="Arrow tables from the downloads of a published data set")
    prepare.add_argument("set", metavar="SET", choices=SETS, help=", ".join(SETS))
    prepare.add_argument("raw", metavar="RAW", type=Path, help="folder with the downloaded files")
    prepare.add_argument("out", metavar="OUT", type=Path, help="folder to write")
    prepare.add_argument("--splits", metavar="A,B", default="", help="default: all")
    prepare.add_argument("--max-missing", type=float, metavar="SHARE",
                         help="of pictures missing or unusable (default 0.01; gcc, sbu 0.5)")  # fmt: skip
    _add_workers(prepare)
    prepare.set_defaults(run=data_prepare)

    own = data.add_parser("import", help="Arrow tables from pictures of your own, named by a .csv or .jsonl file")
    own.add_argument("kind", metavar="KIND", choices=KINDS, help="captions, vqa or retrieval (captions with splits)")
    own.add_argument("source", metavar="SRC", type=Path, help="the file, with columns image and caption, or image, "
                     "question and answer, or answers with | between; or its folder")  # fmt: skip
    own.add_argument("out", metavar="OUT", type=Path, help="folder to write")
    own.add_argument("--name", default="", help="of the tables: NAME, or NAME_SPLIT (default: the file's)")
    own.add_argument("--images", type=Path, metavar="DIR", help="folder of the pictures (default: the file's)")
    own.add_argument("--answers", type=Path, metavar="FILE", help="vqa: take the answers of this JSON list as labels")
    own.add_argument("--min-count", type=int, default=1, metavar="N", help="vqa: answers given so often are labels")
    own.add_argument("--max-bad-share", type=float, default=0.01, metavar="SHARE",
                     help="of rows and pictures that cannot be used (default 0.01)")  # fmt: skip
    _add_workers(own)
    own.set_defaults(run=data_import)

    check = data.add_parser("check", help="read tables and shards once and tell what is broken")
    check.add_argument("root", metavar="ROOT", type=Path, help="folder of .arrow and .tar files")
    check.add_argument("--names", nargs="+", default=(), metavar="NAME",
                       help="tables, published sets or shards:PATTERN (default: all there)")  # fmt: skip
    check.add_argument("--decode", action="store_true", help="decode every picture; else header and end are read")
    check.add_argument("--max-bad-share", type=float, default=0.01, metavar="SHARE",
                       help="of a table's pictures or texts; more is exit code 2 (default 0.01)")  # fmt: skip
    check.add_argument("--json", type=Path, metavar="FILE", help="write what was found there, too")
    _add_workers(check)
    check.set_defaults(run=data_check)


def _add_workers(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--workers", type=int, metavar="N", help="processes that read pictures (default: as cores)")


def data_prepare(arguments: argparse.Namespace) -> int | None:
    from meter_fast.data.prepare import SETS, plan_set

    splits = tuple(split.strip() for split in arguments.splits.split(",") if split.strip())
    max_missing = SETS[arguments.set].max_missing if arguments.max_missing is None else arguments.max_missing
    _check_reading(arguments.workers, "--max-missing", max_missing)
    print(f"{arguments.set}: reading the annotations in {arguments.raw}", flush=True)
    return _carry_out(lambda: plan_set(arguments.set, arguments.raw, splits), arguments, "--max-missing", max_missing)


def _check_reading(workers: int | None, name: str, share: float) -> None:
    if not 0 <= share <= 1:
        raise ValueError(f"{name} {share:g}: give a share from 0 to 1")
    if workers is not None and workers < 0:
        raise ValueError(f"--workers {workers}: give 0 or more")


def _workers(arguments: argparse.Namespace) -> int:
    return min(8, os.cpu_count() or 1) if arguments.workers is None else arguments.workers


def _say(line: str) -> None:
    print(line, flush=True)


def _carry_out(
    make: "Callable[[], Plan]", arguments: argparse.Namespace, option: str, max_missing: float
) -> int | None:
    """Makes a plan, writes its tables and says what is in them."""
    from meter_fast.config import DataConfig
    from meter_fast.data.prepare import carry_out, left_out_lines

    try:
        plan = make()
        manifest = carry_out(
            plan,
            arguments.out,
            workers=_workers(arguments),
            max_missing=max_missing,
            option=option,
            max_pixels=DataConfig.max_image_pixels,
            say=_say,
        )
    except KeyboardInterrupt:
        print("stopped; finished tables stay, and the same command goes on from there")
        return EXIT_STOPPED
    for line in left_out_lines(manifest):
        print(f"  {line}")
    print(f"{arguments.out / plan.name}.manifest.json has counts and hashes")
    if option == "--max-bad-share":  # of own data
        print(f"read it with data.root={arguments.out} data.sources=arrow:{plan.tables[0].name}")
    return None


def data_import(arguments: argparse.Namespace) -> int | None:
    from meter_fast.data.prepare.own import own_captions, own_questions

    share = arguments.max_bad_share
    _check_reading(arguments.workers, "--max-bad-share", share)
    source, name, images = arguments.source, arguments.name, arguments.images
    if arguments.min_count < 1:
        raise ValueError(f"--min-count {arguments.min_count}: give 1 or more")
    if arguments.kind == "vqa":
        make = partial(own_questions, source, name, images, share, arguments.answers, arguments.min_count)
    elif arguments.answers or arguments.min_count != 1:
        raise ValueError("--answers and --min-count go with vqa")
    else:
        make = partial(own_captions, arguments.kind, source, name, images, share)
    return _carry_out(make, arguments, "--max-bad-share", share)


def data_check(arguments: argparse.Namespace) -> int | None:
    from dataclasses import asdict

    from meter_fast.config import DataConfig
    from meter_fast.data.prepare.checking import check_data
    from meter_fast.submission import check_place, write_json

    if arguments.json is not None:
        check_place(arguments.json)
    _check_reading(arguments.workers, "--max-bad-share", arguments.max_bad_share)
    results = check_data(
        arguments.root,
        arguments.names,
        workers=_workers(arguments),
        max_pixels=DataConfig.max_image_pixels,
        decode=arguments.decode,
        say=_say,
    )
    broken = False
    for one in results:
        found = one.found
        over = bool(one.error) or found.share() > arguments.max_bad_share
        broken = broken or over
        bad = {**found.bad_pictures, **found.bad_texts}
        verdict = "BROKEN" if over else "usable" if bad else "sound"
        print(f"{one.name}  {one.kind}  {found.pictures:,} pictures  {found.texts:,} texts  {verdict}")
        for line in [one.error] if one.error else []:
            print(f"  {line}")
        for cause, entry in bad.items():
            print(f"  {cause}: {entry['count']:,}, first {', '.join(entry['first'])}")
        notes = {**one.notes, **({"pictures without a text": found.without_text} if found.without_text else {})}
        for note, count in notes.items():
            print(f"  {note}: {count:,}")
    if arguments.json is not None:
        report = [{**asdict(one), "share": one.found.share()} for one in results]
        write_json(arguments.json, {"broken": broken, "tables": report}, indent=2)
    return EXIT_BROKEN if broken else None
