"""The injector itself: what it accepts, and that every place is reached."""

import faults
import pytest
from faults import Fault, parse


def test_entries_are_read():
    assert parse("kill@rank=1,step=3,place=forward;sleep@seconds=0.5,times=2") == [
        Fault("kill", rank=1, step=3, place="forward"), Fault("sleep", seconds=0.5, times=2),
    ]  # fmt: skip
    assert parse("nan@step=2")[0].place == "forward" and parse("full-disk@step=2")[0].place == "write"


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("", "accepted: kill, term"),
        ("explode@step=1", "unknown kind 'explode'"),
        ("kill@place=lunch", "'lunch'; accepted: step, forward"),
        ("kill@when=3", "unknown key 'when' in 'kill@when=3'; accepted: rank, step"),
        ("kill@step=soon", "step='soon' in 'kill@step=soon' is no int"),
        ("nan@place=step", "nan at place 'step'; accepted: forward"),
        ("kill@file=2", "file goes with place=write"),
        ("kill@step=1;term@place=write,micro=1", "micro with place=forward"),
    ],
)
def test_what_is_malformed_is_named(text, said):
    with pytest.raises(ValueError, match="METER_FAST_FAULT") as error:
        parse(text)
    assert said in str(error.value)


def test_a_ledger_counts_over_processes(tmp_path):
    fault = Fault("kill", times=2, ledger=str(tmp_path / "ledger"))
    other = Fault("kill", step=1, ledger=fault.ledger)
    assert [faults._Due(fault)() for _ in range(3)] == [True, True, False]
    assert faults._Due(other)() and len((tmp_path / "ledger").read_text().splitlines()) == 3
