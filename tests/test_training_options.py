"""The training options of TRL and transformers: LoRA-GA starts from the gradient of the loss that each really trains on.

The reference shares nothing with the package or with TRL: examples are tokenized, masked, cut and packed by hand, each is a
forward of its own through the untouched base model, and its dense weights are what requires the gradient.
"""

import copy
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import dense_reference
import numpy as np
import pytest
import torch
from datasets import Dataset
from peft import PeftModel, get_peft_model
from PIL import Image
from tiny import lora_config, tiny_batches, tiny_model, word_problems, word_tokenizer
from tiny_vision import PATCH, SIDE, llava
from transformers import (
    BatchFeature,
    LlavaForConditionalGeneration,
    TrainerCallback,
)
from trl import SFTConfig, SFTTrainer
from trl.models.activation_offloading import OffloadActivations

from lora_ga_trainer import LoRAGAArguments, LoRAGASFTTrainer, initialize_lora_ga
from lora_ga_trainer.gradient.objective import language_model_loss
from lora_ga_trainer.initialization import initialize

# --- the reference: what is trained on, by hand ---------------------------------------------------------------------


@dataclass
class Document:
    """One text, which attends to itself only."""

    ids: list[int]
    labels: list[int]
    images: dict[str, torch.Tensor] = field(default_factory=dict)


def documents(rows, tokenizer) -> list[Document]:
    """Prompts are masked, and the end of the text is a token to learn."""
    found = []
    for row in rows:
        prompt = tokenizer(row["prompt"])["input_ids"]
        completion = [*tokenizer(row["completion"])["input_ids"], tokenizer.eos_token_id]
        found.append(Document(prompt + completion, [-100] * len(prompt) + completion))
    return found


def cut_up(found: list[Document], length: int) -> list[Document]:
    return [
        Document(document.ids[start : start + length], document.labels[start : start + length])
        for document in found
        for start in range(0, len(document.ids), length)
    ]


def cut_off(found: list[Document], length: int) -> list[Document]:
    return [Document(document.ids[:length], document.labels[:length]) for document in found]


def one_stream(found: list[Document], length: int) -> list[Document]:
    """No borders: a row's later texts attend to its earlier ones."""
    whole = Document(
        [i for document in found for i in document.ids], [i for document in found for i in document.labels]
    )
    return cut_up([whole], length)


def negative_log_likelihood(log_probs_TV, targets_T):
    return -log_probs_TV.gather(1, targets_T[:, None])[:, 0]


def dynamic_fine_tuning(log_probs_TV, targets_T):
    """arXiv 2508.05629: each token's loss times its probability, which is a constant for the gradient."""
    loss_T = negative_log_likelihood(log_probs_TV, targets_T)
    return loss_T * torch.exp(-loss_T).detach()


def smoothed(log_probs_TV, targets_T):
    """A tenth of every target is spread over the vocabulary."""
    return 0.9 * negative_log_likelihood(log_probs_TV, targets_T) - 0.1 * log_probs_TV.mean(dim=1)


def reference_gradients(base, names, found: list[Document], token_loss=negative_log_likelihood):
    """∂(mean token loss over all counted tokens)/∂W for each of `names`, the PEFT layers on W."""
    total, count = 0.0, 0
    for document in found:
        targets_T = torch.tensor(document.labels[1:])
        counted = targets_T != -100
        if counted.any():
            logits_TV = base(input_ids=torch.tensor([document.ids]), **document.images).logits[0, :-1]
            total += token_loss(torch.log_softmax(logits_TV.float(), dim=-1)[counted], targets_T[counted]).sum()
            count += int(counted.sum())
    weights = {name: (base.get_submodule(name.removeprefix("base_model.model.")).weight, False) for name in names}
    return dense_reference.weight_gradient(weights, [total / count])


def largest_relative_error(found, reference):
    assert found.keys() == reference.keys()
    return max(((found[name] - reference[name]).norm() / reference[name].norm()).item() for name in reference)


# --- the trainer ----------------------------------------------------------------------------------------------------


@pytest.fixture
def make_trainer(sft_config, prompt_completion, tokenizer):
    def make(cls=LoRAGASFTTrainer, model=None, train_dataset=None, processing_class=None, peft_config=None, **kwargs):
        options = {name: kwargs.pop(name) for name in list(kwargs) if hasattr(SFTConfig, name) or name[:3] == "ga_"}
        return cls(
            model=tiny_model() if model is None else model,
            # as many as there are, whatever packing makes of them, so that the sample is the whole training set
            args=sft_config(**{"ga_num_samples": 1000, "ga_estimator": "exact", "max_steps": 2} | options),
            train_dataset=prompt_completion if train_dataset is None else train_dataset,
            processing_class=processing_class or tokenizer,
            peft_config=peft_config or lora_config(),
            **kwargs,
        )

    return make


