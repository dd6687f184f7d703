"""The report of a run: what its JSON holds, that its page needs no other file, its charts, and what is refused."""

import json
import math
import re
import shutil
import xml.etree.ElementTree as ET
from html.parser import HTMLParser

import numpy as np
import pytest
from PIL import Image
from scene_run import make_run

from meter_fast.data.scenes import WORD_KINDS
from meter_fast.report import NOVEL_PHRASES, write_report
from meter_fast.report.examples import glow
from meter_fast.report.facts import curve, read_run
from meter_fast.report.plot import Series, binned, line_chart, short, smoothed, ticks

VOID = {"meta", "img", "br", "line", "circle", "path"}


class Page(HTMLParser):
    """Tags, their attributes and the text of a page; complains about tags that are not closed."""

    def __init__(self, text: str):
        super().__init__()
        self.tags: list[tuple[str, dict]] = []
        self.open: list[str] = []
        self.text = ""
        self.feed(text)

    def handle_starttag(self, tag, attributes):
        self.tags.append((tag, dict(attributes)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attributes):
        self.tags.append((tag, dict(attributes)))

    def handle_endtag(self, tag):
        assert self.open.pop() == tag, f"</{tag}> closes another tag"

    def handle_data(self, data):
        self.text += data


@pytest.fixture(scope="module")
def report(tmp_path_factory, scenes, scene_model):
    """What write_report returns, and the run directory that it wrote to."""
    folder = make_run(tmp_path_factory.mktemp("reported") / "small", scenes, scene_model)
    return write_report(folder, device="cpu"), folder


def test_report_json_holds_scores_and_facts_of_the_run(report):
    returned, folder = report
    stored = json.loads((folder / "report.json").read_text())
    assert stored == returned
    assert stored["scores"]["itm"]["chance"] == 0.5 and 0 <= stored["scores"]["itm"]["accuracy"] <= 1
    for scores in (stored["scores"], stored["scores"]["novel"]):
        assert set(scores["mlm"]) == set(WORD_KINDS)
        for kind, score in scores["mlm"].items():
            assert set(score) == {"accuracy", "shuffled", "chance", "uniform", "count"}
            assert score["uniform"] <= score["chance"] < 1 and score["count"] > 0
            assert score["uniform"] == pytest.approx(1 / len(WORD_KINDS[kind]))
    assert (stored["world_size"], stored["zero_stage"], stored["dtype"], stored["steps"]) == (2, 2, "bf16", 30)
    assert stored["seconds_training"] == 61.5
    assert stored["seconds"] == pytest.approx(61.5 + stored["seconds_report"], abs=0.2)
    assert stored["split"]["pictures"] == 40 and stored["split"]["name"] == "test"
    parts = dict(stored["model"]["parameters"])
    assert parts.pop("total") == sum(parts.values()) > 1_000_000


def test_page_is_whole_and_needs_no_other_file(report):
    returned, folder = report
    text = (folder / "report.html").read_text()
    page = Page(text)
    assert page.open == []
    names = {tag for tag, _ in page.tags}
    assert not names & {"script", "link", "iframe", "object"}
    for _, attributes in page.tags:
        for name in ("src", "href", "action"):
            assert attributes.get(name, "data:").startswith("data:")
    assert "url(" not in text and "@import" not in text and "http" not in text
    images = [attributes for tag, attributes in page.tags if tag == "img"]
    assert len(images) == 24 and all(image["alt"] for image in images)
    assert f"{100 * returned['scores']['itm']['accuracy']:.1f} %" in page.text
    assert "ZeRO-2, bf16" in page.text and "prefers-color-scheme: dark" in text


def test_examples_show_every_kind_with_fills_and_true_and_false_captions(report):
    _, folder = report
    text = (folder / "report.html").read_text()
    cards = re.findall(r'<article class="card example">.*?</article>', text, re.S)
    pictures = [re.search(r'src="(.*?)"', card).group(1) for card in cards]
    assert len(set(pictures)) == len(pictures) == 12
    kinds = [re.search(r'class="tag">(\w+)<', card).group(1) for card in cards]
    assert sorted(kinds) == sorted(3 * list(WORD_KINDS))
    for card in cards:
        fills = re.search(r'<div class="fills">(.*?)</div><div class="claims">', card, re.S).group(1)
        assert fills.count('class="bar"') == 5
        assert card.count('class="said true"') == 1 and card.count('class="said false"') == 2
        assert "one word changed" in card and "of another picture" in card


def test_novel_scores_are_of_captions_that_name_a_novel_combination(report, scenes):
    returned, _ = report
    from meter_fast.data.sources import open_sources

    sources = open_sources(["coco"], scenes / "novel", "test")
    texts = [sources.read(i).text for i in range(len(sources))]
    naming = [text for text in texts if any(phrase in text for phrase in NOVEL_PHRASES)]
    assert 0 < len(naming) < len(texts)
    assert returned["scores"]["novel"]["captions"] == len(naming)


def test_a_run_on_data_without_novel_pictures_has_no_novel_table(run_dir, scenes, tmp_path):
    shutil.copytree(scenes, tmp_path / "plain", ignore=shutil.ignore_patterns("novel"))
    returned = write_report(run_dir, [f"data.root={tmp_path / 'plain'}"], device="cpu", max_pictures=5)
    assert "novel" not in returned["scores"] and returned["split"]["pictures"] == 5
    assert "never saw" not in (run_dir / "report.html").read_text()


def test_a_run_on_tables_is_scored_on_the_tables_kept_from_training(run_dir):
    tables = ["data.sources=arrow:coco_caption_karpathy_train", "data.val_sources=arrow:coco_caption_karpathy_val"]
    returned = write_report(run_dir, tables, device="cpu", max_pictures=5)
    assert returned["split"]["name"] == "arrow:coco_caption_karpathy_val" and "novel" not in returned["scores"]
    with pytest.raises(ValueError, match=r"data\.val_sources="):
        write_report(run_dir, [tables[0], "data.val_sources="], device="cpu")


def test_captions_and_names_cannot_break_the_page(run_dir, scenes, tmp_path):
    import pyarrow as pa

    with pa.memory_map(str(scenes / "coco_caption_karpathy_test.arrow")) as source:
        rows = pa.ipc.open_file(source).read_all().to_pylist()
    for row in rows:
        row["caption"] = ['<script>alert("x")</script> a red & <b>star']
    table = pa.Table.from_pylist(rows)
    (tmp_path / "bad").mkdir()
    path = tmp_path / "bad" / "coco_caption_karpathy_test.arrow"
    with pa.OSFile(str(path), "wb") as sink, pa.RecordBatchFileWriter(sink, table.schema) as writer:
        writer.write_table(table)
    write_report(run_dir, [f"data.root={tmp_path / 'bad'}"], device="cpu")
    page = Page((run_dir / "report.html").read_text())
    assert page.open == [] and not any(tag in ("script", "b<") for tag, _ in page.tags)
    assert 'alert("x")' in page.text


@pytest.mark.parametrize(("trained", "other"), [("mlm", "itm"), ("itm", "mlm")])
def test_an_objective_that_was_not_trained_is_not_scored(run_dir, trained, other):
    config = json.loads((run_dir / "config.json").read_text())
    config["objectives"]["names"] = [trained]
    (run_dir / "config.json").write_text(json.dumps(config))
    scores = write_report(run_dir, device="cpu", max_pictures=8)["scores"]
    assert scores[trained] and other not in scores and other not in scores["novel"]
    page = Page((run_dir / "report.html").read_text())
    assert page.open == [] and ("ITM, half" in page.text) == (trained == "itm")


@pytest.mark.parametrize("missing", ["config.json", "run.json", "metrics.jsonl", "export"])
def test_an_unfinished_run_is_refused_by_name(run_dir, missing):
    (run_dir / missing).rename(run_dir / "aside")
    with pytest.raises(ValueError, match=re.escape(f"has no {missing}")):
        write_report(run_dir)
    assert not (run_dir / "report.html").exists()


def test_a_damaged_run_file_is_named(run_dir):
    (run_dir / "run.json").write_text("{")
    with pytest.raises(ValueError, match=r"run\.json is not JSON"):
        read_run(run_dir)


def test_curves_come_from_the_rows_that_have_the_number(run_dir):
    facts = read_run(run_dir)
    assert [row["step"] for row in facts.steps] == [10, 20, 30] and len(facts.evaluations) == 1
    series = curve(facts.metrics, "MLM", "loss", "mlm")
    assert list(zip(series.xs, series.ys)) == [(10, 4.0), (20, 3.0), (30, 2.0), (30, None)]


def test_chart_draws_points_where_they_belong():
    chart = line_chart([Series("loss", [0, 50, 100], [4.0, 2.0, 0.0], 1)], y_range=(0.0, 4.0))
    svg = chart[: chart.index("</svg>") + 6]
    root = ET.fromstring(svg)  # well-formed
    raw = next(node for node in root.iter("path") if "raw" in node.get("class"))
    points = [tuple(map(float, pair.split(","))) for pair in raw.get("d")[1:].split(" L")]
    assert points == [(52.0, 12.0), (300.0, 121.0), (548.0, 230.0)]


def test_chart_leaves_out_what_is_not_finite_and_says_when_nothing_is_left():
    chart = line_chart([Series("loss", [1, 2, 3, 4], [1.0, None, math.nan, 2.0], 1)])
    assert chart.count(" L") == 2 and "nan" not in chart  # one joint in the raw line, one in its mean
    assert "nothing recorded" in line_chart([Series("loss", [1], [None], 1)])


def test_long_curves_are_averaged_not_cut():
    xs = list(range(10_000))
    points = binned(xs, [float(x) for x in xs])
    assert len(points) == 300 and points[0] == (16.0, 16.0) and points[-1][0] > 9_980
    assert sum(y for _, y in points) / 300 == pytest.approx(4999.5, rel=0.01)


def test_running_mean_is_centred_so_a_straight_line_stays_one():
    line = [(x, 2.0 * x) for x in range(20)]
    assert smoothed(line, 4) == line
    assert smoothed([(0, 0.0), (1, 3.0), (2, 0.0)], 1)[1] == (1, 1.0)


@pytest.mark.parametrize(
    ("low", "high", "expected"),
    [
        (0, 1, [0, 0.2, 0.4, 0.6, 0.8, 1.0]),
        (0, 2000, [0, 500, 1000, 1500, 2000]),
        (0.13, 0.4, [0.2, 0.3, 0.4]),
        (3.2, 3.9, [3.2, 3.4, 3.6, 3.8]),
    ],
)
def test_ticks_are_round_numbers(low, high, expected):
    assert ticks(low, high) == pytest.approx(expected)


def test_short_numbers():
    assert [short(x) for x in (0.25, 1500, 3_010_000, 0)] == ["0.25", "1.5k", "3.01M", "0"]


def test_the_glow_is_where_the_word_looks():
    picture = Image.new("RGB", (256, 256), (40, 40, 200))
    attention = np.full((4, 4), 0.01)
    attention[0, 3] = 0.85
    lit = np.asarray(glow(picture, attention)).astype(int)
    assert np.abs(lit[200:, :60] - (30, 30, 150)).max() <= 1  # only dimmed
    assert (lit[10:30, 226:246] > (180, 120, 0)).all() and (lit[10:30, 226:246, 2] < 80).all()  # amber
    even = np.asarray(glow(picture, np.full((4, 4), 1 / 16))).astype(int)
    assert np.abs(even - (30, 30, 150)).max() <= 1
