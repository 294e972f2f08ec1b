"""Prints `name==lowest`, one a line, for each package that setup.cfg requires: what `make test-lower-bounds` installs."""

import configparser
import re
import sys
from pathlib import Path

SETUP_CFG = Path(__file__).parents[1] / "setup.cfg"


def lower_bounds(setup_cfg: Path) -> dict[str, str]:
    """The lowest version of each requirement in `install_requires`, by name.

    Raises:
        ValueError: a requirement has no lower bound.
    """
    config = configparser.ConfigParser()
    config.read_string(setup_cfg.read_text(encoding="utf-8"))
    lowest = {}
    for requirement in config["options"]["install_requires"].split("\n"):
        if not requirement or requirement.startswith("#"):
            continue
        match = re.match(r"([\w.-]+)>=([\w.]+)", requirement)
        if match is None:
            raise ValueError(f"{requirement!r} in {setup_cfg} has no lower bound. Write it as `name>=lowest,<highest`.")
        lowest[match[1]] = match[2]
    return lowest


if __name__ == "__main__":
    sys.stdout.writelines(f"{name}=={version}\n" for name, version in lower_bounds(SETUP_CFG).items())
