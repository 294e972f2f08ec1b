"""LoRA-GA in an adapter that is scaled as plain LoRA's, by α/r, as one more `--method` of the recipes."""

from methods.table import LORA_GA, Method, lora

PLAIN_SCALING = {"lora_ga_plain": Method(LORA_GA, lora())}
