"""Fine-tune on grade-school mathematics and answer GSM8K (paper section 4.2).

    accelerate launch recipes/metamath.py                                                  # small, offline, on a CPU
    accelerate launch recipes/metamath.py --method dora --r 32                             # another method, another rank
    accelerate launch recipes/metamath.py --config recipes/configs/metamath_llama2_7b.yaml   # the paper's run
    accelerate launch recipes/metamath.py --model_name_or_path MODEL --dataset_path mine.jsonl

Every field of the dataclasses in `finetuning.run.parse` is an option, in the YAML or on the command line.
"""

from dataclasses import dataclass, field

from data.gsm_symbolic import gsm_symbolic
from data.prompts import math_prompt
from data.selection import DataArguments, DataDefinition, Row
from finetuning.causal import CausalRecipe
from finetuning.run import run


@dataclass
class MathDataArguments(DataArguments):
    """`DataArguments`, plus which of MetaMathQA's problem types to keep."""

    type_contains: str | None = field(
        default=None, metadata={"help": "Keep only rows whose column `type` contains this; the paper's is GSM."}
    )


def to_prompt_completion(row: Row) -> dict[str, str]:
    """`Q: {query}\\nA:` and ` {worked answer ending in #### number}`.

    The space after `A:` belongs to the completion, so that the prompt ends where a token ends.
    """
    answer = row["response"].split("\nThe answer is:")[0]
    return {"prompt": math_prompt(row["query"]), "completion": f" {answer}"}


def definition(args: MathDataArguments) -> DataDefinition:
    """MetaMathQA's columns (meta-math/MetaMathQA)."""
    columns, keep, wanted = ("query", "response"), {}, args.type_contains
    if wanted:
        columns += ("type",)
        keep = {f"with {wanted!r} in type": lambda row: wanted in row["type"]}
    return DataDefinition(
        columns=columns,
        keep=keep,
        to_prompt_completion=to_prompt_completion,
        # its templates repeat and many problems are long: ten times as many leave enough
        stand_in=lambda size, seed: gsm_symbolic(10 * size, seed),
    )


RECIPE = CausalRecipe("metamath", MathDataArguments, "gsm8k_metamath", definition)

if __name__ == "__main__":
    run(RECIPE)
