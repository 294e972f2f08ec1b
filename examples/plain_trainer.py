"""LoRA-GA for a `transformers.Trainer` that somebody else has made: no TRL, no subclass, two calls before `train()`.

python examples/plain_trainer.py                                     # a random model, made-up text, seconds on a CPU
python examples/plain_trainer.py --model Qwen/Qwen2.5-0.5B           # yours
accelerate launch --config_file accelerate_configs/zero2.yaml examples/plain_trainer.py --model MODEL

`start_from_gradient` is all that has to be copied to wherever a framework has made its trainer; docs/migration.md says where
that is in some. Make a trainer of your own a `class MyTrainer(LoRAGAMixin, Trainer)` instead: that checks more, and also saves
sharded models (ZeRO-3, FSDP2), where a plain Trainer leaves A0 and B0 out of its checkpoints.
"""

import argparse

import torch
from datasets import Dataset
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import AutoModelForCausalLM, LlamaConfig, Trainer, TrainerCallback, TrainingArguments

from lora_ga_trainer import LoRAGAArguments, initialize_lora_ga
from lora_ga_trainer.initialization import attach_lora_ga


class InitializeLoRAGA(TrainerCallback):
    """Step 2: when the model is on its device, and before the first training step."""

    def __init__(self, trainer: Trainer, config: LoRAGAArguments):
        self.trainer, self.config = trainer, config

    def on_train_begin(self, args, state, control, model, **kwargs):
        adapter = self.trainer.accelerator.unwrap_model(model).lora_ga
        if not adapter.is_initialized:  # else it comes from a checkpoint
            initialize_lora_ga(adapter.model, self.sample(args.process_index, args.world_size), self.config)

    def sample(self, process: int, processes: int) -> list[dict[str, torch.Tensor]]:
        """This process's share of the examples, as the trainer would batch them, two at a time."""
        dataset = self.trainer.train_dataset
        order = torch.randperm(len(dataset), generator=torch.Generator().manual_seed(self.config.ga_seed)).tolist()
        mine = [dataset[index] for index in order[: self.config.ga_num_samples][process::processes]]
        return [self.trainer.data_collator(mine[start : start + 2]) for start in range(0, len(mine), 2)]


def start_from_gradient(trainer: Trainer, config: LoRAGAArguments) -> None:
    """Step 1: the adapter of `trainer.model` gets its form, also for a checkpoint to be loaded into, and the trainer is told of
    step 2."""
    attach_lora_ga(trainer.model, config)
    trainer.add_callback(InitializeLoRAGA(trainer, config))


def random_model() -> AutoModelForCausalLM:
    """A two-layer Llama with the 256 bytes as its vocabulary."""
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(
        LlamaConfig(vocab_size=256, hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4)
    )


def pad(rows: list[dict[str, list[int]]]) -> dict[str, torch.Tensor]:
    """A data collator: right-padded inputs, with −100 as the label of what must not count."""
    length = max(len(row["input_ids"]) for row in rows)
    padded = [row["input_ids"] + [0] * (length - len(row["input_ids"])) for row in rows]
    labels = [row["input_ids"] + [-100] * (length - len(row["input_ids"])) for row in rows]
    mask = [[1] * len(row["input_ids"]) + [0] * (length - len(row["input_ids"])) for row in rows]
    return {
        "input_ids": torch.tensor(padded),
        "attention_mask": torch.tensor(mask),
        "labels": torch.tensor(labels),
    }


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description="LoRA-GA for a plain Trainer.")
    parser.add_argument("--model", help="Folder or hub name. Default: a small random model.")
    parser.add_argument("--out", default="outputs/plain_trainer", help="Folder for the adapter.")
    parser.add_argument("--r", type=int, default=8, help="The adapter's rank.")
    parser.add_argument("--resume", action="store_true", help="From the last checkpoint.")
    args = parser.parse_args(argv)

    training = TrainingArguments(
        output_dir=args.out, learning_rate=2e-4, max_steps=12, per_device_train_batch_size=4, logging_steps=4,
        save_steps=6, save_total_limit=2, use_cpu=not torch.accelerator.is_available(), report_to="none",
    )  # fmt: skip
    texts = [f"A low-rank adapter that starts from the gradient, example {number}." for number in range(64)]
    dataset = Dataset.from_list([{"input_ids": list(text.encode())} for text in texts])  # bytes, whatever the model

    base = AutoModelForCausalLM.from_pretrained(args.model) if args.model else random_model()
    model = get_peft_model(base, LoraConfig(r=args.r, lora_alpha=16, use_rslora=True, target_modules="all-linear"))
    trainer = Trainer(model, training, train_dataset=dataset, data_collator=pad)

    start_from_gradient(trainer, LoRAGAArguments(ga_num_samples=16, ga_learning_rate=training.learning_rate))
    trainer.train(resume_from_checkpoint=args.resume)
    trainer.save_model()

    if trainer.is_world_process_zero():
        print(model.lora_ga.state.report.summary())
        print(f"The adapter is in {args.out}.")
    if training.world_size == 1:  # stock PEFT loads it
        fresh = AutoModelForCausalLM.from_pretrained(args.model) if args.model else random_model()
        reloaded = PeftModel.from_pretrained(fresh, args.out).to(training.device).eval()
        ids = pad([dataset[0]])["input_ids"].to(training.device)
        with torch.no_grad():
            torch.testing.assert_close(reloaded(ids).logits, model.eval()(ids).logits, rtol=0, atol=1e-4)
        print("Reloaded with stock PEFT: the same logits.")


if __name__ == "__main__":
    main()
