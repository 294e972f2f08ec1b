"""What the estimation sends over the network, on paper: the formulas with the numbers of real models filled in.

    python benchmarks/communication.py

Per layer of shape O×I, in float32 (4 bytes), with K = 2r + 32 and 8 test columns in the first pass:

    exact                  4·O·I
    sketch, pass 1         4·((K + 8)·O + K·I)
    sketch, later passes   4·K·(O + I)          (layers so small that 2·K·(O + I) ≥ O·I are estimated exactly)
    factors, broadcast     4·(r·(O + I) + 1)

A process puts S bytes (the sum over layers) into the all-reduces of a pass, which go in buckets. In a ring of N, every process
sends and every link carries 2·(N − 1)/N·S: nearly 2·S however many there are. `tests/test_backends.py` finds S in the report of
real runs, byte for byte.
"""

from dataclasses import dataclass

RANK = 8
SKETCH_WIDTH = 2 * RANK + 32
TEST_COLUMNS = 8
PASSES = 2
BYTES = 4
PROCESSES = (8, 64, 512)


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


def exact_bytes(model: Model) -> list[int]:
    """What a process puts into each all-reduce: one pass."""
    return [BYTES * model.layers * sum(O * I for O, I in model.shapes())]


def sketch_bytes(model: Model, width: int = SKETCH_WIDTH, passes: int = PASSES) -> list[int]:
    """What a process puts into each all-reduce, pass by pass."""
    numbers = [0] * passes
    for O, I in model.shapes():
        if 2 * width * (O + I) >= O * I:  # then the gradient itself is summed, in one pass
            numbers[0] += O * I
        else:
            numbers[0] += TEST_COLUMNS * O
            numbers = [count + width * (O + I) for count in numbers]
    return [BYTES * model.layers * count for count in numbers]


def factor_bytes(model: Model, rank: int = RANK) -> int:
    """What the broadcasts of A0, B0 and the alignment carry."""
    return BYTES * model.layers * sum(rank * (O + I) + 1 for O, I in model.shapes())


def on_a_ring(total: int, processes: int) -> float:
    """Bytes that each process sends, and each link carries, to all-reduce `total` bytes."""
    return 2 * (processes - 1) / processes * total


def gigabytes(count: float) -> str:
    return f"{count / 1e9:,.2f}" if count < 1e11 else f"{count / 1e9:,.0f}"


def main() -> None:
    print("\n`python benchmarks/communication.py`\n")
    print(f"r = {RANK}, K = {SKETCH_WIDTH}, {PASSES} passes; GB = 10⁹ bytes.\n")
    print("| model | exact, GB per process | sketch by pass, GB per process | in all | factors, GB |")
    print("|---|---|---|---|---|")
    for model in MODELS:
        sketch = sketch_bytes(model)
        by_pass = " + ".join(gigabytes(count) for count in sketch)
        cells = [gigabytes(sum(exact_bytes(model))), by_pass, gigabytes(sum(sketch)), gigabytes(factor_bytes(model))]
        print(f"| {model.name} | {' | '.join(cells)} |")
    print("\nGB that each process sends, and each link of a ring carries, over the whole estimation:\n")
    columns = [f"{what}, {count} processes" for count in PROCESSES for what in ("exact", "sketch")]
    print(f"| model | {' | '.join(columns)} | exact / sketch |")
    print("|---" * (len(columns) + 2) + "|")
    for model in MODELS:
        exact, sketch = sum(exact_bytes(model)), sum(sketch_bytes(model))
        cells = [gigabytes(on_a_ring(total, count)) for count in PROCESSES for total in (exact, sketch)]
        print(f"| {model.name} | {' | '.join(cells)} | {exact / sketch:.0f} |")


if __name__ == "__main__":
    main()
