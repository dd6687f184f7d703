"""What do the exact savings give in one pre-training step? Forward and backward, plain form against ours, in one run.

    python -m benchmarks.pretrain_step [--size base] [--image-size 288] [--batch 4] [--dtype bf16] [--rounds 3]

Plain is the published procedure in torch's operators (`benchmarks/plain.py`) with texts padded to 50 tokens; ours pads
to the longest caption and takes the kernels and forms that the model chooses by itself. Rounds alternate, so that a
slow spell of the machine meets both.
"""

import argparse
import statistics
import time
from collections.abc import Callable
from dataclasses import replace
from functools import partial

import torch

from benchmarks.plain import PLAIN, pad_text, plain_losses
from benchmarks.record import append
from meter_fast.data.batch import PretrainBatch
from meter_fast.flops import count_flops
from meter_fast.models import config as models
from meter_fast.models.meter import Meter
from meter_fast.objectives.joint import JointLoss

PADDED = 50  # tokens, max_text_len of the published pre-training
CAPTION = 13  # tokens of an average caption, specials included
MASKED = 0.15


def make_batch(config: models.ModelConfig, pairs: int, dtype: torch.dtype, device: str) -> PretrainBatch:
    """Random pairs with captions of about 13 tokens; negatives are partners' pictures."""
    generator = torch.Generator().manual_seed(0)
    lengths = torch.randint(CAPTION - 4, CAPTION + 5, (pairs,), generator=generator)
    length = int(lengths.max())
    mask = torch.arange(length)[None] < lengths[:, None]
    ids = torch.randint(5, config.text.vocab_size, (pairs, length), generator=generator)
    ids = torch.where(mask, ids, config.text.pad_id)
    rows = (mask & (torch.rand(mask.shape, generator=generator) < MASKED)).flatten().nonzero()[:, 0]
    masked = ids.flatten().clone()
    masked[rows] = 4
    labels = torch.arange(pairs) % 2
    side = config.vision.image_size
    return PretrainBatch(
        images=torch.randn(pairs, 3, side, side, generator=generator),
        text_ids=ids,
        text_mask=mask,
        masked_ids=masked.view_as(ids),
        masked_rows=rows,
        masked_labels=ids.flatten()[rows],
        itm_labels=labels,
        itm_images=torch.where(labels == 1, torch.arange(pairs), torch.arange(pairs) ^ 1),
        false_images=None,
        sample_ids=torch.arange(pairs),
    ).to(device, dtype)


def forward_backward(model: Meter, loss: Callable[[], torch.Tensor]) -> float:
    """Seconds of one forward and backward."""
    model.zero_grad(set_to_none=True)
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    start = time.perf_counter()
    loss().backward()
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter() - start


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--size", choices=("tiny", "base"), default="base")
    parser.add_argument("--image-size", type=int, help="pixels; the preset's own by default")
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--dtype", choices=("fp32", "bf16"), default="bf16")
    parser.add_argument("--rounds", type=int, default=3)
    arguments = parser.parse_args()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    dtype = torch.bfloat16 if arguments.dtype == "bf16" else torch.float32
    config = {"tiny": models.tiny, "base": models.base}[arguments.size]()
    if arguments.image_size:
        config = replace(config, vision=replace(config.vision, image_size=arguments.image_size))
    config = replace(
        config, text=replace(config.text, dropout=0.0), fusion=replace(config.fusion, dropout=0.0)
    )  # the same losses on both sides
    torch.manual_seed(0)
    models_of = {
        "plain": Meter(config, kernels=PLAIN).to(device, dtype),
        "fast": Meter(config).to(device, dtype),
    }
    models_of["fast"].load_state_dict(models_of["plain"].state_dict())
    batch = make_batch(config, arguments.batch, dtype, device)
    padded = pad_text(batch, PADDED, config.text.pad_id)
    task = JointLoss(models_of["fast"])
    sides = {
        "plain": lambda: sum(plain_losses(models_of["plain"], padded).values()),
        "fast": lambda: task(batch).loss,
    }
    losses = {name: side().item() for name, side in sides.items()}
    flops = {
        name: count_flops(partial(forward_backward, models_of[name], side), backward=True) / arguments.batch
        for name, side in sides.items()
    }
    seconds: dict[str, list[float]] = {name: [] for name in sides}
    for _ in range(arguments.rounds):
        for name, side in sides.items():
            seconds[name].append(forward_backward(models_of[name], side))
    case = f"{arguments.size} {config.vision.image_size}px batch {arguments.batch} {arguments.dtype}"
    rows = []
    print(f"{case}\n{'':8}{'loss':>10}{'GFLOP/sample':>15}{'ms/sample':>12}")
    for name in sides:
        milliseconds = 1e3 * statistics.median(seconds[name]) / arguments.batch
        print(f"{name:8}{losses[name]:10.4f}{flops[name] / 1e9:15.1f}{milliseconds:12.1f}")
        rows.append(dict(case=case, variant=name, metric="flops_per_sample", value=flops[name], unit="FLOP"))
        rows.append(dict(case=case, variant=name, metric="time_per_sample", value=milliseconds, unit="ms"))
    ratio = statistics.median(seconds["plain"]) / statistics.median(seconds["fast"])
    print(f"plain / fast: {flops['plain'] / flops['fast']:.2f} x the FLOPs, {ratio:.2f} x the time")
    print(f"rows added to {append('pretrain_step', rows)}")


if __name__ == "__main__":
    main()
