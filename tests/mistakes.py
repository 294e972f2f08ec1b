"""The mistakes of docs/troubleshooting.md, committed for real: one function each, named by its id there.

Each gets a `World` to make it in, and raises what a user would see, or returns it where it is no exception.

    python tests/mistakes.py [ID ...]     what each really says, to write the table from
"""

import json
import logging
import platform
import re
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from unittest.mock import patch

import metamath
import torch
from data import selection
from datasets import Dataset, IterableDataset
from evaluation import harness
from finetuning.run import evaluate, finetune, parse
from launching import WORKER, environment, what_two_processes_say
from peft import AdaLoraConfig, IA3Config, PeftModel, get_peft_model, set_peft_model_state_dict
from peft.utils.hotswap import hotswap_adapter
from recipe_cases import RECIPES, options, rows_for, write
from safetensors.torch import load_file, save_file
from tiny import (
    lora_config,
    sft_arguments,
    tiny_batches,
    tiny_model,
    tiny_t5,
    word_problems,
    word_tokenizer,
)
from torch import nn
from transformers import LlamaForSequenceClassification, Trainer, WhisperConfig, WhisperForConditionalGeneration
from trl import SFTConfig, TrlParser

from lora_ga_trainer import (
    LoRAGAArguments,
    LoRAGAMixin,
    LoRAGASeq2SeqConfig,
    LoRAGASeq2SeqTrainer,
    LoRAGASFTConfig,
    LoRAGASFTTrainer,
    LoRAGATrainingArguments,
    initialize_lora_ga,
    restart_lora_ga,
)
from lora_ga_trainer.adapter import targets
from lora_ga_trainer.checkpoint import export
from lora_ga_trainer.checkpoint.state import STATE_FILE
from lora_ga_trainer.distributed.launches import Launch, check_checkpointing, check_restart
from lora_ga_trainer.initialization import attach_lora_ga

CHAT = [{"role": "user", "content": "w1 w2"}, {"role": "assistant", "content": "w3 w4"}]
QUIET = {"disable_tqdm": True}
DEAD_HUB = {"HF_ENDPOINT": "http://127.0.0.1:9", "HF_HUB_OFFLINE": "0"}
"""On the port of the discard protocol nothing answers."""


class World:
    """A place to make one mistake in, which remembers what must be unharmed afterwards."""

    def __init__(self, folder: Path, shared: Path):
        self.folder, self.shared = folder, shared
        self.finished_run = shared / "finished"
        self.out = folder / "out"
        self.weights: list[tuple[nn.Parameter, torch.Tensor]] = []
        self.trainers: list[LoRAGASFTTrainer] = []

    def watch(self, model: nn.Module) -> nn.Module:
        """Its weights must be the same after the mistake."""
        self.weights += [(parameter, parameter.detach().clone()) for parameter in model.parameters()]
        return model

    def model(self) -> nn.Module:
        return self.watch(tiny_model())

    def peft_model(self, **lora) -> PeftModel:
        return get_peft_model(self.model(), lora_config(**lora))

    def config(self, **overrides) -> LoRAGASFTConfig:
        return LoRAGASFTConfig(**sft_arguments(self.out, **overrides))

    def trainer(
        self, *, model=None, data=None, eval_data=None, lora=None, config=None, **overrides
    ) -> LoRAGASFTTrainer:
        trainer = LoRAGASFTTrainer(
            model=self.model() if model is None else model,
            args=config or self.config(**overrides),
            train_dataset=word_problems() if data is None else data,
            eval_dataset=eval_data,
            processing_class=word_tokenizer(),
            peft_config=None if isinstance(model, PeftModel) else lora_config() if lora is None else lora,
        )
        self.trainers.append(trainer)
        return trainer

    def saved(self) -> Path:
        """A copy of a finished run's `output_dir`, with the checkpoints 2 and 4."""
        return Path(shutil.copytree(self.finished_run, self.folder / "saved", dirs_exist_ok=True))

    def resume(self, checkpoint: Path | bool, **overrides) -> None:
        self.trainer(**{"save_strategy": "steps", "save_steps": 2} | overrides).train(resume_from_checkpoint=checkpoint)

    def recipe(self, name: str, *arguments: str, **overrides) -> None:
        recipe = RECIPES[name]
        parsed = parse(recipe, [*options(name, self.folder, **overrides), *arguments])
        finetune(recipe, parsed)
        evaluate(recipe, parsed)

    def rows(self, rows: list[dict] | str | bytes, recipe: str = "wizardlm") -> None:
        """Load `rows`, or a file's content, as the data of a recipe."""
        path = self.folder / "mine.jsonl"
        if isinstance(rows, list):
            write(rows, path)
        else:
            path.write_bytes(rows.encode() if isinstance(rows, str) else rows)
        args = RECIPES[recipe].data_arguments(dataset_path=str(path), eval_size=8)
        selection.load_rows(RECIPES[recipe].definition(args), args, seed=0)


