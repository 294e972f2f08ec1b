"""What a learning-rate sweep says about a method, in numbers: pure functions of finished runs (`training.py` makes them)."""

import math
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, NamedTuple

Run = dict[str, Any]


class Range(NamedTuple):
    """Learning rates between which the loss is near its best. An end is open where the sweep did not go on to a worse one."""

    low: float
    high: float
    open_low: bool
    open_high: bool

    @property
    def decades(self) -> float:
        return math.log10(self.high / self.low)

    def __str__(self) -> str:
        at_least = "≥ " if self.open_low or self.open_high else ""
        return f"{at_least}{self.decades:.2f} ({self.low:.2g} to {self.high:.2g})"


def final_loss(run: Run) -> float:
    """Held-out loss after the last step; infinite where training diverged."""
    loss = run["held_out"][-1]["loss"]
    return math.inf if loss is None else loss


def near_best(losses: dict[float, float], tolerance: float = 0.05) -> Range:
    """Where the loss is at most (1 + `tolerance`) times its minimum, linear in log(learning rate) between the points.

    >>> str(near_best({1e-4: 2.0, 1e-3: 1.0, 1e-2: 2.0}, tolerance=0.5))
    '1.00 (0.00032 to 0.0032)'
    """
    rates = sorted(losses)
    best = min(rates, key=losses.__getitem__)
    limit = (1 + tolerance) * losses[best]

    def end(outward: list[float]) -> tuple[float, bool]:
        for inside, outside in pairwise(outward):
            if losses[outside] > limit:
                if math.isinf(losses[outside]):
                    return inside, False
                share = (limit - losses[inside]) / (losses[outside] - losses[inside])
                return inside * (outside / inside) ** share, False
        return outward[-1], True

    index = rates.index(best)
    low, open_low = end(rates[index::-1])
    high, open_high = end(rates[index:])
    return Range(low, high, open_low, open_high)


def steps_to(run: Run, loss: float) -> float | None:
    """Steps after which the held-out loss is first down to `loss`, linear between evaluations; None if it never is."""
    for before, after in pairwise(run["held_out"]):
        if after["loss"] is not None and after["loss"] <= loss:
            if before["loss"] is None:
                return after["step"]
            share = (before["loss"] - loss) / (before["loss"] - after["loss"])
            return before["step"] + max(0.0, share) * (after["step"] - before["step"])
    return None


@dataclass(frozen=True)
class Arm:
    """All runs of one method on one task, whatever their learning rate and seed."""

    label: str
    runs: list[Run]

    def at(self, rate: float) -> list[Run]:
        """The runs at one learning rate, one per seed."""
        return [run for run in self.runs if run["settings"]["learning_rate"] == rate]

    def losses(self) -> dict[float, float]:
        """Final loss by learning rate, of the seed that ran at all of them: seeds differ in their data."""
        seed = self.runs[0]["settings"]["seed"]
        return {
            run["settings"]["learning_rate"]: final_loss(run) for run in self.runs if run["settings"]["seed"] == seed
        }

    @property
    def best_rate(self) -> float:
        losses = self.losses()
        return min(losses, key=losses.__getitem__)

    def seeds_at_best(self) -> dict[int, float]:
        """Final loss by seed, at the best learning rate."""
        return {run["settings"]["seed"]: final_loss(run) for run in self.at(self.best_rate)}
