"""The command `meter-fast doctor`: arguments and messages. Heavy libraries are loaded by processes of their own."""

import argparse
import asyncio
import os
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from meter_fast.config import DataConfig

EXIT_FAILS = 1
MASTER_PORT = 29500  # DeepSpeed's


def add_doctor(commands: argparse._SubParsersAction) -> None:
    """Adds the command."""
    doctor = commands.add_parser("doctor", help="what would go wrong on these machines, with its remedy")
    doctor.add_argument("settings", nargs="*", metavar="RECIPE KEY=VALUE", help="of the run (default: pretrain)")
    doctor.add_argument("--hostfile", type=Path, metavar="F", help="ask these hosts over ssh, as deepspeed starts them")
    doctor.add_argument("--data-root", type=Path, metavar="DIR", help="the data (default: data.root of the recipe)")
    doctor.add_argument(
        "--port", type=int, default=MASTER_PORT, metavar="N", help=f"master port (default {MASTER_PORT})"
    )
    doctor.add_argument(
        "--seconds", type=float, default=120.0, metavar="S", help="for each group of probes (default 120)"
    )
    doctor.add_argument("--only", default="", metavar="A,B", help="of versions, devices, backends, compilers, limits, "
                        "network, gloo, disks (default: all)")  # fmt: skip
    doctor.add_argument("--json", type=Path, metavar="FILE", help="write what was found there, too")
    doctor.set_defaults(run=examine_machines)


def examine_machines(arguments: argparse.Namespace) -> int | None:
    from meter_fast.doctor.command import examine
    from meter_fast.doctor.finding import AREAS, Asked
    from meter_fast.recipes import resolve
    from meter_fast.submission import check_place, write_json

    if not arguments.seconds > 0:
        raise ValueError(f"--seconds {arguments.seconds:g}: give a time above 0")
    if not 0 < arguments.port < 65536:
        raise ValueError(f"--port {arguments.port}: give a port from 1 to 65535")
    areas = tuple(word.strip() for word in arguments.only.split(",") if word.strip()) or AREAS
    if wrong := [area for area in areas if area not in AREAS]:
        raise ValueError(f"--only {wrong[0]}: some of {', '.join(AREAS)}")
    if arguments.json is not None:
        check_place(arguments.json)
    command = tuple(arguments.settings) or ("pretrain",)
    config = resolve(command)
    data = arguments.data_root or (data_folder(config.data) if arguments.settings else None)
    asked = Asked(command, os.path.abspath(data) if data else "", os.path.abspath(config.run.dir), arguments.port,
                  arguments.seconds, areas=areas)  # fmt: skip
    report = asyncio.run(examine(asked, arguments.hostfile, say=lambda line: print(line, flush=True)))
    if arguments.json is not None:
        write_json(arguments.json, report, indent=2)
    return EXIT_FAILS if report["verdict"] == "fails" else None


def data_folder(data: "DataConfig") -> str:
    """Where a run reads: data.root, or the folder of its first shards where all sources are shards elsewhere."""
    elsewhere = [source.removeprefix("shards:") for source in data.sources if source.startswith("shards:/")]
    return os.path.dirname(elsewhere[0]) if len(elsewhere) == len(data.sources) else data.root