@contextmanager
def warnings_of(*loggers: str) -> Iterator[list[str]]:
    """Yields what those loggers warn of inside."""
    said: list[str] = []

    class Listener(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            said.append(record.getMessage())

    listener = Listener(logging.WARNING)
    for name in loggers:
        logging.getLogger(name).addHandler(listener)
    try:
        yield said
    finally:
        for name in loggers:
            logging.getLogger(name).removeHandler(listener)


# --- options ------------------------------------------------------------------------------------------------------------


def o01_no_samples(world):
    world.config(ga_num_samples=0)


def o02_a_number_as_text(world):
    world.config(ga_num_samples="64")


def o03_a_fraction_of_an_example(world):
    world.config(ga_batch_size=2.5)


def o04_no_such_estimator(world):
    world.config(ga_estimator="svd")


def o05_a_direction_in_small_letters(world):
    world.config(ga_direction="arb2r")


def o06_a_misspelled_scale(world):
    world.config(ga_scale="stabel")


def o07_gamma_is_nan(world):
    world.config(ga_gamma=float("nan"))


def o08_text_for_a_flag(world):
    world.config(ga_offset="false")


def o09_a_seed_too_large(world):
    world.config(ga_seed=2**70)


def o10_restarts_without_the_offset(world):
    world.config(ga_restart_steps=100, ga_offset=False)


def o11_a_sketch_narrower_than_2r(world):
    world.trainer(ga_sketch_size=7)


def o12_an_option_that_does_not_exist(world):
    world.config(ga_samples=32)


def o13_an_option_that_does_not_exist_in_yaml(world):
    path = world.folder / "run.yaml"
    path.write_text("output_dir: out\nbf16: false\nga_samples: 32\n")
    TrlParser(LoRAGASFTConfig).parse_args_and_config(["--config", str(path)])


def o14_a_dictionary_for_args(world):
    world.trainer(config={"output_dir": "out", "ga_num_samples": 32})


def o15_the_other_trainers_configuration(world):
    world.trainer(config=LoRAGASeq2SeqConfig(str(world.out), use_cpu=True, report_to="none"))


def o16_restarts_with_a_schedule_that_looks_at_the_loss(world):
    args = world.config(
        ga_restart_steps=2, lr_scheduler_type="reduce_lr_on_plateau", eval_strategy="steps", eval_steps=2
    )
    LoRAGASFTTrainer(
        world.model(), args, train_dataset=word_problems(), eval_dataset=word_problems(), processing_class=word_tokenizer(),
        peft_config=lora_config(),
    ).train()  # fmt: skip


def o17_restarts_with_a_schedule_of_ones_own(world):
    model = world.peft_model()
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad])
    schedule = torch.optim.lr_scheduler.ConstantLR(optimizer)
    LoRAGASFTTrainer(
        model, world.config(ga_restart_steps=2), train_dataset=word_problems(), processing_class=word_tokenizer(),
        optimizers=(optimizer, schedule),
    )  # fmt: skip


def o18_evaluation_without_data(world):
    world.trainer(eval_strategy="steps", eval_steps=2)


