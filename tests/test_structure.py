"""The plan of the package and of the benchmarks: rooms that import downwards only."""

import ast
from graphlib import TopologicalSorter
from pathlib import Path

import pytest

import lora_ga_trainer

PACKAGE = Path(lora_ga_trainer.__file__).parent
FLOORS = (
    {"_version", "arguments", "factors", "report"},
    {"distributed"},
    {"compatibility"},
    {"adapter"},
    {"gradient", "checkpoint"},
    {"initialization"},
    {"trainers"},
    {"inspection"},
    {"cli"},
)
"""From the ground up. A room imports from lower floors and from itself; the ground floor's files from each other."""
FLOOR_OF = {room: floor for floor, rooms in enumerate(FLOORS) for room in rooms}
FILES = sorted(path.relative_to(PACKAGE) for path in PACKAGE.rglob("*.py"))
BENCHMARKS = Path(__file__).resolve().parents[1] / "benchmarks"
BENCHMARK_ROOMS = ("measuring", "costs", "sweeps")
"""From the ground up, below the programs."""


def imported_rooms(file: Path) -> set[str]:
    """The rooms, or files of the ground floor, that `file` imports from, also inside functions and for type checkers only."""
    here = file.parent.parts
    rooms = set()
    for node in ast.walk(ast.parse((PACKAGE / file).read_text(encoding="utf-8"))):
        if isinstance(node, ast.ImportFrom) and node.level:
            parent = here[: len(here) - (node.level - 1)]
            path = (*parent, *(node.module.split(".") if node.module else ()))
            rooms |= {path[0]} if path else {alias.name for alias in node.names}
    return rooms


@pytest.mark.parametrize("file", [file for file in FILES if file.name != "__init__.py" or len(file.parts) > 1], ids=str)
def test_a_room_imports_downwards_only(file):
    room = file.parts[0].removesuffix(".py")
    assert room in FLOOR_OF, f"{room} has no floor: add it to FLOORS"
    for other in imported_rooms(file):
        below = FLOOR_OF[other] < FLOOR_OF[room]
        assert other == room or below or FLOOR_OF[other] == FLOOR_OF[room] == 0, f"{file} imports {other}"


def test_every_floor_stands():
    assert {file.parts[0].removesuffix(".py") for file in FILES} - {"__init__"} == set(FLOOR_OF)


def test_the_ground_floors_formulas_import_only_torch():
    names = {
        alias.name if isinstance(node, ast.Import) else node.module
        for file in ("factors.py", "gradient/accumulator.py")
        for node in ast.walk(ast.parse((PACKAGE / file).read_text(encoding="utf-8")))
        if isinstance(node, (ast.Import, ast.ImportFrom)) and not getattr(node, "level", 0)
        for alias in node.names
    }
    assert names <= {"torch", "math", "collections.abc", "copy", "typing", "weakref"}


def test_only_one_room_knows_processes():
    """deepspeed and torch.distributed are imported in `distributed` only."""
    for file in FILES:
        for node in ast.walk(ast.parse((PACKAGE / file).read_text(encoding="utf-8"))):
            modules = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            modules += [node.module] if isinstance(node, ast.ImportFrom) and node.module and not node.level else []
            for module in modules:
                if module.startswith(("deepspeed", "torch.distributed")):
                    assert file.parts[0] == "distributed", f"{file} imports {module}"


def test_no_benchmark_is_imported_and_none_imports_in_a_circle():
    """Also inside functions: programs import from the rooms below them, a room from lower ones and from itself."""
    files = [path.relative_to(BENCHMARKS) for path in BENCHMARKS.rglob("*.py") if path.name != "__init__.py"]
    modules = {".".join(file.with_suffix("").parts): file for file in files}
    floors = {room: floor for floor, room in enumerate(BENCHMARK_ROOMS)}
    assert {file.parts[0] for file in files if len(file.parts) > 1} == floors.keys()
    imports = {}
    for name, file in modules.items():
        found = set()
        for node in ast.walk(ast.parse((BENCHMARKS / file).read_text(encoding="utf-8"))):
            if isinstance(node, ast.Import):
                found |= {alias.name for alias in node.names}
            elif isinstance(node, ast.ImportFrom):
                assert not node.level, f"{file} imports relatively"
                found |= {node.module, *(f"{node.module}.{alias.name}" for alias in node.names)}
        imports[name] = found & modules.keys()
        for other in imports[name]:
            assert "." in other, f"{file} imports the program {other}"
            room, others_room = name.split(".")[0], other.split(".")[0]
            assert floors[others_room] <= floors.get(room, len(floors)), f"{file} imports {other}"
    assert sum(map(len, imports.values())) > 30, "they are found"
    TopologicalSorter(imports).prepare()  # raises where there is a circle
