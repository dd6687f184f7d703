"""Fine-tuning on questions: as one plain loop on any division, from a pre-trained model, resumed, refused."""

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
from ranks import RankServer
from small_run import MODEL, WORDS, assert_same_bits, losses, samples, settings, tensors, worst

import meter_fast
from meter_fast.config import ConfigError, RunConfig, RunOptions
from meter_fast.evaluate import evaluate_split
from meter_fast.interop import original_name, original_names
from meter_fast.models.meter import Meter
from meter_fast.recipes import resolve
from meter_fast.training import checkpoint
from meter_fast.training.optimizer import parameter_groups
from meter_fast.training.questions import fit_answers, open_training_questions
from meter_fast.training.resume import Start, load_weights

ANSWERS = ["yes", "no", "red", "two"]
PICTURE_OF = [n // 3 for n in range(60) if n % 5]  # of each answered question of training
CASES = [
    {"task": "vqa", "zero": zero, "dtype": dtype, "accumulation": accumulation, "layer_decay": decay}
    for zero, dtype, accumulation, decay in [
        (0, "fp32", 1, 1.0), (1, "fp32", 4, 0.7), (2, "fp32", 2, 0.7), (3, "fp32", 2, 0.7), (2, "bf16", 2, 1.0),
        (3, "bf16", 1, 0.7),
    ]
]  # fmt: skip
TOLERANCE = {"fp32": 1e-5, "bf16": 2e-2}  # largest relative difference of the loss


@pytest.mark.slow
def test_steps_are_those_of_the_plain_loop(ranks: RankServer, tmp_path: Path) -> None:
    out = tmp_path / "results.json"
    ranks.run(2, tmp_path, "fine_tuning_parity:compare_tuning", out=str(out), cases=CASES, timeout=400).check()
    results = json.loads(out.read_text())
    assert len(results) == len(CASES)
    for result in results:
        assert min(result["reference"]) < result["reference"][0] - 0.5  # it learns, so wrong updates would show
        worst = max(abs(a - b) / b for a, b in zip(result["losses"], result["reference"], strict=True))
        assert worst < TOLERANCE[result["dtype"]], result
        if result["dtype"] == "fp32":
            assert result["weights"] < 1e-4, result
            assert result["scores"] == pytest.approx(result["expected"], abs=1e-4)
        lowest = {name for name in result["rates"] if name.endswith("_lowest")}
        assert bool(lowest) == (result["layer_decay"] < 1), result["rates"]


# ------------------------------------------------------------------------------------------------------ the whole run


def write_question_table(path: Path, pictures: int, first: int, answers: list[str] = ANSWERS) -> None:
    """A table of noisy pictures with three questions each; every fifth question has no answer."""
    rows = []
    for number in range(first, first + pictures):
        chance = np.random.default_rng(number)
        out = io.BytesIO()
        Image.fromarray(chance.integers(0, 256, (40, 40, 3), np.uint8)).save(out, "PNG")
        labels = [[int(chance.integers(len(answers)))] if (3 * number + k) % 5 else [] for k in range(3)]
        rows.append(
            {
                "image": out.getvalue(),
                "questions": [" ".join(chance.choice(WORDS, 5)) + f" {k}" for k in range(3)],
                "answers": [[answers[label] for label in one] for one in labels],
                "answer_labels": labels,
                "answer_scores": [[1.0] * len(one) for one in labels],
                "image_id": number,
                "question_id": [10 * number + k for k in range(3)],
                "split": "train",
            }
        )
    nested = {"answers": pa.string(), "answer_labels": pa.int64(), "answer_scores": pa.float64()}
    types = {name: pa.list_(pa.list_(kind)) for name, kind in nested.items()}
    types |= {"image": pa.binary(), "questions": pa.list_(pa.string()), "question_id": pa.list_(pa.int64()),
              "image_id": pa.int64(), "split": pa.string()}  # fmt: skip
    schema = pa.schema([(name, types[name]) for name in rows[0]])
    with pa.OSFile(str(path), "wb") as sink, pa.ipc.new_file(sink, schema) as writer:
        writer.write_table(pa.Table.from_pylist(rows, schema=schema))


@pytest.fixture(scope="module")
def vqa_data(data: Path) -> Path:
    """Tables of questions beside those of captions."""
    write_question_table(data / "vqav2_train.arrow", 20, 0)
    write_question_table(data / "vqav2_val.arrow", 8, 500)
    return data


def asked(data: Path, *more: str) -> list[str]:
    """Settings of a run of 12 steps on the 48 answered questions of training; later ones win."""
    return [
        *settings(data), "data.val_sources=arrow:vqav2_val", "data.val_pairs=20", "run.max_steps=0", "run.max_epochs=2",
        "run.eval_every=6", *more,
    ]  # fmt: skip


def train_vqa(ranks: RankServer, world: int, run: Path, chosen: list[str], target: str = "workers:train", **options):
    argv = ["vqa", "size=tiny", f"run.dir={run}", *chosen]
    return ranks.run(world, run / "logs", target, argv=argv, **options)


def test_from_a_pre_trained_model_to_answers(ranks: RankServer, vqa_data: Path, pretrained: Path, tmp_path: Path):
    """Weights but the head come from the export, the tokenizer too; the picture is larger; answers go into the export,
    and the score of the last evaluation is the one that `meter-fast evaluate` finds."""
    run = tmp_path / "run"
    ended = train_vqa(ranks, 2, run, asked(
        vqa_data, f"run.init={pretrained / 'export'}", "data.tokenizer=init", "model.vision.image_size=48",
        "optim.lr=0", "engine.dtype=fp32",
    )).check()  # fmt: skip
    for part in (
        "not in the file, starts at random: vqa_head", "not in the model, left out: mlm_head", "left out: itm_head",
        "resized: vision.pos_embed from 5 to 10 rows", "vqa; 4 answers", "steps         12, warm-up 1",
        "arrow:vqav2_train: 1 files, 20 pictures, 48 questions (12 without answers left out)",
        "held out at step 6: vqa loss", f"meter-fast evaluate {run} vqa",
    ):  # fmt: skip
        assert part in ended.logs[0], (part, ended.logs[0])
    model, before = meter_fast.load_model(run), meter_fast.load_model(pretrained)
    assert json.loads((run / "export" / "answers.json").read_text()) == ANSWERS
    assert (run / "best" / "answers.json").is_file()
    assert model.config.vqa_answers == 4 and model.mlm_head is None
    for name, value in model.fusion.state_dict().items():  # the learning rate is 0
        assert torch.equal(value, before.fusion.state_dict()[name]), name
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    said = [row["evaluation"]["vqa"] for row in rows if "evaluation" in row][-1]
    scores = evaluate_split(run, "vqa", [], 20)
    assert scores["vqa"]["all"]["score"] == pytest.approx(said["accuracy"], abs=1e-6)
    assert scores["vqa"]["all"]["count"] == said["count"] == 20
    with pytest.raises(ValueError, match=r"not trained on vqa.*fine-tune it first"):
        evaluate_split(pretrained, "vqa", [f"data.root={vqa_data}"])
    write_question_table(tmp_path / "other.arrow", 4, 0, ["no", "yes", "red", "two"])
    with pytest.raises(ValueError, match=r"other calls label 0 'no', where it should be 'yes'"):
        evaluate_split(run, "vqa", [f"data.root={tmp_path}", "data.val_sources=arrow:other"])


def test_resumed_on_another_number_of_processes(ranks: RankServer, vqa_data: Path, tmp_path: Path):
    """Stopped on one process in the second epoch and gone on with on two: the samples of the uninterrupted run; on as
    many processes as before, its bits."""
    chosen = asked(vqa_data, "engine.dtype=fp32", "run.eval_every=0")
    whole, same, other = tmp_path / "whole", tmp_path / "same", tmp_path / "other"
    train_vqa(ranks, 1, whole, chosen).check()
    for run in (same, other):
        train_vqa(ranks, 1, run, chosen, "workers:train_until", end=8).check(75)
    train_vqa(ranks, 1, same, chosen).check()
    (other / "samples-0.jsonl").unlink()
    train_vqa(ranks, 2, other, [*chosen, "engine.micro_batch=2"]).check()
    assert_same_bits(tensors(same, 12), tensors(whole, 12), least=100)
    seen = samples(whole, 1)
    assert list(seen) == list(range(12)) and sorted(i for s in range(6) for i in seen[s]) == list(range(48))
    late = samples(other, 2)
    assert late == {step: seen[step] for step in range(8, 12)}


def test_questions_by_picture_on_any_division(ranks: RankServer, vqa_data: Path, tmp_path: Path):
    """Two passes in five steps of eight whole pictures: with accumulation, on two processes, stopped and gone on with,
    the same questions in the same order and the same losses; each question once in a pass."""
    chosen = asked(
        vqa_data, "engine.dtype=fp32", "data.questions=by_picture", "data.questions_per_picture=0", "run.eval_every=0",
        "run.save_every=2", "data.augment=randaugment",
    )  # fmt: skip
    one, two, moved = tmp_path / "one", tmp_path / "two", tmp_path / "moved"
    ended = train_vqa(ranks, 1, one, chosen).check()
    assert "8 pictures = 1 processes x 4 x 2 accumulated; each with 2.4 questions, 3 at most" in ended.logs[0]
    train_vqa(ranks, 2, two, [*chosen, "engine.micro_batch=1"]).check()
    train_vqa(ranks, 2, moved, chosen, "workers:train_until", end=2).check(75)
    (moved / "samples-0.jsonl").unlink()
    train_vqa(ranks, 1, moved, [*chosen, "engine.micro_batch=2"]).check()
    seen, found = samples(one, 1), losses(one)
    assert list(seen) == list(range(5)) and sorted(i for s in seen for i in seen[s]) == sorted([*range(48)] * 2)
    for step, numbers in seen.items():
        pictures = [PICTURE_OF[i] for i in numbers]
        assert all(pictures.count(p) in (PICTURE_OF.count(p), 2 * PICTURE_OF.count(p)) for p in pictures), step
    assert samples(two, 2) == seen and {s: samples(moved, 1)[s] for s in range(2, 5)} == {s: seen[s] for s in (2, 3, 4)}
    assert worst(losses(two), found) < 1e-5 and worst(losses(moved), found) < 1e-5
    ended = train_vqa(ranks, 1, moved, [*chosen, "data.questions=single"]).check(2)
    assert "is of another run: data.questions: by_picture -> single" in ended.logs[0]


def test_refusals_of_questions_say_why(ranks: RankServer, vqa_data: Path, pretrained: Path, tmp_path: Path):
    """Each ends with code 2, one message, no stack, before anything is trained."""
    (tmp_path / "answers.json").write_text('["yes", "no"]')
    (tmp_path / "broken.json").write_text("{")
    cases = [
        (["data.sources=arrow:vqav2_minival"], "no table vqav2_minival.arrow"),
        (["data.sources=arrow:coco_caption_karpathy_train"], "no column 'questions'"),
        (["data.sources=coco"], "unknown data source 'coco' of questions"),
        (["data.val_sources=arrow:absent"], "no table absent.arrow"),
        ([f"data.answers={tmp_path / 'answers.json'}"], "there are 2 answers"),
        ([f"data.answers={tmp_path / 'broken.json'}"], "data.answers: cannot read"),
        (["model.vqa_answers=7"], "model.vqa_answers=7: the data have 4 answers"),
        (["data.tokenizer=init"], "data.tokenizer=init: run.init=(empty) has no tokenizer"),
        (["engine.global_batch=10"], "engine.global_batch=10 is not a multiple of 4"),
        ([f"run.init={pretrained / 'export'}", "model.fusion.width=64"], "does not fit the model"),
    ]
    for number, (change, said) in enumerate(cases):
        run = tmp_path / f"run-{number}"
        ended = train_vqa(ranks, 1, run, asked(vqa_data, *change)).check(2)
        assert said in ended.logs[0] and "error:" in ended.logs[0] and "Traceback" not in ended.logs[0], (
            change,
            ended.logs,
        )
        assert not checkpoint.steps(run / "checkpoints")
    run = tmp_path / "other-task"  # a checkpoint of pre-training is of another run
    ended = ranks.run(
        1, tmp_path / "log", "workers:train",
        argv=["vqa", "size=tiny", f"run.dir={run}", *asked(vqa_data), f"run.resume={last_of(pretrained)}"],
    ).check(2)  # fmt: skip
    assert "is of another run" in ended.logs[0] and "objectives.names: mlm,itm -> vqa" in ended.logs[0]


def last_of(run: Path) -> Path:
    folder = run / "checkpoints"
    return checkpoint.path_of(folder, max(checkpoint.steps(folder)))


@pytest.mark.parametrize("name", ["clip_bert", "swin_roberta"])
def test_published_checkpoint_as_start(name: str, tmp_path: Path) -> None:
    """All of a pre-training .ckpt but its heads; the answer head, which it lacks, starts at random and is reported."""
    case = load_case(name)
    torch.save({"state_dict": case.state}, tmp_path / "published.ckpt")
    chosen = replace(case.model.config, mlm_head=False, itm_head=False, vqa_answers=5)
    config = RunConfig(model=chosen, run=RunOptions(init=str(tmp_path / "published.ckpt")))
    model, start = Meter(chosen), Start()
    load_weights(model, config, start)
    own = model.state_dict()
    expected = {
        name: value for name, value in case.model.state_dict().items() if not name.split(".")[0].endswith("_head")
    }
    assert len(expected) > 80
    for name, value in expected.items():
        assert torch.equal(own[name], value), name
    assert (
        set(own) - set(expected) == {name for name in own if name.startswith("vqa_head.")}
        and own["vqa_head.out.weight"].any()
    )
    said = "\n".join(start.notes)
    assert "missing, left at random: vqa_classifier.3.weight" in said
    assert "unexpected, left out: mlm_score.bias" in said


def test_label_space_of_the_start_is_kept(vqa_data: Path, tmp_path: Path) -> None:
    """A model fine-tuned before knows its answers by number: data that number them otherwise are refused."""
    config = resolve(["vqa", "size=tiny", f"data.root={vqa_data}", "data.val_sources=", f"run.init={tmp_path}"])
    sources = open_training_questions(config.data)
    fitted, answers = fit_answers(config, sources)
    assert fitted.model.vqa_answers == 4 and answers.names == tuple(ANSWERS)
    (tmp_path / "answers.json").write_text(json.dumps(ANSWERS))
    assert fit_answers(config, sources)[1] == answers
    (tmp_path / "answers.json").write_text(json.dumps([*ANSWERS[:3], "2"]))
    with pytest.raises(ValueError, match=r"the data calls label 3 'two', where it should be '2'"):
        fit_answers(config, sources)


def test_groups_of_the_full_size_model_are_the_published_ones() -> None:
    golden = json.loads((GOLDEN / "param_groups" / "clip16_roberta_vqa.json").read_text())
    unused = ("vit_model.positional_embedding", "vit_model.ln_final.", "text_transformer.pooler.")
    expected = {row["name"]: row for row in golden["rows"] if not row["name"].startswith(unused)}
    config = resolve(["vqa", "model.vqa_answers=3129"])
    with torch.device("meta"):
        model = Meter(config.model, load_weights=False)
    found = {}
    for group in parameter_groups(model.named_parameters(), config.optim, original_name):
        for name in group["names"]:
            for published in original_names(name):
                found[published] = (group["index"], group["multiplier"], group["weight_decay"])
    assert found == {name: (row["group"], row["lr_mult"], row["weight_decay"]) for name, row in expected.items()}


@pytest.mark.parametrize(
    ("command", "said"),
    [
        (["vqa", "run.max_steps=100"], r"run.max_steps=100: run.max_epochs=10.0 tells the length, too"),
        (["vqa", "run.max_epochs=0"], r"run.max_steps=0: 1 or more, or give run.max_epochs"),
        (["vqa", "objectives.names=vqa,mlm"], r"objectives.names=vqa,mlm: vqa trains alone"),
        (["vqa", "model.vqa_answers=-1"], r"vqa_answers=-1: 0 \(no head\)"),
        (["vqa", "published=yes"], r"published=yes: one of true, false"),
        (["pretrain", "run.max_epochs=-1"], r"run.max_epochs"),
        (["pretrain", "data.questions=by_picture"], r"data.questions=by_picture: only vqa reads questions"),
        (["vqa", "data.questions=grouped"], r"data.questions=grouped: one of single, by_picture"),
        (["vqa", "data.questions_per_picture=-1"], r"data.questions_per_picture=-1: 1 or more, or 0 for all"),
    ],
)
def test_settings_that_contradict(command: list[str], said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        resolve(command)


def test_recipe_gives_the_published_numbers() -> None:
    config = resolve(["vqa"])
    optim = config.optim
    assert (optim.lr, optim.head_multiplier, optim.cross_modal_multiplier, optim.warmup) == (5e-6, 50, 5, 0.1)
    assert (config.engine.global_batch, config.run.max_epochs, config.model.vision.image_size) == (512, 10, 576)
    assert config.data.max_text_length == 50 and not config.model.mlm_head and not config.model.itm_head
    assert config.data.sources == ("arrow:vqav2_train",) and config.data.val_sources == ("arrow:vqav2_val",)
    both = resolve(["vqa", "published=true"])
    assert both.data.sources == ("vqa",) and both.data.val_sources == ()
    bare = resolve(["vqa", "from_encoders=true", "vision=swin_b_384", "text=deberta_v3_base"])
    rates = (
        bare.optim.lr,
        bare.optim.lr * bare.optim.head_multiplier,
        bare.optim.lr * bare.optim.cross_modal_multiplier,
    )
    assert rates == pytest.approx((1e-5, 1e-4, 1e-4))
    assert (bare.model.vision.name, bare.model.vision.image_size, bare.data.transform) == ("swin", 576, "imagenet")
    assert bare.model.text.name == "deberta_v3" and bare.data.tokenizer == "microsoft/deberta-v3-base"
    assert resolve(["vqa", "size=tiny", *MODEL]).model.vision.width == 32