# --- adapter ------------------------------------------------------------------------------------------------------------


def a01_another_initialization(world):
    world.trainer(lora=lora_config(init_lora_weights="pissa"))


def a02_dora(world):
    world.trainer(lora=lora_config(use_dora=True))


def a03_adalora(world):
    world.trainer(lora=AdaLoraConfig(init_r=4, target_r=2, total_step=10, target_modules=["q_proj"]))


def a04_another_kind_of_adapter(world):
    world.trainer(lora=IA3Config(target_modules=["k_proj"], feedforward_modules=[]))


def a05_a_dictionary(world):
    world.trainer(lora={"r": 8})


def a07_a_rank_of_zero(world):
    world.trainer(lora=lora_config(r=0))


def a08_alpha_of_zero(world):
    world.trainer(lora=lora_config(lora_alpha=0))


def a09_alpha_as_text(world):
    world.trainer(lora=lora_config(lora_alpha="16"))


def a10_a_misspelled_target(world):
    world.trainer(lora=lora_config(target_modules=["query_proj"]))


def a11_the_embeddings_as_a_target(world):
    world.trainer(lora=lora_config(target_modules=["q_proj", "embed_tokens"]))


def a12_a_peft_model_and_a_peft_config(world):
    LoRAGASFTTrainer(
        world.peft_model(), world.config(), train_dataset=word_problems(), processing_class=word_tokenizer(),
        peft_config=lora_config(),
    )  # fmt: skip


def a13_an_adapter_that_was_trained(world):
    model = PeftModel.from_pretrained(world.model(), world.finished_run / "checkpoint-4", is_trainable=True)
    world.trainer(model=model, ga_offset=False)


def a14_an_adapter_that_was_initialized(world):
    model = world.peft_model()
    initialize_lora_ga(model, tiny_batches(), LoRAGAArguments(ga_learning_rate=1e-3), **QUIET)
    world.trainer(model=model)


def a15_two_active_adapters(world):
    model = world.peft_model()
    model.add_adapter("second", lora_config())
    model.base_model.set_adapter(["default", "second"])
    initialize_lora_ga(model, tiny_batches(), LoRAGAArguments(ga_learning_rate=1e-3), **QUIET)


def a16_an_adapter_for_inference(world):
    world.trainer(model=world.peft_model(inference_mode=True)).train()


def a17_too_much_dropout(world):
    world.trainer(lora=lora_config(lora_dropout=1.5))


def a18_a_model_that_transformers_gave_an_adapter(world):
    model = tiny_model()
    model.add_adapter(lora_config(), adapter_name="first")
    world.trainer(model=world.watch(model))


def a19_a_classifier_whose_head_would_be_lost(world):
    model = LlamaForSequenceClassification(tiny_model().config)
    attach_lora_ga(
        get_peft_model(world.watch(model), lora_config(task_type=None)), LoRAGAArguments(ga_learning_rate=1e-3)
    )


def a20_a_task_type_of_text_for_a_model_of_sound(world):
    sizes = {"encoder_layers": 1, "decoder_layers": 1, "encoder_attention_heads": 2, "decoder_attention_heads": 2}
    model = WhisperForConditionalGeneration(
        WhisperConfig(d_model=16, encoder_ffn_dim=16, decoder_ffn_dim=16, vocab_size=64, pad_token_id=0, **sizes)
    )
    lora = lora_config(task_type="SEQ_2_SEQ_LM")
    attach_lora_ga(get_peft_model(world.watch(model), lora), LoRAGAArguments(ga_learning_rate=1e-3))


def a21_experts_under_zero3(world):
    # a stand-in for the launch, which test_backends makes
    with patch.object(targets, "is_zero3", lambda parameter: parameter.dim() == 3):
        LoRAGASFTTrainer(
            tiny_model("mixture"), world.config(), train_dataset=word_problems(), processing_class=word_tokenizer()
        )


# --- model --------------------------------------------------------------------------------------------------------------


