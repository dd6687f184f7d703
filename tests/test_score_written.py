"""Scores of what a decoder writes, on a model whose answers are known and on one that a few steps have taught."""

import numpy as np
import pytest
import torch
from scene_run import small
from torch import nn

from meter_fast.config import override, to_dict
from meter_fast.data.scenes import WORD_KINDS
from meter_fast.data.spans import CAPTION, SPANS, Denoiser, add_sentinels, open_denoiser
from meter_fast.data.tokenizer import load_tokenizer
from meter_fast.models.config import DecoderConfig
from meter_fast.models.fusion import Fused
from meter_fast.models.meter import Meter, Need
from meter_fast.predict import caption, match
from meter_fast.score import Block
from meter_fast.score_written import CaptionScore, SpanScore, scores_of

CAPTIONS = ["a red circle", "there are two blue stars", "a green cross", "a white square further left than the middle"]


@pytest.fixture(scope="module")
def tokenizer(scenes):
    opened = load_tokenizer(scenes / "tokenizer")
    add_sentinels(opened, 4)
    return opened


class Copying(nn.Module):
    """A stand-in that has memorised a caption for each picture, and writes it whatever it reads: so every score is
    known beforehand. A picture is [1,1,T], the caption's ids."""

    def __init__(self, tokenizer, captions: list[str]):
        super().__init__()
        self.tokenizer, self.size = tokenizer, len(tokenizer)
        rows = [tokenizer(text)["input_ids"][1:] for text in captions]
        length = max(map(len, rows))
        self.known = torch.tensor([row + [tokenizer.sep_token_id] * (length - len(row)) for row in rows]).float()
        self.anchor = nn.Parameter(torch.zeros(1))
        self.decoder = self.lm_head = self

    def encode_text(self, ids, mask):
        return ids

    def fuse(self, text, image, mask, need):
        assert need is Need.BOTH
        return Fused(text, image, None)

    def inputs(self, targets):
        return targets

    def __call__(self, *inputs):
        if len(inputs) == 1:  # the head
            return nn.functional.one_hot(inputs[0].long(), self.size)
        targets, _, image, *_ = inputs
        rows = image[:, 0].long()
        return torch.where((targets[..., None] == rows[:, None]).any(-1), targets, 0)


def block_of(features: torch.Tensor, captions: list[str]) -> Block:
    return Block(features, features, captions, np.arange(len(captions)))


def test_spans_of_a_model_that_knows_its_pictures(tokenizer) -> None:
    """It writes a token if the picture's caption has it: always with its own picture, and with the next one where both
    captions have the word."""
    texts = ["red circle", "blue star", "blue cross", "white cross"]
    model = Copying(tokenizer, texts)
    score = SpanScore(Denoiser(tokenizer, (SPANS,), 0.5, 1.0))
    score.add(model, tokenizer, block_of(model.known[:, None], texts))
    found = score.result()
    assert found["accuracy"] == 1.0 and found["count"] == 4  # one of two words each
    both = [{"blue"}, {"cross"}]
    assert found["shuffled"] in {0.0, 0.25, 0.5} and len(both) / 4 >= found["shuffled"]
    assert found["chance"] == max(score.tokens.values()) / 4


def test_captions_are_judged_by_all_references(monkeypatch, tokenizer) -> None:
    score = CaptionScore(WORD_KINDS["colour"], WORD_KINDS["shape"])
    assert score.named("two large Red crosses, a blue small star and a green circle") == {
        ("red", "cross"),
        ("green", "circle"),
    }
    written = {
        0: "a red circle",  # right
        1: "there are three blue stars",  # right: counts are not asked
        2: "a green cross beside a red circle",  # one of two is wrong
        3: "a square",  # names no thing
    }
    monkeypatch.setattr(
        "meter_fast.score_written.caption",
        lambda _model, _tokenizer, features, max_length: [written[int(row)] for row in features[:, 0, 0]],
    )
    features = torch.arange(4.0)[:, None, None]
    picture = np.array([0, 1, 2, 3, 0])
    block = Block(features, features, [*CAPTIONS, "a blue star"], picture)
    score.add(None, tokenizer, block)
    assert score.result() == {"accuracy": 0.5, "shuffled": 0.0, "chance": 0.5, "count": 4}
    score.add(None, tokenizer, Block(features[[1, 0]], features[[1, 0]], CAPTIONS[1::-1], np.array([0, 1])))
    assert score.result() == {"accuracy": 4 / 6, "shuffled": 0.0, "chance": 3 / 6, "count": 6}


