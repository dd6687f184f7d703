"""Encoder weights from files in the forms in which they are published, and what is refused."""

import dataclasses
import os
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
import torch
from golden_cases import TOLERANCE, GoldenCase, load_case, relative
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers import BertConfig, BertForMaskedLM, RobertaConfig, RobertaForMaskedLM

from meter_fast.models.config import TextConfig
from meter_fast.models.files import read_tensors
from meter_fast.models.meter import Meter
from meter_fast.models.text import build_text
from meter_fast.models.torchscript import is_torchscript
from meter_fast.models.vision import build_vision
from meter_fast.models.weights import WeightsReport, load_text_weights, load_vision_weights


@pytest.fixture
def golden() -> GoldenCase:
    return load_case("clip_roberta")


def clip_tensors(case: GoldenCase) -> dict[str, Tensor]:
    """A whole CLIP file of the golden size: OpenAI's names, the block that METER drops, and the text half."""
    visual = {name.removeprefix("vit_model."): value for name, value in case.state.items() if ".visual." in name}
    last = {
        name.replace("resblocks.1.", "resblocks.2."): value + 1
        for name, value in visual.items()
        if "resblocks.1." in name
    }
    rest = {"visual.proj": torch.ones(128, 64), "logit_scale": torch.tensor(4.6), "ln_final.weight": torch.ones(64)}
    return visual | last | rest | {"positional_embedding": torch.ones(77, 64), "text_projection": torch.ones(64, 64)}


def load_vision(case: GoldenCase, weights: Path, **sizes: int) -> tuple[nn.Module, WeightsReport]:
    config = dataclasses.replace(case.model.config.vision, weights=str(weights), **sizes)
    vision = build_vision(config).eval()
    return vision, load_vision_weights(vision, config)


def check_vision(case: GoldenCase, vision: nn.Module) -> None:
    with torch.no_grad():
        assert relative(vision(case.inputs["image"]), case.outputs["infer/vit"]) < TOLERANCE


class Tree(nn.Module):
    """A module with the given parameter names, so that it can be scripted like OpenAI's model."""

    def __init__(self, tensors: dict[str, Tensor]) -> None:
        super().__init__()
        inner: dict[str, dict[str, Tensor]] = {}
        for name, value in tensors.items():
            top, _, rest = name.partition(".")
            if rest:
                inner.setdefault(top, {})[rest] = value
            else:
                self.register_parameter(name, nn.Parameter(value))
        for name, part in inner.items():
            self.add_module(name, Tree(part))
        self.input_resolution = 64

    def forward(self, x: Tensor) -> Tensor:
        return x * 2


def test_openai_archive(golden: GoldenCase, tmp_path: Path) -> None:
    """TorchScript with half-precision weights, as OpenAI publishes: golden weights are exact in bf16, nearly so in
    half."""
    tensors = clip_tensors(golden)
    path = tmp_path / "ViT.pt"
    torch.jit.script(Tree(tensors).half()).save(str(path))
    assert is_torchscript(path)
    read = read_tensors(path)
    assert set(read) == set(tensors)
    assert all(
        value.dtype == torch.float16 and torch.equal(value, tensors[name].half()) for name, value in read.items()
    )
    vision, report = load_vision(golden, path)
    assert relative(vision.pos_embed[0], golden.state["vit_model.visual.positional_embedding"].half()) == 0
    assert vision.pos_embed.dtype == torch.float32
    with torch.no_grad():
        assert relative(vision(golden.inputs["image"]), golden.outputs["infer/vit"]) < 1e-3
    assert "block 3 of 3 dropped, as published" in str(report)
    assert "5 other tensors of the file left out" in str(report)
    assert report.matched == len(vision.state_dict())


