"""What LoRA-GA asks of a `LoraConfig` and of the model that it is for, and the paper's."""

from dataclasses import fields

from peft import LoraConfig, PeftModel, PeftType, TaskType
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils import ModulesToSaveWrapper
from torch import nn
from transformers import PreTrainedModel

from ..arguments import is_number_above_zero


def paper_lora_config(task_type: TaskType | None = TaskType.CAUSAL_LM) -> LoraConfig:
    """The paper's adapter (section 4.1): r 8, α 16, rsLoRA scaling, every linear layer but the head."""
    return LoraConfig(r=8, lora_alpha=16, use_rslora=True, target_modules="all-linear", task_type=task_type)


OTHER_METHODS = {
    "use_dora": "DoRA trains a magnitude beside A and B",
    "use_qalora": "QALoRA pools the input before A",
    "use_bdlora": "BD-LoRA makes the factors block-diagonal",
    "alora_invocation_tokens": "aLoRA switches the adapter on per token",
    "arrow_config": "Arrow routes between adapters",
    "velora_config": "VeLoRA compresses the activations that the gradient needs",
    "monteclora_config": "MonteCLoRA samples the factors",
    "kasa_config": "KaSA adds singular values to the factors",
    "megatron_config": "Megatron's parallel layers split the factors",
}
"""Fields of `LoraConfig` that change what an adapter computes, so that LoRA-GA's factors would mean something else."""


BESIDE_THE_BASE_WITH_B_ZERO = ("gaussian", "eva")
"""Of the other initializations, those from which an adapter may have been trained that a new stage starts from: the base's
weights are untouched, and B tells whether it was trained."""


def check_lora_config(config: LoraConfig, adapter_name: str | None = None) -> None:
    """Refuse a `LoraConfig` that asks for another initialization or another kind of adapter.

    Args:
        adapter_name: of the adapter that was made of it; None if the adapter does not exist yet.

    Raises:
        ValueError: naming the field, its value and what to do.
    """
    if not isinstance(config, LoraConfig) or config.peft_type != PeftType.LORA:
        kind = type(config).__name__
        if adapter_name is not None:
            raise ValueError(
                f"The adapter {adapter_name!r} was made of a {kind}, but LoRA-GA initializes LoRA adapters: make it with "
                "`get_peft_model(model, LoraConfig(...))`."
            )
        raise ValueError(
            f"`peft_config` is a {kind}, but LoRA-GA initializes LoRA adapters: pass a `LoraConfig`, or leave it out for the "
            "paper's (r 8, α 16, rsLoRA, all linear layers)."
        )
    if adapter_name is None or config.init_lora_weights not in BESIDE_THE_BASE_WITH_B_ZERO:
        check_new_adapter(config)
    for alpha in (config.lora_alpha, *config.alpha_pattern.values()):
        if not is_number_above_zero(alpha):
            raise ValueError(
                f"An alpha of the `LoraConfig` (`lora_alpha` or in `alpha_pattern`) is {alpha!r}, but must be a finite number "
                "above 0: the adapter's output is multiplied by it. 16 is the paper's."
            )
    for option in fields(config):
        value = getattr(config, option.name)
        if option.name in OTHER_METHODS and value:
            raise ValueError(
                f"`LoraConfig({option.name}={value!r})` cannot be combined with LoRA-GA: {OTHER_METHODS[option.name]}. "
                f"Leave out `{option.name}`, or use TRL's own trainer."
            )


def check_new_adapter(config: LoraConfig) -> None:
    """
    Raises:
        ValueError: it asks for another initialization.
    """
    if config.init_lora_weights is not True:
        raise ValueError(
            f"`LoraConfig(init_lora_weights={config.init_lora_weights!r})` asks for another initialization, but LoRA-GA "
            "is the initialization here. Leave `init_lora_weights` at its default (True), or use TRL's own trainer."
        )


