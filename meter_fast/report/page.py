"""The report as one HTML page that needs no other file and runs no script. Knows facts, scores and examples as data."""

import base64
import io
from collections.abc import Mapping, Sequence
from html import escape

from PIL import Image

from meter_fast.config import describe
from meter_fast.report.examples import Claim, Example
from meter_fast.report.facts import RunFacts, curve
from meter_fast.report.plot import line_chart, per_cent, short
from meter_fast.report.style import CSS
from meter_fast.training.monitor import duration

KIND_TEXT = {
    "colour": "colour words",
    "shape": "shape words",
    "count": "number words",
    "relation": "relation words",
}
WRITTEN_TEXT = {
    "span_denoising": ("tokens of hidden spans", "written by the decoder"),
    "caption": ("caption names a right thing", "written from the picture alone; colour and shape count"),
}
WHAT = """A vision encoder, a text encoder and co-attention layers, trained together to fill in hidden words of
captions (MLM) and to tell whether a caption belongs to a picture (ITM)."""
ASKED = """{pictures:,} held-out pictures with {captions:,} captions ({split} split), none seen in training. One word
is hidden at a time and must come first among the whole vocabulary. Two lines to beat: <b>chance</b>, the best one can
do by always answering the same word; and <b>pictures exchanged</b>, the same model with another scene's picture, which
shows what the text alone gives away. For matching, each caption is asked with its own and with another scene's picture;
now and then the other one fits too, so a perfect score is out of reach."""
NOVEL = """{pictures:,} pictures with {captions:,} captions that name a colour and a shape never drawn together in
training: high scores here mean that colour and shape were learned apart."""
LOOK = """Chosen by their place in the file, not by the result. Left, the picture as the model sees it; right, where
the hidden word looks: its attention to the picture in the upper fusion layers, mean over heads, amber where a patch
gets more than an even share. Below, the five best fills, and how probable it is that a caption belongs to the picture:
its own, the same with one word changed, and the caption of another picture."""
CURVES = """Over optimizer steps. Thin lines are what was recorded, bold ones their running mean, dots the held-out
pairs scored along the way."""
SCORE_HEAD = """<tr><th></th><th></th><th class="number">accuracy</th><th class="number">pictures exchanged</th>
<th class="number">chance</th><th class="number">asked</th></tr>"""
SCORE_KEY = """<ul class="key"><li><i class="is-score"></i>accuracy</li><li><i class="is-shuffled"></i>pictures
exchanged</li><li><i class="is-chance"></i>chance</li></ul>"""
FOOT = """<footer>Written by <code>meter-fast report</code>. The same numbers as JSON: report.json beside this
file.</footer>"""


def render(facts: RunFacts, report: Mapping, examples: Sequence[Example]) -> str:
    """The page. `report` is what report.json holds."""
    parts = [
        _head(facts, report),
        _scores(report),
        _novel(report),
        _examples(examples),
        _curves(facts),
        _details(facts, report),
    ]
    return (
        '<!doctype html><html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f'<meta name="color-scheme" content="light dark"><title>{escape(report["run"])} · pre-training report</title>'
        f"<style>{CSS}</style></head><body><main>{''.join(parts)}</main></body></html>\n"
    )


def _head(facts: RunFacts, report: Mapping) -> str:
    facts_shown = [
        (duration(report["seconds"]), "from start to this page"),
        (f"{report['steps']:,}", f"steps of {facts.config.engine.global_batch:,} pairs"),
        (short(report["model"]["parameters"]["total"]), "parameters"),
        (f"{report['world_size']} × {escape(str(report['device']))}", "processes"),
        (f"ZeRO-{report['zero_stage']}, {escape(report['dtype'])}", "DeepSpeed"),
    ]
    cards = "".join(f'<div class="card"><b>{value}</b><span>{label}</span></div>' for value, label in facts_shown)
    return (
        f"<header><h1>METER pre-training: {escape(report['run'])}</h1>"
        f'<p class="quiet">{WHAT}</p><div class="facts">{cards}</div></header>'
    )


# ------------------------------------------------------------------------------------------------------------- scores


def _scores(report: Mapping) -> str:
    split = report["split"]
    asked = ASKED.format(pictures=split["pictures"], captions=split["captions"], split=escape(split["name"]))
    return _section("Does it look at the picture?", asked, f'<div class="card">{_score_table(report["scores"])}</div>')


def _section(title: str, text: str, body: str) -> str:
    return f"<section><h2>{title}</h2><p>{text}</p>{body}</section>"


def _novel(report: Mapping) -> str:
    novel = report["scores"].get("novel")
    if not novel:
        return ""
    text = NOVEL.format(pictures=novel["pictures"], captions=novel["captions"])
    return _section("Combinations it never saw", text, f'<div class="card">{_score_table(novel)}</div>')


def _score_table(scores: Mapping) -> str:
    rows = []
    if "itm" in scores:
        rows.append(_score_row("caption matches picture?", "ITM, half of the pairs match", scores["itm"]))
    for kind, score in scores.get("mlm", {}).items():
        rows.append(_score_row(KIND_TEXT.get(kind, kind), "MLM", score))
    for name, (text, note) in WRITTEN_TEXT.items():
        if name in scores:
            rows.append(_score_row(text, note, scores[name]))
    return f'<div class="scroll"><table>{SCORE_HEAD}{"".join(rows)}</table></div>{SCORE_KEY}'


