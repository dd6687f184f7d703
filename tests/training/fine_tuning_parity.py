"""Steps of fine-tuning by DeepSpeed and by a plain loop, inside one process of a test run. Helpers only."""

import json
from dataclasses import replace
from functools import partial
from pathlib import Path

import torch
from parity import WORDS, configuration

from meter_fast.config import EngineConfig, ObjectivesConfig, RunConfig
from meter_fast.data.batch import Batch, StatementBatch, VqaBatch
from meter_fast.interop import original_name
from meter_fast.models.meter import Meter
from meter_fast.objectives.joint import JointLoss, counts_of
from meter_fast.training import world as worlds
from meter_fast.training.engine import DS_CONFIGS, Engine
from meter_fast.training.layer_decay import layers_above
from meter_fast.training.optimizer import AdamW, Schedule, parameter_groups
from meter_fast.training.state import WEIGHT

STEPS, TEXTS, ANSWERS = 12, 8, 11
HEADS = {"vqa": {"vqa_answers": ANSWERS}, "nlvr2": {"nlvr2_head": True}, "snli_ve": {"snli_head": True}}


def tuning(task: str, layer_decay: float) -> RunConfig:
    """A model without heads of pre-training."""
    config = configuration(0.0)
    fusion = replace(config.model.fusion, token_types=3 if task == "nlvr2" else 2)
    return replace(
        config,
        model=replace(config.model, mlm_head=False, itm_head=False, fusion=fusion, **HEADS[task]),
        objectives=ObjectivesConfig(names=(task,)),
        optim=replace(config.optim, head_multiplier=2.0, layer_decay=layer_decay),
        run=replace(config.run, max_steps=STEPS),
    )


