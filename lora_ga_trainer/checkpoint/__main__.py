"""python -m lora_ga_trainer.checkpoint --checkpoint_dir out/checkpoint-500 --out adapter [--merge]"""

import sys
from dataclasses import dataclass, field
from typing import Any

from trl import TrlParser

from .exporting import export


@dataclass
class ExportArguments:
    checkpoint_dir: str = field(metadata={"help": "A `checkpoint-N`, or where `save_model` wrote."})
    out: str = field(metadata={"help": "Folder to create."})
    merge: bool = field(default=False, metadata={"help": "Write the whole model with the adapter merged into it."})
    base_model: str | None = field(
        default=None, metadata={"help": "The untouched base, for `merge`. Default: the one the adapter names."}
    )


def main() -> None:
    kind: Any = ExportArguments  # TRL says that it wants an instance, and means a class
    parser = TrlParser(kind, prog="python -m lora_ga_trainer.checkpoint")
    try:
        (arguments,) = parser.parse_args_and_config()  # an unknown option is a `ValueError` here
        export(arguments.checkpoint_dir, arguments.out, arguments.merge, base_model=arguments.base_model)
    except ValueError as error:
        sys.exit(f"error: {error}")
    print(f"{arguments.out} holds {'the merged model' if arguments.merge else 'the adapter'}.")


if __name__ == "__main__":
    main()
