"""The arguments of `meter-fast plan`. They are carried out in `meter_fast.plan`, which loads heavy libraries."""

import argparse
from pathlib import Path

EXAMPLES = """examples:
  meter-fast plan pretrain gpu=a100-80g nodes=8 gpus_per_node=8 engine.micro_batch=32
  meter-fast plan vqa gpu=a100-40g engine.zero=1 engine.activation_checkpointing=true
  meter-fast plan retrieval_coco gpu=h100-80g nodes=4 link=100gbit efficiency=0.4 --out plans/coco

arguments besides those of the recipe and its settings:
  gpu=a100-40g|a100-80g|h100-80g|h200   memory= (GB), tflops= and bandwidth= (GB/s) replace its figures
  nodes=1 gpus_per_node=8
  link=          between nodes: 10gbit ... 8x400gbit, all cards of a node together, or GB/s each way
  in_node=       between GPUs of a node: nvlink3, nvlink4, pcie4, pcie5, or GB/s each way
  efficiency=    share of the GPU's peak that is reached (0.35), link_efficiency= of the links' (0.8)
  headroom=      share of the memory left free (0.08)
  tokens=        of an average text (13), picture_kb= of a picture, samples= of the training data
  out=FOLDER     as --out"""


def add_plan(commands: argparse._SubParsersAction) -> None:
    """The sub-parser."""
    plan = commands.add_parser(
        "plan", help="what a run will take: memory, communication, time", epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )  # fmt: skip
    plan.add_argument("recipe", metavar="RECIPE", help="for example: pretrain")
    plan.add_argument("settings", nargs="*", metavar="KEY=VALUE", help="of the plan, the recipe and the run")
    plan.add_argument("--out", type=Path, metavar="FOLDER", help="draw the chart there, nodes.png")
    plan.add_argument("--json", type=Path, metavar="FILE", help="write the numbers there, too")
    plan.set_defaults(run=run_plan)


def run_plan(arguments: argparse.Namespace) -> None:
    from meter_fast.plan.options import read_arguments

    words = [arguments.recipe, *arguments.settings]
    _, options, _ = read_arguments(words)  # what is wrong is told before anything takes time
    out = arguments.out or (Path(options.out) if options.out else None)
    from meter_fast.submission import check_place, write_json

    if arguments.json is not None:
        check_place(arguments.json)
    if out is not None:
        out.mkdir(parents=True, exist_ok=True)
        check_place(out / CHART)
    from meter_fast.plan import make_plan
    from meter_fast.plan.page import lines
    from meter_fast.training.activations import NotTraced

    try:
        plan = make_plan(words)
    except NotTraced as error:
        raise ValueError(
            f"this model cannot be planned, as its passes cannot be traced without values: {error}"
        ) from error
    print("\n".join(lines(plan)))
    if out is not None:
        from meter_fast.plan.chart import draw

        draw(plan, out / CHART)
        print(f"\nchart: {out / CHART}")
    if arguments.json is not None:
        write_json(arguments.json, plan, indent=2)


CHART = "nodes.png"
