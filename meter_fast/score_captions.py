"""The usual scores of written captions against people's: BLEU-1 to 4, CIDEr and ROUGE-L.

Knows texts by picture. Knows no models and no files. The formulas are pycocoevalcap's, the package of the official COCO
scores (an optional extra, as it weighs 100 MB): those of its parts that need no Java. METEOR and SPICE need it, and so
does the official tokenizer, in whose place `tokens` stands. Scores to be published are made by the official script from
the results file.
"""

import re
from collections.abc import Mapping, Sequence

TOKENIZER = "meter-fast, after PTBTokenizer"
MISSING = (
    "not scored: pycocoevalcap is not installed: pip install 'meter-fast[caption]', or give the results file to the "
    "official script"
)
METRICS = ("BLEU-1", "BLEU-2", "BLEU-3", "BLEU-4", "ROUGE-L", "CIDEr")

_SAME = str.maketrans({"’": "'", "‘": "'", "“": '"', "”": '"', "–": " ", "—": " ", "…": " "})
_BRACKETS = {"(": " -lrb- ", ")": " -rrb- ", "[": " -lsb- ", "]": " -rsb- ", "{": " -lcb- ", "}": " -rcb- "}
_PARTED = re.compile(r"(?<=\w)(n't|'(?:s|m|d|re|ve|ll))\b")
_IN_TWO = re.compile(r"\b(can)(not)\b|\b(gon|got|wan)(na|ta)\b|\b(gim|lem)(me)\b")
_TOKEN = re.compile(
    r"""
      -[lr][rsc]b-                                           # a bracket, which the official list does not drop
    | n't\b | '(?:s|m|d|re|ve|ll)\b                          # what was parted from its word
    | (?:[^\W\d_]\.){2,}                                     # u.s.
    | (?:mr|mrs|ms|dr|st|jr|sr|vs|etc|ave|mt)\. | no\.(?=\s*\d)
    | \w+(?:[-/.@_']\w+ | (?<=\d)[,:](?=\d)\w+)*            # t-shirt, 1/2, 10,000, o'clock
    | [!?]{2,}                                               # the official list has single ones only
    | [^\w\s.,:;!?'"`-]                                      # $ % # & and the like, one by one
    """,
    re.VERBOSE,
)


def tokens(caption: str) -> list[str]:
    """The words of a caption as the official tokenizer (Stanford's PTBTokenizer, lower case, without punctuation)
    leaves them: "A man's T-shirt." -> a, man, 's, t-shirt. Odd texts may differ: there is no Java here."""
    text = caption.lower().translate(_SAME)
    for bracket, name in _BRACKETS.items():
        text = text.replace(bracket, name)
    text = _IN_TWO.sub(lambda found: " ".join(filter(None, found.groups())), _PARTED.sub(r" \1", text))
    return _TOKEN.findall(text)


def caption_scores(written: Mapping[int, str], references: Mapping[int, Sequence[str]]) -> dict[str, float] | None:
    """Scores over all pictures of `written`, each with one reference or more: BLEU and ROUGE-L as shares of 1, CIDEr
    from 0 to 10. None where pycocoevalcap is not installed.

    CIDEr weighs words by how many of these pictures' references hold them, so it is comparable on the same split only,
    and 0 of a single picture.
    """
    try:
        from pycocoevalcap.bleu.bleu import Bleu
        from pycocoevalcap.cider.cider import Cider
        from pycocoevalcap.rouge.rouge import Rouge
    except ImportError:
        return None
    right = {key: [" ".join(tokens(text)) for text in references[key]] for key in written}
    found = {key: [" ".join(tokens(text))] for key, text in written.items()}
    values = [
        *Bleu(4).compute_score(right, found, verbose=0)[0],
        Rouge().compute_score(right, found)[0],
        Cider().compute_score(right, found)[0],
    ]
    return {name: float(value) for name, value in zip(METRICS, values, strict=True)}
