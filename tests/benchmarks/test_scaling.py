"""How cost grows along each axis, by what needs no clock; and that processes are measured together."""

import pytest

from benchmarks.scaling import POINTS, exponent, measure, plans
from benchmarks.step_work import counts


@pytest.mark.parametrize("power", [-1.0, 0.0, 1.0, 1.7])
def test_exponent_of_a_power(power: float) -> None:
    assert exponent([2, 4, 8, 16], [3.0 * x**power for x in (2, 4, 8, 16)]) == pytest.approx(power, abs=1e-9)


# (least, most) of the exponent. Fewer tokens of text than of the picture, and little attention at 10 to 145 tokens.
EXPECTED = {
    "text": {"fast": (0.1, 0.8), "activations": (0.1, 0.9), "state": (0, 0)},
    "image": {"fast": (0.6, 1.2), "activations": (0.6, 1.3), "state": (0, 0.02)},
    "batch": {"fast": (0.9, 1.0), "activations": (0.9, 1.0), "state": (0, 0)},
    "processes": {"fast": (0, 0), "activations": (0, 0), "state": (-1.0, -0.5)},
}


@pytest.mark.parametrize("axis", list(POINTS))
def test_cost_grows_as_it_should(axis: str) -> None:
    points = list(plans(axis, "tiny", "fp32").items())
    found = {place: counts(plan) for place, plan in (points[0], points[-1])}
    for name, (least, most) in EXPECTED[axis].items():
        slope = exponent(list(found), [one[name] for one in found.values()])
        assert least - 1e-3 <= slope <= most + 1e-3, (name, slope)


@pytest.mark.slow
def test_two_processes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DS_ACCELERATOR", "cpu")
    monkeypatch.setitem(POINTS, "processes", {"tiny": (1, 2)})
    one, two = measure("processes", "tiny", "fp32", 1).values()
    assert one["time_per_step"] > 0 < two["time_per_step"] and two["peak_memory"] > 0
    assert two["state"] < one["state"]
