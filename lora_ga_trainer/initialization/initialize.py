"""LoRA-GA's initialization of a PEFT model, whole: probe the gradient, factor it, write A0 and B0.

`initialize_lora_ga` is for people with their own loop; the trainers run the same initialization. `restart_lora_ga` does it
again in the middle of training.
"""

import logging
import time
from collections.abc import Iterable

from peft import PeftModel
from torch.optim import Optimizer
from tqdm.auto import tqdm

from ..adapter.adapter import LoRAGAAdapter
from ..arguments import LoRAGAArguments
from ..distributed.backends import batch_device, forget_optimizer_state, is_sharded, rank
from ..factors import LearningRates
from ..gradient.estimation import accumulator_bytes, estimate_gradients, make_accumulator
from ..gradient.memory import peak_memory
from ..gradient.objective import Batch, ComputeLoss, Objective
from ..gradient.restored import preserved_rng
from ..report import InitReport
from .attach import attach_lora_ga, attached
from .factorization import write_all_factors

logger = logging.getLogger(__name__)


def initialize_lora_ga(
    peft_model: PeftModel,
    batches: Iterable[Batch],
    config: LoRAGAArguments,
    compute_loss: ComputeLoss | None = None,
    *,
    disable_tqdm: bool = False,
) -> InitReport:
    """Initialize the active LoRA adapter of `peft_model` from the gradient of the loss over `batches`.

    Afterwards the model still computes exactly what it did; train it like any `PeftModel`, with an optimizer that is made after
    this call or after `attach_lora_ga`. Its base weights are not written, and its training modes, `requires_grad` flags, hooks
    and the random state are as they were. If anything fails, no factor has been written: the model still computes what it did,
    and since the trained pair and its factors are zero then, it learns nothing until an initialization has succeeded.

    With several processes (DDP, DeepSpeed ZeRO, FSDP2) every one has to call it, each with batches of its own, as many as it
    has; the gradient is that of all of them. Pass the module itself, not its DDP or DeepSpeed wrapper. If the model is
    sharded, `attach_lora_ga` has to come before the sharding.

    Args:
        peft_model: from `get_peft_model`; or with a trained adapter, which is kept, see `attach_lora_ga`.
        batches: what `compute_loss` takes; by default model inputs with `labels`, −100 where a token must not count.
            Read once and kept, since the estimation goes over it `ga_sketch_passes` times; moved to the model's device
            one by one. A look (1.25 passes) is at the first of them.
        config: the `ga_*` options; a `LoRAGASFTConfig` is one. `ga_num_samples` and `ga_batch_size` are for whoever
            makes the batches.
        compute_loss: called as `compute_loss(model, batch, num_items_in_batch)`, like `Trainer.compute_loss`, with the
            number of labels but for −100 in all batches, or of their rows if they have no `labels`; returns a scalar. The
            gradient is that of the sum over batches. By default the cross-entropy of a language model, summed over the
            batch's label tokens, divided by that number.

    Returns:
        the alignment of each layer, and what the initialization took.

    Raises:
        ValueError: no batch, no label, a loss that is not finite, a target whose gradient is not finite, or next to no
            target that gets one; also what `attach_lora_ga` raises.
    """
    check_config(config)
    if config.ga_scale is None and config.scale == "stable" and rank() == 0:
        logger.warning(
            "`ga_learning_rate` is not set, so the factors have the size of the paper's scale (`ga_scale='stable'`), which "
            "wants the small learning rates of full fine-tuning. Pass the peak learning rate of your optimizer as "
            "`ga_learning_rate` to have them sized by it, or `ga_scale='stable'` to silence this warning."
        )
    return start_from_gradient(attach_lora_ga(peft_model, config), batches, config, compute_loss, disable_tqdm)


