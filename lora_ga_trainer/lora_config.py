"""What LoRA-GA asks of a `LoraConfig`, and the paper's."""

from dataclasses import fields

from peft import LoraConfig, PeftType, TaskType

from .arguments import is_number_above_zero


def paper_lora_config(task_type: TaskType = TaskType.CAUSAL_LM) -> LoraConfig:
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
    "target_parameters": "parameters outside of linear layers have no input that the probe could see. The experts of a "
    'Mixture-of-Experts model are such parameters, and PEFT makes this field of "all-linear", "gate_proj" and the like; name '
    'the linear layers instead, for example `target_modules=["q_proj", "k_proj", "v_proj", "o_proj"]`',
    "megatron_config": "Megatron's parallel layers split the factors",
}
"""Fields of `LoraConfig` that change what an adapter computes, so that LoRA-GA's factors would mean something else."""


def check_lora_config(config: LoraConfig) -> None:
    """Refuse a `LoraConfig` that asks for another initialization or another kind of adapter.

    Raises:
        ValueError: naming the field, its value and what to do.
    """
    if not isinstance(config, LoraConfig) or config.peft_type != PeftType.LORA:
        raise ValueError(
            f"`peft_config` is a {type(config).__name__}, but LoRA-GA initializes LoRA adapters: pass a `LoraConfig`, or "
            "leave it out for the paper's (r 8, α 16, rsLoRA, all linear layers)."
        )
    if config.init_lora_weights is not True:
        raise ValueError(
            f"`LoraConfig(init_lora_weights={config.init_lora_weights!r})` asks for another initialization, but LoRA-GA "
            "is the initialization here. Leave `init_lora_weights` at its default (True), or use the trainer without LoRA-GA."
        )
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
                f"Leave out `{option.name}`, or use the trainer without LoRA-GA."
            )
