"""Checkpoints written beside the steps: the same bytes, one at a time, and a failure that reaches every process."""

import threading
import time
from pathlib import Path

import pytest
import torch
from full_disk import full_disk

from meter_fast.training import checkpoint
from meter_fast.training.checkpoint import CheckpointError, Reader
from meter_fast.training.saving import Saver
from meter_fast.training.state import KINDS
from meter_fast.training.world import alone


class State:
    """What NamedState gives, of tensors that the steps go on to change."""

    def __init__(self) -> None:
        self.tensors = {(kind, name): torch.randn(500, 20) for kind in KINDS for name in ("a", "b")}

    def read(self):
        yield from ((kind, name, tensor) for (kind, name), tensor in self.tensors.items())

    def numel(self) -> int:
        return 20_000

    def change(self) -> None:
        for tensor in self.tensors.values():
            tensor.add_(1)


def saver(folder: Path, state: State, background: bool = True) -> tuple[Saver, list[str]]:
    said: list[str] = []
    return Saver(state, alone("cpu"), folder, 2, background, said.append), said


@pytest.fixture
def slow(monkeypatch) -> threading.Event:
    """A disk that takes no byte before the event is set."""
    go, write = threading.Event(), checkpoint.write_durably

    def wait(path: Path, content: bytes) -> None:
        assert go.wait(60)
        write(path, content)

    monkeypatch.setattr(checkpoint, "write_durably", wait)
    return go


@pytest.mark.scenario(8, "a checkpoint holds the step it was begun at, whatever the steps do meanwhile")
def test_steps_go_on_while_the_disk_is_slow(tmp_path, slow):
    state = State()
    before = {key: tensor.clone() for key, tensor in state.tensors.items()}
    own, said = saver(tmp_path, state)
    own.save(1, {})  # returns although nothing can be written
    state.change()
    assert checkpoint.steps(tmp_path) == [] and not own.poll() and said == []
    slow.set()
    own.wait()
    assert said == [f"saved {tmp_path / 'step-00000001'}"]
    reader = Reader(checkpoint.path_of(tmp_path, 1))
    assert all(reader.tensor(*key).equal(tensor) for key, tensor in before.items())


def test_both_ways_write_the_same_bytes(tmp_path):
    state = State()
    for background in (False, True):
        own, _ = saver(tmp_path / str(background), state, background)
        own.save(3, {"config": {}})
        own.wait()
    one, other = (tmp_path / str(way) / "step-00000003" for way in (False, True))
    assert sorted(p.name for p in one.iterdir()) == sorted(p.name for p in other.iterdir())
    assert all((other / path.name).read_bytes() == path.read_bytes() for path in one.iterdir())


@pytest.mark.scenario(10, "a save that meets one still being written waits for it, and says so")
def test_writing_never_overlaps_itself(tmp_path, slow):
    own, said = saver(tmp_path, State())
    own.save(1, {})
    threading.Timer(0.3, slow.set).start()
    own.save(2, {})
    assert checkpoint.steps(tmp_path)[0] == 1  # whole before the second began
    own.wait()
    assert said[0].startswith("step 2 waits for the checkpoint of step 1")
    assert checkpoint.steps(tmp_path) == [1, 2]


@pytest.mark.scenario(
    9, "a disk that really refuses in the middle of a file: the next step hears of it, the older checkpoint stays"
)  # fmt: skip
@pytest.mark.parametrize("background", [False, True])
def test_a_full_disk_is_told_once_and_leaves_the_older_one(tmp_path, background):
    own, said = saver(tmp_path, State(), background)
    own.save(1, {})
    own.wait()
    with full_disk(30_000):
        own.save(2, {})
        deadline = time.monotonic() + 30
        while not own.poll():
            assert time.monotonic() < deadline
            time.sleep(0.01)
        with pytest.raises(CheckpointError, match=r"of step 2 could not be written .*File too large.*step-00000001"):
            own.wait()
    assert [p.name for p in tmp_path.iterdir()] == ["step-00000001"] and len(said) == 1
    own.save(3, {})
    own.wait()
    assert checkpoint.steps(tmp_path) == [1, 3]


def test_the_end_of_a_run_waits_for_what_has_begun(tmp_path, slow):
    own, said = saver(tmp_path, State())
    own.save(1, {})
    threading.Timer(0.3, slow.set).start()
    own.close()
    assert checkpoint.steps(tmp_path) == [1] and len(said) == 1


def test_memory_goes_with_the_files(tmp_path, monkeypatch):
    """The copy is let go tensor by tensor, not kept until the end."""
    import weakref

    from meter_fast.training import saving

    monkeypatch.setattr(checkpoint, "FILE_BYTES", 50_000)
    copies, alive = [], []
    on_host, write = saving._on_host, checkpoint.write_durably

    def copy(tensor):
        copies.append(weakref.ref(made := on_host(tensor)))
        return made

    def count(path, content):
        alive.append(sum(ref() is not None for ref in copies))
        write(path, content)

    monkeypatch.setattr(saving, "_on_host", copy)
    monkeypatch.setattr(checkpoint, "write_durably", count)
    own, _ = saver(tmp_path, State())
    own.save(1, {})
    own.wait()
    assert alive[0] >= 5 and alive[-1] <= 1 and alive == sorted(alive, reverse=True)


@pytest.mark.scenario(10, "a folder that vanishes while the run goes on: the cause is told, nothing hangs")
def test_a_folder_that_becomes_a_file(tmp_path):
    folder = tmp_path / "checkpoints"
    own, _ = saver(folder, State())
    own.save(1, {})
    own.wait()
    folder.rename(tmp_path / "away")
    folder.write_text("")
    own.save(2, {})
    with pytest.raises(CheckpointError, match=r"of step 2 could not be written .*Not a directory"):
        own.wait()
