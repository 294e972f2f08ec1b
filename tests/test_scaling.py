"""The benchmark of how an initialization grows: its fit, its plan, and one real point."""

from dataclasses import asdict, replace

import pytest
import scaling
from costs.growth import Curve, Plan, Point, power_law
from measuring.results import Results

TINY = Point(samples=2, width=64, layers=1, rank=2, batch_size=2, length=8)


def test_the_fit_finds_the_exponent_of_a_power_law():
    xs = [1, 2, 4, 8, 16]
    # numpy's float64 solver on five points
    assert power_law(xs, [3 * x**1.7 for x in xs]) == pytest.approx((1.7, 3), rel=1e-12)


@pytest.mark.parametrize(("xs", "ys"), [([1], [2]), ([1, 2], [3, None]), ([1, 2], [0, 3])])
def test_what_has_no_exponent_gets_none(xs, ys):
    assert power_law(xs, ys) is None


def test_a_curve_is_fitted_to_medians_from_its_middle_up():
    xs = [1, 2, 4, 8, 16]
    flat_then_square = [16, 16, 16, 64, 256]
    curve = Curve(xs, [[y, y, 100 * y] for y in flat_then_square])  # one repeat was disturbed
    assert curve.fitted_xs == [4, 8, 16]
    assert curve.fit[0] == pytest.approx(2)
    assert Curve([1, 2], [[8], [4]]).fit[0] == pytest.approx(-1)  # two processes are all that two cores have


@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_an_axis_varies_one_quantity_by_a_factor_of_16(device):
    plan = scaling.plan(device)
    for axis in ("samples", "width", "layers", "rank"):
        values = plan.values[axis]
        assert len(values) == 5
        assert values[-1] == 16 * values[0]
        for value, point in plan.points(axis).items():
            assert asdict(point) == asdict(plan.base) | {axis: value}


def test_a_real_point_is_measured_once(tmp_path, monkeypatch):
    results = Results("scaling", tmp_path)
    tiny = Plan(TINY, {"samples": [TINY.samples]})
    measured = scaling.measure_all(tiny, 1, results)
    (found,) = measured["samples"][TINY.samples]
    assert found["seconds"] > 0
    # so small a layer is estimated exactly: 4 of 64×64 and 3 of 64×192, float32
    assert found["sketch_bytes"] == found["gradient_bytes"] == 4 * (4 * 64 * 64 + 3 * 64 * 192)
    assert found["all_reduced_bytes"] == [0]

    monkeypatch.setattr(scaling, "measure", lambda point: pytest.fail("measured again"))
    assert scaling.measure_all(tiny, 1, results) == measured


def test_two_processes_share_the_samples_of_one():
    found = scaling.measure(replace(TINY, batch_size=1, processes=2))
    assert found["seconds"] > 0
    assert found["all_reduced_bytes"] == [found["gradient_bytes"]]
