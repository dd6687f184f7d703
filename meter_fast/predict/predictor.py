"""What users call: questions, captions and statements about pictures, one or many, in any form.

Knows a model and what belongs to it. Knows no paths of models, no tables and no progress.
Every call takes one picture and one text, or lists of them; a single one beside a list goes with each of the list.
Shape letters: N pictures, T texts.
"""

import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch

from meter_fast.data.answers import Answers
from meter_fast.data.images import ImageTransform
from meter_fast.data.text import TextPipeline
from meter_fast.models.meter import Meter
from meter_fast.predict.encoded import MATCH, MAX_TEXT_LENGTH
from meter_fast.predict.engine import Request, captions, class_logits, encode_pictures, mask_logits
from meter_fast.predict.pictures import ImageLike, Picture, WrongImage, key_of, read_picture
from meter_fast.predict.texts import TextCut, check_text, encode_masked, encode_texts
from meter_fast.score_retrieval import encode_texts as encode_tokens
from meter_fast.score_retrieval import match_scores

LABELS = ("contradiction", "neutral", "entailment")  # of SNLI-VE, in the order of the head
TRUE = 1  # class of the NLVR2 head
PICTURES_PER_BLOCK = 32  # of a ranking

Scored = list[tuple[str, float]]

PARTS = {  # of a model that each task needs: without it, what the model does not do, and the remedy
    "answer": ("vqa_head", "answers no questions", "fine-tune it first: meter-fast train vqa run.init=MODEL"),
    "match": ("itm_head", "matches no texts", "train it with objectives.names=mlm,itm"),
    "rank": ("itm_head", "ranks no texts",
             "train it with objectives.names=mlm,itm, or fine-tune it: meter-fast train retrieval_coco run.init=MODEL"),
    "fill": ("mlm_head", "fills no masks", "train it with objectives.names=mlm,itm"),
    "entails": ("snli_head", "knows no entailment", "fine-tune it first: meter-fast train snli_ve run.init=MODEL"),
    "compare": ("nlvr2_head", "compares no pictures", "fine-tune it first: meter-fast train nlvr2 run.init=MODEL"),
    "caption": ("decoder", "writes no captions",
                "train one with fusion=encoder_decoder objectives.names=span_denoising,itm,caption"),
}  # fmt: skip
NOUNS = {"answer": "question", "compare": "statement"}  # of the texts, where they are more than a text


@dataclass(frozen=True)
class Ranking:
    """scores [N,T] float32: how well each text fits each picture, higher is better."""

    scores: np.ndarray

    @property
    def texts(self) -> np.ndarray:
        """[N,T] int64: for each picture the texts, best first. Of equal ones the lower number comes first."""
        return np.argsort(-self.scores, axis=1, kind="stable")

    @property
    def images(self) -> np.ndarray:
        """[T,N] int64: for each text the pictures, best first."""
        return np.argsort(-self.scores.T, axis=1, kind="stable")


