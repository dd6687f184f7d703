"""Predictions are what the plain forward of the model says, alone and in batches; every wrong call explains itself."""

import warnings
from dataclasses import replace

import numpy as np
import pytest
import torch
from predict_cases import ANSWERS, CAPTIONS, SIDE, config, draw, lively, make_export, make_writer, write_pictures

import meter_fast
from meter_fast.data.text import TextPipeline
from meter_fast.data.tokenizer import train_tokenizer
from meter_fast.interop import to_meter
from meter_fast.models.config import FusionConfig, ModelConfig, TextConfig
from meter_fast.models.meter import Meter
from meter_fast.predict.encoded import caption as write_captions
from meter_fast.predict.opening import _transform
from meter_fast.predict.texts import encode_masked, filled

QUESTIONS = ["is it red ?", "is the large circle left of two small blue squares ?", "two ?"]


@pytest.fixture(scope="module")
def export(tmp_path_factory):
    return make_export(tmp_path_factory.mktemp("predict") / "export")


@pytest.fixture(scope="module")
def predictor(export):
    return meter_fast.load(export, batch=4)


@pytest.fixture(scope="module")
def writer(tmp_path_factory):
    return meter_fast.load(make_writer(tmp_path_factory.mktemp("writer") / "export"))


@pytest.fixture(scope="module")
def paths(tmp_path_factory):
    return write_pictures(tmp_path_factory.mktemp("pictures"), 5)


@torch.inference_mode()
def plain(predictor, images, text: str, head: str, text_to: int = 50) -> torch.Tensor:
    """One request through the whole model, the text padded: logits of a head, or with "mlm_head" those of all
    tokens."""
    ids = predictor.tokenizer(text, padding="max_length", max_length=text_to, return_tensors="pt")["input_ids"]
    mask = ids != predictor.tokenizer.pad_token_id
    encoded = predictor.model.encode_text(ids, mask)
    fused = [
        predictor.model.fuse(encoded, predictor.model.encode_image(predictor.read(image).pixels[None]), mask, kind)
        for kind, image in enumerate(images, 1)
    ]
    if head == "mlm_head":
        return predictor.model.mlm_head(fused[0].text)[0]
    return getattr(predictor.model, head)(torch.cat([one.cls for one in fused], -1))[0]


def close(found, expected) -> None:
    assert found == pytest.approx(expected, rel=1e-4, abs=1e-6)


def test_answers(predictor, paths):
    for path, question in zip(paths, QUESTIONS):
        scores = plain(predictor, [path], question, "vqa_head").sigmoid()
        best = scores.argsort(descending=True)
        found = predictor.answer(path, question, k=6)
        assert [answer for answer, _ in found] == [ANSWERS[label] for label in best]
        close([score for _, score in found], scores[best].tolist())
        assert predictor.answer(path, question) == found[:5]
        assert predictor.answer(path, question, k=1) == found[:1]


def test_matches_entailment_and_comparison(predictor, paths):
    for first, second, text in zip(paths, paths[1:], QUESTIONS):
        close(predictor.match(first, text), plain(predictor, [first], text, "itm_head").softmax(-1)[1].item())
        said = plain(predictor, [first], text, "snli_head").softmax(-1).tolist()
        found = predictor.entails(first, text)
        assert list(found) == ["contradiction", "neutral", "entailment"]
        close(list(found.values()), said)
        true = plain(predictor, [first, second], text, "nlvr2_head").softmax(-1)[1].item()
        close(predictor.compare(first, second, text), true)
        assert abs(predictor.compare(second, first, text) - true) > 1e-4  # the order of the pictures matters


def test_fills_of_every_mask(predictor, paths):
    text = "a <mask> circle on <mask>"
    found = predictor.fill(paths[0], text, k=3)
    logits = plain(predictor, [paths[0]], text.replace("<mask>", "[MASK]"), "mlm_head")
    for place, fills in zip((2, 5), found, strict=True):
        best = logits[place].softmax(-1).topk(3)
        assert [word for word, _ in fills] == predictor.tokenizer.convert_ids_to_tokens(best.indices)
        close([p for _, p in fills], best.values.tolist())
    assert predictor.fill(paths[0], "a [MASK] circle on[MASK]", k=3) == found


def test_ranking(predictor, paths):
    texts = [*QUESTIONS, QUESTIONS[0]]
    ranking = predictor.rank([*paths, paths[0]], texts)
    expected = [[plain(predictor, [path], text, "rank_head").item() for text in texts] for path in [*paths, paths[0]]]
    assert ranking.scores.dtype == np.float32 and ranking.scores.shape == (6, 4)
    assert np.allclose(ranking.scores, expected, atol=1e-5)
    assert ranking.texts.shape == (6, 4) and ranking.images.shape == (4, 6)
    assert ranking.texts[0].tolist() == sorted(range(4), key=lambda t: -ranking.scores[0, t])
    assert ranking.images[2].tolist() == sorted(range(6), key=lambda n: -ranking.scores[n, 2])
    assert predictor.rank(paths[0], QUESTIONS[0]).scores.shape == (1, 1)


