"""Training by the tiny recipe with Triton's kernels, in its interpreter, follows the run with torch's operators."""

from pathlib import Path

import pytest
from ranks import RankServer
from small_run import losses, settings, worst

pytestmark = pytest.mark.slow

TRITON = [f"kernels.{name}=triton" for name in ("cross_attention", "mlm_loss", "residual_norm", "gelu")]
STEPS = 6


@pytest.mark.parametrize("form", ["direct", "absorbed"])
def test_triton_follows_the_plain_run(ranks: RankServer, data: Path, tmp_path: Path, form: str):
    common = settings(
        data, "model.fusion.heads=1", "engine.dtype=fp32", f"run.max_steps={STEPS}", f"run.save_every={STEPS}"
    )
    plain = ["kernels.cross_attention=reference", "kernels.cross_attention_form=direct", "kernels.text=padded"]
    ranks.train(1, tmp_path / "plain", [*common, *plain]).check()
    kernels = [*TRITON, f"kernels.cross_attention_form={form}", "kernels.text=packed"]
    ranks.train(1, tmp_path / "triton", [*common, *kernels]).check()
    one, other = losses(tmp_path / "triton"), losses(tmp_path / "plain")
    assert list(one) == list(other) == list(range(1, STEPS + 1))
    assert worst(one, other) < 1e-5


def test_dropout_in_the_kernels_repeats_bit_for_bit(ranks: RankServer, data: Path, tmp_path: Path):
    """The seed of each mask comes from torch's generator, which is seeded from the step."""
    common = [*settings(data, "model.fusion.heads=1", "engine.dtype=fp32", "model.fusion.dropout=0.1"), *TRITON]
    chosen = [*common, "run.max_steps=4", "run.save_every=2", "kernels.text=packed"]
    ranks.train(1, tmp_path / "whole", chosen).check()
    again = tmp_path / "again"
    ranks.train(1, again, chosen).check()
    assert losses(again) == losses(tmp_path / "whole")
    without = tmp_path / "without"
    ranks.train(1, without, [*chosen, "model.fusion.dropout=0"]).check()
    assert losses(without) != losses(again)