class Predictor:
    """A model, in evaluation mode, with what it takes to ask it. `meter_fast.load` makes one.

    model: on its device, in its dtype. answers: the texts of the VQA head's labels, None where they are not known.
    max_length: tokens of a text that are read, special ones included. batch: pairs computed at a time. name: what
    messages call the model.
    """

    def __init__(
        self,
        model: Meter,
        tokenizer,
        transform: ImageTransform,
        answers: Answers | None = None,
        max_length: int = MAX_TEXT_LENGTH,
        batch: int = 32,
        name: str = "this model",
    ) -> None:
        _check_number("batch", batch, 1)
        self.model, self.tokenizer, self.transform, self.answers = model.eval(), tokenizer, transform, answers
        self.batch, self.name = batch, name
        self._text = TextPipeline(tokenizer, min(max_length, model.config.text.max_length))

    @property
    def max_length(self) -> int:
        """Tokens of a text that are read, special ones included."""
        return self._text.max_length

    # ------------------------------------------------------------------------------------------------------- calls

    def read(self, image: ImageLike) -> Picture:
        """A picture made ready, for several calls. Raises ValueError saying what is wrong with it."""
        return read_picture(image, self.transform)

    def require(self, task: str) -> None:
        """Raise ValueError where the model lacks what a call of that name needs."""
        part, does_not, remedy = PARTS[task]
        if getattr(self.model, part) is None and not (task == "rank" and self.model.rank_head is not None):
            has = [name for name, _ in self.model.named_children() if name.endswith("_head")]
            there = f"it has no {part}, only {', '.join(has) or 'encoders'}"
            raise ValueError(f"{self.name} {does_not} ({there}): {remedy}")
        if task == "answer":
            self._answer_names()

    def check(self, task: str, text: object) -> str:
        """The text as a call of that name reads it. Raises ValueError for one that cannot be used."""
        checked = check_text(text, NOUNS.get(task, "text"))
        if task == "fill":
            with warnings.catch_warnings():
                warnings.simplefilter("ignore", TextCut)
                encode_masked(self._text, checked)
        return checked

    def answer(self, image, question, k: int = 5) -> Scored | list[Scored]:
        """The k best (answer, score), best first. A score is the sigmoid of the answer's logit: VQA trains each answer
        by itself, so scores of a question need not sum to 1."""
        self.require("answer")
        names = self._answer_names()
        _check_k(k, len(names), "answers that the model knows")
        single, (images, questions) = _columns(image=image, question=question)
        best = [row.sigmoid().topk(k) for row in self._classified("answer", [images], questions)]
        found = [
            [(names[label], score) for label, score in zip(row.indices.tolist(), row.values.tolist())] for row in best
        ]
        return found[0] if single else found

    def match(self, image, text) -> float | list[float]:
        """The probability that the text belongs to the picture."""
        self.require("match")
        single, (images, texts) = _columns(image=image, text=text)
        found = [row.softmax(-1)[MATCH].item() for row in self._classified("match", [images], texts)]
        return found[0] if single else found

    def entails(self, image, text) -> dict[str, float] | list[dict[str, float]]:
        """{"contradiction", "neutral", "entailment"}: probabilities of what the picture says of the text."""
        self.require("entails")
        single, (images, texts) = _columns(image=image, text=text)
        rows = self._classified("entails", [images], texts)
        found = [dict(zip(LABELS, row.softmax(-1).tolist(), strict=True)) for row in rows]
        return found[0] if single else found

    def compare(self, image_a, image_b, statement) -> float | list[float]:
        """The probability that the statement is true of the two pictures. All pictures of a call are held at once."""
        self.require("compare")
        single, (first, second, texts) = _columns(image_a=image_a, image_b=image_b, statement=statement)
        rows = self._classified("compare", [first, second], texts)
        found = [row.softmax(-1)[TRUE].item() for row in rows]
        return found[0] if single else found

    def fill(self, image, text, k: int = 5) -> list[Scored] | list[list[Scored]]:
        """For each "<mask>" of the text, in order, the k most probable (token, probability), best first."""
        self.require("fill")
        _check_k(k, self.model.config.text.vocab_size, "tokens of the vocabulary")
        single, (images, texts) = _columns(image=image, text=text)
        masked = [encode_masked(self._text, check_text(text)) for text in texts]
        (numbers,), _, pixels = self._pictures(images)
        requests = [Request(ids, (n,), places) for (ids, places), n in zip(masked, numbers, strict=True)]
        found: list[list[Scored]] = [[] for _ in requests]
        for row, logits in mask_logits(self.model, pixels, requests, self.batch):
            best, tokens = logits.softmax(-1).topk(k)
            found[row] = [
                [(self._said(token), p) for token, p in zip(*mask)] for mask in zip(tokens.tolist(), best.tolist())
            ]
        return found[0] if single else found

    def caption(self, image, beams: int = 1, max_length: int = MAX_TEXT_LENGTH) -> str | list[str]:
        """A caption of each picture, of at most max_length tokens. beams: texts that the search keeps; 1 is greedy."""
        self.require("caption")
        _check_number("beams", beams, 1)
        _check_number("max_length", max_length, 1)
        single, (images,) = _columns(image=image)
        (numbers,), different, pixels = self._pictures(images)
        said = captions(self.model, self.tokenizer, pixels, different, self.batch, beams, max_length)
        return said[0] if single else [said[n] for n in numbers]

    def rank(self, images, texts) -> Ranking:
        """Every picture against every text: by the ranking head of a model fine-tuned for retrieval, else by the
        log-odds of a match. One picture or text may stand for a list of one."""
        self.require("rank")
        images, texts = (list(x) if _is_list(x) else [x] for x in (images, texts))
        if not images or not texts:
            raise ValueError(f"rank: {len(images)} pictures and {len(texts)} texts: give at least one of each")
        checked = [check_text(text) for text in texts]
        column = {text: n for n, text in enumerate(dict.fromkeys(checked))}
        encoded = encode_tokens(self.model, encode_texts(self._text, list(column), "text"), self.batch)
        (numbers,), different, pixels = self._pictures(images)
        scores = []
        for start in range(0, different, PICTURES_PER_BLOCK):
            block = range(start, min(start + PICTURES_PER_BLOCK, different))
            image = encode_pictures(self.model, pixels, block, self.batch)
            scores.append(match_scores(self.model, image, encoded, self.batch))
        return Ranking(torch.cat(scores)[numbers][:, [column[text] for text in checked]].numpy())

    # ------------------------------------------------------------------------------------------------------- within

    def _answer_names(self) -> list[str]:
        """The text of each label; "label 7" where the label space has no name for one."""
        if self.answers is None:
            raise ValueError(
                f"{self.name} does not say what its {self.model.config.vqa_answers} answers are called: give answers=, "
                "a JSON file that lists them, label 0 first, or the list"
            )
        return [f"label {number}" if name is None else name for number, name in enumerate(self.answers.names)]

    def _classified(self, task: str, images: list[list], texts: list) -> list[torch.Tensor]:
        """Logits [C] float32 of each text with its picture, or its picture in each of two lists."""
        head, what = PARTS[task][0], NOUNS.get(task, "text")
        ids = encode_texts(self._text, [check_text(text, what) for text in texts], what)
        numbers, _, pixels = self._pictures(*images)
        requests = [Request(row, tuple(pictures)) for row, *pictures in zip(ids, *numbers, strict=True)]
        return class_logits(self.model, head, pixels, requests, self.batch)

    def _pictures(self, *lists: Sequence[ImageLike]) -> tuple[list[list[int]], int, Callable[[int], torch.Tensor]]:
        """For each list the number of each picture, equal for the same one; how many different ones there are; what
        reads the pixels of a number."""
        number_of: dict[object, int] = {}
        first: list[tuple[int, ImageLike]] = []  # where each stands in its list
        numbers: list[list[int]] = []
        for images in lists:
            numbers.append([])
            for place, image in enumerate(images):
                number = number_of.setdefault(key_of(image), len(first))
                if number == len(first):
                    first.append((place, image))
                numbers[-1].append(number)

        def pixels(number: int) -> torch.Tensor:
            place, image = first[number]
            try:
                return self.read(image).pixels
            except WrongImage as error:
                where = f"picture {place} of the list: " if len(first) > 1 else ""
                raise WrongImage(error.cause, f"{where}{error}") from error

        return numbers, len(first), pixels

    def _said(self, token: int) -> str:
        return self.tokenizer.decode([token]).strip()


def _is_list(x: object) -> bool:
    return isinstance(x, (list, tuple))


def _columns(**given: object) -> tuple[bool, list[list]]:
    """Arguments as lists of the same length, and whether each was a single one. Raises ValueError for lists of
    different lengths."""
    lengths = {name: len(x) for name, x in given.items() if _is_list(x)}
    if len(set(lengths.values())) > 1:
        said = ", ".join(f"{count} of {name}" for name, count in lengths.items())
        raise ValueError(f"lists of different lengths ({said}): give as many of each, or a single one for all")
    count = next(iter(lengths.values()), 1)
    return not lengths, [list(x) if _is_list(x) else [x] * count for x in given.values()]


def _check_number(name: str, value: object, least: int) -> None:
    if type(value) is not int or value < least:
        raise ValueError(f"{name}={value!r}: give a whole number, {least} or more")


def _check_k(k: object, most: int, of_what: str) -> None:
    if type(k) is not int or not 1 <= k <= most:
        raise ValueError(f"k={k!r}: give 1 to {most}, the {of_what}")
