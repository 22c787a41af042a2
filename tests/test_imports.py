"""The one direction of dependence: graphs <- acdc <- benchmarks, and no cycle anywhere."""

from __future__ import annotations

import ast
import importlib
import os
import subprocess
import sys
from collections import Counter
from pathlib import Path

import networkx as nx
import pytest

import graphs

ROOT = Path(graphs.__file__).parent.parent
FORBIDDEN = {
    "graphs": {"torch", "transformer_lens", "transformers", "acdc", "benchmarks", "tests"},
    "acdc": {"benchmarks", "tests"},
    "benchmarks": {"tests"},
}


def module_name(path: Path) -> str:
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def modules() -> dict[str, Path]:
    return {
        module_name(path): path
        for package in FORBIDDEN
        for path in sorted((ROOT / package).rglob("*.py"))
    }


def imports(path: Path, *, everywhere: bool) -> set[str]:
    """Names that a module imports, at its top level or anywhere."""
    tree = ast.parse(path.read_text())
    nodes = ast.walk(tree) if everywhere else iter(tree.body)
    found = set()
    for node in nodes:
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import; write the full name"
            found |= {f"{node.module}.{alias.name}" for alias in node.names}
    return found


@pytest.mark.parametrize("package", FORBIDDEN)
def test_no_import_against_the_direction(package):
    for name, path in modules().items():
        if name.split(".")[0] == package:
            tops = {imported.split(".")[0] for imported in imports(path, everywhere=True)}
            assert not tops & FORBIDDEN[package], name


def circles(known):
    """Modules that import each other, late imports and those for types alone counted."""
    arrows = nx.DiGraph()
    for name, path in known.items():
        own = f"{name}." if path.name == "__init__.py" else "no package"
        for imported in imports(path, everywhere=True):
            target = imported
            while target and target not in known:
                target = target.rpartition(".")[0]
            # A package whose __init__ re-exports its own modules is no circle of these.
            if target and target != name and not target.startswith(own):
                arrows.add_edge(name, target)
    return [sorted(part) for part in nx.strongly_connected_components(arrows) if len(part) > 1]


def test_no_import_circle():
    assert circles(modules()) == []


def test_a_late_import_makes_a_circle(tmp_path):
    first, second = tmp_path / "first.py", tmp_path / "second.py"
    first.write_text("import second\n")
    second.write_text("def late():\n    from first import thing\n    return thing\n")
    assert circles({"first": first, "second": second}) == [["first", "second"]]
    second.write_text("from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    import first\n")
    assert circles({"first": first, "second": second}) == [["first", "second"]]
    second.write_text("")
    assert circles({"first": first, "second": second}) == []


def test_graphs_brings_in_no_torch():
    code = (
        "import importlib, pkgutil, sys, graphs\n"
        "for module in pkgutil.walk_packages(graphs.__path__, 'graphs.'):\n"
        "    importlib.import_module(module.name)\n"
        "print(*sorted({name.split('.')[0] for name in sys.modules}))"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=ROOT
    )
    assert not set(done.stdout.split()) & FORBIDDEN["graphs"]


def test_a_public_name_of_graphs_means_one_thing():
    found = Counter(
        name
        for path in (ROOT / "graphs").glob("*.py")
        if path.stem != "__init__"
        for name in importlib.import_module(f"graphs.{path.stem}").__all__
    )
    assert [name for name, n in found.items() if n > 1] == []


def test_public_names_of_graphs():
    assert graphs.__all__ == sorted(graphs.__all__)
    modules_of = {path.stem for path in (ROOT / "graphs").glob("*.py")}
    public = {name for name in dir(graphs) if not name.startswith("_")}
    assert public - modules_of == set(graphs.__all__)
    for name in graphs.__all__:
        assert getattr(graphs, name).__doc__, name


@pytest.mark.parametrize("name", ["graphs", "benchmarks"])
@pytest.mark.parametrize("kind", ["{}.py", "{}/__init__.py"])
def test_a_users_file_that_hides_a_package_is_named(tmp_path, name, kind):
    hiding = tmp_path / kind.format(name)
    hiding.parent.mkdir(exist_ok=True)
    hiding.write_text("")
    (tmp_path / "script.py").write_text("import acdc\nprint('imported')\n")
    words = f"{str(hiding)!r} hides the package {name!r} that acdc needs: rename it, or run from"

    def run(*arguments):
        return subprocess.run(
            [sys.executable, *arguments],
            capture_output=True,
            text=True,
            check=False,
            cwd=tmp_path,
            env={**os.environ, "PYTHONPATH": str(ROOT)},
        )

    script = run("script.py")
    assert script.stderr.splitlines()[-1].startswith(f"ImportError: {words}")
    assert not script.stdout
    command = run("-m", "acdc", "list", "models")
    assert command.stderr.splitlines() == [f"acdc: {words} another folder"]
    assert command.returncode == 2


def test_files_of_other_names_hide_nothing(tmp_path):
    (tmp_path / "graph.py").write_text("")
    (tmp_path / "script.py").write_text("import acdc, graphs\nprint(graphs.__file__)\n")
    done = subprocess.run(
        [sys.executable, "script.py"],
        capture_output=True,
        text=True,
        check=True,
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
    )
    assert done.stdout.strip() == str(ROOT / "graphs" / "__init__.py")
