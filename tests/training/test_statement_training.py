"""Fine-tuning on statements, NLVR2 and SNLI-VE: as one plain loop on any division, from a pre-trained model, from one
to the other, resumed, refused."""

import io
import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
import torch
from golden_cases import GOLDEN, load_case
from PIL import Image
from ranks import Ended, RankServer
from safetensors.torch import load_file
from small_run import MODEL, WORDS, assert_same_bits, samples, settings, tensors

import meter_fast
from meter_fast.config import ConfigError, RunConfig, RunOptions
from meter_fast.evaluate import evaluate_split
from meter_fast.interop import original_name, original_names
from meter_fast.models.meter import Meter
from meter_fast.objectives.joint import JointLoss
from meter_fast.recipes import resolve
from meter_fast.training import checkpoint
from meter_fast.training.optimizer import parameter_groups
from meter_fast.training.resume import Start, load_weights
from meter_fast.training.unreached import freeze_unreached

TASKS = {"nlvr2": "nlvr2_head", "snli_ve": "snli_head"}
TABLES = {"nlvr2": ("nlvr2_train", "nlvr2_dev"), "snli_ve": ("snli_train", "snli_dev")}
CASES = [
    {"task": task, "zero": zero, "dtype": dtype, "accumulation": accumulation, "layer_decay": 1.0}
    for task, zero, dtype, accumulation in [
        ("nlvr2", 0, "fp32", 2), ("nlvr2", 2, "fp32", 1), ("nlvr2", 3, "fp32", 2), ("nlvr2", 2, "bf16", 2),
        ("snli_ve", 2, "fp32", 2), ("snli_ve", 3, "fp32", 1), ("snli_ve", 2, "bf16", 1),
    ]
]  # fmt: skip
TOLERANCE = {"fp32": 1e-5, "bf16": 3e-2}  # largest relative difference of the loss


@pytest.mark.slow
def test_steps_are_those_of_the_plain_loop(ranks: RankServer, tmp_path: Path) -> None:
    out = tmp_path / "results.json"
    ranks.run(2, tmp_path, "fine_tuning_parity:compare_tuning", out=str(out), cases=CASES, timeout=400).check()
    results = json.loads(out.read_text())
    assert len(results) == len(CASES)
    for result in results:
        assert max(result["reference"]) > min(result["reference"]) + 0.1
        worst = max(abs(a - b) / b for a, b in zip(result["losses"], result["reference"], strict=True))
        assert worst < TOLERANCE[result["dtype"]], result
        if result["dtype"] == "fp32":
            assert result["weights"] < 1e-4, result
            assert result["scores"] == result["expected"]


# ------------------------------------------------------------------------------------------------------ the whole run


def write_statement_table(path: Path, rows: int, first: int) -> None:
    """Noisy pictures, of NLVR2 two a row, with three statements each."""
    written = []
    for number in range(first, first + rows):
        chance = np.random.default_rng(number)
        images = []
        for _ in range(2):
            out = io.BytesIO()
            Image.fromarray(chance.integers(0, 256, (40, 40, 3), np.uint8)).save(out, "PNG")
            images.append(out.getvalue())
        texts = [" ".join(chance.choice(WORDS, 5)) + f" {k}" for k in range(3)]
        if path.name.startswith("nlvr2"):
            answers = [str(bool(chance.integers(2))) for _ in texts]
            written.append({"image_0": images[0], "image_1": images[1], "questions": texts, "answers": answers,
                            "identifier": f"{number}"})  # fmt: skip
        else:
            labels = [int(chance.integers(3)) for _ in texts]
            written.append({"image": images[0], "sentences": [["a", text] for text in texts], "labels": labels})
    table = pa.Table.from_pylist(written)
    with pa.OSFile(str(path), "wb") as sink, pa.ipc.new_file(sink, table.schema) as writer:
        writer.write_table(table)


@pytest.fixture(scope="module")
def said(data: Path) -> Path:
    """Tables of statements beside those of captions."""
    for train, dev in TABLES.values():
        write_statement_table(data / f"{train}.arrow", 16, 0)
        write_statement_table(data / f"{dev}.arrow", 8, 500)
    return data