def questions_of(step: int, rows: slice) -> VqaBatch:
    """Rows of the global batch of a step; questions 2i and 2i+1 are about one picture."""
    chance = torch.Generator().manual_seed(step)
    pictures = torch.randn(TEXTS // 2, 3, 32, 32, generator=chance)
    lengths = torch.randint(3, 10, (TEXTS,), generator=chance)
    ids = torch.randint(4, WORDS, (TEXTS, 10), generator=chance)
    scores = torch.rand(TEXTS, ANSWERS, generator=chance)
    targets = torch.where(torch.arange(ANSWERS) == ids[:, :1] % ANSWERS, 1.0, 0.3 * (scores < 0.1))
    mask = torch.arange(10) < lengths[:, None]
    about = (torch.arange(TEXTS) // 2)[rows]
    distinct = about.unique()
    longest = int(lengths[rows].max())
    return VqaBatch(
        images=pictures[distinct],
        image_rows=torch.searchsorted(distinct, about),
        text_ids=torch.where(mask, ids, 0)[rows, :longest],
        text_mask=mask[rows, :longest],
        targets=targets[rows],
        question_ids=torch.arange(TEXTS)[rows],
        sample_ids=torch.arange(TEXTS)[rows],
    )


def statements_of(task: str, step: int, rows: slice) -> StatementBatch:
    """Rows of the global batch of a step. Of NLVR2 text i is about pictures i and i + 1, of SNLI-VE texts 2i and 2i + 1
    are about picture i. The first word tells the label."""
    asked = questions_of(step, slice(0, TEXTS))
    chance = torch.Generator().manual_seed(1000 + step)
    pictures = torch.randn(TEXTS + 1, 3, 32, 32, generator=chance)
    numbers = torch.arange(TEXTS)
    about = torch.stack([numbers, numbers + 1], 1) if task == "nlvr2" else (numbers // 2)[:, None]
    distinct = about[rows].unique()
    longest = int(asked.text_mask[rows].sum(1).max())
    return StatementBatch(
        images=pictures[distinct],
        image_rows=torch.searchsorted(distinct, about[rows]),
        text_ids=asked.text_ids[rows, :longest],
        text_mask=asked.text_mask[rows, :longest],
        labels=asked.text_ids[rows, 0] % (2 if task == "nlvr2" else 3),
        sample_ids=numbers[rows],
    )


def batch_of(task: str, step: int, rows: slice) -> Batch:
    """Rows of the global batch of a step of a task."""
    return questions_of(step, rows) if task == "vqa" else statements_of(task, step, rows)


def plain_steps(config: RunConfig) -> tuple[list[float], list[float], dict[str, torch.Tensor]]:
    """One process, fp32, the global batch at once: losses and scores of each step, and the weights at the end."""
    (task,) = config.objectives.names
    torch.manual_seed(0)
    model = Meter(config.model)
    above = partial(layers_above, config=config.model)
    groups = parameter_groups(model.named_parameters(), config.optim, original_name, above)
    optimizer = AdamW(groups, betas=config.optim.betas, eps=config.optim.eps)
    schedule = Schedule.of(config.optim, config.run.max_steps)
    losses, scores = [], []
    for step in range(STEPS):
        schedule.apply(optimizer.param_groups, step)
        found = JointLoss(model, (task,))(batch_of(task, step, slice(0, TEXTS)))
        found.loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(found.loss.item())
        scores.append(found.metrics[task][0].item())
    return losses, scores, {name: p.detach() for name, p in model.named_parameters()}


def steps_by_engine(config: RunConfig, world: worlds.World) -> dict:
    """The same by DeepSpeed on this world's processes."""
    (task,) = config.objectives.names
    torch.manual_seed(0)
    model = Meter(config.model)
    start = {name: p.detach().clone() for name, p in model.named_parameters()}
    engine = Engine(JointLoss(model, (task,)), config, world, original_name, start if world.is_main else None)
    micro, losses, scores = config.engine.micro_batch, [], []
    for step in range(STEPS):
        firsts = [(a * world.size + world.rank) * micro for a in range(engine.accumulation)]
        batches = [batch_of(task, step, slice(first, first + micro)) for first in firsts]
        counts = counts_of(engine.objectives, batches)
        counts = dict(zip(counts, world.sum(list(counts.values())), strict=True))
        numbers = engine.step(step, batches, counts).read()
        loss, score = world.sum([numbers.losses[task], numbers.correct[task]])
        losses.append(loss / (engine.accumulation * world.size))
        scores.append(score)
    weights = {name: tensor.clone() for _, name, tensor in engine.state.read((WEIGHT,))}
    return {"losses": losses, "scores": scores, "weights": weights, "rates": engine.rates()}


def compare_tuning(out: str, cases: list[dict]) -> int:
    """Run all `cases` and write what the main process found to `out`; stage 3 last, it changes torch for good."""
    world = worlds.start(60)
    everything = json.loads((DS_CONFIGS / "zero3.json").read_text())
    everything["zero_optimization"]["stage3_param_persistence_threshold"] = 0  # so that small tensors are split, too
    path = Path(out).with_suffix(f".zero3-{world.rank}.json")
    path.write_text(json.dumps(everything))
    plain = {key: plain_steps(tuning(*key)) for key in {(case["task"], case["layer_decay"]) for case in cases}}
    results = []
    for case in sorted(cases, key=lambda case: case["zero"]):
        key = case["task"], case["layer_decay"]
        engine = EngineConfig(
            zero=case["zero"], dtype=case["dtype"], global_batch=TEXTS,
            micro_batch=TEXTS // world.size // case["accumulation"],
            ds_config=str(path) if case["zero"] == 3 else "",
        )  # fmt: skip
        found = steps_by_engine(replace(tuning(*key), engine=engine), world)
        losses, scores, weights = plain[key]
        moved = found.pop("weights")
        distances = [((moved[n] - weights[n]).norm() / weights[n].norm().clamp_min(1e-3)).item() for n in weights
                     if not n.endswith(("key.bias", "query_key_value.bias", "key_value.bias", "qkv.bias"))]  # fmt: skip
        results.append({**case, **found, "reference": losses, "expected": scores, "weights": max(distances)})
    if world.is_main:
        Path(out).write_text(json.dumps(results))
    return 0
