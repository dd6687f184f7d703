"""What became of each tensor of a checkpoint. Knows names and shapes, nothing of models."""

from dataclasses import dataclass, field

from torch import Tensor


@dataclass(frozen=True)
class LoadReport:
    """Every name of a published checkpoint is in exactly one of `matched`, `unexpected` and `unused`.

    matched: published names that the model took. resized: (name, rows before, rows after) of position tables, also
    matched. missing: published names that the file lacks; the model keeps its random start (only where the caller
    allowed it). unexpected: names without a place, left out (only where the caller allowed it). unused: tensors that
    published models carry and never compute with, and heads of other tasks: kept for `to_meter`. notes: what else was
    done to matched tensors.
    """

    matched: tuple[str, ...]
    resized: tuple[tuple[str, int, int], ...] = ()
    missing: tuple[str, ...] = ()
    unexpected: tuple[str, ...] = ()
    unused: dict[str, Tensor] = field(default_factory=dict)
    notes: tuple[str, ...] = ()

    def __str__(self) -> str:
        lines = [f"{len(self.matched)} tensors matched"]
        lines += [f"resized: {name} from {before} to {after} rows" for name, before, after in self.resized]
        lines += self.notes
        lines += [f"missing, left at random: {name}" for name in self.missing]
        lines += [f"unexpected, left out: {name}" for name in self.unexpected]
        lines += [f"unused, kept: {name} {tuple(value.shape)}" for name, value in self.unused.items()]
        return "\n".join(lines)