@pytest.fixture
def gradients(monkeypatch):
    """The gradient of each target that the last initialization started from, copied on its way."""
    found = {}
    estimate = initialize.estimate_gradients

    def copying(adapter, accumulators, *args, **kwargs):
        sent = estimate(adapter, accumulators, *args, **kwargs)
        found.clear()
        found.update({name: accumulator.grad_OI.clone() for name, accumulator in accumulators.items()})
        return sent

    monkeypatch.setattr(initialize, "estimate_gradients", copying)
    return found


def losses(trainer):
    return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]


def assert_trains_from_the_right_gradient(
    make_trainer, gradients, base, found, token_loss, inputs, plain_options=None, **options
):
    """The four things that an option must not break; `base` is untouched, `found` what is trained on, `inputs` any.

    `plain_options` are those of the plain LoRA run to compare with, if it cannot have all of `options`.
    """
    base = base.eval()
    plain = make_trainer(
        SFTTrainer, copy.deepcopy(base), **(options if plain_options is None else plain_options) | {"max_steps": 1}
    )
    plain.train()
    trainer = make_trainer(model=copy.deepcopy(base), **options)
    trainer.train()
    # 1. the init is exact: what training logs first is what it logs from the base model, to the bit
    assert losses(trainer)[0] == losses(plain)[0]

    # 2. autograd's gradient, up to float32 sums in another order
    estimated = dict(gradients)
    assert largest_relative_error(estimated, reference_gradients(base, estimated, found, token_loss)) < 1e-5

    # 3. a sum over tokens is the same in other batches
    gradients.clear()
    make_trainer(model=copy.deepcopy(base), **options, ga_batch_size=3).initialize_adapter()
    assert largest_relative_error(gradients, estimated) < 1e-5

    # 4. what is saved is what was trained, float32 in another order
    trainer.save_model()
    assert_loads_with_stock_peft(trainer, base, inputs)


def assert_loads_with_stock_peft(trainer, base, inputs):
    loaded = PeftModel.from_pretrained(copy.deepcopy(base), trainer.args.output_dir).eval()
    with torch.no_grad():
        trained = trainer.model.eval()(**inputs).logits
        assert (loaded(**inputs).logits - trained).abs().max() < 1e-5
        assert (base(**inputs).logits - trained).abs().max() > 1e-3, "something was trained"


PACKED = {"packing": True, "max_length": 12, "per_device_train_batch_size": 2}
CHECKPOINTED = {"gradient_checkpointing": True}
INPUTS = {"input_ids": torch.randint(3, 60, (2, 12), generator=torch.Generator().manual_seed(4))}


def sum_over_tokens(outputs, labels, num_items_in_batch):
    """A user's own loss, as transformers asks for it."""
    logits, labels = outputs.logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten()
    return torch.nn.functional.cross_entropy(logits, labels, reduction="sum") / num_items_in_batch


@dataclass
class Case:
    options: dict[str, Any]
    cut: Callable[[list[Document]], list[Document]] = lambda found: found
    token_loss: Callable = negative_log_likelihood
    attention: str = "sdpa"
    plain_options: dict[str, Any] | None = None


CASES = {
    "packing": Case(PACKED, lambda found: cut_off(found, 12)),
    "packing, splitting": Case(PACKED | {"packing_strategy": "bfd_split", "max_length": 7}, lambda found: cut_up(found, 7)),
    "packing, wrapped": Case(PACKED | {"packing_strategy": "wrapped"}, lambda found: one_stream(found, 12)),
    "padding-free": Case({"padding_free": True, "max_length": None}),
    "padding-free, eager attention": Case({"padding_free": True, "max_length": None}, attention="eager"),
    "dft": Case({"loss_type": "dft"}, token_loss=dynamic_fine_tuning),
    "chunked_nll": Case({"loss_type": "chunked_nll"}),
    "label smoothing": Case({"label_smoothing_factor": 0.1}, token_loss=smoothed),
    "a loss of the user's": Case({"compute_loss_func": sum_over_tokens}),
    "neftune": Case({"neftune_noise_alpha": 5.0}),
    "checkpointing every other layer": Case(CHECKPOINTED | {"gradient_checkpointing_kwargs": {"every_n_layers": 2}}),
    "selective checkpointing": Case(  # which fails in TRL's own trainer with any adapter, see `LoRAGASFTTrainer`
        CHECKPOINTED | {"gradient_checkpointing_kwargs": {"selective": True}}, plain_options=CHECKPOINTED
    ),
    "dft, packing, reentrant checkpointing": Case(
        PACKED | CHECKPOINTED | {"gradient_checkpointing_kwargs": {"use_reentrant": True}, "loss_type": "dft"},
        lambda found: cut_off(found, 12), dynamic_fine_tuning,
    ),
}  # fmt: skip


