"""Scores over held-out pairs: objectives on one and two ranks, hidden words, matching, and what the report asks."""

import copy
import io
import multiprocessing as mp
from collections import Counter
from datetime import timedelta

import pyarrow as pa
import pytest
import torch
import torch.distributed as dist
from PIL import Image
from scene_run import small
from torch import nn

import meter_fast
from meter_fast.config import DataConfig
from meter_fast.data.images import image_transform, open_backend
from meter_fast.data.loader import EvaluationLoader
from meter_fast.data.scenes import WORD_KINDS
from meter_fast.data.sources import open_sources
from meter_fast.data.text import TextPipeline
from meter_fast.data.tokenizer import load_tokenizer, train_tokenizer
from meter_fast.evaluate import evaluate_pretraining, evaluate_split, held_out_names
from meter_fast.models.meter import Fused, Need
from meter_fast.objectives.joint import JointLoss
from meter_fast.predict import fill, hide_word, match, word_attention
from meter_fast.score import find_words, glimpse, held_out_blocks, score_held_out

COLOURS = {"red": (220, 20, 20), "green": (20, 200, 20), "blue": (20, 20, 220)}


@pytest.fixture(scope="session")
def backend():
    return open_backend("torchvision", image_transform("clip", 64), "cpu", torch.float32)


# ------------------------------------------------------------------------------------------ objectives over a split


def loader(root, rank: int, world: int, limit: int | None, batch_size: int) -> EvaluationLoader:
    text = TextPipeline(load_tokenizer(root / "tokenizer"), 40, "whole_word")
    images = open_backend("torchvision", image_transform("clip", 64), "cpu", torch.float32)
    sources = open_sources(["coco"], root, "test")
    return EvaluationLoader(sources, text, images, batch_size=batch_size, rank=rank, world=world, limit=limit)


def test_evaluation_means_are_over_tokens_and_pairs_not_over_batches(scenes, scene_model):
    objective = JointLoss(copy.deepcopy(scene_model)).train()
    whole = evaluate_pretraining(objective, loader(scenes, 0, 1, 37, 64), "cpu")
    pieces = evaluate_pretraining(objective, loader(scenes, 0, 1, 37, 4), "cpu")
    assert objective.training
    (batch,) = loader(scenes, 0, 1, 37, 64)
    assert whole["itm"]["count"] == 37 and whole["mlm"]["count"] == len(batch.masked_labels)
    for name in ("mlm", "itm"):
        assert pieces[name] == pytest.approx(whole[name], rel=1e-5)


def _score_as(rank: int, root, export, rendezvous: str) -> dict:
    limit = timedelta(seconds=120)
    dist.init_process_group("gloo", init_method=f"file://{rendezvous}", rank=rank, world_size=2, timeout=limit)
    try:
        return evaluate_pretraining(JointLoss(meter_fast.load_model(export)), loader(root, rank, 2, 37, 8), "cpu")
    finally:
        dist.destroy_process_group()


def _be_rank_1(root, export, rendezvous: str, answer) -> None:
    torch.set_num_threads(1)
    answer.put(_score_as(1, root, export, rendezvous))


def test_two_ranks_score_what_one_scores(tmp_path, scenes, run_dir, scene_model):
    one = evaluate_pretraining(JointLoss(scene_model).eval(), loader(scenes, 0, 1, 37, 8), "cpu")
    context = mp.get_context("spawn")
    answer = context.Queue()
    where = (scenes, run_dir / "export", str(tmp_path / "meet"))
    other = context.Process(target=_be_rank_1, args=(*where, answer), daemon=True)
    other.start()
    scores = _score_as(0, *where)
    assert answer.get(timeout=60) == scores
    other.join(60)
    for name in ("mlm", "itm"):
        assert scores[name]["count"] == one[name]["count"]
        assert scores[name] == pytest.approx(one[name], rel=1e-5)


def test_a_run_directory_is_scored_on_the_split_asked_for(run_dir, scenes):
    scores = evaluate_split(
        run_dir, "pretrain", ["data.val_sources=coco", "data.val_split=test"], pairs=30, device="cpu"
    )
    expected = len(open_sources(["coco"], scenes, "test"))
    assert expected > 30 and scores["pairs"] == scores["itm"]["count"] == 30 and scores["split"] == "test"
    assert scores["mlm"]["loss"] > 0
    with pytest.raises(ValueError, match=r"data\.root"):
        evaluate_split(run_dir, "pretrain", ["data.root=/no/such/folder"], device="cpu")