def test_ranking_without_its_head_is_by_the_odds_of_a_match(tmp_path, paths):
    predictor = meter_fast.load(make_export(tmp_path / "export", rank_head=False))
    scores = predictor.rank(paths, QUESTIONS).scores
    chances = [predictor.match(path, QUESTIONS) for path in paths]
    assert np.allclose(1 / (1 + np.exp(-scores)), chances, atol=1e-6)


def test_captions(writer, paths):
    image = torch.cat([writer.model.encode_image(writer.read(path).pixels[None]) for path in paths])
    expected = write_captions(writer.model, writer.tokenizer, image)
    assert len(set(expected)) > 1 and all(expected)
    assert writer.caption(paths) == expected and writer.caption(paths[1]) == expected[1]
    assert writer.caption([paths[2], paths[0], paths[2]]) == [expected[2], expected[0], expected[2]]
    assert writer.caption(paths[:1], beams=2) == write_captions(writer.model, writer.tokenizer, image[:1], 2)


@pytest.mark.parametrize("batch", [1, 2, 32])
def test_batches_change_nothing_and_keep_the_order(export, predictor, paths, batch):
    """Pictures come again and out of order, texts have different lengths."""
    batched = meter_fast.load(export, batch=batch)
    images = [paths[n] for n in (3, 0, 3, 1, 4, 0, 3, 2)]
    texts = [QUESTIONS[n % 3] for n in range(8)]
    masked = [text.replace("is", "<mask>").replace("two", "<mask>") for text in texts]
    for name, words in (("match", texts), ("answer", texts), ("entails", texts), ("fill", masked)):
        call = getattr(batched, name)
        found, alone = call(images, words), [getattr(predictor, name)(*pair) for pair in zip(images, words)]
        assert len(found) == 8
        for one, expected in zip(found, alone):
            close(numbers(one), numbers(expected))
            assert words_of(one) == words_of(expected)
    found = batched.compare(images, images[::-1], texts)
    close(found, [predictor.compare(*row) for row in zip(images, images[::-1], texts)])


def numbers(said) -> list[float]:
    if isinstance(said, float):
        return [said]
    parts = said.values() if isinstance(said, dict) else said
    return [n for part in parts if not isinstance(part, str) for n in numbers(part)]


def words_of(said) -> list[str]:
    """The words in what a call gives, in order."""
    if isinstance(said, str):
        return [said]
    return [word for part in said for word in words_of(part)] if isinstance(said, (list, tuple)) else []


def test_each_picture_is_encoded_once(predictor, paths, monkeypatch):
    seen = []
    encode = predictor.model.encode_image
    monkeypatch.setattr(predictor.model, "encode_image", lambda images: seen.append(len(images)) or encode(images))
    predictor.answer(paths[0], QUESTIONS * 5)
    assert sum(seen) == 1
    seen.clear()
    predictor.match(paths * 3, [QUESTIONS[n % 3] for n in range(15)])  # more pictures than a batch
    assert sum(seen) == 5
    seen.clear()
    predictor.compare(paths, paths[::-1], QUESTIONS[0])
    assert sum(seen) == 5
    seen.clear()
    predictor.rank([paths[0], paths[1], paths[0]], QUESTIONS)
    assert sum(seen) == 2


def test_texts_are_padded_to_the_longest_of_a_batch(predictor, paths, monkeypatch):
    shapes = []
    encode = predictor.model.encode_text
    monkeypatch.setattr(predictor.model, "encode_text", lambda ids, mask: shapes.append(ids.shape) or encode(ids, mask))
    predictor.match(paths[0], [QUESTIONS[1]] * 4 + [QUESTIONS[2]] * 4)
    assert [tuple(shape) for shape in shapes] == [(4, 4), (4, 13)]


