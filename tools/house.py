"""The shape of the source, measured: lines, files, import circles, modules at the root, and who imports whom.

    python tools/house.py            # the table
    python tools/house.py circles    # each circle with the imports that close it
    python tools/house.py twice      # options by command that are handed on as they are to a dataclass's field

Imports count wherever they stand: at the top, inside functions, and for type checking only.
"""

from __future__ import annotations

import ast
import sys
from collections import defaultdict
from pathlib import Path

SOURCE = Path(__file__).parents[1] / "src"
PACKAGE = "offramp"


def modules() -> dict[str, Path]:
    """Files by the dotted names of their modules."""
    found = {}
    for path in sorted((SOURCE / PACKAGE).rglob("*.py")):
        parts = path.relative_to(SOURCE).with_suffix("").parts
        found[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path
    return found


def imports(files: dict[str, Path], *, late: bool = True) -> dict[str, set[str]]:
    """Which modules of the package each one imports; not `late`: only those that importing it imports."""
    graph: dict[str, set[str]] = {}
    for name, path in files.items():
        graph[name] = {each for node in _nodes(ast.parse(path.read_text()), late) for each in _named(node, files)} - {
            name
        }
    return graph


def _nodes(tree: ast.AST, late: bool) -> list[ast.AST]:
    if late:
        return list(ast.walk(tree))
    found, left = [], [tree]
    while left:
        node = left.pop()
        found.append(node)
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda):
            continue
        if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.dump(node.test):
            left += node.orelse
            continue
        left += ast.iter_child_nodes(node)
    return found


def _named(node: ast.AST, files: dict[str, Path]) -> set[str]:
    if isinstance(node, ast.Import):
        return {alias.name for alias in node.names if alias.name in files}
    if isinstance(node, ast.ImportFrom) and node.module in files:
        inner = {f"{node.module}.{alias.name}" for alias in node.names}
        return (inner & files.keys()) | ({node.module} if inner - files.keys() else set())
    return set()


def circles(graph: dict[str, set[str]]) -> list[set[str]]:
    """Groups of modules that import one another (Tarjan); not `offramp`, which imports what it names late."""
    index: dict[str, int] = {}
    low: dict[str, int] = {}
    stack: list[str] = []
    found: list[set[str]] = []

    def visit(name: str) -> None:
        index[name] = low[name] = len(index)
        stack.append(name)
        for other in sorted(graph[name] - {PACKAGE}):
            if other not in index:
                visit(other)
                low[name] = min(low[name], low[other])
            elif other in stack:
                low[name] = min(low[name], index[other])
        if low[name] == index[name]:
            group = set(stack[stack.index(name) :])
            del stack[stack.index(name) :]
            if len(group) > 1:
                found.append(group)

    sys.setrecursionlimit(10_000)
    for name in graph:
        if name not in index:
            visit(name)
    return found


def closure(graph: dict[str, set[str]], name: str) -> set[str]:
    """What importing a module imports, packages around it included."""
    found: set[str] = set()
    left = [name]
    while left:
        module = left.pop()
        if module in found or module not in graph:
            continue
        found.add(module)
        left += [*graph[module], module.rpartition(".")[0]]
    return found


def twice(files: dict[str, Path]) -> dict[str, list[str]]:
    """Options by command that a dataclass has as well: a command's parameters `x` in a call such as `Config(x=x)`."""
    found: dict[str, list[str]] = {}
    for name, path in files.items():
        if not name.startswith(f"{PACKAGE}.cli."):
            continue
        for command in (node for node in ast.parse(path.read_text()).body if isinstance(node, ast.FunctionDef)):
            if command.name.startswith("_"):
                continue
            own = {each.arg for each in (*command.args.args, *command.args.kwonlyargs)}
            for call in (node for node in ast.walk(command) if isinstance(node, ast.Call)):
                kinds = [each.id for each in (call.func, *call.args) if isinstance(each, ast.Name)]
                if any(kind[0].isupper() for kind in kinds):
                    found.setdefault(command.name, []).extend(
                        each.arg for each in call.keywords
                        if each.arg in own and isinstance(each.value, ast.Name) and each.value.id == each.arg
                    )  # fmt: skip
    return {command: names for command, names in found.items() if names}


def main() -> None:
    """Print what was asked for."""
    files = modules()
    graph = imports(files)
    rings = circles(graph)
    if sys.argv[1:] == ["circles"]:
        for ring in rings:
            print(f"{len(ring)}:")
            for name in sorted(ring):
                print(f"  {name} -> {', '.join(sorted(graph[name] & ring))}")
        return
    if sys.argv[1:] == ["twice"]:
        for command, names in twice(files).items():
            print(f"{command}: {', '.join(names)}")
        return
    texts = {name: path.read_text() for name, path in files.items()}
    at_root = [path for path in files.values() if path.parent == SOURCE / PACKAGE]
    rooms: dict[str, int] = defaultdict(int)
    for name, text in texts.items():
        rooms[name.split(".")[1] if files[name].parent != SOURCE / PACKAGE else "(root)"] += text.count("\n")
    early = imports(files, late=False)
    rows = [
        ("source lines", sum(text.count("\n") for text in texts.values())),
        ("files", len(files)),
        ("modules at the root", len(at_root)),
        ("import circles", len(rings)),
        ("modules in circles", sum(map(len, rings))),
        ("options declared twice", sum(map(len, twice(files).values()))),
        *(
            (f"closure of {name}: files / lines", f"{len(found)} / {sum(texts[m].count(chr(10)) for m in found)}")
            for name in ("offramp.core.decoding", "offramp.classifiers.classifier")
            for found in [closure(early, name)]
        ),
    ]
    print("| | |\n|---|---:|")
    for what, count in rows:
        print(f"| {what} | {count} |")
    print("\n| room | lines |\n|---|---:|")
    for room, count in sorted(rooms.items(), key=lambda item: -item[1]):
        print(f"| {room} | {count} |")


if __name__ == "__main__":
    main()
