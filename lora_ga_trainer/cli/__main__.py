"""lora-ga COMMAND, or python -m lora_ga_trainer.cli COMMAND"""

import sys
from importlib import import_module

COMMANDS = {
    "sft": "fine-tune a language model on your data, starting from the gradient",
    "export": "write a checkpoint's adapter, also at a smaller rank, or the model with it merged in",
    "inspect": "draw what an initialization found and how the run went, as one HTML page",
    "compare": "overlay the losses of several runs, and print a table",
}
"""Each command is the module of the same name."""


def usage() -> str:
    width = max(map(len, COMMANDS))
    lines = [f"  {name:<{width}}  {what}" for name, what in COMMANDS.items()]
    return "\n".join(
        [
            "usage: lora-ga COMMAND [options]",
            "",
            "LoRA that starts from the gradient (arXiv 2407.05000).",
            "",
            *lines,
            "",
            "lora-ga COMMAND --help lists a command's options.",
            "On several GPUs: accelerate launch -m lora_ga_trainer.cli.sft [options]",
        ]
    )


def main(argv: list[str] | None = None) -> None:
    name, *options = (sys.argv[1:] if argv is None else argv) or ["--help"]
    if name in ("-h", "--help"):
        print(usage())
    elif name not in COMMANDS:
        sys.exit(f"error: lora-ga has no command {name!r}, only {', '.join(COMMANDS)}. See `lora-ga --help`.")
    else:
        import_module(f".{name}", __package__).main(options)


if __name__ == "__main__":
    main()
