"""Recall from scores: published numbers, equal captions, ties, chance, memory-mapped tables."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from golden_cases import GOLDEN
from safetensors.torch import load_file

from meter_fast.recall import Retrieval, chance, recalls


def owned(owner: torch.Tensor, pictures: int) -> torch.Tensor:
    """[T] -> [N,T] bool."""
    return torch.arange(pictures)[:, None] == owner


@pytest.mark.parametrize("number", range(3))
def test_published_recalls(number):
    tensors = load_file(GOLDEN / "recall.safetensors")
    expected = json.loads((GOLDEN / "recall.json").read_text())["cases"][number]
    scores, owner = tensors[f"scores.{number}"], tensors[f"text_image_index.{number}"]
    found = recalls(scores, owned(owner, len(scores)))
    assert found == pytest.approx({name: expected[name] for name in found}, abs=1e-6)


def test_equal_captions_are_one_text_and_any_of_their_pictures_is_right():
    """Pictures 0 and 1 share their words; the model prefers picture 1 for them, and 2 is clear."""
    scores = torch.tensor([[2.0, 0.0], [3.0, 0.0], [0.0, 1.0]])
    result = Retrieval(scores, torch.tensor([0, 1, 2]), torch.tensor([0, 0, 1])).result()
    published, equal = result["retrieval"], result["equal_captions"]["retrieval"]
    assert published["ir_r1"] == pytest.approx(2 / 3) and equal["ir_r1"] == 1.0
    # as published the two captions are two columns: for picture 1 the first of them, which is picture 0's, ranks first
    assert published["tr_r1"] == pytest.approx(2 / 3) and equal["tr_r1"] == 1.0
    assert result["chance"]["ir_r1"] == pytest.approx(1 / 3)
    assert result["equal_captions"]["chance"]["ir_r1"] == pytest.approx((2 / 3 + 1 / 3) / 2)
    assert result["different_captions"] == 2


def test_of_equal_scores_the_lower_index_ranks_first():
    own = torch.eye(40, dtype=torch.bool)
    found = recalls(torch.zeros(40, 40), own)
    assert found == pytest.approx({f"{kind}_r{k}": k / 40 for kind in ("ir", "tr") for k in (1, 5, 10)})
    assert found == pytest.approx(chance(own))
    scores = torch.randint(0, 3, (40, 40), generator=torch.Generator().manual_seed(0)).float()
    by_hand = [sorted(range(40), key=lambda i: (-scores[i, t].item(), i)) for t in range(40)]
    assert recalls(scores, own)["ir_r5"] == pytest.approx(sum(t in order[:5] for t, order in enumerate(by_hand)) / 40)


def test_chance_is_the_mean_over_random_orders():
    generator = torch.Generator().manual_seed(1)
    own = owned(torch.arange(12) % 7, 7)
    drawn = [recalls(torch.rand(7, 12, generator=generator), own) for _ in range(4000)]
    for name, level in chance(own).items():
        assert sum(found[name] for found in drawn) / len(drawn) == pytest.approx(level, abs=0.02)
    assert chance(own)["tr_r10"] < 1.0 == chance(own)["ir_r10"]  # 12 captions, 7 pictures


def test_captions_that_share_a_column_and_mapped_tables(tmp_path: Path):
    """More queries than are looked at together; half of the captions repeat another's words."""
    generator = torch.Generator().manual_seed(4)
    scores = torch.rand(300, 400, generator=generator).mul(50).round()  # with ties
    which = torch.randint(0, 400, (700,), generator=generator)
    own = owned(torch.randint(0, 300, (700,), generator=generator), 300)
    mapped = np.memmap(tmp_path / "scores", np.float32, "w+", shape=(300, 400))
    mapped[:] = scores.numpy()
    assert recalls(torch.from_numpy(mapped), own, which=which) == recalls(scores[:, which], own)


def test_unreadable_pictures_leave_with_the_captions_that_only_they_have():
    scores = torch.tensor([[0.1, 0.2, 0.3, 0.4], [torch.nan] * 4, [0.5, 0.6, 0.7, 0.8]])
    captions = [["a", "b"], ["c", "a"], ["d"]]
    found = Retrieval.of(scores, [0, 2], captions)
    assert found.scores.tolist() == scores[[0, 2]][:, [0, 1, 3]].tolist()
    assert found.owner.tolist() == [0, 0, 1] and found.which.tolist() == [0, 1, 2]
    whole = Retrieval.of(scores, [0, 1, 2], captions)
    assert whole.scores is scores and whole.which.tolist() == [0, 1, 2, 0, 3]
