"""The arguments of `meter-fast evaluate`. Knows which options go with which task; heavy libraries are loaded inside."""

import argparse
from pathlib import Path

# Options of `evaluate` that only some tasks have.
TASK_OPTIONS = {
    "pairs": ("pretrain", "vqa", "nlvr2", "snli_ve"),
    "pictures": ("retrieval", "caption"),
    "scores": ("retrieval",),
    "dtype": ("retrieval",),
    "beams": ("caption",),
    "captions": ("caption",),
    "submission": ("vqa", "nlvr2", "snli_ve"),
    "annotations": ("nlvr2",),
}


def add_evaluate(commands: argparse._SubParsersAction) -> None:
    """The sub-parser."""
    evaluate = commands.add_parser("evaluate", help="scores of a model on held-out pairs or questions, or in retrieval")
    evaluate.add_argument(
        "model", metavar="RUN_OR_EXPORT", type=Path, help="run directory, export folder or METER .ckpt"
    )
    evaluate.add_argument(
        "task",
        choices=["pretrain", "vqa", "nlvr2", "snli_ve", "caption", "retrieval"],
        metavar="TASK",
        help="pretrain, vqa, nlvr2, snli_ve, caption or retrieval",
    )
    evaluate.add_argument(
        "settings", nargs="*", metavar="KEY=VALUE", help="for example: data.root=DATA data.val_split=test"
    )
    evaluate.add_argument("--pairs", type=int, metavar="N", help="score N pairs (default: all)")
    evaluate.add_argument("--pictures", type=int, metavar="N", help="retrieval, caption: N pictures (default: all)")
    evaluate.add_argument("--scores", type=Path, metavar="DIR", help="retrieval: keep scores, and go on from them")
    evaluate.add_argument("--dtype", choices=["fp32", "bf16"], help="retrieval: of the model (default fp32)")
    evaluate.add_argument("--beams", type=int, metavar="N", help="caption: width of the search (default 1, greedy)")
    evaluate.add_argument("--captions", type=Path, metavar="FILE", help="caption: the official results file")
    evaluate.add_argument(
        "--submission", type=Path, metavar="FILE", help="vqa: the evaluation server's file; nlvr2, snli_ve: judgements"
    )
    evaluate.add_argument(
        "--annotations",
        type=Path,
        metavar="FILE",
        help="nlvr2: official JSON lines that number a submission's statements",
    )
    evaluate.add_argument("--json", type=Path, metavar="FILE", help="write the scores there, too")
    evaluate.set_defaults(run=evaluate_model)


def evaluate_model(arguments: argparse.Namespace) -> None:
    task, world = arguments.task, arguments.world
    for option, tasks in TASK_OPTIONS.items():
        if getattr(arguments, option) is not None and task not in tasks:
            named = " or ".join(filter(None, [", ".join(tasks[:-1]), tasks[-1]]))
            raise ValueError(f"--{option} goes with the task {named}, not with {task}")
    for option, least in (("pairs", 2), ("pictures", 2), ("beams", 1)):
        given = getattr(arguments, option)
        if given is not None and given < least:
            raise ValueError(f"--{option} {given}: give {least} or more")
    from meter_fast.host_memory import keep_freed_memory
    from meter_fast.submission import check_place, write_json

    keep_freed_memory()
    if arguments.json is not None:
        check_place(arguments.json)
    if task == "retrieval":
        from meter_fast.retrieval import evaluate_retrieval, lines

        scores = evaluate_retrieval(
            arguments.model, arguments.settings, arguments.pictures, say=lambda line: print(line, flush=True),
            scores=arguments.scores, dtype=arguments.dtype or "fp32", world=world,
        )  # fmt: skip
    elif task == "caption":
        from meter_fast.evaluate_caption import evaluate_captions, lines

        scores = evaluate_captions(
            arguments.model, arguments.settings, arguments.pictures, arguments.beams or 1, arguments.captions,
            world=world,
        )  # fmt: skip
    else:
        from meter_fast.evaluate import evaluate_split, lines

        scores = evaluate_split(
            arguments.model, task, arguments.settings, arguments.pairs, world=world, submission=arguments.submission,
            annotations=arguments.annotations,
        )  # fmt: skip
    if world is None or world.is_main:
        print("\n".join(lines(scores)))
        if arguments.json is not None:
            write_json(arguments.json, scores, indent=2)