def restart_lora_ga(
    peft_model: PeftModel,
    batches: Iterable[Batch],
    config: LoRAGAArguments,
    optimizer: Optimizer,
    compute_loss: ComputeLoss | None = None,
    *,
    disable_tqdm: bool = False,
) -> InitReport:
    """Start again from a fresh gradient: LoRA-GA inside ReLoRA. To be called between two optimizer steps.

    What was trained so far is frozen into the adapter, so the function is the same and the base stays unwritten; dA and dB are
    zero again beside new factors from the gradient at the current function, and `optimizer` forgets what it knew of them. The
    saved adapter's rank grows by 2·r; merging removes that. If anything fails before the factors are found, nothing has been
    changed. The learning rate is the caller's: let it climb again, since the optimizer starts without momentum.

    From then on only `save_pretrained` and `load_adapter` carry the whole adapter: what was frozen is not in `state_dict()`.

    All other arguments are as for `initialize_lora_ga`.

    Args:
        optimizer: that of the training, as `accelerator.prepare` or `deepspeed.initialize` returned it.

    Returns:
        the alignment of each layer, and what the estimation took.

    Raises:
        ValueError: the adapter has not been initialized yet, `ga_offset` is or was False, or what `initialize_lora_ga` raises.
    """
    check_config(config)
    adapter = attached(peft_model)
    if adapter is None:
        raise ValueError(
            "The model has no LoRA-GA adapter, so there is nothing to restart. Call `initialize_lora_ga(...)` first."
        )
    return restart_from_gradient(adapter, batches, config, optimizer, compute_loss, disable_tqdm)


def check_config(config: LoRAGAArguments) -> None:
    """
    Raises:
        ValueError: it holds no `ga_*` options.
    """
    if not isinstance(config, LoRAGAArguments):
        raise ValueError(
            f"`config` is a {type(config).__name__}, but must hold the `ga_*` options: pass `LoRAGAArguments(...)` or a "
            "`LoRAGASFTConfig`."
        )


def start_from_gradient(
    adapter: LoRAGAAdapter,
    batches: Iterable[Batch],
    config: LoRAGAArguments,
    compute_loss: ComputeLoss | None = None,
    disable_tqdm: bool = False,
    learning_rates: dict[str, LearningRates] | None = None,
) -> InitReport:
    """`initialize_lora_ga` of an adapter that is attached.

    Args:
        learning_rates: the peak rates of each weight's A and B, by name, where an optimizer says them.
    """
    adapter.state.report = _estimate_and_write(adapter, batches, config, compute_loss, disable_tqdm, learning_rates)
    return adapter.state.report


def restart_from_gradient(
    adapter: LoRAGAAdapter,
    batches: Iterable[Batch],
    config: LoRAGAArguments,
    optimizer: Optimizer,
    compute_loss: ComputeLoss | None = None,
    disable_tqdm: bool = False,
    learning_rates: dict[str, LearningRates] | None = None,
) -> InitReport:
    """`restart_lora_ga` of an adapter that has been initialized."""
    if not (config.ga_offset and adapter.state.options["ga_offset"]):
        raise ValueError(
            f"`ga_offset` is {config.ga_offset}, was {adapter.state.options['ga_offset']} when {adapter.name!r} was attached, "
            "but a restart keeps what was trained beside a pair A0, B0 with its offset. Set it to True, or do not restart."
        )
    if not adapter.is_initialized:
        raise ValueError(
            f"The adapter {adapter.name!r} has not been initialized by LoRA-GA yet, so there is nothing to restart. Call "
            "`initialize_lora_ga(...)` first."
        )
    report = _estimate_and_write(adapter, batches, config, compute_loss, disable_tqdm, learning_rates)
    forget_optimizer_state(optimizer, [half.trainable for half in adapter.halves.values()])
    adapter.state.restarts.append(report)
    return report