def m01_nan_in_the_weights(world):
    model = tiny_model()
    model.model.layers[1].mlp.up_proj.weight.data[0, 0] = float("nan")
    world.trainer(model=world.watch(model)).train()


def m02_infinity_in_the_weights(world):
    model = tiny_model()
    model.model.layers[0].self_attn.v_proj.weight.data[0, 0] = float("inf")
    world.trainer(model=world.watch(model)).train()


def m03_a_loss_that_is_nan(world):
    batches = tiny_batches()
    poisoned = batches[1]["input_ids"].sum()

    def loss(model, batch, num_items):
        value = model(**batch).loss
        return value * float("nan") if batch["input_ids"].sum() == poisoned else value

    initialize_lora_ga(world.peft_model(), batches, LoRAGAArguments(ga_learning_rate=1e-3), loss, **QUIET)


def m04_no_such_folder(world):
    world.trainer(model="./no/such/folder")


def m05_a_folder_without_a_model(world):
    (world.folder / "empty").mkdir()
    world.trainer(model=str(world.folder / "empty"))


def m06_an_encoder_decoder(world):
    world.trainer(model=world.watch(tiny_t5()))


def m07_a_decoder_for_the_seq2seq_trainer(world):
    LoRAGASeq2SeqTrainer(world.model(), LoRAGASeq2SeqConfig(str(world.out), use_cpu=True))


def m08_a_name_for_the_seq2seq_trainer(world):
    LoRAGASeq2SeqTrainer("t5-base", LoRAGASeq2SeqConfig(str(world.out), use_cpu=True))


def m09_no_adapter_on_the_model(world):
    initialize_lora_ga(world.model(), tiny_batches(), LoRAGAArguments(ga_learning_rate=1e-3), **QUIET)


def m10_options_of_another_kind(world):
    initialize_lora_ga(world.peft_model(), tiny_batches(), SFTConfig(str(world.out), bf16=False), **QUIET)


def m11_next_to_no_layer_that_the_forward_pass_runs(world):
    model = tiny_model()
    model.spare = nn.ModuleList(nn.Linear(48, 48) for _ in range(20))
    world.trainer(
        model=world.watch(model), lora=lora_config(target_modules=r".*(0\.self_attn\.q_proj|spare\.\d+)")
    ).train()


def m12_no_layer_that_the_forward_pass_runs(world):
    model = tiny_model()
    model.spare = nn.Linear(48, 48)
    world.trainer(model=world.watch(model), lora=lora_config(target_modules=["spare"])).train()


def m13_more_tokens_than_embeddings(world):
    model = tiny_model()
    model.resize_token_embeddings(40)
    world.trainer(model=world.watch(model)).train()


# --- data ---------------------------------------------------------------------------------------------------------------


def d01_an_empty_dataset(world):
    world.trainer(data=word_problems().select([]))


def d02_no_dataset(world):
    LoRAGASFTTrainer(world.model(), world.config(), processing_class=word_tokenizer(), peft_config=lora_config())


def d03_a_list(world):
    world.trainer(data=list(word_problems()))


def d04_other_columns(world):
    world.trainer(data=word_problems().rename_columns({"prompt": "question", "completion": "answer"}))


def d05_a_prompt_without_a_completion(world):
    world.trainer(data=word_problems().remove_columns("completion"))


def d06_numbers_for_text(world):
    world.trainer(data=Dataset.from_dict({"prompt": ["w1", "w2"], "completion": [1, 2]}))


def d07_a_text_that_is_missing(world):
    world.trainer(data=Dataset.from_dict({"text": ["w1 w2", None, "w3"]}))


def d08_empty_texts(world):
    world.trainer(data=Dataset.from_dict({"text": ["", ""]})).train()


def d09_half_a_character(world):
    Dataset.from_dict({"text": ["w1", "\ud83d"]})


def d10_prompts_longer_than_max_length(world):
    world.trainer(max_length=3)


def d11_a_streaming_dataset_without_max_steps(world):
    world.trainer(data=word_problems().to_iterable_dataset(), max_steps=-1)


