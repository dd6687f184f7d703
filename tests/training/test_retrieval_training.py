"""Fine-tuning on retrieval: as one plain loop on any division, from a pre-trained model, recall while training."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from golden_cases import GOLDEN, load_case
from ranks import RankServer
from small_run import assert_same_bits, settings, tensors, write_table

import meter_fast
from meter_fast.config import ConfigError, RunConfig, RunOptions
from meter_fast.data.tokenizer import load_tokenizer
from meter_fast.interop import original_name, original_names
from meter_fast.models.export import save_export
from meter_fast.models.meter import Meter
from meter_fast.recipes import resolve
from meter_fast.retrieval import evaluate_retrieval
from meter_fast.training.optimizer import parameter_groups
from meter_fast.training.resume import Start, load_weights

CASES = [
    {"zero": 0, "dtype": "fp32", "accumulation": 2},
    {"zero": 2, "dtype": "bf16", "accumulation": 1},
    {"zero": 3, "dtype": "fp32", "accumulation": 1},
]
LAYERS = "model.fusion.layers=2"  # so that there is a first one whose work is shared
TOLERANCE = {"fp32": 1e-5, "bf16": 3e-2}  # largest relative difference of the loss


@pytest.mark.slow
def test_steps_are_those_of_the_plain_loop(ranks: RankServer, tmp_path: Path) -> None:
    out = tmp_path / "results.json"
    ranks.run(2, tmp_path, "retrieval_parity:compare_retrieval", out=str(out), cases=CASES, timeout=400).check()
    results = json.loads(out.read_text())
    assert len(results) == len(CASES)
    for result in results:
        worst = max(abs(a - b) / b for a, b in zip(result["losses"], result["reference"], strict=True))
        assert worst < TOLERANCE[result["dtype"]], result
        # retrieval_parity.NOISE says what is left out, and how exact float32 is
        assert result["frozen"] and (result["dtype"] == "bf16" or result["weights"] < 1e-3), result


# ------------------------------------------------------------------------------------------------------ the whole run


@pytest.fixture(scope="module")
def pretrained(data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An export of a model with an ITM head, and the held-out table of the recipe beside that of training."""
    write_table(data / "coco_caption_karpathy_val.arrow", 20, 500)
    words = len(load_tokenizer(data / "tokenizer"))
    config = resolve(["pretrain", "size=tiny", *settings(data, f"model.text.vocab_size={words}", LAYERS)]).model
    torch.manual_seed(3)
    return save_export(Meter(config), tmp_path_factory.mktemp("pretrained") / "export", data / "tokenizer")


def asked(data: Path, start: Path, *more: str) -> list[str]:
    """Settings of a run of six steps; later ones win."""
    return [
        *settings(data), "data.sources=arrow:coco_caption_karpathy_train", "data.val_pairs=5", "run.max_steps=6",
        "data.val_sources=arrow:coco_caption_karpathy_val", "run.max_epochs=0", "run.eval_every=3", "run.save_every=6",
        f"run.init={start}", "objectives.false_texts=3", "engine.dtype=fp32", LAYERS, *more,
    ]  # fmt: skip


def train_retrieval(ranks: RankServer, world: int, run: Path, chosen: list[str], target: str = "workers:train", **more):
    argv = ["retrieval_coco", "size=tiny", f"run.dir={run}", *chosen]
    return ranks.run(world, run / "logs", target, argv=argv, **more)


def test_from_a_pre_trained_model_to_recall(ranks: RankServer, data: Path, pretrained: Path, tmp_path: Path) -> None:
    """The rank head starts from the ITM head, which stays as it is; two processes under ZeRO-3 find the recall that
    `meter-fast evaluate` finds on one."""
    run = tmp_path / "run"
    ended = train_retrieval(ranks, 2, run, asked(data, pretrained, "engine.zero=3", "engine.micro_batch=4")).check()
    for part in (
        "rank_head starts as row 1 of itm_head", "not in the model, left out: mlm_head", "retrieval, itm",
        "held out at step 3: retrieval ir_r1", f"meter-fast evaluate {run} retrieval",
    ):  # fmt: skip
        assert part in ended.logs[0], (part, ended.logs[0])
    model, before = meter_fast.load_model(run), meter_fast.load_model(pretrained)
    assert torch.equal(model.itm_head.weight, before.itm_head.weight)
    assert not torch.equal(model.rank_head.weight, before.itm_head.weight[1:])
    assert (model.rank_head.weight - before.itm_head.weight[1:]).abs().max() < 1e-2
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    said = [row["evaluation"]["retrieval"] for row in rows if "evaluation" in row][-1]
    found = evaluate_retrieval(run, [], 5)
    assert found["head"] == "rank_head" and found["split"] == "arrow:coco_caption_karpathy_val"
    assert {name: said[name] for name in found["retrieval"]} == pytest.approx(found["retrieval"])
    assert (said["pictures"], said["captions"], said["skipped"]) == (5, found["captions"], 0)


