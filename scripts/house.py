#!/usr/bin/env python3
"""Count what the house is like, and what a change costs.

Run in the project's root::

    python scripts/house.py            loose files, import circles, long functions and files, lines
    python scripts/house.py --since X  product files and places that differ from the commit X

A place is a run of changed lines.  What adding a method, a metric or a command costs is counted by
adding one on a throw-away branch.
"""

from __future__ import annotations

import argparse
import ast
import subprocess
from pathlib import Path

import networkx as nx

TOPS = ("acdc", "graphs", "benchmarks")
LONG_FUNCTION, LONG_FILE = 60, 500


def modules(root: Path) -> dict[str, Path]:
    """Modules of the product by dotted name."""
    found = {}
    for top in TOPS:
        for path in sorted((root / top).rglob("*.py")):
            name = ".".join(path.relative_to(root).with_suffix("").parts)
            found[name.removesuffix(".__init__")] = path
    return found


def imports(name: str, tree: ast.AST, known: dict[str, Path]) -> set[str]:
    """Modules of ours that a module imports anywhere, inside functions too.

    A package whose ``__init__`` offers names of its own modules does not import them in this sense.
    """
    found: set[str] = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            inner = {f"{node.module}.{alias.name}" for alias in node.names}
            found |= (inner & known.keys()) or {node.module}
    own = known[name].name == "__init__.py"
    return {x for x in found & known.keys() if x != name and not (own and x.startswith(name + "."))}


def circles(known: dict[str, Path], trees: dict[str, ast.AST]) -> list[list[str]]:
    """Sets of modules that import each other in a circle, late imports counted."""
    arrows = nx.DiGraph(
        [(name, other) for name in known for other in imports(name, trees[name], known)]
    )
    return [sorted(part) for part in nx.strongly_connected_components(arrows) if len(part) > 1]


def loose_files(root: Path) -> list[str]:
    """Files beside the packages in ``acdc/``."""
    return sorted(p.name for p in (root / "acdc").glob("*.py") if not p.name.startswith("__"))


def describe(root: Path) -> None:
    """Print the counts."""
    known = modules(root)
    trees: dict[str, ast.AST] = {
        name: ast.parse(path.read_text(encoding="utf-8")) for name, path in known.items()
    }
    loose = loose_files(root)
    print(f"{len(loose)} loose files in acdc/: {', '.join(loose)}")
    tied = circles(known, trees)
    print(f"{len(tied)} import circles, late imports counted")
    for part in tied:
        print(f"  {len(part)} files: {', '.join(part)}")
    functions = [
        ((node.end_lineno or 0) - node.lineno + 1, f"{name}:{node.name}")
        for name, tree in trees.items()
        for node in ast.walk(tree)
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)
    ]
    long = sorted((one for one in functions if one[0] > LONG_FUNCTION), reverse=True)
    print(f"{len(long)} of {len(functions)} functions over {LONG_FUNCTION} lines")
    for length, where in long:
        print(f"  {length} {where}")
    sizes = {
        name: len(path.read_text(encoding="utf-8").splitlines()) for name, path in known.items()
    }
    for name, size in sorted(sizes.items(), key=lambda one: -one[1]):
        if size > LONG_FILE:
            print(f"  {size} lines: {name}")
    silenced = sum(p.read_text(encoding="utf-8").count("# type: ignore") for p in known.values())
    print(f"{sum(sizes.values()):,} lines in {len(sizes)} files, {silenced} silenced type errors")


def cost(since: str) -> None:
    """Print which product files differ from a commit, and in how many places."""
    command = ["git", "diff", "--unified=0", since, "--", *TOPS]
    text = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    places: dict[str, int] = {}
    for line in text.splitlines():
        if line.startswith("diff --git"):
            name = line.rpartition(" b/")[2]
        elif line.startswith("@@"):
            places[name] = places.get(name, 0) + 1
    print(f"{len(places)} files, {sum(places.values())} places")
    for name, count in places.items():
        print(f"  {count} in {name}")


def main() -> None:
    """Read the arguments and count."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--since", help="a commit: what differs from it")
    since = parser.parse_args().since
    if since is None:
        describe(Path.cwd())
    else:
        cost(since)


if __name__ == "__main__":
    main()
