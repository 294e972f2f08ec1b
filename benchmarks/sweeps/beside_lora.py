"""LoRA beside LoRA-GA matched to two rates of full fine-tuning, where preferences or rewards train: what their runs share."""

from argparse import ArgumentParser, Namespace
from typing import Any

from peft import LoraConfig

ARMS = [("LoRA", None), ("LoRA-GA", 1e-6), ("LoRA-GA", 5e-5)]
"""(method, η_f)"""
ON_CPU = {
    "gradient_checkpointing": False, "use_cpu": True, "bf16": True, "disable_tqdm": True, "save_strategy": "no",
    "report_to": "none",
}  # fmt: skip


def arguments(description: str, steps: int) -> Namespace:
    parser = ArgumentParser(description=description)
    parser.add_argument("--steps", type=int, default=steps)
    parser.add_argument("--rates", type=float, nargs="+", default=[1e-5, 1e-4])
    parser.add_argument("--seeds", type=int, nargs="+", default=[1])
    return parser.parse_args()


def all_settings(args: Namespace) -> list[dict[str, Any]]:
    return [
        {"method": method, "learning_rate": rate, "full_learning_rate": eta, "steps": args.steps, "seed": seed}
        for seed in args.seeds
        for rate in args.rates
        for method, eta in ARMS
    ]


def label(settings: dict[str, Any]) -> str:
    eta = settings["full_learning_rate"]
    return settings["method"] if eta is None else f"{settings['method']}, η_f {eta:g}"


def cells(settings: dict[str, Any]) -> list[str]:
    """The first three of a row of the table: method, rate, seed."""
    return [label(settings), f"{settings['learning_rate']:g}", str(settings["seed"])]


def options(settings: dict[str, Any]) -> dict[str, Any]:
    """For the configuration of a trainer."""
    return ON_CPU | {
        "learning_rate": settings["learning_rate"],
        "max_steps": settings["steps"],
        "seed": settings["seed"],
        "ga_full_learning_rate": settings["full_learning_rate"] or 5e-5,
    }


def adapter(settings: dict[str, Any]) -> LoraConfig:
    return LoraConfig(
        r=8,
        lora_alpha=16,
        use_rslora=settings["method"] != "LoRA",
        target_modules="all-linear",
        task_type="CAUSAL_LM",
    )
