"""The gradient of a loss over batches, gathered layer by layer: the batches, the loss, the passes over them.

Shapes: O out features, I in features, T tokens.
"""

import hashlib
import logging
import math
from collections.abc import Callable

import torch
import torch.nn.functional as F
from accelerate.utils import find_batch_size, send_to_device
from peft import PeftModel
from peft.tuners.lora import LoraLayer
from torch import Tensor, nn
from tqdm.auto import tqdm
from transformers import PreTrainedModel
from transformers.loss.loss_utils import LOSS_MAPPING, ForCausalLMLoss

from ..arguments import LoRAGAArguments
from ..distributed.backends import (
    batch_device,
    compute_device,
    failing_together,
    full_shape,
    gather_objects,
    input_embedding_weight,
    rank,
    sum_over_processes,
    world_size,
)
from .accumulator import ExactGradient, GradientSketch
from .probe import gradient_probe

Accumulator = ExactGradient | GradientSketch
ComputeLoss = Callable[[nn.Module, dict[str, Tensor], int], Tensor]

logger = logging.getLogger(__name__)

IN_A_MESSAGE = 10
"""Names of layers that an error gives itself; of more it gives some, and the log all."""
SKETCH_OVERSAMPLING = 32
"""K − 2r. Real gradients have slowly falling spectra: with 32 spare directions 2 passes reach 0.999 of the exact alignment in
the mean over the layers of SmolLM2-135M at r = 8, and the sketch takes under 5 % of the gradients of Llama-2-7B."""


def check_batches(model: PeftModel, batches: list[dict[str, Tensor]], need_labels: bool) -> None:
    """
    Raises:
        ValueError: a batch of some process has tokens that the model does not know; or no labels, though they are needed.
    """
    with failing_together():
        for batch in batches:
            if problem := _batch_problem(model, batch, need_labels):
                raise ValueError(problem)


def _batch_problem(model: PeftModel, batch: dict[str, Tensor], needs_labels: bool) -> str | None:
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


def count_items(model: PeftModel, batches: list[dict[str, Tensor]]) -> int:
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


def items_in(model: PeftModel, batch: dict[str, Tensor]) -> int:
    """What the loss of `batch` is a mean over: its labels but for −100, of tokens or of examples, or all rows if it has none.

    Pairs of texts, as those of DPO and of reward models, have no labels: each counts as two rows, in every batch.
    """
    if "labels" not in batch:
        return find_batch_size(batch)
    return int(counted_labels(model, batch["labels"]).ne(-100).sum())


def count_examples(batch: dict[str, Tensor]) -> int:
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


def language_model_loss(model: PeftModel, batch: dict[str, Tensor], num_items_in_batch: int) -> Tensor:
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


def sketch_width(name: str, layer: LoraLayer, adapter_name: str, config: LoRAGAArguments) -> int:
    """K for one layer: `ga_sketch_size` or 2·r + 32, and no more than the layer has dimensions.

    Raises:
        ValueError: K is under 2·r.
    """
    rank = layer.r[adapter_name]
    width = min(config.ga_sketch_size or 2 * rank + SKETCH_OVERSAMPLING, layer.out_features, layer.in_features)
    if width < 2 * rank:
        raise ValueError(
            f"`ga_sketch_size` is {config.ga_sketch_size}, but must be at least 2·r = {2 * rank} for {name}: LoRA-GA "
            "takes 2·r singular vectors from the sketch. Raise it, or leave it out to use 2·r + 32."
        )
    return width


def make_accumulator(name: str, layer: LoraLayer, adapter_name: str, config: LoRAGAArguments) -> Accumulator:
    """The accumulator that `config` asks for; the exact gradient also where a sketch would be hardly smaller.

    It is on the layer's own device: a model may be split over several. All sketches of a seed share their Gaussian matrices.
    """
    O, I, device = layer.out_features, layer.in_features, compute_device(layer.lora_A[adapter_name].trainable)
    width = sketch_width(name, layer, adapter_name, config)
    if config.ga_estimator == "exact" or 2 * width * (O + I) >= O * I:
        return ExactGradient(O, I, device)
    # float32 where the weight is, whatever autocast makes of x and dy. A quantized layer computes in 16 bits, and need not
    # have a parameter.
    is_float32 = any(parameter.dtype == torch.float32 for parameter in layer.get_base_layer().parameters())
    basis_dtype = torch.float32 if is_float32 else torch.bfloat16
    seed = derived_seed("sketch", config.ga_seed)
    return GradientSketch(O, I, width, config.ga_sketch_passes, seed, device, basis_dtype)


def derived_seed(purpose: str, seed: int) -> int:
    """A seed for one purpose that does not depend on process or device, nor meets a model's or a data set's own seed."""
    return int.from_bytes(hashlib.sha256(f"{seed}/{purpose}".encode()).digest()[:7], "big")


