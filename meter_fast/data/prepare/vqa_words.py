"""How VQAv2's answers become labels: words made alike, and counts made scores, as published.

The published function has quirks that decide which 3129 answers there are, so they are kept (METER code, utils/
glossary.py): a period goes wherever no digit follows, but only the first 32 of a text; a comma between two digits makes
all punctuation go without a space; contractions are matched after lower-casing. Knows no files.
"""

import re

PUNCTUATION = ';/[]"{}()=+\\_-><@`,?!'
ARTICLES = ("a", "an", "the")
NUMBERS = {"none": "0", "zero": "0"} | {
    word: str(number)
    for number, word in enumerate(("one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten"), 1)
}
MAX_PERIODS = 32

# Each is found with any one of its apostrophes left out: couldnt've and couldn'tve, but not couldntve.
_CONTRACTIONS = """
ain't aren't can't could've couldn't couldn't've didn't doesn't don't hadn't hadn't've hasn't haven't he'd he'd've he's
how'd how'll how's isn't it'd it'd've it'll ma'am might've mightn't mightn't've must've mustn't needn't not've o'clock
oughtn't 'ow's'at shan't she'd've should've shouldn't shouldn't've somebody'd've somebody'll somebody's someone'd
someone'd've someone'll someone's something'd something'd've something'll that's there'd there'd've there're there's
they'd they'd've they'll they're they've 'twas wasn't we'd've we've weren't what'll what're what's what've when's
where'd where's where've who'd who'd've who'll who's who've why'll why're why's won't would've wouldn't wouldn't've
y'all y'all'll y'all'd've you'd you'd've you'll you're you've
"""
CONTRACTIONS = {
    word[: place.start()] + word[place.end() :]: word
    for word in _CONTRACTIONS.split()
    for place in re.finditer("'", word)
} | {"somebody'd": "somebodyd"}

_COMMA_IN_NUMBER = re.compile(r"\d,\d")
_PERIOD = re.compile(r"\.(?!\d)")


def normalize_word(answer: str) -> str:
    """An answer in the form that is counted for the label space: lower case, figures, no articles or punctuation."""
    tight = _COMMA_IN_NUMBER.search(answer) is not None
    text = answer
    for mark in PUNCTUATION:
        beside_space = f"{mark} " in answer or f" {mark}" in answer
        text = text.replace(mark, "" if tight or beside_space else " ")
    text = _PERIOD.sub("", text, count=MAX_PERIODS)
    words = [NUMBERS.get(word, word) for word in text.lower().split()]
    return " ".join(CONTRACTIONS.get(word, word) for word in words if word not in ARTICLES)


def score(count: float) -> float:
    """The soft score of an answer that `count` of ten people gave: 0, 0.3, 0.6, 0.9, then 1 (METER, write_vqa.py)."""
    return (0.0, 0.3, 0.6, 0.9, 1.0)[min(int(count), 4)]
