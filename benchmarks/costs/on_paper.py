"""What costs are computed for, on paper: models of every size."""

from dataclasses import dataclass

TEST_COLUMNS = 8
"""Of the sketch's first pass."""


@dataclass(frozen=True)
class Model:
    """A Llama by its published configuration; every linear layer but the head is a target."""

    name: str
    layers: int
    hidden: int
    intermediate: int
    key_value: int
    """Outputs of k_proj and of v_proj: key-value heads × head dimension."""

    def shapes(self) -> list[tuple[int, int]]:
        """(O, I) of the targets in one decoder layer."""
        h, m, kv = self.hidden, self.intermediate, self.key_value
        return [(h, h), (kv, h), (kv, h), (h, h), (m, h), (m, h), (h, m)]


MODELS = [
    Model("Llama-2-7B", layers=32, hidden=4096, intermediate=11008, key_value=4096),
    Model("Llama-3-70B", layers=80, hidden=8192, intermediate=28672, key_value=1024),
    Model("Llama-3.1-405B", layers=126, hidden=16384, intermediate=53248, key_value=1024),
]


def gigabytes(count: float) -> str:
    return f"{count / 1e9:,.2f}" if count < 1e11 else f"{count / 1e9:,.0f}"
