"""A module as ZeRO-3 holds it: a part's parameters are there in its own forward alone. Helpers only, no tests."""

import torch
from torch import nn


def partition(module: nn.Module) -> None:
    """Empties every parameter of `module` for good, but for the time between begin and end of its own part's
    forward."""
    values = {parameter: parameter.data for parameter in module.parameters()}

    def fill(part: nn.Module, _inputs: object) -> None:
        for parameter in part.parameters(recurse=False):
            parameter.data = values[parameter]

    def empty(part: nn.Module, *_rest: object) -> None:
        for parameter in part.parameters(recurse=False):
            parameter.data = torch.empty(0)

    for part in module.modules():
        part.register_forward_pre_hook(fill)
        part.register_forward_hook(empty)
        empty(part)
