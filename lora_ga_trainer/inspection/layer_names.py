"""Layers by depth and kind: `model.layers.3.self_attn.q_proj` is the `q_proj` at depth 3."""

from typing import NamedTuple


class Grid(NamedTuple):
    """Where each layer stands in a table of kinds × depths."""

    kinds: list[str]
    """As short as is unambiguous, in the order of the model."""
    depths: list[int | None]
    """Ascending; None last, for layers outside the stack of blocks."""
    places: dict[str, tuple[str, int | None]]
    """(kind, depth) of each layer by its name."""


def layer_grid(names: list[str]) -> Grid:
    """The grid of layers given by their module names. The first number in a name is its depth."""
    parsed = {name: _split(name) for name in names}
    keys = list(dict.fromkeys((stack, kind) for stack, _, kind in parsed.values()))
    labels = dict(zip(keys, _labels(keys), strict=True))
    places = {name: (labels[stack, kind], depth) for name, (stack, depth, kind) in parsed.items()}
    depths = sorted({depth for _, depth in places.values()}, key=lambda depth: (depth is None, depth or 0))
    return Grid([labels[key] for key in keys], depths, places)


Parts = tuple[str, ...]


def _split(name: str) -> tuple[Parts, int | None, Parts]:
    """(the parts before the depth, the depth, the parts after it)."""
    parts = tuple(name.split("."))
    for index, part in enumerate(parts[:-1]):
        if part.isdigit():
            return parts[:index], int(part), parts[index + 1 :]
    return (), None, parts


def _labels(keys: list[tuple[Parts, Parts]]) -> list[str]:
    kinds = list(dict.fromkeys(kind for _, kind in keys))
    short = {kind: _shortest_end(kind, kinds) for kind in kinds}
    stacks = list(dict.fromkeys(stack for stack, _ in keys if stack))
    several = len(stacks) > 1
    differing = (index for index, parts in enumerate(zip(*stacks, strict=False)) if len(set(parts)) > 1)
    shared = next(differing, min(map(len, stacks), default=0))
    return [f"{stack[shared]} {short[kind]}" if several and stack[shared:] else short[kind] for stack, kind in keys]


def _shortest_end(kind: Parts, kinds: list[Parts]) -> str:
    """The shortest end of `kind` that no other kind shares."""
    for length in range(1, len(kind)):
        if sum(other[-length:] == kind[-length:] for other in kinds) == 1:
            return ".".join(kind[-length:])
    return ".".join(kind)
