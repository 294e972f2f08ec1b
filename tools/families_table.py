"""Writes docs/families.md: what works on which architecture, from what the tests find. Takes minutes.

python tools/families_table.py
"""

import subprocess
import sys
import tempfile
import xml.etree.ElementTree as ElementTree
from collections.abc import Iterable
from pathlib import Path

ROOT = Path(__file__).parents[1]
sys.path += [str(ROOT / "tests"), str(ROOT / "benchmarks"), str(ROOT / "recipes")]
from measuring.results import markdown_table  # noqa: E402
from test_families import FAMILIES, PARAMETERS  # noqa: E402
from tiny_vision import FAMILIES as VISION_FAMILIES  # noqa: E402

COLUMNS = {
    "gradient equals autograd's": "test_the_gradient_of_every_target_is_autograds",
    "start is bit-exact in fp32, bf16, fp16": "test_the_logits_are_the_bases_bit_for_bit",
    "resumes bit for bit, stock PEFT loads it, merges": "test_it_resumes_and_stock_peft_loads_and_merges_what_was_trained",
    "FSDP2 on two processes": "test_under_fsdp2_every_architecture_gets_the_factors_of_the_whole_model",
    "on a base in 4 bits (NF4)": "test_4_bits_in_every_family",
}
"""Of the table: the test whose cases it sums up."""
WITH_PICTURES = {
    "gradient equals autograd's, start is bit-exact": "test_the_gradient_is_autograds_and_the_start_is_exact",
    "resumes bit for bit, stock PEFT loads it, merges": (
        "test_it_trains_and_resumes_and_stock_peft_loads_and_merges_what_was_saved"
    ),
    "rows of text only": "test_rows_of_text_train_the_language_model",
    "FSDP2 on two processes": "test_under_fsdp2_what_sees_pictures_gets_the_factors_of_the_whole_model",
    "on a base in 4 bits (NF4)": "test_4_bits_with_pictures",
}
PAGE = """# Which models

What the tests find on tiny random models of transformers' own classes. `python tools/families_table.py` runs them and writes
this page; "yes" means that every case passed.

{table}

With `lora-ga sft` the default adapter is "all-linear":

```bash
lora-ga sft --model_name_or_path Qwen/Qwen3-30B-A3B --dtype bfloat16 --dataset_name trl-lib/Capybara --output_dir out
lora-ga sft --model_name_or_path Qwen/Qwen1.5-MoE-A2.7B --dtype bfloat16 --dataset_name trl-lib/Capybara --output_dir out \\
  --lora_target_parameters mlp.experts.gate_up_proj mlp.experts.down_proj
lora-ga sft --model_name_or_path Qwen/Qwen2.5-VL-3B-Instruct --dtype bfloat16 --dataset_name trl-lib/llava-instruct-mix \\
  --max_length null --output_dir out
```

## With pictures

Rows with one picture, two, none, and all of them in one batch; adapters on everything, on names that both parts have, and on
the language model alone. Layers that the rows do not reach start as in plain LoRA: the vision tower on rows of text, and the
last layers of LLaVA's, which its features skip. PaliGemma's processor takes no text without a picture, so TRL trains it on
whole conversations with pictures only. Gemma 4's vision tower has wrappers where others have linear layers: its names end in
`.linear` (`q_proj.linear`), which "all-linear" finds by itself. The processors of Qwen's families need torchvision. Videos
have not been tried.

{with_pictures}

## On a base in 4 bits

The gradient equals autograd's at the dequantized weights, and the start is bit-exact. bitsandbytes quantizes linear layers
only, so a mixture's experts stay as they were loaded. Falcon's linear layers are a class of its own, which it does not replace
("–"). Mamba's `dt_proj` and `out_proj` and Switch Transformers' `wo` must be left out (`llm_int8_skip_modules`, with
`lm_head`). GPT-OSS is published in MXFP4, which has not been tried: load it dequantized (`Mxfp4Config(dequantize=True)`) and
save it once, then train and merge with that folder. 8 bits are tested
on Llama ([Quantized models](quantized.md)). DDP and DeepSpeed run on Llama, T5 and, but for
ZeRO-3, on a mixture of experts ([Several GPUs](distributed.md)).
"""


def outcomes(columns: dict[str, str], families: Iterable[str], *files: str) -> dict[tuple[str, str], list[bool]]:
    """Whether each case of the tests in `columns` passed, by (test, family)."""
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder, "found.xml")
        tests = [str(ROOT / "tests" / name) for name in files]
        chosen = " or ".join(columns.values())
        subprocess.run([sys.executable, "-m", "pytest", "-q", *tests, "-k", chosen, f"--junitxml={file}"], cwd=ROOT)
        cases = ElementTree.parse(file).iter("testcase")
        found: dict[tuple[str, str], list[bool]] = {}
        for case in cases:
            test, _, rest = case.attrib["name"].partition("[")
            family = next(part for part in rest.rstrip("]").split("-") if part in families)
            found.setdefault((test, family), []).append(not len(case))  # a failure is an element in it
    return found


def in_words(passed: list[bool] | None) -> str:
    if passed is None:
        return "–"
    return "yes" if all(passed) else "no"


def main() -> None:
    found = outcomes(COLUMNS, FAMILIES, "test_families.py", "test_backends.py", "test_quantized.py")
    rows = []
    for family, (_, targets) in FAMILIES.items():
        names = ["all-linear"] if targets == "all-linear" else targets
        cells = [in_words(found.get((test, family))) for test in COLUMNS.values()]
        rows.append([family, ", ".join(f"`{name}`" for name in [*names, *PARAMETERS.get(family, [])]), *cells])
    table = markdown_table(["", "targets", *COLUMNS], rows)
    seen = outcomes(WITH_PICTURES, VISION_FAMILIES, "test_vision_language.py", "test_backends.py", "test_quantized.py")
    rows = [
        [family, *(in_words(seen.get((test, family))) for test in WITH_PICTURES.values())] for family in VISION_FAMILIES
    ]
    page = PAGE.format(table=table, with_pictures=markdown_table(["", *WITH_PICTURES], rows))
    (ROOT / "docs" / "families.md").write_text(page, encoding="utf-8")


if __name__ == "__main__":
    main()