@pytest.mark.parametrize(
    ("sources", "val_sources", "split", "expected"),
    [
        (("coco", "vg"), (), "test", (("coco",), "test")),
        (("arrow:mine",), ("arrow:kept",), "test", (("arrow:kept",), "arrow:kept")),
        (("coco",), ("f30k",), "val", (("f30k",), "val")),
        (("arrow:mine",), (), "test", None),
        (("vg", "gcc"), (), "test", None),
        (("coco",), (), "train", None),
    ],
)
def test_only_data_kept_from_training_counts_as_held_out(sources, val_sources, split, expected):
    data = DataConfig(sources=sources, val_sources=val_sources)
    if expected is None:
        with pytest.raises(ValueError, match=r"data\.val_sources="):
            held_out_names(data, split)
    else:
        assert held_out_names(data, split) == expected


def test_a_tokenizer_of_another_model_is_refused(run_dir, tmp_path):
    captions = [f"word{n} other{n}" for n in range(2000)]
    train_tokenizer(captions, tmp_path / "other", vocab_size=4000)
    (run_dir / "export" / "tokenizer").rename(tmp_path / "aside")
    with pytest.raises(ValueError, match=r"data\.tokenizer=FOLDER"):
        evaluate_split(run_dir, "pretrain", [f"data.tokenizer={tmp_path / 'other'}"], device="cpu")


# ------------------------------------------------------------------------------------------------- words and matching


def png(colour: tuple[int, int, int]) -> bytes:
    out = io.BytesIO()
    Image.new("RGB", (64, 64), colour).save(out, "PNG")
    return out.getvalue()


def write_pictures(folder, pictures: list[tuple[bytes, list[str]]]) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    schema = pa.schema([("image", pa.binary()), ("caption", pa.list_(pa.string()))])
    table = pa.table([[image for image, _ in pictures], [texts for _, texts in pictures]], schema=schema)
    with pa.OSFile(str(folder / "plain.arrow"), "wb") as sink, pa.RecordBatchFileWriter(sink, schema) as writer:
        writer.write_table(table)


class ColourReader(nn.Module):
    """A stand-in for a trained Meter that knows colours exactly: every hidden word is the colour of the picture, and a
    caption matches if it names that colour. So every score is known beforehand."""

    def __init__(self, tokenizer):
        super().__init__()
        self.config = small(len(tokenizer))
        self.anchor = nn.Parameter(torch.zeros(1))
        self.register_buffer("tokens", torch.tensor([tokenizer.convert_tokens_to_ids(name) for name in COLOURS]))
        self.encoded = 0

    def encode_image(self, images):
        self.encoded += len(images)
        return images.mean((2, 3))[:, None]  # [B,1,3]: the strongest channel is the colour

    def encode_text(self, ids, mask):
        return ids[..., None].float()

    def fuse(self, text, image, mask, need=Need.ALL):
        colour = self.tokens[image[:, 0].argmax(-1)]
        if need is Need.TEXT:
            return Fused(colour[:, None, None].expand(-1, text.shape[1], 1), None, None)
        return Fused(None, None, (text[..., 0] == colour[:, None]).any(1)[:, None])

    def mlm_head(self, rows):
        return nn.functional.one_hot(rows[:, 0], self.config.text.vocab_size)

    def itm_head(self, cls):
        return torch.cat([~cls, cls], 1).float()


@pytest.fixture
def plain(tmp_path):
    """Six pictures in the order red, red, red, green, blue, blue with one or two captions each, and a tokenizer."""
    names = ["red", "red", "red", "green", "blue", "blue"]
    pictures = [
        (png(COLOURS[name]), [f"a {name} square", f"This is {name}"][: 1 + n % 2]) for n, name in enumerate(names)
    ]
    write_pictures(tmp_path / "data", pictures)
    captions = [text for _, texts in pictures for text in texts]
    return tmp_path / "data", train_tokenizer(captions, tmp_path / "tokenizer", vocab_size=200)


KINDS = {"colour": tuple(COLOURS), "shape": ("square",)}


@pytest.mark.parametrize("per_block", [256, 2, 3, 4])
def test_scores_of_a_model_that_knows_colours(plain, backend, per_block):
    root, tokenizer = plain
    model = ColourReader(tokenizer)
    sources = open_sources(["arrow:plain"], root)
    scores = score_held_out(model, tokenizer, sources, backend, KINDS, pictures_per_block=per_block)
    assert (scores["pictures"], scores["captions"]) == (6, 9)
    assert model.encoded == 6  # each picture once, though it is asked about up to six times
    colour, shape = scores["mlm"]["colour"], scores["mlm"]["shape"]
    assert colour["accuracy"] == 1.0 and colour["count"] == 9
    assert colour["chance"] == pytest.approx(4 / 9) and colour["uniform"] == pytest.approx(1 / 3)
    assert shape["accuracy"] == 0.0 and shape["chance"] == 1.0 and shape["count"] == 6
    assert scores["itm"]["on_true"] == 1.0 and scores["itm"]["count"] == 18
    if per_block == 256:  # the next picture has the same colour for the 1st, 2nd and 5th, which have 1 + 2 + 1 captions
        assert colour["shuffled"] == pytest.approx(4 / 9)
        assert scores["itm"]["on_false"] == pytest.approx(5 / 9)
        assert scores["itm"]["accuracy"] == pytest.approx(14 / 18)


