"""How processes meet."""

import pytest


@pytest.mark.scenario(38, "a process that ends at once does not take the meeting point from one that still comes")
@pytest.mark.parametrize("slow", [0, 1])
def test_nobody_goes_on_before_all_have_met(ranks, tmp_path, slow):
    """One that went on, found its input wrong and ended would leave the other without the place where they meet."""
    ranks.run(2, tmp_path, "workers:meet", folder=str(tmp_path), slow=slow, timeout=60).check()
    went_on, through = (float((tmp_path / str(rank)).read_text()) for rank in (1 - slow, slow))
    assert went_on >= through
