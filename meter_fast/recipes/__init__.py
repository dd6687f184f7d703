"""Named experiments. Each recipe is a function of a few arguments that returns a complete RunConfig.

Knows which recipes there are and how a command line becomes a configuration. Knows nothing of how a run is carried out.
"""

import difflib
import inspect
import typing
from collections.abc import Callable, Sequence

from meter_fast.config import ConfigError, RunConfig, override
from meter_fast.recipes.caption import caption
from meter_fast.recipes.image_tokenizer import image_tokenizer
from meter_fast.recipes.nlvr2 import nlvr2
from meter_fast.recipes.pretrain import pretrain
from meter_fast.recipes.retrieval import retrieval_coco, retrieval_f30k
from meter_fast.recipes.snli_ve import snli_ve
from meter_fast.recipes.vqa import vqa

RECIPES: dict[str, Callable[..., RunConfig]] = {
    "pretrain": pretrain,
    "vqa": vqa,
    "nlvr2": nlvr2,
    "snli_ve": snli_ve,
    "retrieval_f30k": retrieval_f30k,
    "retrieval_coco": retrieval_coco,
    "caption": caption,
    "image_tokenizer": image_tokenizer,
}


def resolve(argv: Sequence[str]) -> RunConfig:
    """`["pretrain", "size=tiny", "optim.lr=1e-4"]` -> the configuration. Raises ConfigError.

    A key without a point is an argument of the recipe, a key with one a setting of the run."""
    if not argv or argv[0].startswith("-") or "=" in argv[0]:
        raise ConfigError(f"name a recipe first: {', '.join(RECIPES)}. Then settings, key=value.")
    name, *assignments = argv
    if name not in RECIPES:
        near = difflib.get_close_matches(name, list(RECIPES), n=1)
        raise ConfigError(
            f"unknown recipe {name!r}: " + (f"did you mean {near[0]}?" if near else f"one of {list(RECIPES)}")
        )
    recipe = RECIPES[name]
    parameters = inspect.signature(recipe).parameters
    arguments: dict[str, str] = {}
    settings: list[str] = []
    for text in assignments:
        key, separator, value = text.partition("=")
        if separator and key in parameters:
            choices = typing.get_args(parameters[key].annotation)
            if value not in choices:
                raise ConfigError(f"{key}={value}: one of {', '.join(choices)}")
            arguments[key] = value
        else:
            settings.append(text)
    try:
        return override(recipe(**arguments), settings)
    except ConfigError as error:
        raise ConfigError(f"{error} (arguments of the recipe {name}: {', '.join(parameters)})") from None
