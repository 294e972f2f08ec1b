"""Writes docs/families.md: what works on which architecture, from what the tests find. Takes minutes.

python tools/families_table.py
"""

import subprocess
import sys
import tempfile
import xml.etree.ElementTree as ElementTree
from pathlib import Path

ROOT = Path(__file__).parents[1]
sys.path += [str(ROOT / "tests"), str(ROOT / "benchmarks"), str(ROOT / "recipes")]
from measuring.results import markdown_table  # noqa: E402
from test_families import FAMILIES, PARAMETERS  # noqa: E402

COLUMNS = {
    "gradient is autograd's": "test_the_gradient_of_every_target_is_autograds",
    "start is bit-exact in fp32, bf16, fp16": "test_the_logits_are_the_bases_bit_for_bit",
    "resumes bit for bit, stock PEFT loads it, merges": "test_it_resumes_and_stock_peft_loads_and_merges_what_was_trained",
    "FSDP2 on two processes": "test_under_fsdp2_every_architecture_gets_the_factors_of_the_whole_model",
}
"""Of the table: the test whose cases it sums up."""
PAGE = """# Which models

What the tests find on tiny random models of transformers' own classes. `python tools/families_table.py` runs them and writes
this page; "yes" means that every case passed.

{table}

4-bit and 8-bit bases are tested on Llama ([Quantized models](quantized.md)). DDP and DeepSpeed run on Llama, T5 and, but for
ZeRO-3, on a mixture of experts ([Several GPUs](distributed.md)).
"""


def outcomes() -> dict[tuple[str, str], list[bool]]:
    """Whether each case passed, by (test, family)."""
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder, "found.xml")
        tests = [str(ROOT / "tests" / name) for name in ("test_families.py", "test_backends.py")]
        chosen = " or ".join(COLUMNS.values())
        subprocess.run([sys.executable, "-m", "pytest", "-q", *tests, "-k", chosen, f"--junitxml={file}"], cwd=ROOT)
        cases = ElementTree.parse(file).iter("testcase")
        found: dict[tuple[str, str], list[bool]] = {}
        for case in cases:
            test, _, rest = case.attrib["name"].partition("[")
            family = next(part for part in rest.rstrip("]").split("-") if part in FAMILIES)
            found.setdefault((test, family), []).append(not len(case))  # a failure is an element in it
    return found


def main() -> None:
    found = outcomes()
    rows = []
    for family, (_, targets) in FAMILIES.items():
        names = ["all-linear"] if targets == "all-linear" else targets
        cells = ["yes" if all(found[test, family]) else "no" for test in COLUMNS.values()]
        rows.append([family, ", ".join(f"`{name}`" for name in [*names, *PARAMETERS.get(family, [])]), *cells])
    table = markdown_table(["", "targets", *COLUMNS], rows)
    page = PAGE.format(table=table)
    (ROOT / "docs" / "families.md").write_text(page, encoding="utf-8")


if __name__ == "__main__":
    main()
