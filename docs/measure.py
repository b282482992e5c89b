"""The shape of `qwen_chat/` in figures, and the limits that it keeps.

    python docs/measure.py             # print the figures; status 1 where a limit is broken
    python docs/measure.py --list      # name what each figure counts

In: the source files, read as text (nothing is imported, but for the time of `import qwen_chat`). A room is a
subpackage, or a module that lies directly in `qwen_chat/`. Each floor may import the floors above it in `FLOORS`.
"""

from __future__ import annotations

import ast
import subprocess
import sys
from collections import Counter, defaultdict
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
PACKAGE = ROOT / "qwen_chat"

# Which rooms may import which: a room imports only rooms of earlier floors (and itself).
FLOORS: tuple[tuple[str, ...], ...] = (
    ("place",),
    ("errors",),
    ("conversation", "console", "families", "hardware", "threads"),
    ("files", "weights"),
    ("gguf_model", "packed_weights"),
    ("flags", "tools"),
    ("dialects",),
    ("chat",),
    ("data", "demo_model", "certificate"),
    ("models", "delta_rule"),
    ("training", "inference"),
    ("service",),
    ("export",),
    ("evaluation", "report"),
    ("cli",),
)
LONGEST_FUNCTION = 60  # lines, decorators and docstring included
SHARED_NAMES = 12  # top-level names that stand in more than one module
NAMED_ONCE = 0.18  # share of functions that are private and named once
PLAIN_ANY = 0.05  # share of arguments that are annotated as plain Any
IMPORT_MS = 60  # of `import qwen_chat`
HEAVY = ("torch", "numpy", "pydantic", "transformers", "requests", "jsonschema")

Function = ast.FunctionDef | ast.AsyncFunctionDef


@dataclass(frozen=True)
class Module:
    """One source file: its dotted name below the package, its room, its syntax tree."""

    name: str
    room: str
    tree: ast.Module

    @property
    def functions(self) -> Iterator[Function]:
        return (node for node in ast.walk(self.tree) if isinstance(node, Function))


def modules(package: Path = PACKAGE) -> list[Module]:
    """Every module of the package, `__init__` files included."""
    found = []
    for path in sorted(package.rglob("*.py")):
        parts = path.relative_to(package).with_suffix("").parts
        name = ".".join(parts)
        found.append(Module(name, parts[0], ast.parse(path.read_text(encoding="utf-8"))))
    return found


def imports(module: Module, known: frozenset[str], package: str = "qwen_chat") -> Iterator[str]:
    """The modules of the package that a module imports, anywhere in it (inside functions too)."""
    for node in ast.walk(module.tree):
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and node.module and node.level == 0:
            names = [node.module, *(f"{node.module}.{alias.name}" for alias in node.names)]
        else:
            continue
        for name in names:
            inner = name.removeprefix(f"{package}.")
            if name.startswith(f"{package}.") and inner in known:
                yield inner


def arrows(found: list[Module]) -> set[tuple[str, str]]:
    """(module, module it imports)."""
    known = frozenset(module.name for module in found)
    return {
        (module.name, other) for module in found for other in imports(module, known) if other != module.name
    }


def upward(found: list[Module]) -> list[str]:
    """Imports that go up or across: to a later floor, or to another room of the same one."""
    floor = {room: k for k, rooms in enumerate(FLOORS) for room in rooms}
    wrong = []
    for source, target in sorted(arrows(found)):
        a, b = source.split(".")[0], target.split(".")[0]
        if a == "__init__" or a == b:
            continue
        if a not in floor or b not in floor:
            wrong.append(f"{source} -> {target}: no floor for {a if a not in floor else b}")
        elif floor[b] >= floor[a]:
            wrong.append(f"{source} -> {target}")
    return wrong


def circle(edges: set[tuple[str, str]]) -> list[str]:
    """One import circle among modules, or an empty list."""
    following = defaultdict(list)
    for source, target in sorted(edges):
        following[source].append(target)
    done: set[str] = set()

    def visit(name: str, way: list[str]) -> list[str]:
        if name in way:
            return [*way[way.index(name) :], name]
        if name in done:
            return []
        for target in following[name]:
            found = visit(target, [*way, name])
            if found:
                return found
        done.add(name)
        return []

    return next((found for name in sorted(following) if (found := visit(name, []))), [])


def long_functions(found: list[Module]) -> list[str]:
    """Functions longer than LONGEST_FUNCTION lines."""
    return [
        f"{module.name}.{function.name}: {length} lines"
        for module in found
        for function in module.functions
        if (length := (function.end_lineno or 0) - function.lineno + 1) > LONGEST_FUNCTION
    ]