def _score_row(name: str, note: str, score: Mapping) -> str:
    shuffled = score.get("shuffled")
    marks = f'<i style="width:{100 * score["accuracy"]:.1f}%"></i>'
    marks += f'<i class="chance" style="left:{100 * score["chance"]:.1f}%"></i>'
    if shuffled is not None:
        marks += f'<i class="shuffled" style="left:{100 * shuffled:.1f}%"></i>'
    numbers = "".join(
        f'<td class="number">{"" if value is None else f"{100 * value:.1f} %"}</td>'
        for value in (score["accuracy"], shuffled, score["chance"])
    )
    return (
        f'<tr><td class="name">{escape(name)}<small>{escape(note)}</small></td>'
        f'<td class="wide"><div class="bar">{marks}</div></td>{numbers}<td class="number">{score["count"]:,}</td></tr>'
    )


# ----------------------------------------------------------------------------------------------------------- examples


def _examples(examples: Sequence[Example]) -> str:
    if not examples:
        return ""
    return _section("Held-out pictures", LOOK, f'<div class="examples">{"".join(map(_example, examples))}</div>')


def _example(example: Example) -> str:
    masked = example.masked
    caption = (
        escape(masked.caption[: masked.start])
        + f'<span class="hidden" title="hidden: {escape(masked.word)}">?</span>'
        + escape(masked.caption[masked.end :])
    )
    fills = "".join(_fill(word, p, word.lower() == masked.word.lower()) for word, p in example.fills)
    claims = "".join(map(_claim, example.claims))
    pair = _figure(example.picture, masked.caption, "picture")
    pair += _figure(example.attention, "attention of the hidden word", f"where “{masked.word}” looks")
    return (
        f'<article class="card example"><div class="pair">{pair}</div>'
        f'<div class="caption"><span class="tag">{escape(example.kind)}</span>{caption}</div>'
        f'<div class="fills">{fills}</div>' + (f'<div class="claims">{claims}</div>' if claims else "") + "</article>"
    )


def _figure(picture: Image.Image, alt: str, text: str) -> str:
    image = f'<img alt="{escape(alt)}" src="{data_uri(picture)}">'
    return f"<figure>{image}<figcaption>{escape(text)}</figcaption></figure>"


def _bar(share: float, kind: str = "") -> str:
    return f'<div class="bar"><i class="{kind}" style="width:{100 * share:.1f}%"></i></div>'


def _fill(word: str, probability: float, right: bool) -> str:
    kind = "right" if right else ""
    return f'<span class="{kind}">{escape(word)}</span>{_bar(probability, kind)}<span>{per_cent(probability)}</span>'


def _claim(claim: Claim) -> str:
    kind = "true" if claim.is_what == "true" else "false"
    said = f'{escape(claim.caption)} <span class="quiet">· {escape(claim.is_what)}</span>'
    share = f'<div class="share">{per_cent(claim.probability)}</div>'
    return f'<div class="said {kind}"><div>{said}</div>{_bar(claim.probability)}{share}</div>'


def data_uri(picture: Image.Image) -> str:
    out = io.BytesIO()
    picture.save(out, "PNG", optimize=True)
    return "data:image/png;base64," + base64.b64encode(out.getvalue()).decode()


# ------------------------------------------------------------------------------------------------- curves and details


def _curves(facts: RunFacts) -> str:
    steps, held_out = facts.steps, facts.evaluations
    names = [name for name in facts.config.objectives.names]
    charts = []
    for tone, name in enumerate(names, 1):
        lines = [
            curve(steps, "training", "loss", name, tone=tone),
            curve(held_out, "held out", "evaluation", name, "loss", tone=6, dots=True),
        ]
        charts.append((f"{name.upper()} loss", line_chart(lines)))
    lines = []
    for tone, name in enumerate(names, 1):
        lines.append(curve(steps, f"{name.upper()}, training", "accuracy", name, tone=tone))
        lines.append(curve(held_out, f"{name.upper()}, held out", "evaluation", name, "accuracy", tone=tone, dots=True))
    charts.append(("Accuracy", line_chart(lines, per_cent, (0.0, 1.0))))
    charts.append(("Samples per second", line_chart([curve(steps, "all processes", "samples_per_second", tone=3)])))
    cards = "".join(f'<div class="card"><h3>{title}</h3>{chart}</div>' for title, chart in charts)
    return _section("Training", CURVES, f'<div class="charts">{cards}</div>')


def _details(facts: RunFacts, report: Mapping) -> str:
    model = report["model"]["parameters"]
    skipped = {**report["skipped"], **report["split"]["skipped"]}
    rows = [
        ("training time", duration(report["seconds_training"])),
        ("time for this report", duration(report["seconds_report"])),
        ("processes, device", f"{report['world_size']}, {report['device']}"),
        ("parameters", ", ".join(f"{name} {short(count)}" for name, count in model.items() if name != "total")),
        ("samples skipped", ", ".join(f"{cause}: {n}" for cause, n in skipped.items()) or "none"),
        ("versions", ", ".join(f"{name} {version}" for name, version in report["versions"].items())),
        ("run directory", str(facts.folder)),
    ]
    body = "".join(f"<tr><td>{escape(label)}</td><td>{escape(str(value))}</td></tr>" for label, value in rows)
    settings = f"<details><summary>All settings</summary><pre>{escape(describe(facts.config))}</pre></details>"
    return (
        f'<section><h2>The run</h2><div class="card"><table class="plain">{body}</table>{settings}</div></section>'
        + FOOT
    )
