"""python -m lora_ga_trainer.checkpoint --checkpoint_dir out/checkpoint-500 --out adapter [--merge]: `lora-ga export`"""

from ..cli.export import main

if __name__ == "__main__":
    main(prog="python -m lora_ga_trainer.checkpoint")