def _estimate_and_write(
    adapter: LoRAGAAdapter,
    batches: Iterable[Batch],
    config: LoRAGAArguments,
    compute_loss: ComputeLoss | None,
    disable_tqdm: bool,
    learning_rates: dict[str, LearningRates] | None,
) -> InitReport:
    """Sample -> gradient -> factors -> written. At a restart what was trained goes to the history first."""
    _tell_of_memory(adapter, config)
    rates = rates_to_match(adapter, config, learning_rates) if config.scale == "matched" else {}
    with preserved_rng():  # a shuffling DataLoader draws its order
        batches = list(batches)
    objective = Objective(adapter.model, batches, compute_loss)

    started = time.perf_counter()
    with peak_memory(batch_device(adapter.model)) as peak:
        accumulators = {name: make_accumulator(weight, config) for name, weight in adapter.weights.items()}
        all_reduced_bytes = estimate_gradients(adapter, accumulators, objective, disable_tqdm)
        found = write_all_factors(adapter, accumulators, config, rates)

    reached = {name: layer for name, layer in found.items() if layer.singular_values}
    report = InitReport(
        alignment={name: layer.alignment for name, layer in reached.items()},
        num_items=objective.num_items,
        seconds=time.perf_counter() - started,
        extra_peak_bytes=peak.extra_bytes,
        all_reduced_bytes=all_reduced_bytes,
        singular_values={name: layer.singular_values for name, layer in reached.items()},
        gradient_norm={name: layer.gradient_norm for name, layer in reached.items()},
        scale={name: layer.scale for name, layer in found.items()},
        idle=[name for name in found if name not in reached],
        thin=[name for name, layer in found.items() if layer.experts.total == 1 and layer.experts.thin],
        experts={name: layer.experts for name, layer in found.items() if layer.experts.total > 1},
    )
    if rank() == 0:
        logger.info(report.summary())
        if not (disable_tqdm or logger.isEnabledFor(logging.INFO)):  # who watches the progress bar wants its end
            tqdm.write(report.summary())
    return report


def rates_to_match(
    adapter: LoRAGAAdapter, config: LoRAGAArguments, found: dict[str, LearningRates] | None
) -> dict[str, LearningRates]:
    """The peak rates of every weight's A and B, by name: what `config` says, else what was `found` in an optimizer.

    Raises:
        ValueError: nothing says it, or an optimizer does not train A and B of some weight.
    """
    if found is None or config.ga_learning_rate is not None:
        rate = config.peak_learning_rate
        if rate is None:
            raise ValueError(
                "`ga_learning_rate` is None, but `ga_scale='matched'` sizes the factors by the learning rate. Pass the peak "
                "learning rate that your optimizer gives the adapter, or another `ga_scale`."
            )
        found = dict.fromkeys(adapter.weights, LearningRates(rate, rate))
    for name, rates in found.items():
        if (max(rates) if config.ga_offset else rates.B) <= 0:
            raise ValueError(
                f"The optimizer trains the adapter of {name} at the learning rates {rates.A} (A) and {rates.B} (B), to which "
                "no factor can be matched. Set `ga_learning_rate` to the peak learning rate if the optimizer does not know it, "
                "raise `learning_rate` if it is 0, or choose another `ga_scale`."
            )
    return found


def _tell_of_memory(adapter: LoRAGAAdapter, config: LoRAGAArguments) -> None:
    """Log how much memory the estimation will take."""
    if adapter.is_initialized or rank() != 0:
        return
    gibibytes = sum(accumulator_bytes(weight, config) for weight in adapter.weights.values()) / 2**30
    if config.ga_estimator == "exact" and any(map(is_sharded, adapter.model.parameters())):
        logger.warning(
            f"`ga_estimator` is 'exact' on a sharded model: every process holds the whole float32 gradient of all targets, "
            f"{gibibytes:,.2f} GiB. The default, 'sketch', needs a small part of it."
        )
    else:
        logger.info(f"LoRA-GA's sums of the gradients will take {gibibytes:,.2f} GiB on every process.")
