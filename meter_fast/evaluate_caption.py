"""Captions of every picture of a split, written by any number of processes: the official results file, and scores.

Knows pictures, their names and where a model's settings lie. How a model writes is in `predict`, the metrics in
`score_captions`, the file in `submission`.
"""

import re
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch

import meter_fast
from meter_fast.config import DataConfig, RunConfig, override
from meter_fast.data.caption_check import BadCaption, check_caption
from meter_fast.data.images import image_transform, open_backend
from meter_fast.data.pictures import PictureAssembler, picture_split_loader
from meter_fast.data.sources import Sources, open_sources
from meter_fast.data.spans import read_sentinels
from meter_fast.data.tokenizer import load_tokenizer
from meter_fast.evaluate import (
    check_vocabulary,
    facts,
    held_out_names,
    here,
    parted,
    settings_of,
    skipped_by_all,
    tokenizer_of,
)
from meter_fast.models.meter import Meter
from meter_fast.predict import caption
from meter_fast.score_captions import METRICS, MISSING, TOKENIZER, caption_scores
from meter_fast.submission import caption_file, check_place, image_ids, write_json
from meter_fast.training.world import World, alone

NO_REFERENCE = "no reference"


def evaluate_captions(
    model_path: str | Path,
    settings: Sequence[str] = (),
    pictures: int | None = None,
    beams: int = 1,
    file: str | Path | None = None,
    device: str | None = None,
    world: World | None = None,
) -> dict:
    """Write a caption of each picture of a held-out split with the model at `model_path`, and score them.

    settings: as of `evaluate.evaluate_split`; `captioned_names` says which pictures. pictures: at most so many, a fair
    draw. beams: of the search, 1 is greedy. file: the official results, [{"image_id", "caption"}]; without a name
    captions-SPLIT.json beside the model. world: the processes that do it together; the file is the same whatever their
    number, and the main one writes it.

    Returns {"caption": `caption_scores`, "exchanged": the same against another picture's references, "tokenizer": how
    words were told apart for both (all three are left out where pycocoevalcap is not installed), "captions": {"file",
    "pictures", "filled", "numbered"}, "beams", "split", "tables", "pictures", "skipped"} and `evaluate.facts`. filled:
    pictures that could not be read; numbered: whether image_id is a running number, as the tables name no COCO picture.
    Raises ValueError.
    """
    path, world = Path(model_path), world or alone(device or here())
    rows, opened = world.each(lambda: _write_captions(path, settings, pictures, beams, file, world))
    written = {sample: text for rows in world.share(rows) for sample, text in rows}
    opened["skipped"] = skipped_by_all(world, opened["skipped"])
    result = world.together(lambda: _finish(written, **opened))
    return {**result, "beams": beams, **facts(path, "caption", world)}


def captioned_names(data: DataConfig, settings: Sequence[str]) -> tuple[tuple[str, ...], str]:
    """The sources whose pictures are captioned, and how to call them. With data.val_split=test and no data.val_sources
    in `settings` the data sets of data.sources in their test split; else as `held_out_names`."""
    named = any(text.startswith("data.val_sources=") for text in settings)
    own = parted(data, "test") if data.val_split == "test" and not named else ()
    return (own, data.val_split) if own else held_out_names(data, data.val_split)


def _write_captions(
    path: Path, settings: Sequence[str], limit: int | None, beams: int, file: str | Path | None, world: World
) -> tuple[list[tuple[int, str]], dict]:
    """(sample, caption) of each picture of this process, and what `_finish` wants."""
    model = meter_fast.load_model(path)
    config = _settings(path, model, settings)
    data = config.data
    names, said = captioned_names(data, settings)
    sources = open_sources(names, data.root, data.val_split)
    file = check_place(file or _beside(path, said))
    tokenizer = load_tokenizer(tokenizer_of(path, data.tokenizer))
    check_vocabulary(model, tokenizer)
    read_sentinels(tokenizer)
    transform, batch = image_transform(data.transform, model.config.vision.image_size), config.engine.micro_batch
    backend = open_backend(data.backend, transform, world.device, torch.float32, max_batch=batch)
    try:
        assembler = PictureAssembler(sources, backend, config.run.seed, data.max_image_pixels, replace=False)
        whole = picture_split_loader(
            assembler, batch_size=batch, limit=limit, seed=config.run.seed, workers=data.workers,
            max_bad_share=data.max_bad_share,
        )  # fmt: skip
        loader = whole.dealt(world.rank, world.size)
        rows = written_of(model.to(world.device), tokenizer, loader, world.device, beams, data.max_text_length)
    finally:
        backend.close()
    samples = sorted(whole.samples.tolist())
    return rows, {"file": file, "sources": sources, "samples": samples, "said": said, "skipped": dict(loader.skipped)}