def test_lists_and_single_ones(predictor, paths):
    picture = predictor.read(paths[0])
    assert predictor.match(picture, QUESTIONS[0]) == predictor.match(draw(0), QUESTIONS[0])
    assert predictor.match([picture], [QUESTIONS[0]]) == [predictor.match(picture, QUESTIONS[0])]
    close(predictor.match(paths[:2], QUESTIONS[0]), [predictor.match(path, QUESTIONS[0]) for path in paths[:2]])
    assert predictor.match([], []) == predictor.answer([], "a") == predictor.fill([], []) == []
    with pytest.raises(ValueError, match="2 of image, 3 of text"):
        predictor.match(paths[:2], QUESTIONS)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda p, i: p.answer(i, ""), "a question is '': empty text; give one in words"),
        (lambda p, i: p.answer(i, " \n"), "empty text"),
        (lambda p, i: p.answer(i, None), "a question is a string, this is NoneType"),
        (lambda p, i: p.answer(i, "is it ?", k=0), "k=0: give 1 to 6"),
        (lambda p, i: p.answer(i, "is it ?", k=7), "k=7: give 1 to 6"),
        (lambda p, i: p.answer(i, "is it ?", k=2.5), "k=2.5: give 1 to 6"),
        (lambda p, i: p.answer(i, "is it ?", k="3"), "k='3': give 1 to 6"),
        (lambda p, i: p.fill(i, "a <mask>", k=None), "k=None: give 1 to"),
        (lambda p, i: p.match([i, "nowhere.png"], "a"), "picture 1 of the list: nowhere.png does not exist"),
        (lambda p, i: p.match(i.parent, "a"), "is a folder"),
        (lambda p, i: p.match(b"", "a"), "0 bytes is no picture that can be read .zero bytes"),
        (lambda p, i: p.match(3, "a"), "int is no image: give a path"),
        (lambda p, i: p.match(draw(0) / 255, "a"), "array float64 .40, 48, 3. is no picture: give uint8"),
        (lambda p, i: p.match(draw(0)[None], "a"), "give a list of arrays"),
        (lambda p, i: p.match(draw(0).transpose(2, 0, 1), "a"), "channels come last"),
        (lambda p, i: p.fill(i, "a red circle"), "nothing to fill in: write <mask>"),
        (lambda p, i: p.fill(i, "a red circle " * 8 + "<mask>"), "a mask beyond the 16 tokens"),
        (lambda p, i: p.rank([], ["a"]), "0 pictures and 1 texts"),
        (lambda p, i: p.caption(i), "writes no captions .it has no decoder, only mlm_head.*fusion=encoder_decoder"),
    ],
)
def test_wrong_calls_explain_themselves(predictor, paths, call, message):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        with pytest.raises(ValueError, match=message):
            call(predictor, paths[0])


@pytest.mark.parametrize(("options", "message"), [({"beams": 0}, "beams=0: give"), ({"beams": 1.5}, "beams=1.5: give"),
                                                  ({"max_length": 0}, "max_length=0: give")])  # fmt: skip
def test_captions_of_wrong_numbers(writer, paths, options, message):
    with pytest.raises(ValueError, match=message):
        writer.caption(paths[0], **options)


@pytest.mark.parametrize("task", ["answer", "match", "rank", "fill", "entails", "compare"])
def test_a_model_without_the_head_says_so(tmp_path, paths, task):
    predictor = meter_fast.load(
        make_export(tmp_path / "export", mlm_head=False, itm_head=False, vqa_answers=0, nlvr2_head=False,
                    snli_head=False, rank_head=False)
    )  # fmt: skip
    arguments = [paths[0], "a"] if task != "compare" else [paths[0], paths[1], "a"]
    with pytest.raises(ValueError, match=r"export .* \(it has no \w+_head, only encoders\): "):
        getattr(predictor, task)(*arguments)


def test_a_long_text_is_cut_with_a_warning(predictor, paths):
    words = ["red", "blue", "two", "small"] * 5
    with pytest.warns(UserWarning, match="a question is longer than 16 tokens"):
        found = predictor.answer(paths[0], " ".join(words))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        exact = predictor.answer(paths[0], " ".join(words[:14]))  # 16 with the first and the last token
    assert found == exact
    with pytest.warns(UserWarning, match="longer than 16 tokens"):
        assert predictor.fill(paths[0], " ".join(["<mask>", *words])) == predictor.fill(
            paths[0], " ".join(["<mask>", *words[:13]])
        )


def test_special_tokens_in_a_question_are_text(predictor):
    ids = predictor._text.encode(["[SEP] red"])[0]
    assert ids.count(predictor.tokenizer.sep_token_id) == 1


def test_white_space_before_a_mask_belongs_to_the_word(tmp_path):
    """As RoBERTa's tokens do, whatever the tokenizer says of its mask."""
    tokenizer = train_tokenizer(CAPTIONS, tmp_path, "roberta", 300)
    inner = [tokenizer(text)["input_ids"][1:-1] for text in ("a", " circle on")]
    ids, places = encode_masked(TextPipeline(tokenizer, 32), "a <mask> circle on <mask>")
    mask = [tokenizer.mask_token_id]
    assert ids == [tokenizer.cls_token_id, *inner[0], *mask, *inner[1], *mask, tokenizer.sep_token_id]
    assert [ids[place] for place in places] == mask * 2 and len(places) == 2
    assert filled(tokenizer, "a <mask> circle on <mask>", ["red", "white"]) == "a red circle on white"