def test_two_processes_share_the_pictures_and_another_one_goes_on(
    ranks: RankServer, data: Path, pretrained: Path, tmp_path: Path
) -> None:
    """20 pictures in three blocks: the same scores from two processes as from one; a lost block is done again."""
    more = [f"data.root={data}", "data.val_sources=arrow:coco_caption_karpathy_val"]
    alone = evaluate_retrieval(pretrained, more, scores=tmp_path / "alone")
    written = tmp_path / "recall.json"
    argv = [str(pretrained), "retrieval", *more, "--scores", str(tmp_path / "both"), "--json", str(written)]
    ended = ranks.run(2, tmp_path / "log", "evaluate_workers:evaluate", argv=argv).check()
    assert json.loads(written.read_text()) == {**alone, "world_size": 2}
    assert alone["pictures"] == 20 and alone["head"] == "itm_head"
    assert "pictures 12/12 on each of 2 processes" in ended.logs[0] and "IR@1" not in ended.logs[1]
    expected = (tmp_path / "alone" / "scores.f32").read_bytes()
    assert (tmp_path / "both" / "scores.f32").read_bytes() == expected
    assert len(list((tmp_path / "both" / "blocks").iterdir())) == 3
    (tmp_path / "both" / "blocks" / "00001.json").unlink()
    row = len(expected) // 20
    with open(tmp_path / "both" / "scores.f32", "r+b") as file:
        file.seek(8 * row)
        file.write(bytes(8 * row))
    lines: list[str] = []
    assert evaluate_retrieval(pretrained, more, scores=tmp_path / "both", say=lines.append) == alone
    assert (tmp_path / "both" / "scores.f32").read_bytes() == expected and "pictures 8/8" in lines[-1]
    with pytest.raises(ValueError, match="holds scores of something else"):
        evaluate_retrieval(pretrained, more, 10, scores=tmp_path / "both")
    ended = ranks.run(2, tmp_path / "log2", "evaluate_workers:evaluate", argv=[*argv, "--pictures", "10"]).check(2)
    assert "holds scores of something else" in ended.logs[0] and "Traceback" not in ended.logs[1]


@pytest.mark.slow
def test_resumed_run_has_the_bits_of_the_uninterrupted_one(
    ranks: RankServer, data: Path, pretrained: Path, tmp_path: Path
) -> None:
    chosen = asked(data, pretrained, "run.eval_every=0")
    whole, other = tmp_path / "whole", tmp_path / "other"
    train_retrieval(ranks, 1, whole, chosen).check()
    train_retrieval(ranks, 1, other, chosen, "workers:train_until", end=4).check(75)
    train_retrieval(ranks, 1, other, chosen).check()
    assert_same_bits(tensors(other, 6), tensors(whole, 6), least=100)


# ------------------------------------------------------------------------------------------------ starts and settings


@pytest.mark.parametrize("itm_head", [True, False])
@pytest.mark.parametrize("name", ["clip_bert", "swin_roberta"])
def test_published_checkpoint_as_start(name: str, itm_head: bool, tmp_path: Path) -> None:
    """The rank head starts from a .ckpt's ITM head, whether the model keeps that or not; one of its own is kept."""
    case = load_case(name)
    torch.save({"state_dict": case.state}, tmp_path / "published.ckpt")
    chosen = replace(case.model.config, mlm_head=False, itm_head=itm_head, rank_head=True)
    config = RunConfig(model=chosen, run=RunOptions(init=str(tmp_path / "published.ckpt")))
    model, start = Meter(chosen), Start()
    load_weights(model, config, start)
    assert torch.equal(model.rank_head.weight, case.state["itm_score.fc.weight"][1:])
    assert torch.equal(model.rank_head.bias, case.state["itm_score.fc.bias"][1:])
    assert "rank_head starts as row 1 of itm_head" in start.notes
    if not itm_head:
        assert "not in the model, left out: itm_head" in start.notes
    own = torch.full((1, model.config.cls_width), 0.5)
    torch.save({"state_dict": {**case.state, "rank_output.weight": own, "rank_output.bias": own[0, :1]}},
               tmp_path / "published.ckpt")  # fmt: skip
    load_weights(model, config, Start())
    assert torch.equal(model.rank_head.weight, own)