def chosen_for(data: Path, task: str, *more: str) -> list[str]:
    """Settings of a run of 12 steps on the 48 statements of training; later ones win."""
    return [
        *settings(data), f"data.val_sources=arrow:{TABLES[task][1]}", "data.val_pairs=20", "run.max_steps=0",
        "run.max_epochs=2", "run.eval_every=6", *more,
    ]  # fmt: skip


def tune(
    ranks: RankServer, world: int, task: str, run: Path, chosen: list[str], target: str = "workers:train", **options
) -> Ended:
    argv = [task, "size=tiny", f"run.dir={run}", *chosen]
    return ranks.run(world, run / "logs", target, argv=argv, **options)


def test_from_a_pre_trained_model_and_on_to_the_other_task(
    ranks: RankServer, said: Path, pretrained: Path, tmp_path: Path
) -> None:
    """NLVR2 from an export, SNLI-VE from NLVR2: weights but the heads are taken, token types grow and shrink, and the
    score of the last evaluation is the one that `meter-fast evaluate` finds."""
    runs = {task: tmp_path / task for task in TASKS}
    still = ["data.tokenizer=init", "optim.lr=0", "engine.dtype=fp32"]
    start = pretrained / "export"
    expected = {
        "nlvr2": (
            "resized: fusion.token_types.weight from 2 to 3 rows, new ones start as row 1",
            "not in the file, starts at random: nlvr2_head", "not in the model, left out: mlm_head",
            "arrow:nlvr2_train: 1 files, 16 pairs of pictures, 48 statements", "steps         12, warm-up 1",
        ),
        "snli_ve": (
            "resized: fusion.token_types.weight from 3 to 2 rows, row 2 left out",
            "not in the file, starts at random: snli_head", "not in the model, left out: nlvr2_head",
            "arrow:snli_train: 1 files, 16 pictures, 48 hypotheses",
        ),
    }  # fmt: skip
    for task, run in runs.items():
        ended = tune(ranks, 2, task, run, chosen_for(said, task, f"run.init={start}", *still)).check()
        for part in (*expected[task], f"held out at step 6: {task} loss", f"meter-fast evaluate {run} {task}"):
            assert part in ended.logs[0], (part, ended.logs[0])
        start = run / "export"
        rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
        last = [row["evaluation"][task] for row in rows if "evaluation" in row][-1]
        scores = evaluate_split(run, task, [], 20)
        assert scores[task]["all"]["accuracy"] == pytest.approx(last["accuracy"], abs=1e-6)
        assert scores[task]["all"]["count"] == last["count"] == 20
        with pytest.raises(ValueError, match=rf"not trained on {task}.*train {task} run.init={pretrained}/export"):
            evaluate_split(pretrained, task, [f"data.root={said}"])
    before, one, other = (meter_fast.load_model(run) for run in (pretrained, *runs.values()))
    types = before.fusion.token_types.weight
    assert torch.equal(one.fusion.token_types.weight, types[[0, 1, 1]])  # the learning rate is 0
    assert torch.equal(other.fusion.token_types.weight, types)
    for name, value in before.fusion.layers.state_dict().items():
        assert torch.equal(one.fusion.layers.state_dict()[name], value), name
        assert torch.equal(other.fusion.layers.state_dict()[name], value), name


def test_resumed_on_another_number_of_processes(ranks: RankServer, said: Path, tmp_path: Path) -> None:
    """Stopped on one process in the second epoch and gone on with on two: the samples of the uninterrupted run; on as
    many processes as before, its bits."""
    chosen = chosen_for(said, "nlvr2", "engine.dtype=fp32", "run.eval_every=0")
    whole, same, other = tmp_path / "whole", tmp_path / "same", tmp_path / "other"
    tune(ranks, 1, "nlvr2", whole, chosen).check()
    for run in (same, other):
        tune(ranks, 1, "nlvr2", run, chosen, "workers:train_until", end=8).check(75)
    tune(ranks, 1, "nlvr2", same, chosen).check()
    (other / "samples-0.jsonl").unlink()
    tune(ranks, 2, "nlvr2", other, [*chosen, "engine.micro_batch=2"]).check()
    assert_same_bits(tensors(same, 12), tensors(whole, 12), least=100)
    seen = samples(whole, 1)
    assert list(seen) == list(range(12)) and sorted(i for s in range(6) for i in seen[s]) == list(range(48))
    assert samples(other, 2) == {step: seen[step] for step in range(8, 12)}


