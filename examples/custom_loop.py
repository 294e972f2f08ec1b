"""LoRA-GA without a Trainer: from an untouched base model to an adapter that stock PEFT loads, in seconds on a CPU.

python examples/custom_loop.py                                                       # a random model, made-up text
python examples/custom_loop.py --model Qwen/Qwen2.5-0.5B --text mine.txt             # yours: one example per line
accelerate launch --config_file accelerate_configs/zero3.yaml examples/custom_loop.py --model MODEL --text mine.txt

The four steps of LoRA-GA are marked. `Accelerator` handles the device and several processes; in plain torch, leave out
`attach_lora_ga` and everything with `accelerator`, and call `loss.backward()`.
"""

import argparse
from collections.abc import Callable
from pathlib import Path

import torch
from accelerate import Accelerator
from peft import LoraConfig, PeftModel, get_peft_model
from torch import Tensor
from torch.utils.data import DataLoader
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, get_cosine_schedule_with_warmup

from lora_ga_trainer import LoRAGAArguments, initialize_lora_ga
from lora_ga_trainer.initialization import attach_lora_ga

SENTENCE = "A low-rank adapter that starts from the gradient, example {}."


def random_model() -> AutoModelForCausalLM:
    """A two-layer Llama with the 256 bytes as its vocabulary."""
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(
        LlamaConfig(vocab_size=256, hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4)
    )


def batch_of(texts: list[str], tokenize: Callable[[str], list[int]]) -> dict[str, Tensor]:
    """Right-padded inputs with `labels`, −100 for tokens that must not count: padding here, and the prompt if there is one."""
    rows = [torch.tensor(tokenize(text)) for text in texts]
    length = max(map(len, rows))
    batch = {"input_ids": torch.zeros(len(rows), length, dtype=torch.long)}
    batch |= {"attention_mask": batch["input_ids"].clone(), "labels": torch.full_like(batch["input_ids"], -100)}
    for row, (inputs, mask, labels) in zip(rows, zip(*batch.values(), strict=True), strict=True):
        inputs[: len(row)] = labels[: len(row)] = row
        mask[: len(row)] = 1
    return batch


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description="LoRA-GA in your own training loop.")
    parser.add_argument("--model", help="Folder or hub name. Default: a small random model.")
    parser.add_argument("--text", type=Path, help="A file with one example per line. Default: made up.")
    parser.add_argument("--out", default="outputs/custom_loop", help="Folder for the adapter.")
    parser.add_argument("--r", type=int, default=8, help="The adapter's rank.")
    parser.add_argument("--learning_rate", type=float, default=2e-4)
    parser.add_argument("--batch_size", type=int, default=4)
    parser.add_argument("--epochs", type=int, default=2)
    args = parser.parse_args(argv)

    accelerator = Accelerator(cpu=not torch.accelerator.is_available())
    torch.manual_seed(0)
    texts = (
        [line for line in args.text.read_text().splitlines() if line.strip()]
        if args.text
        else [SENTENCE.format(number) for number in range(32)]
    )
    if args.model:
        base, tokenizer = AutoModelForCausalLM.from_pretrained(args.model), AutoTokenizer.from_pretrained(args.model)
        tokenize = lambda text: tokenizer(text)["input_ids"]  # noqa: E731
    else:
        base, tokenize = random_model(), lambda text: list(text.encode())

    loader = DataLoader(texts, args.batch_size, shuffle=True, collate_fn=lambda some: batch_of(some, tokenize))
    # The batches to estimate on are ordinary training batches, a few dozen examples in all; their size need not match training.
    # Each process passes its own share.
    mine = texts[:64][accelerator.process_index :: accelerator.num_processes]
    sample = [batch_of(mine[start : start + 2], tokenize) for start in range(0, len(mine), 2)]

    # Step 1. An ordinary PEFT model. Its adapter becomes A0 + dA and B0 + dB, where only the differences train. Everything is
    # still zero, so it computes the base model's function. It comes before `prepare`, which then shards these parameters too.
    ga = LoRAGAArguments(ga_learning_rate=args.learning_rate)  # by which the factors are scaled
    config = LoraConfig(r=args.r, lora_alpha=16, use_rslora=True, target_modules="all-linear", task_type="CAUSAL_LM")
    model = get_peft_model(base, config)
    attach_lora_ga(model, ga)

    optimizer = torch.optim.AdamW(
        [p for p in model.parameters() if p.requires_grad], lr=args.learning_rate, weight_decay=0
    )
    steps = args.epochs * len(loader)  # for one process: a prepared scheduler steps once per process
    scheduler = get_cosine_schedule_with_warmup(optimizer, num_warmup_steps=steps // 30, num_training_steps=steps)
    wrapped, optimizer, loader, scheduler = accelerator.prepare(model, optimizer, loader, scheduler)

    # Steps 2 and 3. Estimate the gradient of the loss with respect to every target weight, and take A0 and B0 from its singular
    # vectors. This comes after `prepare`, on the model itself, not on its DDP or DeepSpeed wrapper. The base weights, the
    # optimizer and the random state stay unchanged.
    model = accelerator.unwrap_model(wrapped)
    report = initialize_lora_ga(model, sample, ga, disable_tqdm=True)
    accelerator.print(report.summary())

    # Step 4. Train as usual.
    wrapped.train()
    for epoch in range(args.epochs):
        for batch in loader:
            loss = wrapped(**batch).loss
            accelerator.backward(loss)
            optimizer.step()
            scheduler.step()
            optimizer.zero_grad()
        accelerator.print(f"epoch {epoch + 1}: loss {loss.item():.4f}")

    # An ordinary LoRA adapter of rank 2r for the untouched base. Every process calls it, since each may hold a part.
    model.save_pretrained(args.out, is_main_process=accelerator.is_main_process)
    accelerator.wait_for_everyone()
    accelerator.print(f"The adapter is in {args.out}.")

    if accelerator.num_processes == 1:
        # Anyone can load the trained adapter with PEFT alone.
        fresh = AutoModelForCausalLM.from_pretrained(args.model) if args.model else random_model()
        reloaded = PeftModel.from_pretrained(fresh, args.out).to(accelerator.device).eval()
        model.eval()
        ids = sample[0]["input_ids"].to(accelerator.device)
        with torch.no_grad():
            torch.testing.assert_close(reloaded(ids).logits, model(ids).logits, rtol=0, atol=1e-4)
            with model.disable_adapter():  # without the adapter, it is still the base model
                untouched = model(ids).logits
            torch.testing.assert_close(untouched, reloaded.unload()(ids).logits, rtol=0, atol=0)
        accelerator.print("Reloaded with stock PEFT: the same logits.")
    accelerator.end_training()


if __name__ == "__main__":
    main()
