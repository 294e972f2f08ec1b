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

from costs.on_paper import MODELS, TEST_COLUMNS, Model, gigabytes
from measuring.results import markdown_table

RANK = 8
SKETCH_WIDTH = 2 * RANK + 32
PASSES = 2
BYTES = 4
PROCESSES = (8, 64, 512)


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


def main() -> None:
    print("\n`python benchmarks/communication.py`\n")
    print(f"r = {RANK}, K = {SKETCH_WIDTH}, {PASSES} passes; GB = 10⁹ bytes.\n")
    rows = []
    for model in MODELS:
        sketch = sketch_bytes(model)
        by_pass = " + ".join(map(gigabytes, sketch))
        totals = [gigabytes(sum(exact_bytes(model))), by_pass, gigabytes(sum(sketch)), gigabytes(factor_bytes(model))]
        rows.append([model.name, *totals])
    header = ["model", "exact, GB per process", "sketch by pass, GB per process", "in all", "factors, GB"]
    print(markdown_table(header, rows))
    print("\nGB that each process sends, and each link of a ring carries, over the whole estimation:\n")
    columns = [f"{what}, {count} processes" for count in PROCESSES for what in ("exact", "sketch")]
    rows = []
    for model in MODELS:
        exact, sketch = sum(exact_bytes(model)), sum(sketch_bytes(model))
        sent = [gigabytes(on_a_ring(total, count)) for count in PROCESSES for total in (exact, sketch)]
        rows.append([model.name, *sent, f"{exact / sketch:.0f}"])
    print(markdown_table(["model", *columns, "exact / sketch"], rows))


if __name__ == "__main__":
    main()
