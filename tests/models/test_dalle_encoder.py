"""The published DALL-E encoder: its file is made here as it was published, a pickled module, and read without running
it."""

import os
import pickle
import sys
import types
from collections import OrderedDict
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from meter_fast.models.dalle_encoder import load_dalle_encoder
from meter_fast.models.image_tokenizer import open_image_tokenizer

WIDTH, CODES, BLOCKS = 16, 24, 2


@pytest.fixture
def published(monkeypatch: pytest.MonkeyPatch):
    """The published package's module names, with classes of the published structure; gone after the test."""
    package, encoder, utils = (types.ModuleType(name) for name in ("dall_e", "dall_e.encoder", "dall_e.utils"))

    class Conv2d(nn.Module):
        def __init__(self, inputs: int, outputs: int, size: int) -> None:
            super().__init__()
            self.n_in, self.n_out, self.kw, self.use_float16 = inputs, outputs, size, True
            self.device = torch.device("cpu")
            self.w = nn.Parameter(torch.randn(outputs, inputs, size, size) / (inputs * size**2) ** 0.5)
            self.b = nn.Parameter(0.1 * torch.randn(outputs))

        def forward(self, x):
            return F.conv2d(x, self.w, self.b, padding=(self.kw - 1) // 2)

    class EncoderBlock(nn.Module):
        def __init__(self, inputs: int, outputs: int) -> None:
            super().__init__()
            inner, self.post_gain = outputs // 4, 1 / (4 * BLOCKS) ** 2
            self.id_path = Conv2d(inputs, outputs, 1) if inputs != outputs else nn.Identity()
            parts = OrderedDict()
            sizes = [(inputs, inner, 3), (inner, inner, 3), (inner, inner, 3), (inner, outputs, 1)]
            for number, size in enumerate(sizes, 1):
                parts[f"relu_{number}"], parts[f"conv_{number}"] = nn.ReLU(), Conv2d(*size)
            self.res_path = nn.Sequential(parts)

        def forward(self, x):
            return self.id_path(x) + self.post_gain * self.res_path(x)

    class Encoder(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.n_hid, self.vocab_size, self.device = WIDTH, CODES, torch.device("cpu")
            parts = OrderedDict(input=Conv2d(3, WIDTH, 7))
            inputs = WIDTH
            for group in range(4):
                outputs = WIDTH * 2**group
                blocks = OrderedDict()
                for block in range(BLOCKS):
                    blocks[f"block_{block + 1}"] = EncoderBlock(inputs if block == 0 else outputs, outputs)
                if group < 3:
                    blocks["pool"] = nn.MaxPool2d(2)
                parts[f"group_{group + 1}"] = nn.Sequential(blocks)
                inputs = outputs
            parts["output"] = nn.Sequential(OrderedDict(relu=nn.ReLU(), conv=Conv2d(inputs, CODES, 1)))
            self.blocks = nn.Sequential(parts)

        def forward(self, x):
            return self.blocks(x)

    for module, classes in ((encoder, (Encoder, EncoderBlock)), (utils, (Conv2d,))):
        for kind in classes:
            kind.__module__, kind.__qualname__ = module.__name__, kind.__name__
            setattr(module, kind.__name__, kind)
    for module in (package, encoder, utils):
        monkeypatch.setitem(sys.modules, module.__name__, module)
    torch.manual_seed(0)
    return Encoder().requires_grad_(False)


@pytest.mark.parametrize("whole", [True, False])
def test_reads_a_published_file(published: nn.Module, whole: bool, tmp_path: Path, monkeypatch) -> None:
    """Codes and scores are the original's, from the pickled module and from its state dict, without its classes."""
    path = tmp_path / "encoder.pkl"
    torch.save(published if whole else published.state_dict(), path)
    for name in ("dall_e", "dall_e.encoder", "dall_e.utils"):
        monkeypatch.delitem(sys.modules, name)
    ours = open_image_tokenizer(path)
    assert (ours.codes, ours.factor, ours.training) == (CODES, 8, False)
    pictures = torch.rand(2, 3, 5, 3, generator=torch.Generator().manual_seed(1)).repeat_interleave(8, 2)
    pictures = pictures.repeat_interleave(8, 3)  # cells of one colour: more differ in their code than noise would
    with torch.no_grad():
        expected = published(0.8 * pictures + 0.1)
        assert torch.allclose(ours(pictures), expected, atol=1e-5)
    assert expected.argmax(1).unique().numel() > 3
    assert torch.equal(ours.encode(pictures), expected.argmax(1))
    assert "dall_e" not in sys.modules


class Payload:
    """Opening it would create a folder."""

    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self):
        return os.mkdir, (str(self.marker),)


@pytest.mark.parametrize("way", ["torch", "torch, old", "pickle", "inside a module"])
@pytest.mark.scenario(40, "a pickled DALL-E encoder")
def test_a_file_that_asks_to_run_code_is_refused(published: nn.Module, way: str, tmp_path: Path) -> None:
    path, marker = tmp_path / "encoder.pkl", tmp_path / "it ran"
    content = Payload(marker)
    if way == "inside a module":
        published.blocks.extra = content
        content = published
    if way == "pickle":
        path.write_bytes(pickle.dumps(content))
    else:
        torch.save(content, path, _use_new_zipfile_serialization=way != "torch, old")
    with pytest.raises(ValueError, match=r"encoder.pkl was not opened: .*Nothing of it was run"):
        load_dalle_encoder(path)
    assert not marker.exists()


def test_another_model_is_refused(published: nn.Module, tmp_path: Path) -> None:
    path = tmp_path / "encoder.pkl"
    for content, said in (
        ({"a": torch.zeros(2)}, r"holds no encoder of DALL-E: its 1 tensors lack input.weight"),
        (published.blocks.group_1, r"holds no encoder of DALL-E: its 16 tensors lack input.weight"),
        (nn.Linear(2, 2), r"encoder.pkl was not opened"),
    ):
        torch.save(content, path)
        with pytest.raises(ValueError, match=said):
            load_dalle_encoder(path)
    del published.blocks.group_3.block_2
    torch.save(published, path)
    with pytest.raises(ValueError, match=r"does not fit the model: .* missing: groups.2.1"):
        load_dalle_encoder(path)
