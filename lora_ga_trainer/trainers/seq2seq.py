"""`LoRAGASeq2SeqTrainer`: encoder-decoder models such as T5."""

from collections.abc import Callable
from typing import Any

import torch
from peft import LoraConfig, PeftModel, TaskType, get_peft_model
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler
from transformers import EvalPrediction, PreTrainedModel, Seq2SeqTrainer, TrainerCallback, TrainingArguments

from ..adapter.lora_config import check_lora_config, check_no_adapter, paper_lora_config
from ..arguments import LoRAGASeq2SeqConfig, with_ga_options
from ..distributed.launches import check_shared_embeddings, launch_of
from ..initialization.stages import as_peft_model, carries_adapter
from .mixin import LoRAGAMixin


class TokenMeanSeq2SeqTrainer(Seq2SeqTrainer):
    """transformers' `Seq2SeqTrainer`, whose loss is a mean over tokens, however they are spread over batches and processes."""

    def compute_loss(
        self,
        model: nn.Module,
        inputs: dict[str, Tensor],
        return_outputs: bool = False,
        num_items_in_batch: Tensor | int | None = None,
    ) -> Tensor | tuple[Tensor, Any]:
        """`Seq2SeqTrainer`'s loss, but as this batch's share of the mean over all `num_items_in_batch` label tokens.

        transformers leaves that to the model, and T5, BART and similar models ignore it: with gradient accumulation, the
        losses of the micro-batches would add up instead of being averaged, and with several processes each would be
        multiplied by their number (transformers 5.23). With one process and no accumulation, the loss is unchanged.
        """
        if num_items_in_batch is None or self.compute_loss_func is not None:
            return super().compute_loss(model, inputs, return_outputs, num_items_in_batch)
        share = inputs["labels"].ne(-100).sum() / torch.as_tensor(num_items_in_batch, device=inputs["labels"].device)
        mean, outputs = super().compute_loss(model, inputs, return_outputs=True)
        loss = torch.where(share > 0, mean, 0.0) * share  # without label tokens the mean is NaN
        if self.args.average_tokens_across_devices:  # the backends average gradients over processes
            loss = loss * self.accelerator.num_processes
        return (loss, outputs) if return_outputs else loss


class LoRAGASeq2SeqTrainer(LoRAGAMixin, TokenMeanSeq2SeqTrainer):
    """transformers' `Seq2SeqTrainer` with the LoRA-GA initialization (arXiv 2407.05000); takes the same arguments.

    `args` may be a `LoRAGASeq2SeqConfig`, or a `Seq2SeqTrainingArguments` or `TrainingArguments`, which get the default
    `ga_*` options. `model` is an encoder-decoder model, to which `peft_config` (default: the paper's) adds the adapter, or a
    `PeftModel` with a LoRA adapter, new or trained. Everything else is as in `LoRAGASFTTrainer`.

    Raises:
        ValueError: the model is no encoder-decoder, both a `PeftModel` and a `peft_config` are given, or embeddings are shared
            under FSDP2; otherwise as `LoRAGASFTTrainer`.
    """

    def __init__(
        self,
        model: PreTrainedModel | PeftModel,
        args: TrainingArguments | None = None,
        data_collator: Callable[[list[Any]], dict[str, Any]] | None = None,
        train_dataset: Any = None,
        eval_dataset: Any = None,
        processing_class: Any = None,
        model_init: Callable[[], PreTrainedModel] | None = None,
        compute_loss_func: Callable | None = None,
        compute_metrics: Callable[[EvalPrediction], dict] | None = None,
        callbacks: list[TrainerCallback] | None = None,
        optimizers: tuple[Optimizer | None, LRScheduler | None] = (None, None),
        preprocess_logits_for_metrics: Callable[[Tensor, Tensor], Tensor] | None = None,
        peft_config: LoraConfig | None = None,
    ):
        config: Any = model.config if isinstance(model, nn.Module) else None
        if config is None or not config.is_encoder_decoder:
            raise ValueError(
                f"`model` is {model if isinstance(model, str) else type(model).__name__}, but must be an encoder-decoder "
                "model in memory, for example from `AutoModelForSeq2SeqLM.from_pretrained(...)`. Decoder-only models are for "
                "`LoRAGASFTTrainer`."
            )
        args = with_ga_options(LoRAGASeq2SeqConfig, args, model)
        if peft_config is None and carries_adapter(model):
            model = as_peft_model(model)
        if isinstance(model, PeftModel):
            if peft_config is not None:
                raise ValueError(
                    "`model` is a `PeftModel` already, so `peft_config` would be a second adapter. Leave one of them out."
                )
        else:
            self.adapter_is_default = peft_config is None
            if peft_config is None:
                # PEFT calls a SEQ_2_SEQ_LM with text, which Whisper and similar models do not take
                takes_text = model.main_input_name == "input_ids"
                peft_config = paper_lora_config(TaskType.SEQ_2_SEQ_LM if takes_text else None)
            check_lora_config(peft_config)
            check_no_adapter(model)
            model = get_peft_model(model, peft_config)
            if args.gradient_checkpointing:  # reentrant checkpointing passes a gradient on only if its input has one
                model.enable_input_require_grads()
        super().__init__(
            model=model,
            args=args,
            data_collator=data_collator,
            train_dataset=train_dataset,
            eval_dataset=eval_dataset,
            processing_class=processing_class,
            model_init=model_init,
            compute_loss_func=compute_loss_func,
            compute_metrics=compute_metrics,
            callbacks=callbacks,
            optimizers=optimizers,
            preprocess_logits_for_metrics=preprocess_logits_for_metrics,
        )
        check_shared_embeddings(launch_of(self.accelerator, model), model)