def d12_an_empty_stream(world):
    world.trainer(data=word_problems().to_iterable_dataset().take(0))


def d13_fewer_examples_than_the_sample(world):
    with warnings_of("lora_ga_trainer") as said:
        world.trainer(data=word_problems().select(range(6)), max_steps=1).train()
    return said[0]


def d14_a_stream_that_ends_before_the_sample_is_full(world):
    with warnings_of("lora_ga_trainer") as said:
        world.trainer(data=word_problems().select(range(6)).to_iterable_dataset(), max_steps=1).train()
    return said[0]


def d15_a_stream_that_can_be_read_only_once(world):
    rows = iter(list(word_problems()))
    world.trainer(data=IterableDataset.from_generator(lambda: rows), max_steps=8).train()


def d16_a_conversation_without_a_chat_template(world):
    messages = [{"role": "user", "content": "w1"}, {"role": "assistant", "content": "w2"}]
    world.trainer(data=Dataset.from_dict({"messages": [messages] * 4}))


def d17_an_end_token_that_is_not_in_the_vocabulary(world):
    world.trainer(eos_token="<|im_end|>")


def d18_all_labels_masked(world):
    rows = [{"input_ids": [5, 6, 7], "labels": [-100, -100, -100]}] * 8
    world.trainer(data=Dataset.from_list(rows)).train()


def d19_batches_without_labels(world):
    batches = [{"input_ids": torch.full((2, 4), 5)}]
    initialize_lora_ga(world.peft_model(), batches, LoRAGAArguments(ga_learning_rate=1e-3), **QUIET)


def d20_no_batches(world):
    initialize_lora_ga(world.peft_model(), [], LoRAGAArguments(ga_learning_rate=1e-3), **QUIET)


def d21_other_columns_to_evaluate_on(world):
    world.trainer(eval_data={"hard": word_problems().rename_columns({"prompt": "question", "completion": "answer"})})


def d22_a_training_loader_without_a_dataset(world):
    class MyTrainer(LoRAGAMixin, Trainer): ...

    MyTrainer(world.peft_model(), LoRAGATrainingArguments(str(world.out), use_cpu=True))


def d23_a_conversation_as_json_text(world):
    world.trainer(data=Dataset.from_dict({"messages": [json.dumps(CHAT)] * 4}))


def d24_an_empty_conversation(world):
    world.trainer(data=Dataset.from_dict({"messages": [CHAT] * 4 + [[]]}))


def d25_a_conversation_and_a_text(world):
    world.trainer(data=Dataset.from_dict({"prompt": [CHAT[:1]] * 4, "completion": ["w3 w4"] * 4}))


# --- checkpoints and resuming -------------------------------------------------------------------------------------------


def c01_no_such_checkpoint(world):
    world.resume(world.folder / "checkpoint-500")


def c02_nothing_to_resume(world):
    world.resume(True)


def c03_a_plain_peft_adapter(world):
    world.peft_model().save_pretrained(world.folder / "plain")
    world.resume(world.folder / "plain")


def c04_a_file_cut_short(world):
    path = world.saved() / "checkpoint-4/adapter_model.safetensors"
    path.write_bytes(path.read_bytes()[:1000])
    world.resume(path.parent)


def c05_a_file_that_was_not_copied(world):
    path = world.saved() / "checkpoint-4/optimizer.pt"
    path.unlink()
    world.resume(path.parent)


def c06_a_damaged_trainer_state(world):
    path = world.saved() / "checkpoint-4/trainer_state.json"
    path.write_text(path.read_text()[:100])
    world.resume(path.parent)


def c07_a_file_overwritten_in_place(world):
    path = world.saved() / "checkpoint-4/lora_ga.tensors"
    path.write_bytes(b"\xff" * path.stat().st_size)
    world.resume(path.parent)


def c08_another_rank(world):
    world.resume(world.saved() / "checkpoint-4", lora=lora_config(r=2))


def c09_another_gamma(world):
    world.resume(world.saved() / "checkpoint-4", ga_gamma=64.0)


