"""Fine-tune on varied instructions and answer MT-Bench (paper section 4.2).

    accelerate launch recipes/wizardlm.py                                                  # small, offline, on a CPU
    accelerate launch recipes/wizardlm.py --config recipes/configs/wizardlm_llama2_7b.yaml   # the paper's run

Every field of the dataclasses in `finetuning.run.parse` is an option, in the YAML or on the command line.
"""

from data.alpaca_demo import alpaca_demo
from data.prompts import alpaca_prompt
from data.selection import DataArguments, DataDefinition, Row
from finetuning.causal import CausalRecipe
from finetuning.run import run


def to_prompt_completion(row: Row) -> dict[str, str]:
    """The Alpaca template and the answer. Leading line breaks are stripped: they would merge with the prompt's last one."""
    return {"prompt": alpaca_prompt(row["instruction"]), "completion": row["output"].lstrip()}


def definition(args: DataArguments) -> DataDefinition:
    """The columns of WizardLM's Evol-Instruct (WizardLMTeam/WizardLM_evol_instruct_70k), without refusals."""
    return DataDefinition(
        columns=("instruction", "output"),
        keep={
            "without 'sorry' in output": lambda row: "sorry" not in row["output"].lower(),
            "without 'as an AI' in output": lambda row: "as an ai" not in row["output"].lower(),
        },
        to_prompt_completion=to_prompt_completion,
        stand_in=lambda size, seed: alpaca_demo(),
    )


RECIPE = CausalRecipe("wizardlm", DataArguments, "mt_bench", definition)

if __name__ == "__main__":
    run(RECIPE)