def test_refusals_say_why(ranks: RankServer, said: Path, pretrained: Path, tmp_path: Path) -> None:
    """Each ends with code 2, one message, no stack, before anything is trained."""
    cases = [
        ("nlvr2", ["data.sources=arrow:nlvr2_balanced"], "no table nlvr2_balanced.arrow"),
        ("nlvr2", ["data.sources=arrow:snli_train"], "no column 'image_0'; a table of statements"),
        ("nlvr2", ["data.sources=vqa"], "unknown data source 'vqa' of statements: choose nlvr2 or arrow"),
        ("snli_ve", ["data.val_sources=arrow:nlvr2_dev"], "no column 'image'; a table of hypotheses"),
        ("snli_ve", ["engine.global_batch=10"], "engine.global_batch=10 is not a multiple of 4"),
        ("nlvr2", [f"run.init={pretrained / 'export'}", "model.fusion.width=64"], "does not fit the model"),
    ]
    for number, (task, change, words) in enumerate(cases):
        run = tmp_path / f"run-{number}"
        ended = tune(ranks, 1, task, run, chosen_for(said, task, *change)).check(2)
        assert words in ended.logs[0] and "error:" in ended.logs[0] and "Traceback" not in ended.logs[0], ended.logs
        assert not checkpoint.steps(run / "checkpoints")


# ------------------------------------------------------------------------------------------------ published checkpoints


@pytest.mark.parametrize("name", ["clip_bert", "swin_roberta"])
def test_published_checkpoints_as_start(name: str, tmp_path: Path) -> None:
    """A pre-training .ckpt for NLVR2, whose second picture starts as the first; one of NLVR2 for SNLI-VE, whose third
    row is left out; one of NLVR2 for NLVR2 as it is."""
    case = load_case(name)
    plain = replace(case.model.config, mlm_head=False, itm_head=False)
    types = case.state["token_type_embeddings.weight"]
    tasks = load_file(GOLDEN / name / "state_tasks.safetensors")
    fine = {key: value for key, value in case.state.items() if not key.startswith(("mlm_score.", "itm_score."))}
    fine |= {key: value for key, value in tasks.items() if key.startswith(("nlvr2_classifier.", "token_type_"))}
    three = replace(plain, fusion=replace(plain.fusion, token_types=3), nlvr2_head=True)
    table = "token_type_embeddings.weight"
    for number, (state, chosen, rows, notes) in enumerate(
        [
            (case.state, three, types[[0, 1, 1]],
             [f"resized: {table} from 2 to 3 rows, new ones start as row 1", "at random: nlvr2_classifier.3.weight"]),
            (fine, replace(plain, snli_head=True), types,
             [f"resized: {table} from 3 to 2 rows, row 2 left out", "left out: nlvr2_classifier.3.bias"]),
            (fine, three, tasks[table], ["tensors matched"]),
        ]
    ):  # fmt: skip
        file = tmp_path / f"{number}.ckpt"
        torch.save({"state_dict": state}, file)
        model, start = Meter(chosen), Start()
        load_weights(model, RunConfig(model=chosen, run=RunOptions(init=str(file))), start)
        assert torch.equal(model.fusion.token_types.weight, rows)
        said = "\n".join(start.notes)
        for note in notes:
            assert note in said, said
        assert ("resized: token" in said) == (number < 2)
        layers = case.model.fusion.layers.state_dict()
        assert all(torch.equal(value, layers[key]) for key, value in model.fusion.layers.state_dict().items())


# -------------------------------------------------------------------------------------------------------------- recipes


