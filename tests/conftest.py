"""Fixtures that several test folders share. Its place also puts this folder on the import path (see golden_cases)."""

import os

os.environ.setdefault("TRITON_INTERPRET", "1")  # read when triton is imported: kernels then run without a GPU

import pytest
import torch
from golden_cases import GOLDEN_CASES, GoldenCase, load_case
from scene_run import run_dir, scene_model, scene_tokenizer, scenes  # noqa: F401


@pytest.fixture(params=GOLDEN_CASES)
def case(request: pytest.FixtureRequest) -> GoldenCase:
    """Each small published model with its inputs and outputs; the model is a fresh one."""
    return load_case(request.param)


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Tests marked `gpu` skip where there is no device, those marked `multinode` where nobody asks for them."""
    asked = "multinode" in config.option.markexpr
    for item in items:
        if item.get_closest_marker("gpu") and not torch.cuda.is_available():
            item.add_marker(pytest.mark.skip(reason="no CUDA device"))
        if item.get_closest_marker("multinode") and not asked:
            item.add_marker(pytest.mark.skip(reason="two hosts are made by: make test-multinode"))
