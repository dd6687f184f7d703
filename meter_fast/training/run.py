"""A run, put together: data, model, engine, monitor and checkpoints of a configuration.

Knows every room of training. Knows nothing of the loop that works with it.
"""

import json
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path

import torch

from meter_fast.config import RunConfig, describe, to_dict
from meter_fast.training import banner, checkpoint
from meter_fast.training.engine import DTYPES, Engine, accumulation
from meter_fast.training.interruption import StopRequest
from meter_fast.training.monitor import Monitor
from meter_fast.training.pairs import Pairs, fit_length, fit_vocabulary, open_tokenizer
from meter_fast.training.resume import Start, checkpoints_of, expected_bytes, find_start, load_weights, restore
from meter_fast.training.saving import Saver
from meter_fast.training.spikes import Spikes
from meter_fast.training.tasks import task_of
from meter_fast.training.world import World


@dataclass
class Run:
    """Everything the loop works with."""

    config: RunConfig
    world: World
    engine: Engine
    pairs: Pairs
    monitor: Monitor
    saver: Saver
    start: Start
    stop: StopRequest = field(default_factory=StopRequest)
    spikes: Spikes = field(default_factory=Spikes)

    @property
    def checkpoints(self) -> Path:
        """The folder of this run's checkpoints."""
        return checkpoints_of(self.config.run.dir)

    def skipped(self) -> dict[str, int]:
        """Samples replaced since the run began, over all processes and resumptions, by cause. Collective."""
        counts = self.world.share(dict(self.pairs.loader.skipped))
        return dict(sum(map(Counter, counts), Counter(self.start.skipped)))


def prepare(config: RunConfig, this: World) -> Run:
    """Open data, model and engine, and show the banner. Collective; raises ValueError or OSError with the remedy."""
    accumulated = accumulation(config.engine.global_batch, config.engine.micro_batch, this.size)
    task = task_of(config.objectives.names)
    sources = this.each(lambda: task.open_sources(config.data))
    this.together(lambda: checkpoint.probe(checkpoints_of(config.run.dir), 0))
    tokenizer, folder = open_tokenizer(config, this, sources) if task.reads_text else (None, None)
    read = fit_length(
        fit_vocabulary(config, tokenizer) if task.reads_text else config, task.draws(config.data, sources)
    )
    config, answers = this.each(lambda: task.fit(read, sources))
    dtype = DTYPES[config.engine.dtype]
    pairs = this.each(lambda: task.open_data(config, this, sources, tokenizer, folder, accumulated, dtype, answers))
    start = find_start(config, this, pairs.identity())
    memory = this.together(lambda: banner.memory(config, this))
    torch.manual_seed(config.run.seed)
    module = this.each(lambda: build(config, this, start))
    this.together(lambda: checkpoint.probe(checkpoints_of(config.run.dir), expected_bytes(count(module))))
    engine = Engine(module, config, this, task.parameter_name, start.masters)
    restore(engine.state, start, this)
    start.reader = start.masters = None
    samples = config.engine.global_batch * pairs.samples_a_draw
    monitor = Monitor(config.run.dir, config.run.max_steps, samples, this.is_main)
    monitor.message(describe(config))
    monitor.banner(banner.rows(config, this, engine, pairs, start, module.model, memory))
    this.together(lambda: note_settings(config))
    monitor.start(start.step)
    options = config.run
    saver = Saver(
        engine.state, this, checkpoints_of(options.dir), options.keep_last, options.async_save, monitor.message
    )
    return Run(config, this, engine, pairs, monitor, saver, start)


def build(config: RunConfig, this: World, start: Start) -> torch.nn.Module:
    """The module in fp32 on the host; weights from files are read on the main process alone."""
    from_files = this.is_main and start.step == 0 and not config.run.init
    task = task_of(config.objectives.names)
    model = task.make(config, from_files)
    if this.is_main:
        load_weights(model, config, start)
    return task.module(model, config)


def count(module: torch.nn.Module) -> int:
    """Number of parameters."""
    return sum(p.numel() for p in module.parameters())


def note_settings(config: RunConfig) -> None:
    """Keep the resolved configuration in the run directory."""
    path = Path(config.run.dir) / "config.json"
    path.write_text(json.dumps(to_dict(config), indent=1) + "\n")
