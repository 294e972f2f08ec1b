"""Options from dataclasses, a YAML file and the command line, as TRL has them; errors as one line."""

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from difflib import get_close_matches
from pathlib import Path
from typing import Any

from trl import TrlParser


@contextmanager
def errors_as_messages() -> Iterator[None]:
    """What a user can mend ends the program with a message, not a traceback."""
    try:
        yield
    except (ValueError, ModuleNotFoundError) as error:
        sys.exit(f"error: {error}")


def options_parser(types: tuple[type, ...], prog: str) -> TrlParser:
    return TrlParser(types, prog=prog, usage=f"{prog} [--config FILE.yaml] [--OPTION VALUE ...]", allow_abbrev=False)


def parse_options(types: tuple[type, ...], argv: list[str], prog: str) -> tuple[Any, ...]:
    """One instance of each of `types`: from the file after `--config`, and over it the options in `argv`.

    Raises:
        ValueError: an option that does not exist, in `argv` or the file; no such file; or what the dataclasses raise.
    """
    for option in argv:
        if option.startswith("--config="):
            raise ValueError(f"`{option}` is not understood: write `--config {option.removeprefix('--config=')}`.")
    if "--config" in argv:
        path = ([*argv, ""])[argv.index("--config") + 1]
        if not Path(path).is_file():
            raise ValueError(f"`config` is {path!r}, but there is no such file. Pass a YAML file with options.")
    parser = options_parser(types, prog)
    *parsed, unknown = parser.parse_args_and_config(argv, return_remaining_strings=True)
    if unknown:
        option = next((word for word in unknown if word.startswith("-")), unknown[0])
        known = [text for action in parser._actions for text in action.option_strings]
        close = get_close_matches(option.replace("-", "_").replace("__", "--", 1), known, n=1)
        hint = f"Did you mean {close[0]}? " if close else ""
        raise ValueError(f"There is no option {option!r}. {hint}`{prog} --help` lists the options.")
    return tuple(parsed)
