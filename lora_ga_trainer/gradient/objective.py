"""What the gradient is the gradient of: the mean loss over the items of all batches of all processes.

    L = Σ compute_loss(batch, N) over the batches of all processes        N the items in all of them

An item is what a loss is a mean over: a label token of a language model, a label or a row of other models.
"""

import math
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
import torch.nn.functional as F
from accelerate.utils import find_batch_size, send_to_device
from peft import PeftModel
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.loss.loss_utils import LOSS_MAPPING, ForCausalLMLoss

from ..distributed.backends import (
    batch_device,
    failing_together,
    full_shape,
    gather_objects,
    input_embedding_weight,
    rank,
    world_size,
)

Batch = dict[str, Tensor]
ComputeLoss = Callable[[nn.Module, Batch, int], Tensor]
"""(model, batch, N) -> the batch's share of the mean over N items, as `Trainer.compute_loss` with `num_items_in_batch`."""


class Objective:
    """The loss L whose gradient is estimated.

    Args:
        batches: this process's, as many as it has; kept where they are.
        compute_loss: default: the cross-entropy of a language model.

    Raises:
        ValueError: on all processes, if one has a batch with tokens that the model does not know, or without the labels that
            the default loss needs; or if no process has a batch, or an item.
    """

    def __init__(self, model: PeftModel, batches: list[Batch], compute_loss: ComputeLoss | None = None):
        check_batches(model, batches, needs_labels=compute_loss is None)
        self.model, self.compute_loss = model, compute_loss or language_model_loss
        self.num_items = count_items(model, batches)
        self.weighted_batches = even_batches(batches)

    @property
    def loss_scale(self) -> float:
        """What every loss is multiplied by, and the sums of gradients are to be divided by: a power of two near N.

        An item's share of the mean loss is 1/N, which fp16 would lose on the way back. A power of two rounds nothing.
        """
        return 2.0 ** math.floor(math.log2(self.num_items))

    def first(self, share: float) -> list[tuple[Batch, float]]:
        """(batch, weight) for every forward over the first `share` of the sample, 1 for all: as many on every process."""
        return self.weighted_batches[: max(1, round(share * len(self.weighted_batches)))]

    def num_examples(self, share: float = 1.0) -> int:
        """Of this process, in the first `share` of the sample."""
        return sum(count_examples(batch) for batch, weight in self.first(share) if weight)

    def losses(self, share: float = 1.0) -> Iterator[tuple[Tensor, int]]:
        """(`loss_scale` times a batch's share of L, how many examples it stands for), for every forward of this process over
        the first `share` of the sample.

        Raises:
            ValueError: on all processes, at the end, if a loss of one does not depend on any target or is not finite.
        """
        device, losses = batch_device(self.model), []
        unreached: list[int] = []
        for index, (batch, weight) in enumerate(self.first(share)):
            # `dict`: what a processor returns would move itself, and with all batches kept, all would stay there
            loss = self.compute_loss(self.model, send_to_device(dict(batch), device), self.num_items)
            losses.append(loss.detach().reshape(()))
            if loss.requires_grad:
                yield loss * (weight * self.loss_scale), count_examples(batch) if weight else 0
            else:
                unreached.append(index)
        with failing_together():  # not sooner: the forward and the loss may communicate
            _check_depends(unreached)
            _check_losses(losses)


def check_batches(model: PeftModel, batches: list[Batch], needs_labels: bool) -> None:
    """
    Raises:
        ValueError: a batch of some process has tokens that the model does not know; or no labels, though they are needed.
    """
    with failing_together():
        for batch in batches:
            if problem := _batch_problem(model, batch, needs_labels):
                raise ValueError(problem)


def _batch_problem(model: PeftModel, batch: Any, needs_labels: bool) -> str | None:
    if not isinstance(batch, Mapping):
        return f"`batches` holds a {type(batch).__name__}, but must be an iterable of dictionaries of tensors, one a forward."
    ids = batch.get("input_ids")
    if ids is not None and not (isinstance(ids, Tensor) and ids.dim() > 1 and ids.numel()):
        kind = f"tensor of the shape {tuple(ids.shape)}" if isinstance(ids, Tensor) else type(ids).__name__
        return (
            f"The `input_ids` of a batch for LoRA-GA are a {kind}, but must be a tensor of examples × tokens, at least one of "
            "each. Pad the examples, and leave out empty ones."
        )
    if needs_labels and "labels" not in batch:
        return (
            f"A batch for LoRA-GA has no 'labels', only {sorted(batch)}: its loss, and so the gradient, is unknown. "
            "Add `labels`, −100 where a token must not count."
        )
    if "input_ids" in batch and isinstance(model.get_base_model(), PreTrainedModel):
        try:
            known = full_shape(input_embedding_weight(model))[0]
        except NotImplementedError:
            return None
        largest = int(batch["input_ids"].max())
        if largest >= known:
            return (
                f"A batch for LoRA-GA holds the token {largest}, but the model has only {known} embeddings. Use the tokenizer "
                "that belongs to the model, or `model.resize_token_embeddings(len(tokenizer))` after adding tokens."
            )
    return None


