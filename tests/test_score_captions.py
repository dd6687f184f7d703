"""Scores of captions: words as the official tokenizer leaves them, formulas of the official package."""

import math
import shutil
import sys

import pytest

from meter_fast.score_captions import METRICS, caption_scores, tokens

# Caption -> words, as Stanford's PTBTokenizer with the official list of punctuation gives them.
WORDS = {
    "A man's dog won't sit.": "a man 's dog wo n't sit",
    "Two T-shirts, and a black-and-white cat!": "two t-shirts and a black-and-white cat",
    "He paid $5 (or 50%) for it...": "he paid $ 5 -lrb- or 50 % -rrb- for it",
    'A sign that reads "STOP" on 5th St.': "a sign that reads stop on 5th st.",
    "It's 3.5 km; cannot go & can't stay": "it 's 3.5 km can not go & ca n't stay",
    "and/or 10,000 people at 10:30 a.m. in the U.S.": "and/or 10,000 people at 10:30 a.m. in the u.s.",
    "a #1 fan's hat -- red": "a # 1 fan 's hat red",
    "the dogs' bowl at 12 o'clock": "the dogs bowl at 12 o'clock",
    "Mr. Smith is gonna go\tin a 'quoted'   word": "mr. smith is gon na go in a quoted word",
    "I'm you're they've he'd we'll shouldn't've": "i 'm you 're they 've he 'd we 'll should n't 've",
    "a [red] {blue} 1/2 thing, what?!": "a -lsb- red -rsb- -lcb- blue -rcb- 1/2 thing what ?!",
    "a “quoted” café’s menu – and so..good": "a quoted café 's menu and so good",
    "": "",
}


@pytest.mark.parametrize("caption", list(WORDS))
def test_words(caption: str) -> None:
    assert " ".join(tokens(caption)) == WORDS[caption]


def test_words_are_those_of_the_official_tokenizer() -> None:
    """Where Java is at hand."""
    official = pytest.importorskip("pycocoevalcap.tokenizer.ptbtokenizer", reason="pycocoevalcap is not installed")
    if shutil.which("java") is None:
        pytest.skip("no Java")
    texts = [text for text in WORDS if text]
    found = official.PTBTokenizer().tokenize({n: [{"caption": text}] for n, text in enumerate(texts)})
    assert {text: found[n][0] for n, text in enumerate(texts)} == {text: WORDS[text] for text in texts}


REFERENCES = {
    4: ["A red circle.", "a circle that is red", "one red round thing"],
    9: ["Two blue stars", "there are two blue stars"],
    7: ["A green cross beside a white square."],
}


def test_scores_without_the_package(monkeypatch) -> None:
    monkeypatch.setitem(sys.modules, "pycocoevalcap.bleu.bleu", None)
    assert caption_scores({4: "a red circle"}, REFERENCES) is None


@pytest.fixture
def package() -> None:
    pytest.importorskip("pycocoevalcap", reason="pycocoevalcap is not installed: pip install 'meter-fast[caption]'")


def test_what_people_wrote_scores_best(package) -> None:
    perfect = caption_scores({key: texts[0] for key, texts in REFERENCES.items()}, REFERENCES)
    assert tuple(perfect) == METRICS
    assert perfect["BLEU-1"] == pytest.approx(1, abs=1e-6) and perfect["ROUGE-L"] == pytest.approx(1)
    shifted = dict(zip(REFERENCES, [*list(REFERENCES.values())[1:], REFERENCES[4]]))
    wrong = caption_scores({key: texts[0] for key, texts in REFERENCES.items()}, shifted)
    assert all(wrong[name] < perfect[name] for name in METRICS)


def test_scores_known_by_hand(package) -> None:
    """BLEU-1 counts a word as often as one reference has it; case and punctuation do not count."""
    written = {4: "A RED red circle!", 9: "a dog", 7: "green"}
    found = caption_scores(written, REFERENCES)
    # Right are 3 of 4, 0 of 2 and 1 of 1 words; the references that are nearest in length have 4, 3 and 7.
    assert found["BLEU-1"] == pytest.approx(4 / 7 * math.exp(1 - (4 + 3 + 7) / 7), rel=1e-6)
    assert found["CIDEr"] > 0