def c10_other_targets(world):
    world.resume(world.saved() / "checkpoint-4", lora=lora_config(target_modules=["q_proj", "v_proj"]))


def c11_saved_by_another_launch(world):
    checkpoint = world.saved() / "checkpoint-4"
    document = json.loads((checkpoint / STATE_FILE).read_text())
    document["launch"] = {"backend": "ZeRO-2", "world_size": 8}
    rewrite(checkpoint, STATE_FILE, json.dumps(document))
    world.resume(checkpoint)


def c12_a_model_without_its_optimizer(world):
    checkpoint = world.saved() / "checkpoint-4"
    (checkpoint / "lora_ga_files.json").unlink()  # as `save_only_model` leaves it
    world.resume(checkpoint)


def c13_a_list_that_names_a_file_elsewhere(world):
    checkpoint = world.saved() / "checkpoint-4"
    sizes = json.loads((checkpoint / "lora_ga_files.json").read_text())
    (checkpoint / "lora_ga_files.json").write_text(json.dumps(sizes | {"../../secret": 6}))
    (world.folder / "secret").write_text("secret")
    world.resume(checkpoint)


def c14_a_program_in_the_optimizer_file(world):
    checkpoint = world.saved() / "checkpoint-4"
    torch.save({"state": Path("/")}, checkpoint / "optimizer.pt")  # any object that is no tensor
    rewrite(checkpoint, "optimizer.pt", (checkpoint / "optimizer.pt").read_bytes())
    world.resume(checkpoint)


def c15_saving_before_training(world):
    world.trainer().save_model()


def c16_restarting_before_the_start(world):
    model, config = world.peft_model(), LoRAGAArguments(ga_learning_rate=1e-3)
    attach_lora_ga(model, config)
    restart_lora_ga(model, tiny_batches(), config, torch.optim.AdamW(model.parameters()), **QUIET)


def c17_exporting_onto_something(world):
    (world.folder / "merged").mkdir()
    (world.folder / "merged/notes.txt").write_text("mine")
    export(world.finished_run / "checkpoint-4", world.folder / "merged")


def c18_exporting_a_folder_without_an_adapter(world):
    export(world.folder, world.folder / "merged")


def c19_merging_into_a_base_that_is_not_there(world):
    export(world.finished_run / "checkpoint-4", world.folder / "merged", merge=True, base_model="no/such_model")


def c20_merging_into_another_base(world):
    tiny_model("qwen2").save_pretrained(world.folder / "base")
    path = world.folder / "base/model.safetensors"
    tensors = load_file(path)
    name = "model.layers.0.self_attn.q_proj.weight"
    save_file(tensors | {name: torch.zeros(60, 48)}, path, metadata={"format": "pt"})
    export(world.finished_run / "checkpoint-4", world.folder / "merged", merge=True, base_model=world.folder / "base")


def c21_merging_into_a_quantized_base(world):
    tiny_model().save_pretrained(world.folder / "base")
    path = world.folder / "base/config.json"
    quantization = {"quant_method": "bitsandbytes", "load_in_4bit": True}
    path.write_text(json.dumps(json.loads(path.read_text()) | {"quantization_config": quantization}))
    export(world.finished_run / "checkpoint-4", world.folder / "merged", merge=True, base_model=world.folder / "base")


def initialized(world) -> PeftModel:
    model = world.peft_model()
    initialize_lora_ga(model, tiny_batches(), LoRAGAArguments(ga_learning_rate=1e-3), **QUIET)
    return model


def c22_an_adapters_tensors_into_the_model_in_memory(world):
    tensors = load_file(world.finished_run / "checkpoint-4/adapter_model.safetensors")
    set_peft_model_state_dict(initialized(world), tensors)


def c23_hotswapping_the_model_in_memory(world):
    hotswap_adapter(initialized(world), str(world.finished_run / "checkpoint-4"), "default")


def c24_a_copy_of_the_adapter_in_memory(world):
    model = initialized(world)
    model.add_adapter("copy", model.peft_config["default"])


