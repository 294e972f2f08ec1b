"""Answers to compare with: known beforehand, in place of a model's in lm-evaluation-harness; or a model's own, one by one."""

from typing import Any

from evaluation.arguments import EvaluationArguments
from evaluation.harness import known_tasks
from lm_eval import simple_evaluate
from lm_eval.api.model import LM


class Answers(LM):
    """Says what `answers` has for a prompt."""

    def __init__(self, answers: dict[str, str]):
        super().__init__()
        self.answers = answers

    def generate_until(self, requests) -> list[str]:
        return [self.answers[request.args[0]] for request in requests]

    loglikelihood = loglikelihood_rolling = None  # nothing asks for them


def score(task: str, answers: dict[str, str], **options) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """(the harness's metrics, its record of each item) of `answers`, by prompt; `options` of `EvaluationArguments`."""
    args = EvaluationArguments(confirm_run_unsafe_code=True, **options)
    manager = known_tasks([task], args, {})
    results = simple_evaluate(Answers(answers), tasks=[task], task_manager=manager, confirm_run_unsafe_code=True)
    return results["results"][task], results["samples"][task]


def greedy(model, tokenizer, prompt: str, max_new_tokens: int = 4) -> str:
    """By transformers alone, without a batch."""
    inputs = tokenizer(prompt, return_tensors="pt")
    output = model.eval().generate(**inputs, do_sample=False, max_new_tokens=max_new_tokens)
    return tokenizer.decode(output[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