@pytest.mark.parametrize("per_block", [2, 3, 4, 5, 256])
def test_blocks_hold_every_caption_once_and_never_its_own_picture_as_the_other(plain, backend, per_block):
    root, tokenizer = plain
    sources = open_sources(["arrow:plain"], root)
    blocks = list(held_out_blocks(ColourReader(tokenizer), sources, backend, Counter(), pictures_per_block=per_block))
    assert sorted(text for b in blocks for text in b.captions) == sorted(sources.read(i).text for i in range(9))
    for block in blocks:
        assert len(block.features) >= 2
        assert (block.other() != block.picture).all() and set(block.other()) <= set(range(len(block.features)))


def test_bad_pictures_and_captions_are_left_out_and_counted(plain, backend, tmp_path):
    _, tokenizer = plain
    good = [(png(COLOURS["red"]), ["a red square", "  "]), (png(COLOURS["blue"]), ["a blue square"])]
    bad = [(b"", ["nothing"]), (b"no picture at all", ["nothing"]), (png(COLOURS["red"])[:60], ["half"])]
    write_pictures(tmp_path / "bad", [good[0], *bad, good[1]])
    sources = open_sources(["arrow:plain"], tmp_path / "bad")
    scores = score_held_out(ColourReader(tokenizer), tokenizer, sources, backend, KINDS)
    assert scores["pictures"] == 2 and scores["captions"] == 2 and scores["mlm"]["colour"]["accuracy"] == 1.0
    assert scores["skipped"] == {"zero bytes": 1, "not an image": 1, "truncated": 1, "empty caption": 1}
    write_pictures(tmp_path / "one", [good[0], *bad])
    with pytest.raises(ValueError, match="two readable pictures"):
        score_held_out(
            ColourReader(tokenizer), tokenizer, open_sources(["arrow:plain"], tmp_path / "one"), backend, KINDS
        )


def test_only_some_pictures_or_captions_are_scored_on_request(plain, backend):
    root, tokenizer = plain
    sources = open_sources(["arrow:plain"], root)
    some = score_held_out(ColourReader(tokenizer), tokenizer, sources, backend, KINDS, max_pictures=3)
    assert some["pictures"] == 3
    named = score_held_out(
        ColourReader(tokenizer), tokenizer, sources, backend, KINDS, naming=["red square", "no such phrase"]
    )
    assert named["captions"] == 3 and named["mlm"]["colour"]["count"] == 3


def test_words_are_found_whole_in_any_case():
    found = find_words("Redder than RED: two left-most circles, one circle", WORD_KINDS)
    words = [("Redder than RED: two left-most circles, one circle"[a:b], kind) for kind, a, b in found]
    assert words == [("RED", "colour"), ("two", "count"), ("left", "relation"), ("circle", "shape")]


# ------------------------------------------------------------------------------------------- hidden words and the model


@pytest.mark.parametrize("kind", ["bert", "roberta"])
def test_all_tokens_of_the_word_and_no_others_are_hidden(tmp_path, kind):
    tokenizer = train_tokenizer(["a red thing", "pupil", "ruler"], tmp_path, kind=kind, vocab_size=300)
    caption = "a purple-red thing"  # nothing between the word and the next token
    masked = hide_word(tokenizer, caption, 2, 8)
    assert masked.word == "purple" and masked.shown() == "a [MASK]-red thing"
    assert len(masked.places) > 1  # the vocabulary does not know the word as a whole
    plain_ids = tokenizer(caption)["input_ids"]
    restored = list(masked.ids)
    for place, label in zip(masked.places, masked.labels):
        assert restored[place] == tokenizer.mask_token_id
        restored[place] = label
    assert restored == plain_ids
    assert tokenizer.decode(masked.labels).strip() == "purple"
    through = masked.places[-1] + 1  # with the closing token, one place too few for the whole word
    assert hide_word(tokenizer, caption, 2, 8, max_length=through) is None
    assert hide_word(tokenizer, caption, 2, 8, max_length=through + 1) is not None


def test_a_word_beyond_the_longest_text_is_not_asked(scene_tokenizer):
    caption = "a red circle further left than a blue square"
    assert hide_word(scene_tokenizer, caption, 2, 5, max_length=6) is not None
    start = caption.index("blue")
    assert hide_word(scene_tokenizer, caption, start, start + 4, max_length=6) is None


