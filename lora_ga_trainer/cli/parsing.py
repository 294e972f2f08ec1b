"""Options from dataclasses, a YAML file and the command line, as in TRL; errors as one line."""

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from difflib import get_close_matches
from pathlib import Path
from typing import Any

import yaml
from safetensors import SafetensorError
from trl import TrlParser


@contextmanager
def errors_as_messages() -> Iterator[None]:
    """Errors that a user can fix end the program with one line, not a traceback; so do unreadable files and hubs."""
    try:
        yield
    except (ValueError, ModuleNotFoundError, OSError, SafetensorError) as error:
        sys.exit(f"error: {' '.join(str(error).split()) or type(error).__name__}")


def options_parser(types: tuple[type, ...], prog: str) -> TrlParser:
    kinds: Any = types  # TRL's annotation says instances, but it takes classes
    return TrlParser(kinds, prog=prog, usage=f"{prog} [--config FILE.yaml] [--OPTION VALUE ...]", allow_abbrev=False)


def parse_options(types: tuple[type, ...], argv: list[str], prog: str) -> tuple[Any, ...]:
    """One instance of each of `types`: from the file after `--config`, and over it the options in `argv`.

    Raises:
        ValueError: an unknown option in `argv` or the file; a missing file; or what the dataclasses raise.
    """
    parser = options_parser(types, prog)
    known = [text for action in parser._actions for text in action.option_strings]
    given = [word.partition("=")[0] for word in argv if word.startswith("--")]
    if "--config" in argv:
        given += [f"--{key}" for key in config_keys(([*argv, ""])[argv.index("--config") + 1])]
    for option in given:  # before any other check
        if option == "--config" and "--config" not in argv:
            raise ValueError("`--config=FILE` is not understood: write `--config FILE`.")
        if option not in (*known, "--config", "--env"):
            spelled = option.replace("-", "_").replace("__", "--", 1)
            close = [name for name in known if name.startswith(spelled)] or get_close_matches(spelled, known, n=1)
            hint = f"Did you mean {close[0]}? " if close else ""
            raise ValueError(f"There is no option {option!r}. {hint}`{prog} --help` lists the options.")
    return parser.parse_args_and_config(argv)


def config_keys(path: str) -> list[str]:
    """The options that a YAML file sets.

    Raises:
        ValueError: there is no such file, or it is not a mapping.
    """
    if not Path(path).is_file():
        raise ValueError(f"`config` is {path!r}, but there is no such file. Pass a YAML file with options.")
    try:
        config = yaml.safe_load(Path(path).read_text(encoding="utf-8"))
    except yaml.YAMLError as error:
        raise ValueError(
            f"`config` is {path!r}, which is not valid YAML ({error}). Write one `option: value` per line."
        ) from error
    if not isinstance(config, dict):
        raise ValueError(f"`config` is {path!r}, which holds no options. Write one `option: value` per line.")
    return list(config)


def resume_choice(option: str | bool | None) -> str | bool | None:
    """The trainer's argument (True, a folder, or None) from the command line's text."""
    words = {"true": True, "false": None, "none": None}
    return words.get(str(option).lower(), option)
