"""The arguments of `meter-fast predict`. They are carried out in `predict.command`, which loads heavy libraries."""

import argparse
from pathlib import Path

TASKS = {
    "answer": "the best answers to a question",
    "match": "the probability that a text belongs to a picture",
    "rank": "every picture against every text",
    "fill": "words for each <mask> of a text",
    "entails": "whether a picture contradicts a text, leaves it open or entails it",
    "compare": "the probability that a statement is true of two pictures",
    "caption": "a caption",
}
EXAMPLES = """examples:
  meter-fast predict runs/vqa answer dog.jpg --text "what is the dog holding ?"
  meter-fast predict runs/demo match PICTURES --text "a dog on a beach" --out matches.csv
  meter-fast predict runs/demo fill dog.jpg --text "a <mask> on a beach"
  meter-fast predict runs/nlvr2 compare left.jpg right.jpg --text "both pictures show a dog"
  meter-fast predict runs/vqa answer questions.csv --out answers.jsonl

A table has the columns image and text (compare: image_a, image_b and text; caption: image); paths in it are relative to
its folder, and other columns are handed through. A row that cannot be used keeps its place, with the cause in the
column error."""


def add_predict(commands: argparse._SubParsersAction) -> None:
    """The sub-parser."""
    predict = commands.add_parser(
        "predict", help="ask a model about pictures", epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )  # fmt: skip
    predict.add_argument("model", metavar="MODEL", type=Path, help="run directory, export folder or METER .ckpt")
    tasks = "; ".join(f"{name}: {what}" for name, what in TASKS.items())
    predict.add_argument("task", choices=list(TASKS), metavar="TASK", help=tasks)
    predict.add_argument("input", nargs="+", type=Path, metavar="INPUT", help="pictures, a folder, a .csv or a .jsonl")
    predict.add_argument("--text", action="append", default=[], metavar="TEXT", help="of all pictures; may be repeated")
    predict.add_argument("--out", type=Path, metavar="FILE", help="write a .csv or .jsonl (default: print)")
    predict.add_argument("--k", type=int, metavar="N", help="answers, or fills of a mask (default 5)")
    predict.add_argument("--batch", type=int, default=32, metavar="N", help="pairs computed at a time (default 32)")
    predict.add_argument("--device", default="cpu", metavar="NAME", help="cpu (default) or cuda")
    predict.add_argument("--dtype", metavar="NAME", help="fp32 or bf16 (default: fp32 on the CPU, bf16 on CUDA)")
    predict.add_argument("--tokenizer", metavar="NAME", help="folder or hub name, where none lies with the model")
    predict.add_argument("--transform", metavar="NAME", help="clip, imagenet or vit, where the model does not tell")
    predict.add_argument("--answers", type=Path, metavar="FILE", help="JSON list, where none lies with the model")
    predict.set_defaults(run=run_predict)


def run_predict(arguments: argparse.Namespace) -> int:
    from meter_fast.host_memory import keep_freed_memory
    from meter_fast.predict.command import predict

    keep_freed_memory()
    return predict(arguments)
