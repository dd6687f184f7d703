"""The same 20 steps by DeepSpeed and by a plain loop, inside one process of a test run. Helpers only, no tests."""

import json
from dataclasses import replace
from pathlib import Path

import torch

from meter_fast.config import EngineConfig, OptimConfig, RunConfig, RunOptions
from meter_fast.data.batch import PretrainBatch
from meter_fast.interop import original_name
from meter_fast.models.config import FusionConfig, KernelsConfig, ModelConfig, TextConfig, VisionConfig
from meter_fast.models.meter import Meter
from meter_fast.models.text_presets import tiny_text
from meter_fast.objectives.joint import JointLoss, counts_of
from meter_fast.training import world as worlds
from meter_fast.training.engine import DS_CONFIGS, Engine
from meter_fast.training.optimizer import AdamW, Schedule, parameter_groups
from meter_fast.training.state import WEIGHT

STEPS, PAIRS, WORDS = 20, 8, 97  # an odd vocabulary: its tables and biases do not divide by two processes

Pair = tuple[torch.Tensor, torch.Tensor, torch.Tensor]  # picture [3,32,32], ids [L], hidden [L] bool


def configuration(clip: float, text: str = "bert") -> RunConfig:
    """A model of every kind of part, no dropout; a schedule that warms up and decays within the 20 steps."""
    if text != "bert":
        sizes = {"width": 32, "heads": 2, "ffn": 64, "max_positions": 32, "pad_id": 0}
        bert = configuration(clip)
        return replace(bert, model=replace(bert.model, text=replace(tiny_text(text, WORDS), **sizes)))
    return RunConfig(
        model=ModelConfig(
            vision=VisionConfig(width=32, layers=1, heads=2, patch_size=16, image_size=32),
            text=TextConfig(
                name="bert", width=32, layers=1, heads=2, ffn=64, vocab_size=WORDS, max_positions=32, token_types=2,
                eps=1e-12, dropout=0.0, pad_id=0,
            ),
            fusion=FusionConfig(width=32, layers=1, heads=1, dropout=0.0),
        ),
        optim=OptimConfig(lr=4e-3, clip=clip),
        run=RunOptions(max_steps=STEPS),
    )  # fmt: skip


def pairs_of(step: int) -> list[Pair]:
    """The global batch of a step. How many tokens are hidden differs much from pair to pair: some have none."""
    chance = torch.Generator().manual_seed(step)
    pairs = []
    for number in range(PAIRS):
        length = int(torch.randint(4, 12, (1,), generator=chance))
        hidden = torch.rand(length, generator=chance) < 0.15 * (number % 4)
        ids = 4 + (torch.rand(length, generator=chance) ** 4 * (WORDS - 4)).long()  # some words are frequent
        pairs.append((torch.randn(3, 32, 32, generator=chance), ids, hidden))
    return pairs


def batch_of(pairs: list[Pair]) -> PretrainBatch:
    """A micro-batch; of each two pairs the second gets the first one's picture in ITM."""
    count, length = len(pairs), max(len(ids) for _, ids, _ in pairs)
    text, mask = torch.zeros(count, length, dtype=torch.int64), torch.zeros(count, length, dtype=torch.bool)
    hidden = torch.zeros(count, length, dtype=torch.bool)
    for row, (_, ids, hide) in enumerate(pairs):
        text[row, : len(ids)], mask[row, : len(ids)], hidden[row, : len(ids)] = ids, True, hide
    rows = hidden.flatten().nonzero().flatten()
    places = torch.arange(count)
    return PretrainBatch(
        images=torch.stack([image for image, _, _ in pairs]),
        text_ids=text,
        text_mask=mask,
        masked_ids=text.masked_fill(hidden, 3),
        masked_rows=rows,
        masked_labels=text.flatten()[rows],
        itm_labels=1 - places % 2,
        itm_images=places - places % 2,
        false_images=None,
        sample_ids=places,
    )


def plain_loop(config: RunConfig) -> tuple[list[float], dict[str, torch.Tensor]]:
    """One process, fp32, the global batch at once, no DeepSpeed. Losses of each step and the weights at the end."""
    torch.manual_seed(0)
    model = Meter(config.model)
    groups = parameter_groups(model.named_parameters(), config.optim, original_name)
    optimizer = AdamW(groups, betas=config.optim.betas, eps=config.optim.eps)
    schedule = Schedule.of(config.optim, config.run.max_steps)
    losses = []
    for step in range(STEPS):
        schedule.apply(optimizer.param_groups, step)
        batch = batch_of(pairs_of(step))
        loss = JointLoss(model)(batch).loss
        loss.backward()
        if config.optim.clip:
            torch.nn.utils.clip_grad_norm_(model.parameters(), config.optim.clip)
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return losses, {name: p.detach() for name, p in model.named_parameters()}


