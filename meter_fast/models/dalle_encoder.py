"""The image tokenizer of DALL-E, which the paper takes for masked image modelling with discrete codes.

Knows its architecture and its file; knows no text and no training. Source: Ramesh et al. 2021, "Zero-Shot Text-to-Image
Generation", appendix A.1, and the published file `encoder.pkl` (8192 codes, one for 8 x 8 pixels). The file is a whole
pickled module: here only its tensors are taken, and none of its classes is imported or run.
"""

import re
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from meter_fast.models.files import read_content
from meter_fast.models.weights import copy_into

GROUPS = 4  # of blocks, with 1, 2, 4 and 8 times the first one's channels; pictures are halved after all but the last
MARGIN = 0.1  # pixel values 0..1 are mapped to MARGIN..1 - MARGIN


class _Kept:
    """Stands for an object of any of the file's classes: holds its attributes, does nothing."""

    def __setstate__(self, state: object) -> None:
        if not isinstance(state, dict):
            raise ValueError(f"an object whose state is a {type(state).__name__}")
        self.__dict__.update(state)


CLASSES = tuple(
    (_Kept, name)
    for name in (
        "dall_e.encoder.Encoder",
        "dall_e.encoder.EncoderBlock",
        "dall_e.utils.Conv2d",
        "torch.nn.modules.container.Sequential",
        "torch.nn.modules.activation.ReLU",
        "torch.nn.modules.pooling.MaxPool2d",
        "torch.nn.modules.linear.Identity",
    )
)


class DalleBlock(nn.Module):
    """shortcut(x) + gain * four convolutions, of which the inner three have a quarter of the channels."""

    def __init__(self, inputs: int, outputs: int, gain: float) -> None:
        super().__init__()
        inner, self.gain = outputs // 4, gain
        sizes = ((inputs, inner, 3), (inner, inner, 3), (inner, inner, 3), (inner, outputs, 1))
        self.convolutions = nn.ModuleList(nn.Conv2d(*size, padding=size[2] // 2) for size in sizes)
        self.shortcut = nn.Conv2d(inputs, outputs, 1) if inputs != outputs else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        told = x
        for convolution in self.convolutions:
            told = convolution(F.relu(told))
        return self.shortcut(x) + self.gain * told


class DalleEncoder(nn.Module):
    """Pictures to codes. width: channels of the first group; blocks: in each group."""

    factor = 2 ** (GROUPS - 1)

    def __init__(self, codes: int = 8192, width: int = 256, blocks: int = 2) -> None:
        super().__init__()
        self.codes = codes
        self.input = nn.Conv2d(3, width, 7, padding=3)
        self.groups = nn.ModuleList()
        inputs = width
        for group in range(GROUPS):
            outputs = width * 2**group
            sizes = [(inputs if block == 0 else outputs, outputs) for block in range(blocks)]
            self.groups.append(nn.Sequential(*(DalleBlock(*size, gain=(GROUPS * blocks) ** -2) for size in sizes)))
            inputs = outputs
        self.output = nn.Conv2d(inputs, codes, 1)

    def forward(self, pictures: Tensor) -> Tensor:
        """pictures [B,3,S,S], values in 0..1 -> scores of the codes [B,K,S/8,S/8]."""
        x = self.input((1 - 2 * MARGIN) * pictures + MARGIN)
        for number, group in enumerate(self.groups):
            x = group(F.max_pool2d(x, 2) if number else x)
        return self.output(F.relu(x))

    @torch.no_grad()
    def encode(self, pictures: Tensor) -> Tensor:
        """pictures [B,3,S,S], values in 0..1 -> codes [B,S/8,S/8] int64."""
        return self(pictures).argmax(1)


def load_dalle_encoder(path: str | Path) -> DalleEncoder:
    """The encoder of a published file, or of its state dict, float32 on the CPU, in evaluation mode. Nothing in the
    file is run.

    Raises ValueError, naming the file, if it is damaged, asks to run code or holds another model."""
    content = read_content(path, CLASSES)
    tensors: dict[str, Tensor] = {}
    if isinstance(content, dict):
        tensors = {name: value for name, value in content.items() if isinstance(value, Tensor)}
    _collect(content, "", tensors)
    ours = {_our_name(name): tensor.detach().float() for name, tensor in tensors.items()}
    for name in ("input.weight", "output.weight"):
        if name not in ours:
            raise ValueError(f"{path} holds no encoder of DALL-E: its {len(tensors)} tensors lack {name}")
    blocks = len({name.split(".")[2] for name in ours if name.startswith("groups.0.")})
    width = ours["input.weight"].shape[0]
    encoder = DalleEncoder(ours["output.weight"].shape[0], width, blocks)
    copy_into(encoder, ours, str(path))
    return encoder.eval()


def _our_name(name: str) -> str:
    name = re.sub(r"\.w$", ".weight", re.sub(r"\.b$", ".bias", name.removeprefix("blocks.")))
    name = re.sub(r"^group_(\d+)\.block_(\d+)\.", lambda at: f"groups.{int(at[1]) - 1}.{int(at[2]) - 1}.", name)
    name = re.sub(r"\.res_path\.conv_(\d)\.", lambda at: f".convolutions.{int(at[1]) - 1}.", name)
    return name.replace(".id_path.", ".shortcut.").replace("output.conv.", "output.")


def _collect(node: object, prefix: str, tensors: dict[str, Tensor]) -> None:
    """Parameters of a kept module and of those in it, by their paths."""
    if not isinstance(node, _Kept):
        return
    for name, value in vars(node).get("_parameters", {}).items():
        if isinstance(value, Tensor):
            tensors[f"{prefix}{name}"] = value
    for name, part in vars(node).get("_modules", {}).items():
        _collect(part, f"{prefix}{name}.", tensors)