def c25_a_finished_run_started_again(world):
    world.saved()
    with warnings_of("lora_ga_trainer") as said:
        world.trainer(config=LoRAGASFTConfig(**sft_arguments(world.folder / "saved"))).train(
            resume_from_checkpoint=True
        )
    return said[0]


def c26_merging_replicated_layers(world):
    checkpoint = world.saved() / "checkpoint-4"
    path = checkpoint / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"layer_replication": [[0, 1], [0, 1]]}))
    export(checkpoint, world.folder / "merged", merge=True)


def rewrite(checkpoint: Path, name: str, content: str | bytes) -> None:
    """Replace a file, and its size in the list, so that it is not just incomplete."""
    (checkpoint / name).write_bytes(content.encode() if isinstance(content, str) else content)
    sizes = json.loads((checkpoint / "lora_ga_files.json").read_text())
    sizes[name] = (checkpoint / name).stat().st_size
    (checkpoint / "lora_ga_files.json").write_text(json.dumps(sizes))


# --- several processes --------------------------------------------------------------------------------------------------


def p01_a_process_that_dies_in_the_estimation(world):
    return said_by_two_processes(world.shared)["launcher"]


def p02_nan_on_one_process_only(world):
    return said_by_two_processes(world.shared)["P02"]


def p03_attached_after_sharding(world):
    return said_by_two_processes(world.shared)["P03"]


def p04_reentrant_checkpointing_under_fsdp2(world):
    check_checkpointing(Launch("FSDP2", 2), use_reentrant=True)


def p05_restarts_under_zero_with_other_trained_parameters(world):
    check_restart(Launch("ZeRO-2", 2), ["lm_head.weight"])


# --- recipes and evaluation ---------------------------------------------------------------------------------------------


def r01_no_such_configuration(world):
    world.recipe("metamath", "--config", "mine.yaml")


def r02_no_such_method(world):
    world.recipe("metamath", method="lora-ga")


def r03_a_method_and_an_option_that_contradicts_it(world):
    world.recipe("metamath", "--ga_scale", "stable", method="gaussian")


def r04_no_such_option(world):
    world.recipe("metamath", "--lora_rank", "8")


def r05_two_sources_of_data(world):
    world.recipe("metamath", dataset_name="meta-math/MetaMathQA")


def r06_no_such_data_file(world):
    world.recipe("metamath", dataset_path="mine.jsonl")


def r07_a_file_of_another_kind(world):
    world.recipe("metamath", dataset_path="mine.txt")


def r08_a_missing_column(world):
    world.rows([{"question": "w1", "output": "w2"}])


def r09_a_column_of_numbers(world):
    world.rows([row | {"output": 1} for row in rows_for("wizardlm")])


def r10_a_broken_line(world):
    world.rows('{"instruction": "w1", "output": "w2"}\n{"instruction": "w1", "outp\n')


def r11_an_empty_file(world):
    world.rows("")


def r12_text_that_is_not_utf8(world):
    world.rows('{"instruction": "caf\u00e9", "output": "w2"}\n'.encode("latin-1"))


def r13_no_row_left(world):
    world.recipe("metamath", max_length=3)


def r14_a_dataset_on_a_hub_that_cannot_be_reached(world):
    args = metamath.MathDataArguments(dataset_name="meta-math/MetaMathQA")
    selection.load_rows(metamath.RECIPE.definition(args), args, seed=0)


def r15_generated_programs_without_leave(world):
    world.recipe("code_feedback", evaluate="true")


def r16_no_such_task(world):
    known = harness.TaskManager
    # the harness's own tasks are thousands, and take seconds
    with patch.object(harness, "TaskManager", lambda **options: known(**options | {"include_defaults": False})):
        world.recipe("metamath", evaluate="gsm8k_metamat")


def r17_programs_that_cannot_be_contained(world):
    with patch.object(platform, "machine", lambda: "riscv64"):
        world.recipe("code_feedback", "--confirm_run_unsafe_code", "true", evaluate="true")