def check_no_adapter(model: nn.Module) -> None:
    """Refuse a base model that carries adapters: a new one would take their place, or be trained on top of them.

    transformers puts adapters into the model itself (`from_pretrained(adapter_folder)`, `load_adapter`, `add_adapter`), PEFT's
    `inject_adapter_in_model` does so too; neither makes a `PeftModel`.

    Raises:
        ValueError: naming the adapters.
    """
    found = {
        name
        for module in model.modules()
        if isinstance(module, BaseTunerLayer)
        for name in module._get_available_adapters()
    }
    if found:
        raise ValueError(
            f"The model is not a bare base model: transformers or PEFT has put the adapters {sorted(found)} into it "
            "(`from_pretrained(adapter_folder)`, `load_adapter`, `add_adapter`, `inject_adapter_in_model`), and LoRA-GA would "
            "train a new adapter on top of them that no file could tell. Load the base model alone; or, to train on from an "
            "adapter, `PeftModel.from_pretrained(base_model, adapter_folder, is_trainable=True)` without a `peft_config`."
        )


def check_own_adapter(peft_model: PeftModel) -> None:
    """The same for a model that `get_peft_model` has already wrapped: `check_no_adapter` would find the new adapter.

    Raises:
        ValueError: transformers had put adapters into the model before.
    """
    base = peft_model.get_base_model()
    if isinstance(base, PreTrainedModel) and base._hf_peft_config_loaded:
        check_no_adapter(base)


LANGUAGE_MODELS = (TaskType.CAUSAL_LM, TaskType.SEQ_2_SEQ_LM)
CLASSIFIERS = ("Classification", "QuestionAnswering", "MultipleChoice")
"""In the names of transformers' classes whose head is made new for a base model that has none."""


def check_task(peft_model: PeftModel, adapter_name: str) -> None:
    """Refuse a `task_type` that does not fit the model, so that PEFT calls it wrongly, or trains and saves no head.

    Raises:
        ValueError: the model takes no text; or it is a classifier whose new head is neither trained nor saved.
    """
    base, task_type = peft_model.get_base_model(), peft_model.peft_config[adapter_name].task_type
    if not isinstance(base, PreTrainedModel):
        return
    if task_type in LANGUAGE_MODELS and base.main_input_name != "input_ids":
        raise ValueError(
            f"`task_type` is {TaskType(task_type).value!r}, for which PEFT calls the model with text, but "
            f"{type(base).__name__} takes `{base.main_input_name}`. Leave `task_type` out of the `LoraConfig`."
        )
    lost = _lost_heads(base)
    if lost:
        names = ", ".join(lost)
        raise ValueError(
            f"{names} of {type(base).__name__} would be neither trained nor saved, although it is new and random: the adapter "
            f"would be worthless once it is reloaded. Set `LoraConfig(modules_to_save={lost!r})`, or the `task_type` of the "
            'model, for example "SEQ_CLS", with which PEFT does that for the heads that it knows.'
        )


def _lost_heads(base: PreTrainedModel) -> list[str]:
    """The parts of a new head that no adapter's file would hold. A head that came with the base model's files is not new."""
    kind = type(base).__name__
    if not any(part in kind for part in CLASSIFIERS) or kind in (base.config.architectures or []):
        return []
    return [
        name
        for name, child in base.named_children()
        if name != base.base_model_prefix and not _is_tower(child) and not _is_saved_whole(child)
    ]


def _is_tower(module: nn.Module) -> bool:
    """A pretrained part of another name than the base's, such as the encoder of Whisper's classifier: heads have no layers."""
    return isinstance(module, PreTrainedModel) or any(isinstance(part, nn.ModuleList) for part in module.modules())


def _is_saved_whole(module: nn.Module) -> bool:
    if isinstance(module, ModulesToSaveWrapper):
        return True
    return not any(True for _ in module.parameters(recurse=False)) and all(map(_is_saved_whole, module.children()))
