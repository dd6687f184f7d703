"""Steps of question answering by DeepSpeed and by a plain loop, inside one process of a test run. Helpers only."""

import json
from dataclasses import replace
from functools import partial
from pathlib import Path

import torch
from parity import WORDS, configuration

from meter_fast.config import EngineConfig, ObjectivesConfig, RunConfig
from meter_fast.data.batch import VqaBatch
from meter_fast.interop import original_name
from meter_fast.models.meter import Meter
from meter_fast.objectives.joint import JointLoss, counts_of
from meter_fast.training import world as worlds
from meter_fast.training.engine import DS_CONFIGS, Engine
from meter_fast.training.layer_decay import layers_above
from meter_fast.training.optimizer import AdamW, Schedule, parameter_groups
from meter_fast.training.state import WEIGHT

STEPS, QUESTIONS, ANSWERS = 12, 8, 11


def vqa_configuration(layer_decay: float) -> RunConfig:
    """A model without heads of pre-training."""
    config = configuration(0.0)
    return replace(
        config,
        model=replace(config.model, mlm_head=False, itm_head=False, vqa_answers=ANSWERS),
        objectives=ObjectivesConfig(names=("vqa",)),
        optim=replace(config.optim, head_multiplier=2.0, layer_decay=layer_decay),
        run=replace(config.run, max_steps=STEPS),
    )


def questions_of(step: int, rows: slice) -> VqaBatch:
    """Rows of the global batch of a step; questions 2i and 2i+1 are about one picture."""
    chance = torch.Generator().manual_seed(step)
    pictures = torch.randn(QUESTIONS // 2, 3, 32, 32, generator=chance)
    lengths = torch.randint(3, 10, (QUESTIONS,), generator=chance)
    ids = torch.randint(4, WORDS, (QUESTIONS, 10), generator=chance)
    scores = torch.rand(QUESTIONS, ANSWERS, generator=chance)
    targets = torch.where(torch.arange(ANSWERS) == ids[:, :1] % ANSWERS, 1.0, 0.3 * (scores < 0.1))
    mask = torch.arange(10) < lengths[:, None]
    about = (torch.arange(QUESTIONS) // 2)[rows]
    distinct = about.unique()
    longest = int(lengths[rows].max())
    return VqaBatch(
        images=pictures[distinct],
        image_rows=torch.searchsorted(distinct, about),
        text_ids=torch.where(mask, ids, 0)[rows, :longest],
        text_mask=mask[rows, :longest],
        targets=targets[rows],
        question_ids=torch.arange(QUESTIONS)[rows],
        sample_ids=torch.arange(QUESTIONS)[rows],
    )


def plain_steps(config: RunConfig) -> tuple[list[float], list[float], dict[str, torch.Tensor]]:
    """One process, fp32, the global batch at once: losses and scores of each step, and the weights at the end."""
    torch.manual_seed(0)
    model = Meter(config.model)
    above = partial(layers_above, config=config.model)
    groups = parameter_groups(model.named_parameters(), config.optim, original_name, above)
    optimizer = AdamW(groups, betas=config.optim.betas, eps=config.optim.eps)
    schedule = Schedule.of(config.optim, config.run.max_steps)
    losses, scores = [], []
    for step in range(STEPS):
        schedule.apply(optimizer.param_groups, step)
        found = JointLoss(model, ("vqa",))(questions_of(step, slice(0, QUESTIONS)))
        found.loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(found.loss.item())
        scores.append(found.metrics["vqa"][0].item())
    return losses, scores, {name: p.detach() for name, p in model.named_parameters()}


def steps_by_engine(config: RunConfig, world: worlds.World) -> dict:
    """The same by DeepSpeed on this world's processes."""
    torch.manual_seed(0)
    model = Meter(config.model)
    start = {name: p.detach().clone() for name, p in model.named_parameters()}
    engine = Engine(JointLoss(model, ("vqa",)), config, world, original_name, start if world.is_main else None)
    micro, losses, scores = config.engine.micro_batch, [], []
    for step in range(STEPS):
        firsts = [(a * world.size + world.rank) * micro for a in range(engine.accumulation)]
        batches = [questions_of(step, slice(first, first + micro)) for first in firsts]
        counts = counts_of(engine.objectives, batches)
        counts = dict(zip(counts, world.sum(list(counts.values())), strict=True))
        numbers = engine.step(step, batches, counts).read()
        loss, score = world.sum([numbers.losses["vqa"], numbers.correct["vqa"]])
        losses.append(loss / (engine.accumulation * world.size))
        scores.append(score)
    weights = {name: tensor.clone() for _, name, tensor in engine.state.read((WEIGHT,))}
    return {"losses": losses, "scores": scores, "weights": weights, "rates": engine.rates()}


def compare_vqa(out: str, cases: list[dict]) -> int:
    """Run all `cases` and write what the main process found to `out`; stage 3 last, it changes torch for good."""
    world = worlds.start(60)
    everything = json.loads((DS_CONFIGS / "zero3.json").read_text())
    everything["zero_optimization"]["stage3_param_persistence_threshold"] = 0  # so that small tensors are split, too
    path = Path(out).with_suffix(f".zero3-{world.rank}.json")
    path.write_text(json.dumps(everything))
    plain = {decay: plain_steps(vqa_configuration(decay)) for decay in {case["layer_decay"] for case in cases}}
    results = []
    for case in sorted(cases, key=lambda case: case["zero"]):
        engine = EngineConfig(
            zero=case["zero"], dtype=case["dtype"], global_batch=QUESTIONS,
            micro_batch=QUESTIONS // world.size // case["accumulation"],
            ds_config=str(path) if case["zero"] == 3 else "",
        )  # fmt: skip
        found = steps_by_engine(replace(vqa_configuration(case["layer_decay"]), engine=engine), world)
        losses, scores, weights = plain[case["layer_decay"]]
        moved = found.pop("weights")
        distances = [((moved[n] - weights[n]).norm() / weights[n].norm().clamp_min(1e-3)).item() for n in weights
                     if not n.endswith(("key.bias", "query_key_value.bias", "key_value.bias", "qkv.bias"))]  # fmt: skip
        results.append({**case, **found, "reference": losses, "expected": scores, "weights": max(distances)})
    if world.is_main:
        Path(out).write_text(json.dumps(results))
    return 0