@pytest.mark.scenario(40, "a TorchScript archive of CLIP")
def test_torchscript_archive_cannot_run_code(golden: GoldenCase, tmp_path: Path) -> None:
    """A pickle inside the archive that calls os.system is refused by name and not run."""
    good, bad, proof = tmp_path / "good.pt", tmp_path / "bad.pt", tmp_path / "proof"
    torch.jit.script(Tree({"a.b": torch.ones(2)})).save(str(good))
    payload = (
        b"\x80\x02cposix\nsystem\nX"
        + len(f"touch {proof}").to_bytes(4, "little")
        + f"touch {proof}".encode()
        + b"\x85R."
    )
    with zipfile.ZipFile(good) as old, zipfile.ZipFile(bad, "w") as new:
        for name in old.namelist():
            new.writestr(name, payload if name.endswith("/data.pkl") else old.read(name))
    with pytest.raises(ValueError, match=r"bad.pt: not read.*posix.system"):
        load_vision(golden, bad)
    assert not proof.exists()


@pytest.mark.parametrize("form", ["openai safetensors", "openai state dict", "openai wrapped", "timm"])
def test_plain_files(golden: GoldenCase, tmp_path: Path, form: str) -> None:
    tensors = clip_tensors(golden)
    path = tmp_path / ("weights.safetensors" if form in ("openai safetensors", "timm") else "weights.pt")
    if form == "timm":
        own = {name: value.clone() for name, value in golden.model.vision.state_dict().items()}
        save_file(own | {"head.weight": torch.ones(4, 128), "head.bias": torch.ones(4)}, path)
    elif form == "openai safetensors":
        save_file({name: value.clone() for name, value in tensors.items()}, path)
    else:
        torch.save({"state_dict": tensors} if form == "openai wrapped" else tensors, path)
    vision, report = load_vision(golden, path)
    check_vision(golden, vision)
    assert ("dropped" in str(report)) == (form != "timm")
    assert report.resized == ()


def test_position_table_is_resized(golden: GoldenCase, tmp_path: Path) -> None:
    path = tmp_path / "weights.pt"
    torch.save(clip_tensors(golden), path)
    vision, report = load_vision(golden, path, image_size=96)
    assert report.resized == ("position table resized from 4 x 4 to 6 x 6 patches",)
    assert vision.pos_embed.shape == (1, 37, 128)
    assert torch.equal(vision.pos_embed[0, 0], golden.state["vit_model.visual.positional_embedding"][0])


def test_vision_files_that_do_not_fit(golden: GoldenCase, tmp_path: Path) -> None:
    path, tensors = tmp_path / "weights.pt", clip_tensors(golden)
    torch.save(tensors, path)
    with pytest.raises(ValueError, match=r"has 3 blocks: set model.vision.layers=2"):
        load_vision(golden, path, layers=1)
    with pytest.raises(ValueError, match=r"patches of 16 px: set model.vision.patch_size=16"):
        load_vision(golden, path, patch_size=32)
    with pytest.raises(ValueError, match=r"is 128 wide: set model.vision.width=128"):
        load_vision(golden, path, width=64)
    torch.save({name: value for name, value in tensors.items() if "ln_pre" not in name}, path)
    with pytest.raises(ValueError, match=r"2 tensors are missing: norm_pre.bias, norm_pre.weight"):
        load_vision(golden, path)
    torch.save(tensors | {"visual.extra": torch.ones(1)}, path)
    with pytest.raises(ValueError, match=r"1 tensors have no place: extra"):
        load_vision(golden, path)
    torch.save({"visual.layer1.0.conv1.weight": torch.ones(1)}, path)
    with pytest.raises(ValueError, match=r"no CLIP ViT"):
        load_vision(golden, path)
    with pytest.raises(ValueError, match=r"neither a file nor a model of timm"):
        load_vision(golden, Path("vit_of_nobody"))
    with pytest.raises(ValueError, match=r"absent.pt does not exist.*weights.pt"):
        load_vision(golden, tmp_path / "absent.pt")