def r18_an_answer_without_a_number(world):
    file = write([{"question": "w1", "answer": "w2"}], world.folder / "items.jsonl")
    world.recipe("metamath", evaluate="true", evaluation_file=file)


def r19_no_items(world):
    world.recipe("metamath", evaluation_limit=0)


def r20_a_benchmark_for_another_kind_of_model(world):
    file = write([{"sentence": "w1", "label": 1}], world.folder / "items.jsonl")
    world.recipe("metamath", evaluate="sst2_label_words", evaluation_file=file)


# --- the machine --------------------------------------------------------------------------------------------------------


def s01_a_full_disk(world):
    return said_by_one_process(world.shared)["S01"]


def s02_the_output_is_under_a_file(world):
    (world.folder / "file").write_text("")
    world.trainer(config=LoRAGASFTConfig(**sft_arguments(world.folder / "file/out")))


def s03_the_output_cannot_be_written(world):
    world.trainer(config=LoRAGASFTConfig(**sft_arguments("/proc/self")))


def s04_a_model_on_a_hub_that_cannot_be_reached(world):
    world.trainer(model="meta-llama/Llama-2-7b-hf")


def s05_pushing_to_a_hub_that_cannot_be_reached(world):
    return said_by_one_process(world.shared)["S05"]


@cache
def said_by_one_process(shared: Path) -> dict[str, str]:
    """By the mistakes of `mistakes_worker.ONE_PROCESS`, which leave their files in `shared`/one."""
    finished = subprocess.run(
        [sys.executable, str(WORKER.with_name("mistakes_worker.py")), str(shared / "one")],
        env=environment() | DEAD_HUB, capture_output=True, text=True, timeout=120,
    )  # fmt: skip
    return by_name(finished.stdout)


@cache
def said_by_two_processes(shared: Path) -> dict[str, str]:
    """By those of `mistakes_worker.TWO_PROCESSES`, and as "launcher" what is left to it to say when one has died."""
    out = shared / "two"
    said, error, status = what_two_processes_say("mistakes_worker.py", out, seconds=120)  # 15 s are usual
    assert status != 0
    return by_name(said) | {"launcher": error}


def by_name(said: str) -> dict[str, str]:
    return dict(re.findall(r"^([A-Z]\d\d): (.*)$", said, re.MULTILINE))


MISTAKES: dict[str, Callable[[World], str | None]] = {
    name[:3].upper(): function
    for name, function in list(globals().items())
    if callable(function) and name[1:3].isdigit() and name[3:4] == "_"
}


def what_is_said(mistake: Callable[[World], str | None], world: World) -> str:
    """The message, on one line; with the kind of exception before it, unless it is a `ValueError`."""
    try:
        said = mistake(world)
    except SystemExit as ending:
        said = str(ending)
    except Exception as error:
        said = str(error) if type(error) is ValueError else f"{type(error).__name__}: {error}"
    return " ".join((said or "NOTHING").split())


def finish_a_run(out: Path) -> None:
    """Two checkpoints of a run with the settings of `World.trainer`."""
    trainer = LoRAGASFTTrainer(
        tiny_model(), LoRAGASFTConfig(**sft_arguments(out, save_strategy="steps", save_steps=2)),
        train_dataset=word_problems(), processing_class=word_tokenizer(), peft_config=lora_config(),
    )  # fmt: skip
    trainer.train()


if __name__ == "__main__":
    import tempfile
    import time

    with tempfile.TemporaryDirectory() as root:
        finish_a_run(Path(root, "finished"))
        for name, mistake in MISTAKES.items():
            if len(sys.argv) == 1 or name.startswith(tuple(sys.argv[1:])):
                folder = Path(root, name)
                folder.mkdir()
                started = time.perf_counter()
                said = what_is_said(mistake, World(folder, Path(root)))
                seconds = time.perf_counter() - started
                print(
                    f"\n{name} {mistake.__name__[4:].replace('_', ' ')} [{seconds:.2f} s]\n    {said.replace(root, '…')}"
                )