@pytest.mark.filterwarnings("ignore:.*deprecated.*:FutureWarning")
@pytest.mark.parametrize("case", CASES.values(), ids=CASES.keys())
def test_the_gradient_is_that_of_the_loss_trained_on(make_trainer, gradients, prompt_completion, tokenizer, case):
    base = tiny_model()
    base.set_attn_implementation(case.attention)
    found = case.cut(documents(prompt_completion, tokenizer))
    assert_trains_from_the_right_gradient(
        make_trainer, gradients, base, found, case.token_loss, INPUTS, case.plain_options, **case.options
    )


@pytest.mark.parametrize("packed", [False, True])
def test_streaming(make_trainer, gradients, prompt_completion, tokenizer, packed):
    found = documents(prompt_completion, tokenizer)
    assert_trains_from_the_right_gradient(
        make_trainer, gradients, tiny_model(), cut_off(found, 12) if packed else found, negative_log_likelihood, INPUTS,
        train_dataset=prompt_completion.to_iterable_dataset(), **PACKED if packed else {},
    )  # fmt: skip


def test_packed_texts_do_not_see_each_other(make_trainer, gradients, prompt_completion, tokenizer):
    """The reference of the tests above can tell: with attention across the borders the gradient is another."""
    make_trainer(**PACKED).initialize_adapter()
    found = documents(prompt_completion, tokenizer)
    contaminated = reference_gradients(tiny_model().eval(), dict(gradients), one_stream(cut_off(found, 12), 12))
    assert largest_relative_error(gradients, contaminated) > 0.1


def test_neftune_makes_noise_in_training_only(make_trainer):
    """That none is in the estimate is shown above: its reference has none."""
    quiet, noisy = make_trainer(max_steps=1), make_trainer(max_steps=1, neftune_noise_alpha=5.0)
    for trainer in (quiet, noisy):
        trainer.train()
    assert losses(quiet) != losses(noisy)


# --- conversations --------------------------------------------------------------------------------------------------

CHAT_TEMPLATE = (
    "{% for message in messages %}{% if message.role == 'assistant' %}"
    "w0 {% generation %}{{ message.content }} </s>{% endgeneration %}"
    "{% else %}w1 {{ message.content }} {% endif %}{% endfor %}"
)


@pytest.mark.parametrize("packed", [False, True])
def test_conversations_with_assistant_only_loss(make_trainer, gradients, prompt_completion, packed):
    """Two questions and two answers each; only the answers count, wherever they are."""
    tokenizer = word_tokenizer()
    tokenizer.chat_template = CHAT_TEMPLATE
    rows = list(prompt_completion)
    conversations, found = [], []
    for first, second in zip(rows[::2], rows[1::2], strict=True):
        messages, ids, labels = [], [], []
        for row in (first, second):
            question, answer = tokenizer(row["prompt"])["input_ids"], tokenizer(row["completion"])["input_ids"]
            messages += [
                {"role": "user", "content": row["prompt"].strip()},
                {"role": "assistant", "content": row["completion"]},
            ]
            asked, answered = (
                [tokenizer.convert_tokens_to_ids("w1"), *question, tokenizer.convert_tokens_to_ids("w0")],
                [*answer, 2],
            )
            ids, labels = ids + asked + answered, labels + [-100] * len(asked) + answered
        conversations.append({"messages": messages})
        found.append(Document(ids, labels))
    assert_trains_from_the_right_gradient(
        make_trainer, gradients, tiny_model(), found, negative_log_likelihood, INPUTS,
        train_dataset=Dataset.from_list(conversations), processing_class=tokenizer, assistant_only_loss=True,
        **{"packing": True, "max_length": 40, "per_device_train_batch_size": 2} if packed else {},
    )  # fmt: skip


# --- vision-language models -----------------------------------------------------------------------------------------

