"""lora-ga export --checkpoint_dir out/checkpoint-500 --out adapter [--merge]"""

import sys
from dataclasses import dataclass, field

from .parsing import errors_as_messages, parse_options


@dataclass
class ExportArguments:
    checkpoint_dir: str = field(metadata={"help": "A `checkpoint-N`, or the folder that `save_model` wrote."})
    out: str = field(metadata={"help": "Folder to create."})
    merge: bool = field(default=False, metadata={"help": "Write the whole model with the adapter merged into it."})
    base_model: str | None = field(
        default=None, metadata={"help": "The untouched base, for `merge`. Default: the one that the adapter names."}
    )


def main(argv: list[str] | None = None) -> None:
    with errors_as_messages():
        (arguments,) = parse_options((ExportArguments,), sys.argv[1:] if argv is None else argv, "lora-ga export")
        from ..checkpoint.exporting import export

        export(arguments.checkpoint_dir, arguments.out, arguments.merge, base_model=arguments.base_model)
    print(f"{arguments.out} holds {'the merged model' if arguments.merge else 'the adapter'}.")


if __name__ == "__main__":
    main()
