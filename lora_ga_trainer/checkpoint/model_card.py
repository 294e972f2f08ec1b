"""The model card (README.md) of a LoRA-GA adapter: that of PEFT, TRL or transformers, plus a section on LoRA-GA.

Saving an adapter calls `create_or_update_model_card`, which `adapter_files.bind_files` replaces with the one here; the
trainers' `create_model_card` adds the same section. Two comments mark the section, so that it can be found again.
"""

import re
from pathlib import Path
from statistics import mode
from typing import Any

from huggingface_hub import ModelCard
from huggingface_hub.errors import HFValidationError
from huggingface_hub.utils import validate_repo_id
from peft import PeftModel
from peft.tuners.tuners_utils import BaseTuner

from ..adapter.state import LoRAGAState
from ..distributed.backends import full_shape
from .layouts import LAYOUTS

TAG = "lora-ga"
BEGIN, END = "<!-- LoRA-GA -->", "<!-- end of LoRA-GA -->"
HERE = "path/to/this/adapter"
CITATION = """\
@inproceedings{wang2024loraga,
  title     = {{LoRA-GA: Low-Rank Adaptation with Gradient Approximation}},
  author    = {Wang, Shaowen and Yu, Linxi and Li, Jian},
  booktitle = {Advances in Neural Information Processing Systems},
  year      = {2024},
  url       = {https://arxiv.org/abs/2407.05000}
}"""


def create_or_update_model_card(peft_model: PeftModel, output_dir: str | Path) -> None:
    """`PeftModel.create_or_update_model_card`, plus the section on LoRA-GA. One process calls it."""
    if peft_model.lora_ga.is_deleted:
        type(peft_model).create_or_update_model_card(peft_model, output_dir)
        return
    path = Path(output_dir, "README.md")
    if not path.exists():  # PEFT would start with a form to fill in
        ModelCard(f"---\n{{}}\n---\n\n# {path.resolve().parent.name}\n").save(path)
    type(peft_model).create_or_update_model_card(peft_model, output_dir)
    add_lora_ga(peft_model, path)


def add_lora_ga(peft_model: PeftModel, path: Path) -> None:
    """Add or renew the section on LoRA-GA in the card at `path`, and correct what the card says about the base model."""
    card, base = ModelCard.load(path), base_name(peft_model)
    card.data.library_name = "peft"
    card.data.tags = sorted({*(card.data.tags or []), "lora", TAG})
    if not is_hub_name(base):  # the hub refuses a card that names a folder, but PEFT names whatever was loaded
        card.data.base_model = None
        card.data.tags = [tag for tag in card.data.tags if not tag.startswith("base_model:")]
    elif not card.data.base_model:
        card.data.base_model = base
    # TRL's quick start loads `hub_model_id`, which is None before a push, and treats every adapter as a chat model
    text = re.sub(r"^## Quick start\n.*?(?=^## )", "", card.text, flags=re.DOTALL | re.MULTILINE)
    text = re.sub(f"{BEGIN}.*?{END}\n*", "", text, flags=re.DOTALL)
    # written by TRL 1.16 and transformers 5.23 if the base model has no name, or is a folder
    known, origin = f"`{base}`" if base else "a model without a name", changed_origin(peft_model)
    if origin:
        known = f"a changed copy of `{origin}`"
    for unknown in ("None", "", *filter(None, [origin])):
        text = text.replace(f"[{unknown}](https://huggingface.co/{unknown})", known)
    text = text.replace("This model was trained from scratch on ", f"This model is a fine-tuned version of {known} on ")
    text = text.replace(
        "on the None dataset.", "on an unknown dataset."
    )  # by transformers, for a data set made in memory
    heading = re.search(r"^##+ ", text, flags=re.MULTILINE)
    start = heading.start() if heading else len(text)
    card.text = f"{text[:start].rstrip()}\n\n{section(peft_model)}\n\n{text[start:]}".rstrip() + "\n"
    card.save(path)


def base_name(peft_model: PeftModel) -> str:
    """Folder or hub name of the base model; empty if it was made in memory."""
    return peft_model.lora_ga.lora_config.base_model_name_or_path or ""


def changed_origin(peft_model: PeftModel) -> str:
    """The source of the base model if its weights have been changed since; else empty."""
    return "" if base_name(peft_model) else BaseTuner.get_model_config(peft_model).get("_name_or_path") or ""


def is_hub_name(name: str) -> bool:
    try:
        validate_repo_id(name)
    except HFValidationError:
        return False
    return bool(name) and not Path(name).is_dir()


