"""Does a step of fine-tuning take the memory that the estimate says? One optimizer step of visual question answering
by the real engine, on this machine's CPU.

    python -m benchmarks.vqa_step [--size base] [--image-size 576] [--batch 1] [--dtype fp32] [--zero 2] [--keep-all]

Random weights, 3129 answers, texts of 50 tokens, activation checkpointing unless --keep-all. What is measured is the
largest resident size of the process after the step less that after the imports: weights, gradients, optimizer,
activations, and what DeepSpeed and the allocator need besides. At size base that is about 8 GB.
"""

import argparse
import resource
import time
from dataclasses import replace

import torch

from benchmarks.record import append
from meter_fast.config import RunConfig, override
from meter_fast.interop import original_name
from meter_fast.objectives.joint import counts_of
from meter_fast.recipes import resolve
from meter_fast.training import world as worlds
from meter_fast.training.activations import largest_batch
from meter_fast.training.engine import Engine
from meter_fast.training.memory import Memory, estimate_memory
from meter_fast.training.tasks import task_of

ANSWERS = 3129  # of the published label space


def configuration(arguments: argparse.Namespace) -> RunConfig:
    """The recipe's, with one micro-batch a step."""
    settings = [f"model.vqa_answers={ANSWERS}", "run.max_epochs=0", "run.max_steps=10", "data.max_text_length=50"]
    settings += [f"engine.{key}_batch={arguments.batch}" for key in ("global", "micro")]
    settings += [f"engine.dtype={arguments.dtype}", f"engine.zero={arguments.zero}"]
    settings += [f"engine.activation_checkpointing={str(not arguments.keep_all).lower()}"]
    if arguments.image_size:
        settings.append(f"model.vision.image_size={arguments.image_size}")
    config = override(resolve(["vqa", f"size={arguments.size}"]), settings)
    model = replace(config.model, vision=replace(config.model.vision, weights=None))
    return replace(config, model=replace(model, text=replace(model.text, weights=None)))


def largest_resident() -> int:
    """Bytes of this process's memory at its largest so far."""
    return 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss


def take_steps(config: RunConfig, world: worlds.World, steps: int) -> list[float]:
    """Seconds of each optimizer step of a fresh model."""
    task = task_of(config.objectives.names)
    torch.manual_seed(0)
    module = task.module(task.make(config, False), config)
    masters = None
    if config.engine.dtype != "fp32":
        masters = {name: p.detach().clone() for name, p in module.model.named_parameters()}
    engine = Engine(module, config, world, original_name, masters)
    del masters
    batch, seconds = largest_batch(config), []
    for step in range(steps):
        begun = time.perf_counter()
        numbers = engine.step(step, [batch], counts_of(engine.objectives, [batch])).read()
        seconds.append(time.perf_counter() - begun)
        print(f"step {step}: {seconds[-1]:.1f} s, loss {sum(numbers.losses.values()):.4g}", flush=True)
    return seconds


def show(memory: Memory) -> None:
    """The estimate, part by part, in MB."""
    parts = {
        name: getattr(memory, name) for name in ("weights", "gradients", "masters", "moments", "buckets", "update")
    }
    if memory.activations is not None:
        parts |= {"kept by autograd": memory.activations.kept, "peak of the passes": memory.activations.peak}
    for name, size in parts.items():
        print(f"{name:20}{size / 1e6:10.0f} MB")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--size", choices=("tiny", "base"), default="base")
    parser.add_argument("--image-size", type=int, help="pixels; the recipe's own by default")
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--dtype", choices=("fp32", "bf16"), default="fp32")
    parser.add_argument("--zero", type=int, choices=(0, 1, 2, 3), default=2)
    parser.add_argument("--steps", type=int, default=1)
    parser.add_argument("--keep-all", action="store_true", help="no activation checkpointing")
    arguments = parser.parse_args()
    config = configuration(arguments)
    world = worlds.start(1800)
    before = largest_resident()
    seconds = take_steps(config, world, arguments.steps)
    measured = largest_resident() - before
    memory = estimate_memory(config, world.size, world.device)
    show(memory)
    kept = "everything kept" if arguments.keep_all else "checkpointed"
    case = f"{arguments.size} {config.model.vision.image_size}px batch {arguments.batch} {arguments.dtype} "
    case += f"zero {arguments.zero} {kept}"
    print(f"{case}\nestimated {memory.peak / 1e9:.3f} GB, measured {measured / 1e9:.3f} GB: "
          f"{100 * (memory.peak / measured - 1):+.1f} %")  # fmt: skip
    rows = [
        dict(case=case, variant=variant, metric="peak_memory", value=value, unit="B")
        for variant, value in (("estimated", memory.peak), ("measured", measured))
    ]
    rows.append(dict(case=case, variant="measured", metric="time_per_step", value=1e3 * seconds[-1], unit="ms"))
    print(f"rows added to {append('vqa_step', rows)}")


if __name__ == "__main__":
    main()
