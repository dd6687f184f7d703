"""Settings: typed overrides, clear refusals, JSON there and back; recipes hold the published numbers."""

import json
from pathlib import Path

import pytest

from meter_fast.config import ConfigError, RunConfig, check, describe, flatten, from_dict, override, to_dict
from meter_fast.models.config import tiny
from meter_fast.recipes import RECIPES, resolve
from meter_fast.training.engine import DS_CONFIGS, accumulation, deepspeed_config

CONFIG = RunConfig(model=tiny())


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("optim.lr=3e-4", 3e-4),
        ("optim.warmup=0.25", 0.25),
        ("optim.warmup=250", 250),
        ("optim.warmup=1", 1),
        ("optim.decay_power=cosine", "cosine"),
        ("optim.decay_power=2", 2.0),
        ("optim.betas=0.8,0.9", (0.8, 0.9)),
        ("engine.zero=3", 3),
        ("engine.compile=True", True),
        ("engine.activation_checkpointing=false", False),
        ("data.sources=coco,f30k", ("coco", "f30k")),
        ("data.sources=arrow:a", ("arrow:a",)),
        ("data.val_sources=", ()),
        ("model.vision.weights=none", None),
        ("model.text.weights=some/name", "some/name"),
        ("model.fusion.layers=4", 4),
        ("objectives.names=itm", ("itm",)),
        ("run.dir=a=b", "a=b"),
    ],
)
def test_values_are_read_by_the_type_of_their_setting(text, value):
    key = text.partition("=")[0]
    found = flatten(override(CONFIG, [text]))[key]
    assert found == value and type(found) is type(value)


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("optim.lrr=1", "did you mean optim.lr?"),
        ("lr=1", "did you mean optim.lr?"),
        ("engine.sources=coco", "did you mean data.sources?"),
        ("data.worker=1", "did you mean data.workers?"),
        ("nothing.like.it=1", r"known: model\.\*, data\.\*, objectives\.\*, optim\.\*, engine\.\*"),
        ("optim.lr", "key=value"),
        ("optim.lr=fast", "optim.lr=fast: expected a number"),
        ("optim.warmup=soon", "a whole number or a number"),
        ("run.max_steps=1.5", "run.max_steps=1.5: expected a whole number"),
        ("engine.zero=4", "one of 0, 1, 2, 3"),
        ("engine.dtype=fp16", "one of bf16, fp32"),
        ("engine.compile=yes", "true or false"),
        ("optim.betas=0.9", "expected 2 values"),
        ("objectives.names=mlm,mim", "one of mlm, itm"),
        ("objectives.names=mlm,mlm", "each once"),
        ("model.vision.image_size=100", "image_size"),
        ("optim.warmup=1.5", "share below 1"),
        ("engine.micro_batch=3", "must be even"),
        ("data.weights=1,2", "one weight for each of the 4 sources"),
        ("engine.checkpointed_parts=", "some of vision,text,fusion,decoder"),
        ("engine.checkpointed_parts=heads", "one of vision, text, fusion, decoder"),
        ("engine.offload=cpu", None),
    ],
)
def test_wrong_settings_say_what_is_wrong(text, said):
    assignments = [text, "engine.zero=1"] if said is None else [text]
    with pytest.raises(ConfigError, match=None if said is None else said.replace("?", r"\?")) as error:
        override(CONFIG, assignments)
    assert text.partition("=")[0] in str(error.value)


def test_json_round_trip_and_unknown_fields():
    config = override(CONFIG, ["optim.warmup=0.2", "data.weights=1,2,3,4", "model.text.weights=x"])
    table = json.loads(json.dumps(to_dict(config)))
    assert from_dict(RunConfig, table) == config
    table["optim"]["momentum"] = 0.9
    with pytest.raises(ConfigError, match=r"optim\.momentum"):
        from_dict(RunConfig, table)
    del table["optim"]["momentum"], table["model"]
    with pytest.raises(ConfigError, match="missing setting: model"):
        from_dict(RunConfig, table)


def test_description_names_every_setting():
    text = describe(CONFIG)
    for key, value in flatten(CONFIG).items():
        assert f"{key.rpartition('.')[2]}={','.join(map(str, value)) if isinstance(value, tuple) else value}" in text
    assert max(map(len, text.splitlines())) <= 110


