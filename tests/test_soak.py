"""A short soak, and that growth would be noticed."""

import pytest
from soak import WARM_UP, Standing, growth, soak


def test_nothing_grows_from_round_to_round():
    """3 rounds after the warm-up: counts only, memory wants the longer run of `python tests/soak.py`."""
    found = soak(lambda rounds: rounds < WARM_UP + 3)
    assert growth(found, kibibytes_per_round=float("inf")) == []


@pytest.mark.parametrize("name", ["tensors", "modules", "hooks", "trainers", "threads", "files", "children"])
def test_a_leak_is_named(name):
    rounds = [{"tensors": 9, "modules": 9, "hooks": 9, "trainers": 0, "threads": 1, "files": 9, "children": 0}] * 10
    leaking = [
        Standing(**counts | {name: counts[name] + number}, kibibytes=1000) for number, counts in enumerate(rounds)
    ]
    assert [problem.partition(":")[0] for problem in growth(leaking)] == [name]
    assert growth([Standing(**counts, kibibytes=1000) for counts in rounds]) == []


@pytest.mark.parametrize(("kibibytes_per_round", "is_growth"), [(0, False), (100, False), (300, True)])
def test_memory_is_judged_by_its_slope(kibibytes_per_round, is_growth):
    found = [
        Standing(9, 9, 9, 0, 1, 9, 0, kibibytes=10**6 + kibibytes_per_round * number + 400 * (number % 2))
        for number in range(40)
    ]
    assert bool(growth(found)) == is_growth