# --------------------------------------------------------------------------------------------------------- opening


def test_load_takes_a_run_directory_and_its_settings(tmp_path, paths):
    export = make_export(tmp_path / "run" / "export")
    opened = [meter_fast.load(path) for path in (export, tmp_path / "run", str(export))]
    assert len({one.match(paths[0], "a red circle") for one in opened}) == 1
    assert opened[0].max_length == 16 and opened[0].transform.name == "clip" and opened[0].transform.size == SIDE
    assert meter_fast.load(export, transform="vit").transform.name == "vit"


def test_bf16_stays_near(export, predictor, paths):
    half = meter_fast.load(export, dtype="bf16")
    assert next(half.model.parameters()).dtype == torch.bfloat16
    assert half.match(paths, QUESTIONS[0]) == pytest.approx(predictor.match(paths, QUESTIONS[0]), abs=0.1)


def test_a_published_checkpoint_needs_a_tokenizer_and_answers(tmp_path, export, predictor, paths):
    """Sizes whose heads the file tells: width 64 and 768."""
    text = TextConfig("bert", 768, 1, 12, ffn=64, vocab_size=60, max_positions=64, token_types=2, pad_id=0, eps=1e-12)
    sizes = ModelConfig(config(60).vision, text, FusionConfig(width=768, layers=1), vqa_answers=6)
    model = lively(Meter(sizes))
    path = tmp_path / "small.ckpt"
    torch.save({"state_dict": to_meter(model)}, path)
    with pytest.raises(ValueError, match=r"small.ckpt has no tokenizer with it: give tokenizer=.*bert-base-uncased"):
        meter_fast.load(path)
    opened = meter_fast.load(path, tokenizer=export.parent / "tokenizer")
    assert opened.transform.name == "clip"
    with pytest.raises(ValueError, match="does not say what its 6 answers are called: give answers="):
        opened.answer(paths[0], "is it red ?")
    named = meter_fast.load(path, tokenizer=export.parent / "tokenizer", answers=ANSWERS)
    scores = plain(named, [paths[0]], "is it red ?", "vqa_head").sigmoid()
    assert named.answer(paths[0], "is it red ?", k=1)[0][0] == ANSWERS[scores.argmax()]
    (tmp_path / "answers.json").write_text('["a", "b", "c", "d", "e", null]')
    listed = meter_fast.load(path, tokenizer=export.parent / "tokenizer", answers=tmp_path / "answers.json")
    assert {answer for answer, _ in listed.answer(paths[0], "is it red ?", k=6)} == {*"abcde", "label 5"}


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"device": "gpu"}, "device='gpu' is no device: give cpu, cuda"),
        ({"dtype": "fp16"}, "dtype='fp16': give fp32 or bf16"),
        ({"transform": "none"}, "unknown image transform 'none': choose 'clip'"),
        ({"answers": ["yes"]}, "answers=the list: 1 answers, the model has 6"),
        ({"answers": "nowhere.json"}, "cannot read nowhere.json"),
        ({"tokenizer": "./nowhere"}, "'./nowhere' does not exist"),
        ({"batch": 0}, "batch=0: give a whole number, 1 or more"),
        ({"batch": "4"}, "batch='4': give a whole number, 1 or more"),
        ({"device": "meta"}, "device='meta' is not one that models run on here: give cpu, cuda"),
        ({"answers": [1, 2, 3, 4, 5, 6]}, "answers= is a list of texts, label 0 first"),
        ({"answers": 6}, "answers= is a list of texts, label 0 first"),
    ],
)
def test_load_refuses(export, options, message):
    with pytest.raises(ValueError, match=message):
        meter_fast.load(export, **options)


def test_cuda_where_there_is_none(export):
    if torch.cuda.is_available():
        pytest.skip("a CUDA device is here")
    with pytest.raises(ValueError, match="no CUDA device here: give device=cpu"):
        meter_fast.load(export, device="cuda")


def test_a_vision_transformer_of_unknown_pixel_values_is_asked_for(tmp_path):
    vision = config(60).vision
    for kind, name in (("clip_vit", "clip"), ("swin", "imagenet"), ("beit", "vit")):
        layers = {"swin": {"layers": 7, "heads": 8, "width": 64}}.get(kind, {})
        assert _transform(None, replace(config(60), vision=replace(vision, name=kind, **layers))).name == name
    with pytest.raises(ValueError, match=r"vision\.name=vit were trained on different pixel values: give transform="):
        _transform(None, replace(config(60), vision=replace(vision, name="vit")))
