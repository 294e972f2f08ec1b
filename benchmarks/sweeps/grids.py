"""The runs that a sweep asks for, by their settings."""

import itertools
from typing import Any


def combinations(common: dict[str, Any], grid: dict[str, Any]) -> list[dict[str, Any]]:
    """The settings of every run of a grid: each of its lists contributes one value.

    >>> combinations({"r": 8}, {"method": ["lora", "full"], "seed": 1})
    [{'r': 8, 'method': 'lora', 'seed': 1}, {'r': 8, 'method': 'full', 'seed': 1}]
    """
    lists = [value if isinstance(value, list) else [value] for value in grid.values()]
    return [common | dict(zip(grid, values, strict=True)) for values in itertools.product(*lists)]


def grid_runs(sweep: dict[str, Any]) -> list[dict[str, Any]]:
    """The settings of all runs of a sweep's grids, in order."""
    return [settings for grid in sweep["grids"] for settings in combinations(sweep["common"], grid)]


def arm_of(settings: dict[str, Any]) -> tuple[tuple[str, Any], ...]:
    """What a run is an example of, whatever its learning rate and seed."""
    return tuple((name, value) for name, value in sorted(settings.items()) if name not in ("learning_rate", "seed"))