def by_engine(config: RunConfig, world: worlds.World, steps: int) -> dict:
    """The same by DeepSpeed on this world's processes. What it found, for the test to judge."""
    torch.manual_seed(0)
    model = Meter(config.model, kernels=config.kernels)
    start = {name: p.detach().clone() for name, p in model.named_parameters()}
    engine = Engine(JointLoss(model), config, world, original_name, start if world.is_main else None)
    begun = {(kind, name): tensor.clone() for kind, name, tensor in engine.state.read()}
    micro, losses, norms = config.engine.micro_batch, [], []
    for step in range(steps):
        pairs = pairs_of(step)
        firsts = [(a * world.size + world.rank) * micro for a in range(engine.accumulation)]
        batches = [batch_of(pairs[first : first + micro]) for first in firsts]
        counts = counts_of(engine.objectives, batches)
        counts = dict(zip(counts, world.sum(list(counts.values())), strict=True))
        numbers = engine.step(step, batches, counts).read()
        total = world.sum([sum(numbers.losses.values())])[0]
        losses.append(total / (engine.accumulation * world.size))
        norms.append(numbers.grad_norm)
    return {
        "losses": losses,
        "norms": norms,
        "exact_start": all(begun[WEIGHT, name].equal(value) for name, value in start.items()),
        "empty_moments": all(not tensor.any() for (kind, _), tensor in begun.items() if kind != WEIGHT),
        "weights": {name: tensor.clone() for _, name, tensor in engine.state.read((WEIGHT,))},
    }


def compare(out: str, cases: list[dict]) -> int:
    """Run all `cases` in this process and write what the main one found to `out`. Stage 3 comes last: it changes torch
    for the rest of the process."""
    world = worlds.start(60)
    kinds = {(case["clip"], case.get("text", "bert")) for case in cases}
    references = {kind: plain_loop(configuration(*kind)) for kind in kinds}
    everything = json.loads((DS_CONFIGS / "zero3.json").read_text())
    everything["zero_optimization"]["stage3_param_persistence_threshold"] = 0  # so that small tensors are split, too
    path = Path(out).with_suffix(f".zero3-{world.rank}.json")
    path.write_text(json.dumps(everything))
    results = []
    for case in sorted(cases, key=lambda case: case["zero"]):
        engine = EngineConfig(
            zero=case["zero"], dtype=case["dtype"], offload=case.get("offload", "none"), global_batch=PAIRS,
            micro_batch=PAIRS // world.size // case["accumulation"],
            activation_checkpointing=case.get("activation_checkpointing", False),
            ds_config=str(path) if case["zero"] == 3 and "offload" not in case else "",
        )  # fmt: skip
        kernels = KernelsConfig(**case.get("kernels", {}))
        kind = case["clip"], case.get("text", "bert")
        config = replace(configuration(*kind), engine=engine, kernels=kernels)
        found = by_engine(config, world, case.get("steps", STEPS))
        losses, weights = references[kind]
        moved = found.pop("weights")
        embeddings = next(name for name in weights if name.startswith("text.embeddings.") and "position" not in name)
        found["weights"] = ((moved[embeddings] - weights[embeddings]).norm() / weights[embeddings].norm()).item()
        results.append({**case, **found, "reference": losses[: len(found["losses"])]})
    if world.is_main:
        Path(out).write_text(json.dumps(results))
    return 0


def unused(out: str) -> int:
    """Three steps at stage 0 with a head that no micro-batch reaches; its weight before and after."""
    world = worlds.start(60)
    engine_config = EngineConfig(zero=0, dtype="fp32", global_batch=PAIRS, micro_batch=PAIRS // world.size)
    config = replace(configuration(0.0), engine=engine_config)
    torch.manual_seed(0)
    model = Meter(replace(config.model, snli_head=True))
    weight = max((p for name, p in model.named_parameters() if name.startswith("snli")), key=torch.numel)
    before = weight.tolist()
    engine = Engine(JointLoss(model), config, world, original_name)
    for step in range(3):
        first = world.rank * PAIRS // world.size
        batch = batch_of(pairs_of(step)[first : first + PAIRS // world.size])
        counts = counts_of(engine.objectives, [batch])
        engine.step(step, [batch], dict(zip(counts, world.sum(list(counts.values())), strict=True)))
    if world.is_main:
        Path(out).write_text(json.dumps([before, weight.tolist()]))
    return 0


def checkpointed(out: str) -> int:
    """An engine that is to compute the fusion's blocks again; which parts of its model do."""
    world = worlds.start(60)
    settings = {"activation_checkpointing": True, "checkpointed_parts": ("fusion",)}
    engine_config = EngineConfig(zero=0, dtype="fp32", global_batch=PAIRS, micro_batch=PAIRS, **settings)
    model = Meter(configuration(0.0).model)
    Engine(JointLoss(model), replace(configuration(0.0), engine=engine_config), world, original_name)
    Path(out).write_text(json.dumps([model.fusion.activation_checkpointing, model.vision.grad_checkpointing]))
    return 0