def count_items(model: PeftModel, batches: list[Batch]) -> int:
    """How many items the mean loss is a mean over, in the `batches` of all processes; see `items_in`.

    Raises:
        ValueError: no process has a batch, or an item.
    """
    num_items_here = sum(items_in(model, batch) for batch in batches)
    num_batches, num_items = map(sum, zip(*gather_objects((len(batches), num_items_here)), strict=True))
    if num_batches == 0:
        raise ValueError("LoRA-GA got no batch to estimate the gradient on. Pass at least one example.")
    if num_items == 0:
        raise ValueError(
            f"All labels of the {num_batches} batches for LoRA-GA are −100, so there is no loss and no gradient. Check "
            "the completion mask, that texts are not empty, and that prompts are shorter than `max_length`."
        )
    return num_items


def items_in(model: PeftModel, batch: Batch) -> int:
    """What the loss of `batch` is a mean over: its labels but for −100, of tokens or of examples, or all rows if it has none.

    Pairs of texts, as those of DPO and of reward models, have no labels: each counts as two rows, in every batch.
    """
    if "labels" not in batch:
        return find_batch_size(batch)
    return int(counted_labels(model, batch["labels"]).ne(-100).sum())


def count_examples(batch: Batch) -> int:
    """Rows of a batch, or what padding-free collators put into its single row one behind the other."""
    rows = find_batch_size(batch)
    return int(batch["position_ids"].eq(0).sum()) if rows == 1 and "position_ids" in batch else rows


def counted_labels(model: PeftModel, labels: Tensor) -> Tensor:
    """The labels that some prediction is compared with: a model of the next token predicts no first one."""
    if not isinstance(model.get_base_model(), PreTrainedModel):
        return labels
    # transformers takes the loss of a causal language model for every model that it does not know
    loss = LOSS_MAPPING.get(model.loss_type, ForCausalLMLoss)
    is_shifted = loss is ForCausalLMLoss and not model.config.is_encoder_decoder and labels.dim() > 1
    return labels[..., 1:] if is_shifted else labels


def language_model_loss(model: PeftModel, batch: Batch, num_items_in_batch: int) -> Tensor:
    """Cross-entropy summed over the batch's label tokens / `num_items_in_batch`: batches add up to the token mean."""
    if model.config.is_encoder_decoder:
        logits, labels = model(**batch).logits, batch["labels"]
    else:
        inputs = {name: value for name, value in batch.items() if name != "labels"}
        logits = model(**inputs, use_cache=False).logits
        # position t predicts token t + 1; moving the labels instead of the logits copies nothing large
        labels = F.pad(counted_labels(model, batch["labels"]), (0, 1), value=-100)
    labels = labels.to(logits.device)  # of a model that is split over devices
    return F.cross_entropy(logits.flatten(0, 1).float(), labels.flatten(), reduction="sum") / num_items_in_batch


def even_batches(batches: list[Batch]) -> list[tuple[Batch, float]]:
    """(batch, weight) for every forward of this process: `batches` at weight 1, padded with a repeated batch of weight 0.

    ZeRO-3 and FSDP2 exchange weights in every forward and backward, so all processes have to do as many.
    """
    counts = gather_objects(len(batches))
    weighted = [(batch, 1.0) for batch in batches]
    if min(counts) == max(counts):
        return weighted
    idle_batches = batches[:1]
    if min(counts) == 0:
        lender = counts.index(max(counts))
        lent = gather_objects(send_to_device(batches[0], "cpu") if rank() == lender else None)[lender]
        idle_batches = idle_batches or [lent]
    return weighted + [(idle_batches[0], 0.0)] * (max(counts) - len(batches))


def _check_depends(unreached: list[int]) -> None:
    if unreached:
        raise ValueError(
            f"The loss of batch {unreached[0]} for LoRA-GA does not depend on any target layer. Check `target_modules` "
            "against the layers that the forward pass really runs."
        )


def _check_losses(losses: list[Tensor]) -> None:
    """Once for a whole pass: waiting for the accelerator after every batch would slow it down."""
    values = torch.stack(losses).tolist()
    bad = next((index for index, value in enumerate(values) if not math.isfinite(value)), None)
    if bad is not None:
        process = f" on process {rank()}" if world_size() > 1 else ""
        raise ValueError(
            f"The loss of batch {bad} for LoRA-GA{process} is {values[bad]}, so there is no gradient to start from. Look for "
            "NaN or Inf in the model's weights, or load it in a wider dtype (bf16 or fp32 instead of fp16)."
        )
