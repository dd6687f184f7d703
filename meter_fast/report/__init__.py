"""The report of a pre-training run: RUN_DIR/report.json for programs and RUN_DIR/report.html for people.

Scores the exported model on held-out pairs and puts what the run recorded beside it. Knows run directories and the word
kinds of the drawn scenes; what is scored and how is in `score`, what the model says in `predict`.
"""

import json
import time
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch

from meter_fast.config import FINE_TUNING, override
from meter_fast.data.images import ImageBackend, image_transform, open_backend
from meter_fast.data.scenes import WORD_KINDS
from meter_fast.data.scenes.world import NOVEL_COMBINATIONS
from meter_fast.data.sources import open_sources
from meter_fast.data.spans import open_denoiser
from meter_fast.data.tokenizer import load_tokenizer
from meter_fast.evaluate import held_out_names, parted
from meter_fast.models.export import TOKENIZER, load_export
from meter_fast.models.meter import Meter
from meter_fast.report.examples import Example, examples
from meter_fast.report.facts import ReportError, RunFacts, read_run
from meter_fast.report.page import render
from meter_fast.score import held_out_blocks, score_held_out
from meter_fast.training.monitor import replace_text

__all__ = ["ReportError", "write_report"]

EXAMPLES = 12
NOVEL_FOLDER = "novel"
NOVEL_PHRASES = tuple(sorted(f"{colour} {shape}" for colour, shape in NOVEL_COMBINATIONS))


def write_report(
    run_dir: str | Path,
    settings: Sequence[str] = (),
    split: str = "test",
    kinds: Mapping[str, Sequence[str]] = WORD_KINDS,
    max_pictures: int | None = None,
    device: str | None = None,
) -> dict:
    """Score the run's export, write report.json and report.html into the run directory, return what report.json holds.

    What is scored: `split` of the data sets in data.sources; of tables and shards, which are training data,
    data.val_sources. settings: "data.root=FOLDER" and the like, where they differ from the run's own. kinds: words to
    hide, by kind. max_pictures: score that many at most. device: None takes a GPU if there is one. Raises ValueError
    for a directory that is no finished run, and for data that cannot be read.
    """
    began = time.monotonic()
    facts = read_run(run_dir)
    tuned = [name for name in facts.config.objectives.names if name in FINE_TUNING]
    if tuned:
        hint = f": meter-fast evaluate {run_dir} {tuned[0]}" if tuned[0] != "reconstruction" else ""
        raise ReportError(f"{run_dir} is a run of {tuned[0]}, reports are of pre-training{hint}")
    data = override(facts.config, settings).data
    root = Path(data.root)
    device = device or ("cuda" if torch.cuda.is_available() else "cpu")
    model = _with_trained_heads(load_export(facts.export), facts.config.objectives.names).to(device)
    tokenizer = load_tokenizer(facts.export / TOKENIZER)
    goals = facts.config.objectives
    denoiser = open_denoiser(tokenizer, goals.names, goals.span_probability, goals.span_length)
    transform = image_transform(data.transform, model.config.vision.image_size)
    backend = open_backend("torchvision", transform, "cpu", torch.float32)
    own = parted(data, split)
    names, said = (own, split) if own else held_out_names(data, split)
    try:
        sources = open_sources(names, root, split)
        asked = (model, tokenizer, sources, backend, kinds, max_pictures, data.max_text_length)
        scores = score_held_out(*asked, denoiser=denoiser)
        shown = _examples(model, tokenizer, sources, backend, kinds)
        novel = None
        if own and (root / NOVEL_FOLDER).is_dir():
            unseen = open_sources(own, root / NOVEL_FOLDER, split)
            asked = (model, tokenizer, unseen, *asked[3:])
            novel = score_held_out(*asked, naming=NOVEL_PHRASES, denoiser=denoiser)
    finally:
        backend.close()
    report = _report(facts, model, scores, novel, said, time.monotonic() - began)
    replace_text(facts.folder / "report.json", json.dumps(report, indent=2) + "\n")
    replace_text(facts.folder / "report.html", render(facts, report, shown))
    return report


def _with_trained_heads(model: Meter, objectives: Sequence[str]) -> Meter:
    """The model without the head of an objective that it was not trained on: there is nothing to score."""
    if "mlm" not in objectives:
        model.mlm_head = None
    if "itm" not in objectives:
        model.itm_head = None
    return model


def _examples(model: Meter, tokenizer, sources, backend: ImageBackend, kinds: Mapping) -> list[Example]:
    """A dozen pictures spread over the split."""
    block = next(held_out_blocks(model, sources, backend, Counter(), max_pictures=8 * EXAMPLES))
    return examples(model, tokenizer, block, backend.transform, kinds, EXAMPLES)


def count_parameters(model: Meter) -> dict[str, int]:
    parts = {
        "vision": model.vision,
        "text": model.text,
        "fusion": model.fusion,
        "MLM head": model.mlm_head,
        "ITM head": model.itm_head,
        "decoder": model.decoder,
        "decoder's head": model.lm_head,
    }
    counts = {name: sum(p.numel() for p in part.parameters()) for name, part in parts.items() if part is not None}
    return {"total": sum(counts.values()), **counts}


def _report(facts: RunFacts, model: Meter, scores: Mapping, novel: Mapping | None, split: str, seconds: float) -> dict:
    run = facts.run
    graded = {name: scores[name] for name in ("itm", "mlm", "span_denoising", "caption") if name in scores}
    if novel is not None:
        graded["novel"] = dict(novel)
    return {
        "run": facts.folder.resolve().name,
        "scores": graded,
        "split": {
            "name": split,
            **{name: scores[name] for name in ("pictures", "captions", "cut_off", "skipped")},
        },
        "steps": run["steps"],
        "seconds": round(run["seconds"] + seconds, 1),
        "seconds_training": round(run["seconds"], 1),
        "seconds_report": round(seconds, 1),
        "world_size": run["world_size"],
        "zero_stage": run["zero_stage"],
        "dtype": run["dtype"],
        "device": run["device"],
        "skipped": run.get("skipped", {}),
        "versions": run.get("versions", {}),
        "model": {"parameters": count_parameters(model)},
    }
