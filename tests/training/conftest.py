"""Fixtures of the training tests: a server of ranks, small data."""

from collections.abc import Iterator
from pathlib import Path

import pytest
from ranks import RankServer
from small_run import make_data, settings


@pytest.fixture(scope="session")
def ranks() -> Iterator[RankServer]:
    """Starts real processes quickly; one for the whole session."""
    server = RankServer()
    yield server
    server.close()


@pytest.fixture(scope="session")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Tables and a tokenizer."""
    return make_data(tmp_path_factory.mktemp("data"))


@pytest.fixture(scope="session")
def pretrained(ranks: RankServer, data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run directory of two steps of pre-training."""
    run = tmp_path_factory.mktemp("pretrained") / "run"
    ranks.train(1, run, settings(data, "run.max_steps=2", "engine.dtype=fp32")).check()
    return run