def test_start_without_an_itm_head_is_told(tmp_path: Path) -> None:
    case = load_case("clip_bert")
    save_export(case.model, tmp_path / "export", None)
    model = Meter(replace(case.model.config, mlm_head=False, itm_head=False))
    model.config = replace(model.config, itm_head=False)
    save_export(model, tmp_path / "bare", None)
    chosen = replace(case.model.config, mlm_head=False, rank_head=True)
    start = Start()
    load_weights(Meter(chosen), RunConfig(model=chosen, run=RunOptions(init=str(tmp_path / "bare"))), start)
    assert {"not in the file, starts at random: rank_head", "not in the file, starts at random: itm_head"} <= set(
        start.notes
    )


def test_groups_of_the_full_size_model_are_the_published_ones() -> None:
    golden = json.loads((GOLDEN / "param_groups" / "clip16_roberta_irtr.json").read_text())
    unused = ("vit_model.positional_embedding", "vit_model.ln_final.", "text_transformer.pooler.", "mlm_score.")
    rows = [row for row in golden["rows"] if not row["name"].startswith(unused)]
    expected = {row["name"]: row for row in rows if row["requires_grad"]}
    assert {row["name"] for row in rows} - expected.keys() == {"itm_score.fc.weight", "itm_score.fc.bias"}
    config = resolve(["retrieval_f30k"])
    with torch.device("meta"):
        model = Meter(config.model, load_weights=False)
    model.itm_head.requires_grad_(False)
    found = {}
    for group in parameter_groups(model.named_parameters(), config.optim, original_name):
        for name in group["names"]:
            for published in original_names(name):
                found[published] = (group["index"], group["multiplier"], group["weight_decay"])
    assert found == {name: (row["group"], row["lr_mult"], row["weight_decay"]) for name, row in expected.items()}
    assert (config.optim.lr, config.optim.head_multiplier, config.optim.cross_modal_multiplier) == (
        golden["learning_rate"], golden["lr_mult_head"], golden["lr_mult_cross_modal"],
    )  # fmt: skip


@pytest.mark.parametrize("name", ["f30k", "coco"])
def test_recipes(name: str) -> None:
    config = resolve([f"retrieval_{name}"])
    data, goals = config.data, config.objectives
    assert (config.engine.global_batch, config.run.max_epochs, config.model.vision.image_size) == (512, 10, 384)
    assert (data.max_text_length, goals.false_texts, config.optim.warmup) == (40, 15, 0.1)
    assert goals.names == ("retrieval", "itm") and goals.false_text_choice == "other_picture"
    assert not any("test" in source or source == name for source in (*data.sources, *data.val_sources))
    assert data.val_sources == (f"arrow:{name}_caption_karpathy_val",) and "val" not in data.sources[0].split("rest")[0]
    published = resolve([f"retrieval_{name}", "published=true"])
    assert published.data.sources == published.data.val_sources == (name,)
    assert (published.objectives.itm_negatives, published.objectives.false_text_choice) == ("dataset", "dataset")
    other = resolve([f"retrieval_{name}", "vision=swin_b_384", "text=bert_base", "fusion=merged_attention"])
    assert (other.model.vision.name, other.data.transform, other.data.tokenizer) == (
        "swin",
        "imagenet",
        "bert-base-uncased",
    )
    assert other.model.fusion.name == "merged_attention" and other.model.rank_head and other.model.itm_head
    assert resolve([f"retrieval_{name}", "size=tiny"]).data.tokenizer == "init"


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ("objectives.names=retrieval,mlm", "objectives.names=retrieval,mlm: retrieval trains alone or with itm"),
        ("objectives.false_texts=0", r"objectives.false_texts=0: 1 or more"),
        ("objectives.false_text_choice=batch", r"objectives.false_text_choice=batch: one of other_picture, dataset"),
        ("engine.micro_batch=3", r"engine.micro_batch=3: must be even"),
    ],
)
def test_settings_that_contradict(change: str, said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        resolve(["retrieval_f30k", change])