class Attack:
    def __reduce__(self) -> tuple:
        return (os.system, ("echo attacked > attacked.txt",))


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "is empty \\(0 bytes\\)"),
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:00\n", "no PyTorch file"),
        (b"PK\x03\x04 half an archive", "no readable PyTorch file"),
        (["a list"], "holds a list, not a dict"),
        ({"epoch": 3}, "holds no tensors"),
        ({"a": torch.ones(1), "b": Attack()}, "asks to run code"),
    ],
    ids=["empty", "git-lfs pointer", "truncated", "list", "no tensors", "malicious"],
)
def test_files_that_cannot_be_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, content: object, message: str
) -> None:
    monkeypatch.chdir(tmp_path)
    path = tmp_path / "weights.pt"
    if isinstance(content, bytes):
        path.write_bytes(content)
    else:
        torch.save(content, path)
    with pytest.raises(ValueError, match=message) as caught:
        read_tensors(path)
    assert str(path) in str(caught.value)
    assert not (tmp_path / "attacked.txt").exists()


def test_a_flipped_bit_is_found(tmp_path: Path) -> None:
    """In an archive as torch writes it, whose check sums torch itself does not look at."""
    path = tmp_path / "weights.pt"
    torch.save({"a": torch.zeros(1000)}, path)
    content = bytearray(path.read_bytes())
    assert read_tensors(path)["a"].shape == (1000,)
    content[content.index(bytes(2000)) + 500] ^= 4
    path.write_bytes(content)
    with pytest.raises(ValueError, match=r"weights.pt is damaged: weights/data/0 in it does not have its"):
        read_tensors(path)


def text_config(kind: str, weights: Path) -> TextConfig:
    roberta = kind == "roberta"
    return TextConfig(
        name=kind,
        width=24,
        layers=2,
        heads=2,
        ffn=48,
        vocab_size=60,
        max_positions=20,
        token_types=1 if roberta else 2,
        eps=1e-5 if roberta else 1e-12,
        dropout=0.0,
        pad_id=1 if roberta else 0,
        weights=str(weights),
    )


def save_library_model(kind: str, folder: Path, **changes: object) -> nn.Module:
    """A folder as `save_pretrained` writes it, of a model with a language-modelling head."""
    config_class, model_class = {
        "roberta": (RobertaConfig, RobertaForMaskedLM),
        "bert": (BertConfig, BertForMaskedLM),
    }[kind]
    sizes = {
        "vocab_size": 60,
        "hidden_size": 24,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "intermediate_size": 48,
        "max_position_embeddings": 20,
        "type_vocab_size": 1 if kind == "roberta" else 2,
        "layer_norm_eps": 1e-5 if kind == "roberta" else 1e-12,
        "pad_token_id": 1 if kind == "roberta" else 0,
        **changes,
    }
    torch.manual_seed(4)
    model = model_class(config_class(**sizes)).eval()
    model.save_pretrained(folder)
    return model


@pytest.mark.parametrize("kind", ["roberta", "bert"])
@pytest.mark.parametrize("form", ["folder", "file", "bin", "gamma and beta"])
def test_text_weights(kind: str, form: str, tmp_path: Path) -> None:
    library = save_library_model(kind, tmp_path)
    source = tmp_path / "model.safetensors" if form == "file" else tmp_path
    if form in ("bin", "gamma and beta"):
        (tmp_path / "model.safetensors").unlink()
        state = dict(library.state_dict())
        if form == "gamma and beta":
            state = {
                name.replace("LayerNorm.weight", "LayerNorm.gamma").replace("LayerNorm.bias", "LayerNorm.beta"): value
                for name, value in state.items()
            }
        state[f"{kind}.pooler.dense.weight"] = torch.ones(24, 24)
        state[f"{kind}.embeddings.position_ids"] = torch.arange(20)[None]
        torch.save(state, tmp_path / "pytorch_model.bin")
    config = text_config(kind, source)
    text = build_text(config).eval()
    report = load_text_weights(text, config)
    ids = torch.tensor([[5, 6, 7, 8, config.pad_id], [9, 10, 11, 12, 13]])
    mask = ids != config.pad_id
    with torch.no_grad():
        found = text(input_ids=ids, attention_mask=mask[:, None, None, :]).last_hidden_state
        expected = getattr(library, kind)(input_ids=ids, attention_mask=mask.long()).last_hidden_state
    assert relative(found[mask], expected[mask]) < TOLERANCE
    assert report.matched == len(text.state_dict())
    assert "left out" in str(report)