def estimate_gradients(
    model: PeftModel,
    layers: dict[str, LoraLayer],
    accumulators: dict[str, Accumulator],
    batches: list[dict[str, Tensor]],
    compute_loss: ComputeLoss,
    num_items: int,
    disable_tqdm: bool = True,
    *,
    adapter_is_zero: bool = True,
) -> list[int]:
    """Fill `accumulators` with the gradient of Σ compute_loss(model, batch, num_items) over the batches of all processes.

    The gradient is that at the current function; `adapter_is_zero` says that this is the base model's.

    Returns:
        for each pass, the bytes that this process put into the all-reduce of its sums.

    Raises:
        ValueError: on all processes, if the loss of one is not finite, or a layer gets no finite, non-zero gradient.
    """
    # A token's share of the mean loss is 1/num_items, which fp16 would lose on the way back. Backward runs on the loss
    # times a power of two near num_items; the sums are divided by it afterwards, which rounds nothing.
    loss_scale = 2.0 ** math.floor(math.log2(num_items))
    device = batch_device(model)
    passes = max(accumulator.passes for accumulator in accumulators.values())
    weighted = even_batches(batches)
    bytes_of_passes = []
    share = f", process 1 of {world_size()}" if world_size() > 1 else ""
    total = passes * sum(map(count_examples, batches))
    with tqdm(total=total, disable=disable_tqdm, unit=" samples", desc="LoRA-GA gradient") as progress:
        for pass_number in range(1, passes + 1):
            progress.set_description(f"LoRA-GA gradient, pass {pass_number} of {passes}{share}")
            summing = {name: acc for name, acc in accumulators.items() if acc.passes >= pass_number}
            losses: list[Tensor] = []
            receivers: dict[str, Callable[[Tensor, Tensor], None]] = {
                name: accumulator.add for name, accumulator in summing.items()
            }
            with gradient_probe(model, layers, receivers, adapter_is_zero) as backward:
                for index, (batch, weight) in enumerate(weighted):
                    # `dict`: what a processor returns would move itself, and with all batches kept, all would stay there
                    loss = compute_loss(model, send_to_device(dict(batch), device), num_items)
                    _check_reached(loss, index)
                    losses.append(loss.detach().reshape(()))
                    backward(loss * (weight * loss_scale))
                    progress.update(count_examples(batch) if weight else 0)
            with failing_together():  # not sooner: the forward and the loss may communicate
                _check_losses(losses)
            bytes_of_passes.append(_finish_sums(summing, loss_scale))
            with failing_together():
                for accumulator in summing.values():
                    accumulator.end_pass()
    return bytes_of_passes


def _finish_sums(accumulators: dict[str, Accumulator], loss_scale: float) -> int:
    """Sum a pass over processes, undo the loss scale, and look at what came of it; returns the bytes all-reduced.

    No reference to the sums may outlive it: the next pass makes its own, and there is memory for one set.
    """
    sums = [total for accumulator in accumulators.values() for total in accumulator.sums()]
    all_reduced_bytes = sum_over_processes(sums)
    for total in sums:
        total.div_(loss_scale)
    _check_gradients(accumulators)
    return all_reduced_bytes


def even_batches(batches: list[dict[str, Tensor]]) -> list[tuple[dict[str, Tensor], float]]:
    """(batch, weight) for every forward that this process does: `batches` at weight 1, then some batch again at weight 0.

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


def _check_reached(loss: Tensor, index: int) -> None:
    if not loss.requires_grad:
        raise ValueError(
            f"The loss of batch {index} for LoRA-GA does not depend on any target layer. Check `target_modules` "
            "against the layers that the forward pass really runs."
        )


def _check_losses(losses: list[Tensor]) -> None:
    """Of a whole pass, so that the accelerator is not waited for after every batch."""
    values = torch.stack(losses).tolist()
    bad = next((index for index, value in enumerate(values) if not math.isfinite(value)), None)
    if bad is not None:
        process = f" on process {rank()}" if world_size() > 1 else ""
        raise ValueError(
            f"The loss of batch {bad} for LoRA-GA{process} is {values[bad]}, so there is no gradient to start from. Look for "
            "NaN or Inf in the model's weights, or load it in a wider dtype (bf16 or fp32 instead of fp16)."
        )


def whole_list(names: list[str]) -> str:
    """All of `names`, which somebody is to copy; in the log if they are many, once for all processes."""
    if len(names) <= IN_A_MESSAGE:
        return ", ".join(names)
    if rank() == 0:
        logger.error("\n".join(names))
    return f"{', '.join(names[:3])} and {len(names) - 3} more, all of which are in the log"


def _check_gradients(accumulators: dict[str, Accumulator]) -> None:
    """A layer that would be left at vanilla LoRA, or worse, is an error that names it; never a silent fallback."""
    # all layers' answers wait for the accelerator once; a model may be split over several
    answers = [
        torch.stack([torch.stack([total.any(), total.isfinite().all()]) for total in acc.sums()]).all(dim=0)
        for acc in accumulators.values()
    ]
    found = torch.stack([answer.to(answers[0].device) for answer in answers]).T.tolist()
    for problem, are_good in zip(
        ("no gradient (it is exactly zero)", "a gradient with NaN or Inf"), found, strict=True
    ):
        bad = [name for name, is_good in zip(accumulators, are_good, strict=True) if not is_good]
        if bad:
            raise ValueError(
                f"{len(bad)} of {len(accumulators)} target layers get {problem}: {whole_list(bad)}. LoRA-GA "
                "cannot initialize them: leave them out with `LoraConfig(exclude_modules=...)`, check that the forward "
                "pass uses them, or estimate on other or more samples (`ga_num_samples`)."
            )