@pytest.mark.parametrize(("task", "name"), [("nlvr2", "clip16_roberta_nlvr2"), ("snli_ve", "clip16_roberta_snli")])
def test_groups_of_the_full_size_model_are_the_published_ones(task: str, name: str) -> None:
    golden = json.loads((GOLDEN / "param_groups" / f"{name}.json").read_text())
    unused = ("vit_model.positional_embedding", "vit_model.ln_final.", "text_transformer.pooler.")
    expected = {row["name"]: row for row in golden["rows"] if not row["name"].startswith(unused)}
    config = resolve([task])
    with torch.device("meta"):
        model = Meter(config.model, load_weights=False)
    found, shapes = {}, dict(model.named_parameters())
    for group in parameter_groups(model.named_parameters(), config.optim, original_name):
        for own in group["names"]:
            for published in original_names(own):
                found[published] = (group["index"], group["multiplier"], group["weight_decay"])
    assert found == {key: (row["group"], row["lr_mult"], row["weight_decay"]) for key, row in expected.items()}
    assert list(shapes["fusion.token_types.weight"].shape) == expected["token_type_embeddings.weight"]["shape"]
    optim = config.optim
    told = optim.lr, optim.head_multiplier, optim.cross_modal_multiplier, optim.weight_decay
    assert told == (golden["learning_rate"], golden["lr_mult_head"], golden["lr_mult_cross_modal"], 0.01)


def test_recipes_give_the_published_numbers() -> None:
    for task, batch, epochs, side, train in [("nlvr2", 256, 10, 288, "nlvr2"), ("snli_ve", 64, 5, 384, "snli")]:
        config = resolve([task])
        assert (config.engine.global_batch, config.run.max_epochs) == (batch, epochs)
        assert (config.model.vision.image_size, config.optim.warmup, config.data.max_text_length) == (side, 0.1, 50)
        assert config.data.sources == (f"arrow:{train}_train",) and config.data.val_sources == (f"arrow:{train}_dev",)
        assert getattr(config.model, TASKS[task]) and not config.model.mlm_head and not config.model.itm_head
        assert config.model.fusion.token_types == (3 if task == "nlvr2" else 2)
        published = resolve([task, "published=true"]).data
        assert published.sources == published.val_sources == (task,) and published.val_split == "val"
        other = resolve([task, "vision=swin_b_384", "text=bert_base", "fusion=merged_attention"])
        assert (other.model.vision.name, other.data.transform) == ("swin", "imagenet")
        assert other.data.tokenizer == "bert-base-uncased" and other.model.fusion.layers == 12
        assert resolve([task, "size=tiny", *MODEL]).model.vision.width == 32


@pytest.mark.parametrize("fusion", ["co_attention", "merged_attention", "encoder_decoder"])
@pytest.mark.parametrize("task", TASKS)
def test_nothing_is_frozen_but_what_the_task_does_not_read(task: str, fusion: str) -> None:
    config = resolve([task, "size=tiny", f"fusion={fusion}", *MODEL]).model
    frozen = freeze_unreached(JointLoss(Meter(config), (task,)), config)
    expected = ("model.lm_head.",) if fusion == "encoder_decoder" else ()
    assert [name for name in frozen if not name.startswith(expected)] == []


def test_what_is_not_read_is_found_without_running_the_model() -> None:
    config = resolve(["nlvr2", "size=tiny", "fusion=encoder_decoder", *MODEL]).model
    module, ran = JointLoss(Meter(config), ("nlvr2",)), []
    for part in module.modules():
        part.register_forward_pre_hook(lambda *_: ran.append(1))
    frozen = freeze_unreached(module, config)
    assert frozen and not ran and all(p.grad is None for p in module.parameters())
    assert {name for name, p in module.named_parameters() if not p.requires_grad} == set(frozen)


@pytest.mark.parametrize(
    ("command", "said"),
    [
        (["nlvr2", "objectives.names=nlvr2,mlm"], r"objectives.names=nlvr2,mlm: nlvr2 trains alone"),
        (["nlvr2", "model.fusion.token_types=2"], r"model.fusion.token_types=2: .*tells two pictures apart"),
        (["snli_ve", "published=yes"], r"published=yes: one of true, false"),
        (["snli_ve", "run.max_steps=100"], r"run.max_epochs=5.0 tells the length, too"),
    ],
)
def test_settings_that_contradict(command: list[str], said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        resolve(command)