def test_text_folders_that_do_not_fit(tmp_path: Path) -> None:
    def load(kind: str, source: Path, **changes: object) -> None:
        config = dataclasses.replace(text_config(kind, source), **changes)
        load_text_weights(build_text(config), config)

    save_library_model("bert", tmp_path / "bert")
    save_library_model("bert", tmp_path / "eps", layer_norm_eps=1e-5)
    with pytest.raises(ValueError, match=r"model_type='bert', the model has text.name='roberta'"):
        load("roberta", tmp_path / "bert")
    with pytest.raises(ValueError, match=r"holds bert weights"):
        load("roberta", tmp_path / "bert" / "model.safetensors")
    with pytest.raises(ValueError, match=r"layer_norm_eps=1e-05, the model has text.eps=1e-12"):
        load("bert", tmp_path / "eps")
    with pytest.raises(ValueError, match=r"num_attention_heads=2, the model has text.heads=4"):
        load("bert", tmp_path / "bert", heads=4)
    with pytest.raises(
        ValueError, match=r"word_embeddings.weight is \(60, 24\) in the file and \(61, 24\) in the model"
    ):
        load("bert", tmp_path / "bert", vocab_size=61)
    with pytest.raises(ValueError, match=r"tensors have no place: encoder.layer.1"):
        load("bert", tmp_path / "bert", layers=1)
    (tmp_path / "bert" / "model.safetensors").unlink()
    with pytest.raises(ValueError, match=r"neither model.safetensors nor pytorch_model.bin"):
        load("bert", tmp_path / "bert")
    with pytest.raises(ValueError, match=r"nowhere' does not exist"):
        load("bert", tmp_path / "nowhere")


def test_hub_names_without_a_network(tmp_path: Path) -> None:
    """In a process that is told to stay offline: both encoders say what could not be fetched and what to do."""
    code = """
from meter_fast.models.config import TextConfig, VisionConfig
from meter_fast.models.weights import load_text_weights, load_vision_weights
for load, config in ((load_text_weights, TextConfig(weights="roberta-base")),
                     (load_vision_weights, VisionConfig(weights="vit_base_patch16_clip_quickgelu_224.openai"))):
    try:
        load(None, config)
    except ValueError as error:
        print(error)
"""
    environment = os.environ | {"HF_HUB_OFFLINE": "1", "HF_HOME": str(tmp_path), "TORCH_HOME": str(tmp_path)}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment, check=True)
    lines = done.stdout.strip().splitlines()
    assert len(lines) == 2, done.stdout + done.stderr
    assert "model.text.weights='roberta-base'" in lines[0]
    assert "model.vision.weights='vit_base_patch16_clip_quickgelu_224.openai'" in lines[1]
    assert all("check the name and the network, or give a local" in line for line in lines)


def test_config_weights_are_loaded_by_the_model(golden: GoldenCase, tmp_path: Path) -> None:
    torch.save(clip_tensors(golden), tmp_path / "clip.pt")
    vision = dataclasses.replace(golden.model.config.vision, weights=str(tmp_path / "clip.pt"))
    config = dataclasses.replace(golden.model.config, vision=vision)
    model = Meter(config).eval()
    check_vision(golden, model.vision)
    assert [report.what for report in model.weight_reports] == ["vision encoder"]
    assert Meter(config, load_weights=False).weight_reports == []