IMAGE_TOKENS = (SIDE // PATCH) ** 2


def tiny_llava(vision_feature_layer: int = -1) -> LlavaForConditionalGeneration:
    torch.manual_seed(0)
    return llava(vision_feature_layer)[0]


@pytest.fixture
def make_vision_trainer(make_trainer):
    """Every example has a picture of its own."""
    pixels = np.random.default_rng(0).integers(0, 255, (24, SIDE, SIDE, 3), dtype=np.uint8)
    rows = [
        {"image": Image.fromarray(picture), "prompt": f"<image> {row['prompt']}", "completion": row["completion"]}
        for picture, row in zip(pixels, word_problems(), strict=True)
    ]
    processor = llava()[1]

    def make(cls=LoRAGASFTTrainer, model=None, **options):
        return make_trainer(cls, model, Dataset.from_list(rows), processor, **options)

    return make, rows


def test_vision_language_models(make_vision_trainer, gradients):
    """The vision tower, the projector and the language model are all targets."""
    make, rows = make_vision_trainer
    processor = llava()[1]
    tokenizer, process = processor.tokenizer, processor.image_processor
    found = []
    for row in rows:
        prompt = [tokenizer.convert_tokens_to_ids("<image>")] * (IMAGE_TOKENS - 1) + tokenizer(row["prompt"])[
            "input_ids"
        ]
        completion = tokenizer(row["completion"])["input_ids"]  # here TRL leaves the end of the text to the user
        pixel_values = process(row["image"], return_tensors="pt")["pixel_values"]
        found.append(Document(prompt + completion, [-100] * len(prompt) + completion, {"pixel_values": pixel_values}))
    inputs = {"input_ids": torch.tensor([found[0].ids]), **found[0].images}
    assert_trains_from_the_right_gradient(make, gradients, tiny_llava(), found, negative_log_likelihood, inputs)
    for part in ("vision_tower", "multi_modal_projector", "language_model"):
        assert any(part in name for name in gradients)


def test_vision_layers_that_the_model_leaves_unused_start_as_in_lora(make_vision_trainer):
    """LLaVA takes its features before the last layer of the vision tower, which `all-linear` targets all the same."""
    make, _ = make_vision_trainer
    trainer = make(model=tiny_llava(vision_feature_layer=-2))
    trainer.train()
    report = trainer.lora_ga_report
    assert len(report.alignment) == 22 and len(report.idle) == 6
    assert all("vision_tower.encoder.layers.1" in name for name in report.idle)


def test_batches_of_a_processor_are_moved_as_copies():
    """`BatchFeature.to` moves the batch itself: batches that are kept would all stay on the device, as the loss left them."""
    batches = tiny_batches()

    def emptying(model, batch, num_items_in_batch):
        loss = language_model_loss(model, batch, num_items_in_batch)
        batch.clear()
        return loss

    model = get_peft_model(tiny_model(), lora_config())
    features = [BatchFeature(batch) for batch in batches]
    initialize_lora_ga(
        model, features, LoRAGAArguments(ga_learning_rate=1e-3, ga_sketch_size=8), emptying, disable_tqdm=True
    )
    assert [set(batch) for batch in features] == [set(batch) for batch in batches]


# --- torch.compile --------------------------------------------------------------------------------------------------


def compiled_graphs() -> int:
    return torch._dynamo.utils.counters["stats"]["unique_graphs"]


class AfterInitialization(TrainerCallback):
    def on_train_begin(self, args, state, control, **kwargs):
        self.graphs = compiled_graphs()


def test_compiled_models_are_estimated_as_they_are(make_trainer, gradients):
    """Nothing is compiled for the estimation, training is, and both are as without. Layers compiled in place: `test_probe`."""
    options = {"max_steps": 2, "pad_to_multiple_of": 16}  # one shape, one compilation
    plain = make_trainer(**options)
    plain.train()
    reference = dict(gradients)

    torch._dynamo.reset()
    before = compiled_graphs()
    trainer = make_trainer(torch_compile=True, torch_compile_backend="aot_eager", **options)
    after_initialization = AfterInitialization()
    trainer.add_callback(after_initialization)  # the last, after LoRA-GA's own
    trainer.train()
    assert after_initialization.graphs == before and compiled_graphs() > before
    assert all(torch.equal(gradients[name], reference[name]) for name in reference)
    assert losses(trainer) == pytest.approx(losses(plain), rel=1e-5)  # float32, in the compiler's order
    trainer.save_model()
    assert_loads_with_stock_peft(trainer, tiny_model().eval(), INPUTS)


# --- autocast -------------------------------------------------------------------------------------------------------


def assert_as_close_as_autograds(found, dtype, examples):
    """Autocast rounds here and there: from float32's gradient the estimate is no further than twice what autograd's own is."""
    exact = reference_gradients(tiny_model().eval(), found, examples)
    with torch.autocast("cpu", dtype):
        rounded = reference_gradients(tiny_model().eval(), found, examples)
    error = largest_relative_error(found, exact)
    assert 1e-4 < error < 2 * largest_relative_error(rounded, exact), "at 0 it would not have been rounded at all"


def test_bf16_autocast(make_trainer, gradients, prompt_completion, tokenizer):
    trainer, plain = (make_trainer(cls, bf16=True) for cls in (LoRAGASFTTrainer, SFTTrainer))
    for each in (trainer, plain):
        each.train()
    assert losses(trainer)[0] == losses(plain)[0]
    assert_as_close_as_autograds(gradients, torch.bfloat16, documents(prompt_completion, tokenizer))
    trainer.save_model()
    trainer.model.forward = trainer.model._original_forward  # accelerate's autocast comes off
    assert_loads_with_stock_peft(trainer, tiny_model().eval(), INPUTS)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast_in_a_loop_of_ones_own(gradients, dtype):
    """On a CPU accelerate ignores `fp16=True`; what it does on a GPU is this."""

    def loss(model, batch, num_items_in_batch):
        with torch.autocast("cpu", dtype):
            return language_model_loss(model, batch, num_items_in_batch)

    batches, examples = tiny_batches(), []
    for batch in batches:
        for ids, mask, labels in zip(
            *(batch[key].tolist() for key in ("input_ids", "attention_mask", "labels")), strict=True
        ):
            examples.append(Document(ids[: sum(mask)], labels[: sum(mask)]))
    model = get_peft_model(tiny_model().eval(), lora_config())
    initialize_lora_ga(
        model, batches, LoRAGAArguments(ga_learning_rate=1e-3, ga_estimator="exact"), loss, disable_tqdm=True
    )
    assert_as_close_as_autograds(gradients, dtype, examples)


# --- offloading activations -----------------------------------------------------------------------------------------


def test_offloaded_activations_reach_the_estimate(make_trainer, gradients, monkeypatch):
    """TRL's own offloading, with the CPU for the accelerator: whatever the taps keep is taken away and comes back."""
    make_trainer().initialize_adapter()
    reference = dict(gradients)

    monkeypatch.setattr(torch.accelerator, "current_accelerator", lambda *args: torch.device("cpu"))
    monkeypatch.setattr(torch.accelerator, "device_count", lambda: 0)  # the CPU has no random state beside the CPU's
    monkeypatch.setattr(torch.cpu, "empty_cache", lambda: None, raising=False)
    trainer = make_trainer()
    offload = OffloadActivations(use_pin_memory=False, use_streams=False)
    trainer.maybe_activation_offload_context = offload
    trainer.initialize_adapter()
    assert offload.tensor_id > len(gradients), "the last batch's tensors, at least one for each tap"
    # (what is left is kept for the model's own loss, which TRL does not use)
    assert not any(was_moved for _, was_moved, *_ in offload.tracker.values()), "all that was moved was fetched again"
    assert all(torch.equal(gradients[name], reference[name]) for name in reference)


@pytest.mark.skipif(torch.accelerator.is_available(), reason="there is an accelerator to offload from")
@pytest.mark.parametrize(
    ("options", "named"),
    [
        ({"activation_offloading": True}, "`activation_offloading=True`"),
        (CHECKPOINTED | {"gradient_checkpointing_kwargs": {"offload": True}}, "{'offload': True}`"),
    ],
)
def test_offloading_from_nowhere_is_refused(make_trainer, options, named):
    with pytest.raises(ValueError, match=f"{named} moves activations from a GPU .* finds no GPU .*Leave it out"):
        make_trainer(**options)


# --- Liger ----------------------------------------------------------------------------------------------------------


@pytest.mark.filterwarnings("ignore:.*deprecated.*:FutureWarning")
def test_ligers_kernels(make_trainer, gradients, prompt_completion, tokenizer):
    """Its norms, its MLP and its rotary embedding. (Its fused loss is what TRL refuses, since it has one of its own.)"""
    pytest.importorskip("liger_kernel")
    trainer = make_trainer(use_liger_kernel=True)
    trainer.train()
    found = documents(prompt_completion, tokenizer)
    reference = reference_gradients(tiny_model().eval(), dict(gradients), found)
    assert largest_relative_error(gradients, reference) < 1e-4  # float32, by other formulas


@pytest.mark.filterwarnings("ignore:.*deprecated.*:FutureWarning")
def test_ligers_fused_loss_is_refused(make_trainer):
    with pytest.raises(ValueError, match="fused_linear_cross_entropy.*not supported"):
        make_trainer(use_liger_kernel=True, liger_kernel_config={"fused_linear_cross_entropy": True})