def test_base_recipe_holds_the_published_numbers():
    config = resolve(["pretrain", "size=base"])
    flat = flatten(config)
    expected = {
        "optim.lr": 1e-5, "optim.weight_decay": 0.01, "optim.head_multiplier": 5, "optim.cross_modal_multiplier": 5,
        "optim.betas": (0.9, 0.98), "optim.eps": 1e-8, "optim.warmup": 0.1, "optim.clip": 0,
        "engine.global_batch": 4096, "run.max_steps": 100_000, "data.max_text_length": 50,
        "data.sources": ("coco", "vg", "sbu", "gcc"), "model.vision.image_size": 288, "model.vision.layers": 11,
        "model.fusion.layers": 6, "objectives.mlm_probability": 0.15,
    }  # fmt: skip
    assert {key: flat[key] for key in expected} == expected


@pytest.mark.parametrize("size", ["tiny", "base"])
@pytest.mark.parametrize("name", list(RECIPES))
def test_recipes_are_sound_and_take_overrides(name, size):
    config = resolve([name, f"size={size}", "run.seed=7"])
    check(config)
    assert config.run.seed == 7


@pytest.mark.parametrize(
    ("argv", "said"),
    [
        ([], "name a recipe first: pretrain"),
        (["size=tiny"], "name a recipe first"),
        (["pretrian"], "did you mean pretrain?"),
        (["pretrain", "size=huge"], "one of tiny, base"),
        (["pretrain", "sise=tiny"], "arguments of the recipe pretrain: size"),
        (["pretrain", "--lr", "3"], "key=value"),
    ],
)
def test_a_wrong_command_line_says_what_is_wrong(argv, said):
    with pytest.raises(ConfigError) as error:
        resolve(argv)
    assert said in str(error.value)


def test_global_batch_arithmetic():
    assert accumulation(4096, 32, 8) == 16
    with pytest.raises(ConfigError) as error:
        accumulation(4096, 24, 8)
    for part in ("4096", "192", "engine.micro_batch=16 or 32", "engine.global_batch=4032 or 4224"):
        assert part in str(error.value)
    with pytest.raises(ConfigError, match=r"engine\.global_batch=12"):
        accumulation(8, 4, 3)


@pytest.mark.parametrize("path", sorted(DS_CONFIGS.glob("*.json")), ids=lambda path: path.stem)
def test_deepspeed_takes_each_config_as_it_is(path: Path):
    from deepspeed.runtime.config import DeepSpeedConfig

    content = json.loads(path.read_text())
    parsed = DeepSpeedConfig(content)
    assert parsed.zero_config.stage == int(path.stem[4]) and parsed.bfloat16_config.enabled


@pytest.mark.parametrize(
    ("zero", "offload", "dtype"), [(0, "none", "fp32"), (1, "none", "bf16"), (2, "cpu", "bf16"), (3, "cpu", "fp32")]
)
def test_the_run_puts_its_numbers_into_the_file(zero, offload, dtype):
    config = override(
        CONFIG,
        [f"engine.zero={zero}", f"engine.offload={offload}", f"engine.dtype={dtype}", "optim.clip=0.5",
         "engine.global_batch=64", "engine.micro_batch=4"],
    )  # fmt: skip
    content = deepspeed_config(config, world_size=2)
    assert content["train_batch_size"] == 64 and content["train_micro_batch_size_per_gpu"] == 4
    assert content["gradient_accumulation_steps"] == 8 and content["gradient_clipping"] == 0.5
    assert content["bf16"]["enabled"] == (dtype == "bf16")
    assert content["zero_optimization"]["stage"] == zero
    assert ("offload_optimizer" in content["zero_optimization"]) == (offload == "cpu")


def test_a_config_file_of_another_stage_is_refused(tmp_path):
    config = override(CONFIG, [f"engine.ds_config={DS_CONFIGS / 'zero3.json'}"])
    with pytest.raises(ConfigError, match=r"say engine\.zero=3"):
        deepspeed_config(config, 1)
    with pytest.raises(ConfigError, match="cannot read"):
        deepspeed_config(override(CONFIG, [f"engine.ds_config={tmp_path / 'none.json'}"]), 1)