def shared_names(found: list[Module]) -> list[str]:
    """Names that are defined at the top of more than one module."""
    places = defaultdict(set)
    for module in found:
        for node in module.tree.body:
            for name in _defined(node):
                places[name].add(module.name)
    return [f"{name}: {', '.join(sorted(where))}" for name, where in sorted(places.items()) if len(where) > 1]


def _defined(node: ast.stmt) -> list[str]:
    if isinstance(node, Function | ast.ClassDef):
        return [node.name]
    targets = (
        node.targets
        if isinstance(node, ast.Assign)
        else [node.target]
        if isinstance(node, ast.AnnAssign)
        else []
    )
    names = [n.id for target in targets for n in ast.walk(target) if isinstance(n, ast.Name)]
    return [name for name in names if not (name.startswith("__") and name.endswith("__"))]


def named_once(found: list[Module]) -> list[str]:
    """Private functions and methods whose name is used in one place of their module: a step of one caller."""
    once = []
    for module in found:
        nodes = list(ast.walk(module.tree))
        uses = Counter(node.id for node in nodes if isinstance(node, ast.Name))
        uses += Counter(node.attr for node in nodes if isinstance(node, ast.Attribute))
        once += [
            f"{module.name}.{function.name}"
            for function in module.functions
            if function.name.startswith("_") and not function.name.endswith("__") and uses[function.name] == 1
        ]
    return once


def plain_any(found: list[Module]) -> tuple[int, list[str]]:
    """(arguments in all, those annotated as plain Any)."""
    total, plain = 0, []
    for module in found:
        for function in module.functions:
            given = [*function.args.posonlyargs, *function.args.args, *function.args.kwonlyargs]
            given += [extra for extra in (function.args.vararg, function.args.kwarg) if extra]
            named = [argument for argument in given if argument.arg not in ("self", "cls")]
            total += len(named)
            plain += [
                f"{module.name}.{function.name}({argument.arg})"
                for argument in named
                if isinstance(argument.annotation, ast.Name) and argument.annotation.id == "Any"
            ]
    return total, plain


def import_cost() -> tuple[float, list[str]]:
    """(milliseconds of `import qwen_chat`, the heavy packages that came along): the best of five."""
    code = (
        "import sys, time; start = time.perf_counter(); import qwen_chat; "
        f"print((time.perf_counter() - start) * 1000, *(name for name in {HEAVY!r} if name in sys.modules))"
    )
    runs = [
        subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
        for _ in range(5)
    ]
    words = [run.stdout.split() for run in runs]
    return min(float(line[0]) for line in words), words[0][1:]


def main() -> int:
    found = modules()
    functions = sum(1 for module in found for _ in module.functions)
    once, (arguments, plain) = named_once(found), plain_any(found)
    milliseconds, heavy = import_cost()
    lines = sum(len(path.read_text(encoding="utf-8").splitlines()) for path in PACKAGE.rglob("*.py"))
    figures: list[tuple[str, str, bool, list[str]]] = [
        ("imports that go up or across", str(len(upward(found))), not upward(found), upward(found)),
        ("import circle", " -> ".join(circle(arrows(found))) or "none", not circle(arrows(found)), []),
    ]
    long, shared = long_functions(found), shared_names(found)
    figures += [
        (f"functions over {LONGEST_FUNCTION} lines", str(len(long)), not long, long),
        (
            f"top-level names in two modules (at most {SHARED_NAMES})",
            str(len(shared)),
            len(shared) <= SHARED_NAMES,
            shared,
        ),
        _share("private functions named once", once, functions, NAMED_ONCE),
        _share("arguments that are plain Any", plain, arguments, PLAIN_ANY),
        (
            f"import qwen_chat (under {IMPORT_MS} ms, nothing heavy)",
            f"{milliseconds:.0f} ms",
            milliseconds < IMPORT_MS and not heavy,
            heavy,
        ),
    ]
    print(f"{len(found)} modules, {lines:,} lines, {functions:,} functions")
    for name, figure, holds, details in figures:
        print(f"{'ok  ' if holds else 'NOT '} {name}: {figure}")
        if details and ("--list" in sys.argv or (not holds and len(details) <= 20)):
            print("\n".join(f"         {detail}" for detail in details))
    return 0 if all(holds for _, _, holds, _ in figures) else 1


def _share(name: str, part: list[str], whole: int, limit: float) -> tuple[str, str, bool, list[str]]:
    share = len(part) / max(1, whole)
    return f"{name} (at most {limit:.0%})", f"{len(part)} of {whole:,}, {share:.1%}", share <= limit, part


if __name__ == "__main__":
    sys.exit(main())
