"""Grade-school word problems with worked answers, generated on the spot: the offline stand-in for MetaMathQA."""

from datasets import Dataset


def gsm_symbolic(size: int, seed: int) -> Dataset:
    """`size` rows with MetaMathQA's columns, from reasoning-gym's GSM-symbolic templates.

    Sample:
        query: "James gets 160 emails a day. 30% of those emails don't require any response. …"
        response: "James receives 48=48 emails that don't require a response\\nSo James responds to … \\n#### 560"
        type: "GSM_symbolic"

    The templates repeat: now and then two rows ask exactly the same question.
    """
    import reasoning_gym  # imported here, so that the recipes run on other data without it

    problems = reasoning_gym.create_dataset("gsm_symbolic", size=size, seed=seed)
    return Dataset.from_list(
        [
            {"query": problem["question"], "response": problem["metadata"]["answer_cot"], "type": "GSM_symbolic"}
            for problem in problems
        ]
    )
