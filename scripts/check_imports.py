"""Draw the import graph of src/spunge and fail on an import upwards, sideways between rooms, or in a circle.

python scripts/check_imports.py             # check
python scripts/check_imports.py --draw      # print the graph between rooms

Imports inside functions count too: they hide a circle, they don't break it. Imports for the type checker alone do not.
"""

import ast
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path

ROOT = Path(__file__).parent.parent / "src"
# From the ground up. Rooms on one floor don't import each other.
FLOORS: list[set[str]] = [
    {"errors"},
    {"registry", "files", "progress", "stopping", "copies"},
    {"recipe", "results", "temporary"},
    {"data", "weights", "endpoints"},
    {"model"},
    {"unlearning", "merging", "evaluation", "report"},
    {"run"},
    {"view"},
    {"cli"},
    {"__main__"},
]
LEVEL = {room: level for level, rooms in enumerate(FLOORS) for room in rooms}
MOST_AT_THE_ROOT = 9


def module_name(file: Path) -> str:
    parts = file.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def imports(file: Path, known: Mapping[str, Path]) -> Iterator[str]:
    """The modules of the package that a file imports, anywhere in it."""
    tree = ast.parse(file.read_text(encoding="utf-8"))
    for_types = {
        id(inner)
        for node in ast.walk(tree)
        if isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING"
        for inner in ast.walk(node)
    }
    for node in ast.walk(tree):
        if id(node) in for_types:
            continue
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names if alias.name in known)
        elif isinstance(node, ast.ImportFrom) and node.module in known:
            # The root's own constant, which is there before anything else is.
            for alias in (alias for alias in node.names if alias.name != "__version__"):
                inner = f"{node.module}.{alias.name}"
                yield inner if inner in known else str(node.module)


def graph() -> dict[str, set[str]]:
    """Module -> the modules it imports."""
    known = {module_name(file): file for file in sorted((ROOT / "spunge").rglob("*.py"))}
    return {name: set(imports(file, known)) - {name} for name, file in known.items()}


def room(module: str) -> str:
    return module.split(".")[1] if "." in module else module


def misplaced(edges: Mapping[str, set[str]]) -> Iterator[str]:
    for module, targets in edges.items():
        if room(module) not in LEVEL:
            if module != "spunge":
                yield f"{module}: no such room in FLOORS"
            continue
        for target in sorted(targets):
            if target == "spunge":
                yield f"{module} imports the package root"
            elif room(target) != room(module) and LEVEL.get(room(target), -1) >= LEVEL[room(module)]:
                yield f"{module} imports {target}, which is not below it"


def circles(edges: Mapping[str, set[str]]) -> Iterator[str]:
    """Each circle once, as the modules on it (Tarjan's strongly connected components)."""
    index: dict[str, int] = {}
    low: dict[str, int] = {}
    stack: list[str] = []
    found: list[list[str]] = []

    def visit(module: str) -> None:
        index[module] = low[module] = len(index)
        stack.append(module)
        for target in sorted(edges.get(module, ())):
            if target not in index:
                visit(target)
                low[module] = min(low[module], low[target])
            elif target in stack:
                low[module] = min(low[module], index[target])
        if low[module] == index[module]:
            component: list[str] = []
            while not component or component[-1] != module:
                component.append(stack.pop())
            if len(component) > 1:
                found.append(sorted(component))

    for module in edges:
        if module not in index:
            visit(module)
    yield from (f"circle: {', '.join(component)}" for component in found)


def main() -> None:
    edges = graph()
    if "--draw" in sys.argv:
        rooms: dict[str, set[str]] = {}
        for module, targets in edges.items():
            rooms.setdefault(room(module), set()).update(room(target) for target in targets)
        for level in FLOORS:
            for name in sorted(level & rooms.keys()):
                print(f"{name:12} -> {', '.join(sorted(rooms[name] - {name, 'spunge'}))}")
    problems = [*misplaced(edges), *circles(edges)]
    at_root = [
        name for name in edges if name.count(".") == 1 and (ROOT / name.replace(".", "/")).with_suffix(".py").exists()
    ]
    if len(at_root) + 1 > MOST_AT_THE_ROOT:
        problems.append(f"{len(at_root) + 1} modules at the root, more than {MOST_AT_THE_ROOT}: {', '.join(at_root)}")
    for problem in problems:
        print(problem, file=sys.stderr)
    sys.exit(1 if problems else 0)


if __name__ == "__main__":
    main()
