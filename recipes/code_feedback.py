"""Fine-tune on programming questions and answer HumanEval (paper section 4.2).

    accelerate launch recipes/code_feedback.py                                                      # small, offline
    accelerate launch recipes/code_feedback.py --config recipes/configs/code_feedback_llama2_7b.yaml   # the paper's run

Every field of the dataclasses in `finetuning.run.parse` is an option, in the YAML or on the command line.
"""

import re

from data.codeio import codeio
from data.prompts import alpaca_prompt
from data.selection import DataArguments, DataDefinition, Row
from finetuning.causal import CausalRecipe
from finetuning.run import run

# A fence must be alone on its line, so that backticks inside the code do not end it; the closing one is at least as long.
CODE_BLOCK = re.compile(r"^[ \t]*(`{3,})[^`\n]*\n.*?^[ \t]*\1`*[ \t]*$", re.DOTALL | re.MULTILINE)


def has_code_block(row: Row) -> bool:
    return CODE_BLOCK.search(row["answer"]) is not None


def to_prompt_completion(row: Row) -> dict[str, str]:
    """The Alpaca template, and the answer up to and including the end of its first code block.

    Leading line breaks are stripped: they would merge with the prompt's last one.
    """
    answer = row["answer"][: CODE_BLOCK.search(row["answer"]).end()]
    return {"prompt": alpaca_prompt(row["query"]), "completion": answer.lstrip()}


def definition(args: DataArguments) -> DataDefinition:
    """Code-Feedback's columns (m-a-p/CodeFeedback-Filtered-Instruction)."""
    return DataDefinition(
        columns=("query", "answer"),
        keep={"with a complete code block in answer": has_code_block},
        to_prompt_completion=to_prompt_completion,
        stand_in=lambda size, seed: codeio(),
    )


RECIPE = CausalRecipe("code_feedback", DataArguments, "humaneval_alpaca", definition)

if __name__ == "__main__":
    run(RECIPE)
