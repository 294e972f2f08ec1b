"""The results and the cost of an initialization."""

from dataclasses import dataclass, field
from typing import NamedTuple

NAMED = 3
"""Idle or thin layers that the summary names; the `InitReport` has all."""


class ExpertCounts(NamedTuple):
    """Of the weights in one parameter."""

    total: int
    idle: int
    """Those that no token of the sample reached in a way that the loss feels. They start as in LoRA: A0 random, B0 zero."""
    thin: int
    """Those whose gradient has fewer than 2·r singular pairs. What is lacking starts as in LoRA."""


class LayerReport(NamedTuple):
    """What the initialization found in one layer; see `InitReport`."""

    alignment: float
    singular_values: list[float]
    gradient_norm: float
    scale: float
    experts: ExpertCounts


@dataclass(frozen=True)
class InitReport:
    """Result of `initialize_lora_ga`.

    Attributes:
        alignment: for each adapted layer by module name, cos(G, B0 B0ᵀ G + G A0ᵀ A0) in [0, 1]: how much of the gradient
            the first step of the adapter can follow. With the sketch, ‖G‖ in it is an estimate. Idle layers are not in it.
        num_items: what the gradient was averaged over: label tokens, labels of examples, or rows of batches without labels
            (two for each pair of DPO and of reward models).
        seconds: wall time of the estimation and factorization.
        extra_peak_bytes: peak memory in use minus memory in use before, activations included; None where it cannot be
            measured.
        all_reduced_bytes: for each pass, the look included, the bytes that each process put into the all-reduce of the
            gradients' sums; zeros for one process.
        singular_values: for each layer of `alignment`, the 2·r leading singular values of G, the gradient of the mean loss per
            label token, descending; fewer for a thin layer, whose G has fewer above rounding error.
            Empty if it comes from a file older than this field; `gradient_norm` likewise.
        gradient_norm: for each layer of `alignment`, ‖G‖, including what lies beyond the 2·r; an estimate with the sketch.
        scale: for each adapted layer c, the length of the rows of A0. Empty if it comes from a file older than this field.
        idle: the layers that get no gradient from any row of the sample. They start as in LoRA: A0 random, B0 zero (B0 too is
            random with the direction `gaussian`).
        thin: the layers whose gradient has fewer than 2·r singular pairs, such as those with fewer than 2·r dimensions on one
            side. What is lacking starts as in LoRA.
        experts: for each adapted parameter with the weights of several experts, how many there are, and how many of them are
            idle or thin. Everything else that is said of it is said of all together, as of one block-diagonal matrix.
    """

    alignment: dict[str, float]
    num_items: int
    seconds: float
    extra_peak_bytes: int | None
    all_reduced_bytes: list[int]
    singular_values: dict[str, list[float]] = field(default_factory=dict)
    gradient_norm: dict[str, float] = field(default_factory=dict)
    scale: dict[str, float] = field(default_factory=dict)
    idle: list[str] = field(default_factory=list)
    thin: list[str] = field(default_factory=list)
    experts: dict[str, ExpertCounts] = field(default_factory=dict)

    @property
    def alignment_mean(self) -> float:
        return sum(self.alignment.values()) / len(self.alignment)

    @property
    def alignment_min(self) -> float:
        return self.alignment[self.alignment_min_layer]

    @property
    def alignment_min_layer(self) -> str:
        return min(self.alignment, key=self.alignment.__getitem__)

    def summary(self) -> str:
        """A few lines for a human reader."""
        memory = (
            "not measured here"
            if self.extra_peak_bytes is None
            else f"{self.extra_peak_bytes / 2**20:,.0f} MiB extra at the peak"
        )
        lines = [
            f"LoRA-GA initialized {len(self.alignment)} layers from the gradient over {self.num_items:,} items",
            f"  time       {self.seconds:,.1f} s",
            f"  memory     {memory}",
            f"  alignment  mean {self.alignment_mean:.3f}, min {self.alignment_min:.3f} in {self.alignment_min_layer}",
        ]
        if any(self.all_reduced_bytes):
            mebibytes = ", ".join(f"{count / 2**20:,.2f}" for count in self.all_reduced_bytes)
            lines.insert(3, f"  network    {mebibytes} MiB per process all-reduced, pass by pass")
        if self.scale:
            lines.append(f"  scale      c from {min(self.scale.values()):.3g} to {max(self.scale.values()):.3g}")
        if self.idle:
            more = f" and {len(self.idle) - NAMED} more" if len(self.idle) > NAMED else ""
            lines.append(f"  idle       {self.idle_note()}: {', '.join(self.idle[:NAMED])}{more}")
        if self.thin:
            more = f" and {len(self.thin) - NAMED} more" if len(self.thin) > NAMED else ""
            lines.append(f"  thin       {self.thin_note()}: {', '.join(self.thin[:NAMED])}{more}")
        if self.experts:
            lines.append(f"  experts    {self.experts_note()}")
        return "\n".join(lines)

    def idle_note(self) -> str:
        """How many layers had no gradient, in words."""
        layers = len(self.alignment) + len(self.idle)
        return f"{len(self.idle)} of {layers} layers got no gradient from the sample and start as in LoRA"

    def thin_note(self) -> str:
        """How many layers had a gradient of low rank, in words."""
        layers = len(self.alignment) + len(self.idle)
        return f"{len(self.thin)} of {layers} layers got a gradient of fewer than 2·r singular pairs; the rest is as in LoRA"

    def total_experts(self) -> ExpertCounts:
        """Of all parameters together."""
        return ExpertCounts(*map(sum, zip(*self.experts.values(), strict=True)))

    def experts_note(self) -> str:
        """How many experts had little or no gradient, in words."""
        total = self.total_experts()
        advice = "; a larger `ga_num_samples` reaches more" if total.idle or total.thin else ""
        return (
            f"of {total.total:,} experts' weights {total.idle:,} got no gradient from the sample and start as in LoRA, and "
            f"{total.thin:,} one of fewer than 2·r singular pairs{advice}"
        )

    def metrics(self) -> dict[str, float]:
        """The same, for a logger."""
        metrics = {
            "ga/alignment_mean": self.alignment_mean,
            "ga/alignment_min": self.alignment_min,
            "ga/idle_weights": len(self.idle),
            "ga/thin_weights": len(self.thin),
            "ga/init_seconds": self.seconds,
        }
        if self.experts:
            metrics |= {"ga/idle_experts": self.total_experts().idle, "ga/thin_experts": self.total_experts().thin}
        if self.extra_peak_bytes is not None:
            metrics["ga/init_bytes"] = self.extra_peak_bytes
        if any(self.all_reduced_bytes):
            metrics["ga/all_reduced_bytes"] = sum(self.all_reduced_bytes)
        return metrics