@pytest.fixture(scope="module")
def asked(scenes, scene_model, scene_tokenizer, backend):
    """Encoded pictures with a hidden word each, of captions of different lengths."""
    sources = open_sources(["coco"], scenes, "test")
    block = next(held_out_blocks(scene_model, sources, backend, Counter()))
    rows = [n for n, caption in enumerate(block.captions) if find_words(caption, WORD_KINDS)][:8]
    masked = []
    for n in rows:
        _, start, end = find_words(block.captions[n], WORD_KINDS)[0]
        masked.append(hide_word(scene_tokenizer, block.captions[n], start, end))
    assert len({len(m.ids) for m in masked}) > 1
    return block.features[torch.from_numpy(block.picture[rows])], masked


def test_answers_do_not_depend_on_what_else_is_in_the_batch(asked, scene_model, scene_tokenizer):
    image, masked = asked
    fills = fill(scene_model, scene_tokenizer, image, masked)
    matches = match(scene_model, scene_tokenizer, image, [m.caption for m in masked])
    maps = word_attention(scene_model, scene_tokenizer, image, masked)
    for n, one in enumerate(masked):
        (alone,) = fill(scene_model, scene_tokenizer, image[n : n + 1], [one])
        assert [word for word, _ in alone] == [word for word, _ in fills[n]]
        assert [p for _, p in alone] == pytest.approx([p for _, p in fills[n]], rel=1e-4)
        assert sorted((p for _, p in alone), reverse=True) == [p for _, p in alone] and len(alone) == 5
        torch.testing.assert_close(match(scene_model, scene_tokenizer, image[n : n + 1], [one.caption])[0], matches[n])
        torch.testing.assert_close(word_attention(scene_model, scene_tokenizer, image[n : n + 1], [one])[0], maps[n])
    assert len({word for row in fills for word, _ in row[:1]}) > 1 or matches.std() > 0


def test_attention_map_is_the_mean_over_heads_and_upper_layers_without_the_class_token(
    asked, scene_model, scene_tokenizer
):
    image, masked = asked
    one = masked[0]
    ids = torch.tensor([one.ids])
    text = scene_model.encode_text(ids, torch.ones_like(ids, dtype=torch.bool))
    layers = scene_model.fuse(text, image[:1], torch.ones_like(ids, dtype=torch.bool), attention=True).attention
    read = (layers[1] + layers[2])[0, :, one.places[0], 1:].sum(0)  # the upper two of three layers
    expected = (read / read.sum()).view(4, 4)
    torch.testing.assert_close(word_attention(scene_model, scene_tokenizer, image[:1], [one])[0], expected)


def test_a_bf16_model_scores_as_the_fp32_one_nearly(scenes, scene_model, scene_tokenizer, backend):
    sources = open_sources(["coco"], scenes, "test")
    full = score_held_out(scene_model, scene_tokenizer, sources, backend, WORD_KINDS, max_pictures=6)
    half_model = copy.deepcopy(scene_model).to(torch.bfloat16)
    half = score_held_out(half_model, scene_tokenizer, sources, backend, WORD_KINDS, max_pictures=6)
    assert half["captions"] == full["captions"] and set(half["mlm"]) == set(full["mlm"])
    assert half["itm"]["accuracy"] == pytest.approx(full["itm"]["accuracy"], abs=0.2)


def test_an_evaluation_without_batches_is_an_error(scene_model):
    with pytest.raises(ValueError, match="no batch"):
        evaluate_pretraining(JointLoss(scene_model).eval(), [], "cpu")


def test_the_model_is_left_in_the_mode_it_was_in(plain, backend):
    root, tokenizer = plain
    model = ColourReader(tokenizer).train()
    score_held_out(model, tokenizer, open_sources(["arrow:plain"], root), backend, KINDS)
    assert model.training


def test_a_glimpse_shows_a_caption_with_fills_of_some_of_its_words(scenes, scene_model, scene_tokenizer, backend):
    sources = open_sources(["coco"], scenes, "test")
    seen = [glimpse(scene_model, scene_tokenizer, sources, backend, number) for number in (3, 3 + len(sources))]
    for one in seen:
        assert one.image.shape == (64, 64, 3) and one.image.dtype == "uint8" and one.image.std() > 5
        assert one.caption.replace("[", "").replace("]", "") == sources.read(3).text
        assert [part.split("]")[0] for part in one.caption.split("[")[1:]] == one.words
        assert len(one.words) == len(one.fills) == 3 and all(len(best) == 5 for best in one.fills)


def test_a_glimpse_of_a_broken_picture_is_none(plain, backend, tmp_path):
    _, tokenizer = plain
    write_pictures(tmp_path / "bad", [(b"nothing", ["a red square"])])
    assert (
        glimpse(ColourReader(tokenizer), tokenizer, open_sources(["arrow:plain"], tmp_path / "bad"), backend, 0) is None
    )
