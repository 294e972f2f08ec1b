"""What an export loses of the trained adapter: in its weights, and on data.

Shapes: N tokens that count in the loss, V vocabulary.
"""

import math
import statistics
import tempfile
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from datasets import Dataset
from peft import LoraConfig, TaskType
from peft.utils import CONFIG_NAME
from torch import Tensor
from transformers import (
    MODEL_FOR_CAUSAL_LM_MAPPING,
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    PreTrainedModel,
)
from trl import SFTConfig, SFTTrainer

from ..checkpoint.merging_in_memory import with_adapter
from ..checkpoint.portable import Lost
from ..checkpoint.scaling import PREFIX

WORST = 3
"""Layers that the table names."""


class OnData(NamedTuple):
    """What was found on the tokens of some rows that count in the loss."""

    tokens: int
    base: float
    """The mean loss per token of the untouched base model."""
    trained: float
    exported: float
    moved: float
    """The root mean square, over tokens and vocabulary, of what training changed in the logits."""
    error: float
    """That of what the export changed in the trained model's."""


def measure(
    base: Path, trained: Path, exported: Path, rows: Dataset, max_length: int | None, batch_size: int
) -> OnData:
    """The losses and logits of the adapter in `trained` and of what was exported from it, an adapter or a merged model.

    All is computed in float32. `rows` are prepared as TRL does for training: prompts do not count.

    Args:
        base: the folder of the untouched base model, a decoder only.

    Raises:
        ValueError: `rows` have no token that counts; the adapter is for another base; or what `check_measurable` or TRL, about
            the rows, raises.
    """
    check_measurable(base, trained)
    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    has_tokenizer = (trained / "tokenizer_config.json").is_file()
    tokenizer = AutoTokenizer.from_pretrained(trained if has_tokenizer else base)
    batches = prepared(model, tokenizer, rows, max_length, batch_size)
    adapted = with_adapter(model, trained)
    is_adapter = (exported / CONFIG_NAME).is_file()
    if is_adapter:
        adapted.load_adapter(exported, "exported")
        other: Any = adapted
    else:
        other = AutoModelForCausalLM.from_pretrained(exported, dtype=torch.float32, device_map=model.device).eval()
    adapted.eval()
    sums = torch.zeros(5, dtype=torch.float64)
    tokens = width = 0
    for batch in batches:
        adapted.set_adapter("default")
        with adapted.disable_adapter():
            base_NV, labels_N = counted(adapted, batch)
        trained_NV, _ = counted(adapted, batch)
        if is_adapter:
            adapted.set_adapter("exported")
        exported_NV, _ = counted(other, batch)
        losses = [F.cross_entropy(found, labels_N, reduction="sum") for found in (base_NV, trained_NV, exported_NV)]
        squares = [(trained_NV - base_NV).square().sum(), (exported_NV - trained_NV).square().sum()]
        sums += torch.stack([*losses, *squares]).double().cpu()
        tokens, width = tokens + len(labels_N), base_NV.shape[1]
    if not tokens:
        raise ValueError(
            "The rows have no token that counts in the loss (are the prompts longer than `max_length`?), so nothing can be "
            "measured on them. Pass others, or raise `max_length`."
        )
    base_loss, trained_loss, exported_loss = (sums[:3] / tokens).tolist()
    return OnData(tokens, base_loss, trained_loss, exported_loss, *(sums[3:] / (tokens * width)).sqrt().tolist())


def check_measurable(base: Path, trained: Path) -> None:
    """
    Raises:
        ValueError: the adapter in `trained` or the model in `base` is not a decoder-only language model's.
    """
    task, config = LoraConfig.from_pretrained(trained).task_type, AutoConfig.from_pretrained(base)
    if task not in (None, TaskType.CAUSAL_LM):
        found = f"The adapter's `task_type` is {TaskType(task).value!r}"
    elif type(config) not in MODEL_FOR_CAUSAL_LM_MAPPING:
        found = f"The base model in {base} is of the type {config.model_type!r}"
    else:
        return
    raise ValueError(f"{found}, but only decoder-only language models are measured. Leave out the data.")


def prepared(
    model: PreTrainedModel, tokenizer: Any, rows: Dataset, max_length: int | None, batch_size: int
) -> list[dict[str, Tensor]]:
    """Batches of `rows` as TRL's trainer feeds them to the model, which it puts on its device."""
    with tempfile.TemporaryDirectory() as unused:
        args = SFTConfig(
            unused, max_length=max_length, per_device_eval_batch_size=batch_size, report_to="none", bf16=False,
            gradient_checkpointing=False, use_cpu=not torch.cuda.is_available(), disable_tqdm=True,
        )  # fmt: skip
        trainer = SFTTrainer(model, args, train_dataset=rows, processing_class=tokenizer)
        return list(trainer.get_eval_dataloader(trainer.train_dataset))


def counted(model: Any, batch: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
    """(the logits from which the tokens that count are predicted, N×V; those tokens, N)."""
    inputs = {name: value for name, value in batch.items() if name != "labels"}
    following = batch["labels"][:, 1:]
    counts = following != -100
    with torch.no_grad():
        logits = model(**inputs).logits[:, :-1]
    return logits[counts].float(), following[counts]


def table(lost: dict[str, Lost], found: OnData | None) -> str:
    """Both as Markdown; each part only if there is one."""
    rows = [("what the export loses", "")]
    if lost:
        together = math.hypot(*(layer.error for layer in lost.values())) / math.hypot(
            *(layer.norm for layer in lost.values())
        )
        worst = sorted(lost, key=lambda name: lost[name].share, reverse=True)[:WORST]
        rows += [
            (f"of ‖ΔW‖, {len(lost)} layers together", f"{together:.2%}"),
            ("in the median layer", f"{statistics.median(layer.share for layer in lost.values()):.2%}"),
            ("in the worst", ", ".join(f"{lost[name].share:.2%} {name.removeprefix(PREFIX)}" for name in worst)),
        ]
    if found:
        rows += [
            (
                f"loss on {found.tokens:,} tokens",
                f"{found.base:.4f} base, {found.trained:.4f} trained, {found.exported:.4f} exported",
            ),
            ("rms of the logits", f"{found.moved:.4f} moved by training, {found.error:.4f} by the export"),
        ]
    lines = [f"| {' | '.join(row)} |" for row in rows]
    return "\n".join([lines[0], "| --- | --- |", *lines[1:]])