@torch.inference_mode()
def written_of(model: Meter, tokenizer, batches, device, beams: int, max_length: int) -> list[tuple[int, str]]:
    """(sample, caption) of each picture of the batches (`PictureBatch`)."""
    was_training = model.training
    model.eval()
    rows: list[tuple[int, str]] = []
    try:
        for pictures in batches:
            batch = pictures.to(device)
            texts = caption(model, tokenizer, model.encode_image(batch.images), beams, max_length)
            rows += zip(batch.sample_ids.tolist(), texts, strict=True)
    finally:
        model.train(was_training)
    return rows


def _settings(path: Path, model: Meter, settings: Sequence[str]) -> RunConfig:
    """The run's settings, or the recipe's. Raises ValueError for a model that has not learnt to caption."""
    config = override(settings_of(path, "caption"), settings)
    learnt = model.config.decoder.layers and "caption" in config.objectives.names
    if not learnt:
        why = (
            f"was trained on objectives.names={','.join(config.objectives.names)}"
            if model.config.decoder.layers
            else "has no decoder (fusion=encoder_decoder)"
        )
        raise ValueError(
            f"{path} writes no captions: it {why}. Fine-tune a model with a decoder: meter-fast train caption "
            "run.init=MODEL"
        )
    return config


def _beside(path: Path, said: str) -> Path:
    """captions-SPLIT.json in the model's folder."""
    name = re.sub(r"[^\w.-]+", "-", said.removeprefix("arrow:")).strip("-")[:100]
    return (path if path.is_dir() else path.parent) / f"captions-{name}.json"


# ------------------------------------------------------------------------------------------------ on the main process


def _finish(
    written: Mapping[int, str], file: Path, sources: Sources, samples: Sequence[int], said: str, skipped: dict[str, int]
) -> dict:
    """Write the official file and score what was written."""
    names, references, left_out = [], [], Counter(skipped)
    for sample in samples:
        name, texts = sources.picture(sample)
        names.append(name)
        references.append(good_captions(texts, left_out))
    ids, named = image_ids(names)
    captions = [written.get(sample) for sample in samples]
    write_json(file, caption_file(ids, captions))
    result = scores_of(captions, references, left_out)
    return {
        **result,
        "captions": {
            "file": str(file),
            "pictures": len(samples),
            "filled": captions.count(None),
            "numbered": not named,
        },
        "split": said,
        "tables": sources.files,
        "pictures": len(samples),
        "skipped": dict(left_out),
    }


def good_captions(texts: Sequence[str], skipped: Counter) -> list[str]:
    """The reference captions that are text; others are counted by cause."""
    good = []
    for text in texts:
        try:
            good.append(check_caption(text))
        except BadCaption as error:
            skipped[error.cause] += 1
    return good


def scores_of(captions: Sequence[str | None], references: Sequence[Sequence[str]], skipped: Counter) -> dict:
    """{"caption", "exchanged", "tokenizer"} of the captions of readable pictures with references; {} where they cannot
    be scored."""
    read = [n for n, text in enumerate(captions) if text is not None]
    scored = [n for n in read if references[n]]
    if len(scored) < len(read):
        skipped[NO_REFERENCE] += len(read) - len(scored)
    if not scored:
        raise ValueError(f"not one picture of the split could be captioned and scored; skipped: {dict(skipped)}")
    own = caption_scores({n: captions[n] for n in scored}, {n: references[n] for n in scored})
    if own is None:
        return {}
    others = dict(zip(scored, [*scored[1:], scored[0]], strict=True))
    exchanged = caption_scores({n: captions[n] for n in scored}, {n: references[others[n]] for n in scored})
    return {"caption": own, "exchanged": exchanged, "tokenizer": TOKENIZER}


def lines(result: Mapping) -> list[str]:
    """The result for people."""
    made = result["captions"]
    numbered = "; no COCO names: image_id counts the pictures of the tables from 0" if made["numbered"] else ""
    filled = f", {made['filled']:,} of them unreadable, with a likely caption" if made["filled"] else ""
    scores = [MISSING]
    if "caption" in result:
        rows = {"score": result["caption"], "with other pictures": result["exchanged"]}
        heads = "".join(f"{name:>9}" for name in METRICS)
        scores = [f"{'captions, per cent':<22}{heads}"]
        scores += [f"{title:<22}" + "".join(f"{100 * row[m]:>9.2f}" for m in METRICS) for title, row in rows.items()]
        scores.append(
            f"words by {result['tokenizer']}; METEOR and SPICE take Java: give the file to the official script"
        )
    return [
        *scores,
        f"split {result['split']} ({', '.join(result['tables'])}), {result['pictures']:,} pictures, skipped "
        f"{result['skipped'] or 'none'}",
        f"{made['file']}: {made['pictures']:,} captions{filled}{numbered}",
    ]