def test_which_scores_there_are(tokenizer) -> None:
    assert scores_of(None, WORD_KINDS) == {}
    both = Denoiser(tokenizer, (SPANS, CAPTION))
    assert set(scores_of(both, WORD_KINDS)) == {SPANS, CAPTION}
    assert set(scores_of(both, {"count": ("two",)})) == {SPANS}
    assert set(scores_of(open_denoiser(tokenizer, ("caption", "itm"), 0.15, 3.0), WORD_KINDS)) == {CAPTION}


@pytest.fixture(scope="module")
def writer(tokenizer) -> Meter:
    from dataclasses import replace

    torch.manual_seed(0)
    config = replace(small(len(tokenizer)), decoder=DecoderConfig(1, 16), mlm_head=False)
    model = Meter(config).eval()
    for parameter in model.parameters():
        if parameter.dim() > 1:
            parameter.data.mul_(3)
    return model


def test_captions_and_matches_of_a_model(writer, tokenizer) -> None:
    """Text comes out without marks of any kind, each picture by itself; the match head reads the decoder."""
    images = torch.randn(3, 3, 64, 64, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        encoded = writer.encode_image(images)
    for beams in (1, 3):
        texts = caption(writer, tokenizer, encoded, beams, max_length=8)
        assert len(texts) == 3 and not any("extra_id" in text or "[" in text for text in texts)
        assert texts[1:2] == caption(writer, tokenizer, encoded[1:2], beams, max_length=8)
    assert match(writer, tokenizer, encoded, CAPTIONS[:3]).shape == (3,)
    writer_without = Meter(small(len(tokenizer)))
    with pytest.raises(ValueError, match=r"no decoder.*fusion=encoder_decoder"):
        caption(writer_without, tokenizer, encoded)


def test_report_of_a_run(writer, tokenizer, tmp_path, scenes, capsys) -> None:
    """From the run directory to the printed table and the page."""
    import dataclasses
    import json

    from scene_run import make_run

    from meter_fast import recipes
    from meter_fast.cli import main

    folder = make_run(tmp_path / "run", scenes, writer)
    tokenizer.save_pretrained(folder / "export" / "tokenizer")
    config = override(recipes.resolve(["pretrain", "size=tiny", "fusion=encoder_decoder"]), [f"data.root={scenes}"])
    config = dataclasses.replace(config, model=writer.config)
    (folder / "config.json").write_text(json.dumps(to_dict(config)))
    assert main(["report", str(folder), "--pictures", "12"]) == 0
    shown = capsys.readouterr().out
    scores = json.loads((folder / "report.json").read_text())["scores"]
    assert {"itm", SPANS, CAPTION} <= set(scores) and "mlm" not in scores
    assert scores[CAPTION]["count"] == 12 and 0 < scores[CAPTION]["chance"] < 1 and scores[SPANS]["count"] > 12
    assert CAPTION not in scores["novel"] and SPANS in scores["novel"]
    assert "span_denoising" in shown and "caption" in shown
    assert "caption names a right thing" in (folder / "report.html").read_text()
    assert main(["evaluate", str(folder), "pretrain", "data.val_split=test", "--pairs", "16"]) == 0
    assert "caption  loss" in capsys.readouterr().out