def section(peft_model: PeftModel) -> str:
    state, base, origin = peft_model.lora_ga.state, base_name(peft_model), changed_origin(peft_model)
    relative_to = f"the untouched base model{f' `{base}`' if base else ''}"
    if origin:
        relative_to = f"a copy of `{origin}` whose weights had been changed before training; load that copy as the base"
    parts = [
        f"{BEGIN}\n",
        "## LoRA-GA\n",
        "This is a LoRA adapter initialized from the gradient of the full weights, with [LoRA-GA](https://arxiv.org/abs/"
        "2407.05000) as implemented in `lora_ga_trainer`. It is relative to "
        f"{relative_to}, and loads with stock [PEFT](https://github.com/huggingface/peft):\n",
        f"```python\n{how_to_load(peft_model, base)}\n```\n",
        "| setting | |\n|---|---|",
        *(f"| {name} | {value} |" for name, value in settings(state).items()),
        f"\nCite LoRA-GA as:\n\n```bibtex\n{CITATION}\n```",
        END,
    ]
    return "\n".join(parts)


def how_to_load(peft_model: PeftModel, base: str) -> str:
    """Code that loads the adapter on its base model; `HERE` stands for its folder."""
    model_class = type(peft_model.get_base_model())
    lines = ["from peft import PeftModel"]
    if model_class.__module__.startswith("transformers."):
        name = model_class.__name__
        lines.append(f"from transformers import {name}\n")
        revision = peft_model.lora_ga.lora_config.revision
        at = f", revision={revision!r}" if revision else ""
        lines.append(f"base = {name}.from_pretrained({base or 'path/to/the/base/model'!r}{at})")
    else:
        lines.append(f"\nbase = ...  # a {model_class.__name__}, with the weights that the adapter was trained on")
    if peft_model.lora_ga.state.has_embeddings:  # the files hold the resized embeddings
        rows = full_shape(peft_model.get_input_embeddings().weight)[0]
        lines.append(f"base.resize_token_embeddings({rows})")
    adapter_name = peft_model.lora_ga.name
    folder = "" if adapter_name == "default" else f", subfolder={adapter_name!r}"
    lines.append(f"model = PeftModel.from_pretrained(base, {HERE!r}{folder})  # or its name on the hub")
    return "\n".join(lines).replace("'", '"')


def scale_in_words(ga: dict[str, Any]) -> str:
    if ga["ga_scale"] == "matched":
        return f"matched to full fine-tuning at the learning rate {ga['ga_full_learning_rate']:g}"
    return f"stable with γ = {ga['ga_gamma']:g}" if ga["ga_scale"] == "stable" else ga["ga_scale"]


def settings(state: LoRAGAState) -> dict[str, str]:
    """A run's settings and results for the reader of a card, by name."""
    lora, ga, report = state.lora, state.options, state.report
    r, times = lora["r"], LAYOUTS[ga["ga_offset"]].times * (len(state.restarts) + 1)
    earlier = mode(state.earlier_ranks.values()) if state.earlier_ranks else 0
    exact = ga["ga_estimator"] == "exact"
    found = {
        "rank that trained": f"r = {r}",
        "rank of the file": f"{times * r + earlier}" + (f", {earlier} of them of an earlier stage" if earlier else ""),
        "scaling": f"α = {lora['lora_alpha']}, {'α/√r (rsLoRA); in the file as α/r' if lora['use_rslora'] else 'α/r'}",
        "gradient": f"`ga_num_samples` = {ga['ga_num_samples']}" + (f", {report.num_items:,} items" if report else ""),
        "estimator": "exact" if exact else f"sketch, {ga['ga_sketch_passes']:g} passes",
        "direction, scale": f"{ga['ga_direction']}, {scale_in_words(ga)}",
        "seed": f"`ga_seed` = {ga['ga_seed']}",
    }
    if report:
        found["alignment with the full gradient"] = (
            f"mean {report.alignment_mean:.3f}, minimum {report.alignment_min:.3f} in `{report.alignment_min_layer}`, over "
            f"{len(report.alignment)} layers"
        )
        if report.idle:
            found["layers without a gradient"] = report.idle_note()
        if report.thin:
            found["layers with a gradient of low rank"] = report.thin_note()
        if report.experts:
            found["experts"] = report.experts_note()
    if state.restarts:
        found["restarts from a fresh gradient"] = str(len(state.restarts))
    return found
