"""The prompts of training and of the benchmarks, defined once so that they cannot differ."""

ALPACA = (
    "Below is an instruction that describes a task. Write a response that appropriately completes the request.\n\n"
    "### Instruction:\n{instruction}\n\n### Response:\n"
)


def math_prompt(question: str) -> str:
    """`Q: {question}\\nA:`. The completion begins with a space, so that the prompt ends where a token ends."""
    return f"Q: {question}\nA:"


def alpaca_prompt(instruction: str) -> str:
    """The Alpaca template without an input (github.com/tatsu-lab/stanford_alpaca)."""
    return ALPACA.format(instruction=instruction)
