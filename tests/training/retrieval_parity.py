"""Steps of retrieval by DeepSpeed and by a plain loop, inside one process of a test run. Helpers only, no tests."""

import json
from dataclasses import replace

import torch
from parity import PAIRS as PICTURES
from parity import batch_of, configuration, pairs_of

from meter_fast.config import EngineConfig, ObjectivesConfig, RunConfig
from meter_fast.data.batch import PretrainBatch, RankedTexts
from meter_fast.interop import original_name
from meter_fast.models.meter import Meter
from meter_fast.objectives.joint import counts_of
from meter_fast.training import world as worlds
from meter_fast.training.engine import Engine
from meter_fast.training.optimizer import AdamW, Schedule, parameter_groups
from meter_fast.training.state import WEIGHT
from meter_fast.training.tasks import joint_loss

STEPS, FALSE = 6, 3
# Their gradient is rounding, which Adam scales up: a bias that is the same for all candidates or all keys changes no
# softmax. The picture's half of the rank head's weight is near that, as a picture's candidates share the picture: the
# plain loop in float32 is 5e-3 off the one in float64 there, and 4e-4 in the worst of the other weights.
NOISE = ("key.bias", "query_key_value.bias", "key_value.bias", "qkv.bias", "rank_head.bias")


def retrieval_configuration() -> RunConfig:
    config = configuration(0.0)
    return replace(
        config,
        model=replace(config.model, mlm_head=False, rank_head=True, fusion=replace(config.model.fusion, layers=2)),
        objectives=ObjectivesConfig(names=("retrieval", "itm"), false_texts=FALSE),
        run=replace(config.run, max_steps=STEPS),
    )


def pictures_of(step: int, rows: slice) -> PretrainBatch:
    """Rows of the global batch of a step; the false texts of a picture are those of the next ones."""
    pairs = pairs_of(step)
    batch = batch_of(pairs[rows])
    numbers = range(PICTURES)[rows]
    false = [pairs[(number + 1 + place) % PICTURES][1] for number in numbers for place in range(FALSE)]
    texts = [pairs[number][1] for number in numbers] + false
    mask = torch.arange(max(map(len, texts))) < torch.tensor([[len(text)] for text in texts])
    ids = torch.zeros(mask.shape, dtype=torch.int64)
    ids[mask] = torch.cat(texts)
    return replace(batch, ranked=RankedTexts(ids, mask))


def plain_steps(config: RunConfig) -> tuple[list[float], dict[str, torch.Tensor]]:
    """One process, fp32, the global batch at once: losses of each step, and the weights at the end."""
    torch.manual_seed(0)
    module = joint_loss(Meter(config.model), config)
    groups = parameter_groups(module.model.named_parameters(), config.optim, original_name)
    optimizer = AdamW(groups, betas=config.optim.betas, eps=config.optim.eps)
    schedule = Schedule.of(config.optim, config.run.max_steps)
    losses = []
    for step in range(STEPS):
        schedule.apply(optimizer.param_groups, step)
        loss = module(pictures_of(step, slice(0, PICTURES))).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return losses, {name: p.detach() for name, p in module.model.named_parameters()}


def steps_by_engine(config: RunConfig, world: worlds.World) -> dict:
    torch.manual_seed(0)
    model = Meter(config.model)
    masters = {name: p.detach().clone() for name, p in model.named_parameters()} if world.is_main else None
    engine = Engine(joint_loss(model, config), config, world, original_name, masters)
    micro, losses = config.engine.micro_batch, []
    for step in range(STEPS):
        firsts = [(a * world.size + world.rank) * micro for a in range(engine.accumulation)]
        batches = [pictures_of(step, slice(first, first + micro)) for first in firsts]
        counts = counts_of(engine.objectives, batches)
        counts = dict(zip(counts, world.sum(list(counts.values())), strict=True))
        numbers = engine.step(step, batches, counts).read()
        losses.append(world.sum([sum(numbers.losses.values())])[0] / (engine.accumulation * world.size))
    return {"losses": losses, "weights": {name: tensor.clone() for _, name, tensor in engine.state.read((WEIGHT,))}}


def compare_retrieval(out: str, cases: list[dict]) -> int:
    """Run all `cases` and write what the main process found to `out`; stage 3 last, it changes torch for good."""
    world = worlds.start(60)
    config = retrieval_configuration()
    reference, weights = plain_steps(config)
    weights["rank_head.weight"] = weights["rank_head.weight"][:, : config.model.fusion.width]
    results = []
    for case in sorted(cases, key=lambda case: case["zero"]):
        engine = EngineConfig(
            zero=case["zero"], dtype=case["dtype"], global_batch=PICTURES,
            micro_batch=PICTURES // world.size // case["accumulation"],
        )  # fmt: skip
        found = steps_by_engine(replace(config, engine=engine), world)
        moved = found.pop("weights")
        moved["rank_head.weight"] = moved["rank_head.weight"][:, : config.model.fusion.width]
        apart = [
            ((moved[n] - weights[n]).norm() / weights[n].norm().clamp_min(1e-3)).item()
            for n in moved
            if not n.endswith(NOISE)
        ]
        results.append(
            {**case, **found, "reference": reference, "weights": max(apart), "frozen": "itm_head.weight" not in moved}
        )
    if world.is_main:
        with open(out, "w") as file:
            json.dump(results, file)
    return 0
