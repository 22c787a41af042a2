"""Write the reference: a page for every command and for every public name, made from the code.

::

    python docs/generate.py FOLDER

The pages of commands come from the parser that the command line runs, those of names from
``__all__`` of every module; ``conf.py`` writes both before Sphinx reads its sources.
"""

from __future__ import annotations

import importlib
import pkgutil
import re
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import typer

import acdc
import graphs
from acdc import cli
from acdc.cli.asked import MethodCommand, _method_params

_COMMAND_LINE = ("acdc.cli", "acdc.terminal", "acdc.__main__")
"""Packages that are the command line, which has pages of its own."""


def reference(folder: Path) -> None:
    """Write ``commands/`` and ``api/`` into a folder anew."""
    _write(folder / "commands", dict(_commands()))
    _write(folder / "api", dict(_api()))


def _write(folder: Path, pages: dict[str, str]) -> None:
    """Make a folder hold these pages; what is as it was keeps its time: builds are short."""
    folder.mkdir(parents=True, exist_ok=True)
    for page in folder.glob("*.md"):
        if page.stem not in pages:
            page.unlink()
    for name, text in pages.items():
        page = folder / f"{name}.md"
        if not page.exists() or page.read_text(encoding="utf-8") != text:
            page.write_text(text, encoding="utf-8")


def commands() -> dict[str, Any]:
    """Every command by its words, as ``bench accuracy``."""
    cli._add_plugins()
    return dict(_leaves(typer.main.get_command(cli.app), ()))


def _leaves(command: Any, words: tuple[str, ...]) -> Iterator[tuple[str, Any]]:
    inner = getattr(command, "commands", None)
    if inner is None:
        yield " ".join(words), command
        return
    for name, one in inner.items():
        yield from _leaves(one, (*words, name))


def _commands() -> Iterator[tuple[str, str]]:
    for words, command in commands().items():
        yield words.replace(" ", "-"), _command_page(words, command)


def _command_page(words: str, command: Any) -> str:
    about, _, example = (command.help or "").partition("Example:")
    parts = [f"# acdc {words}", about.strip(), ""]
    if example:
        parts += ["```sh", " ".join(example.split()), "```", ""]
    context = command.context_class(command, info_name=words)
    for title, params in panels(command).items():
        parts += [f"## {title}", "", *[_described(param, context) for param in params], ""]
    return "\n".join(parts)


def panels(command: Any) -> dict[str, list[Any]]:
    """Parameters of a command by the heading that its help puts them under."""
    params = list(command.params)
    if isinstance(command, MethodCommand):
        known = {flag for param in params for flag in (*param.opts, *param.secondary_opts)}
        params += _method_params(known)
    panels: dict[str, list[Any]] = {"Arguments": []}
    for param in params:
        if param.param_type_name == "argument":
            panels["Arguments"].append(param)
        elif not getattr(param, "hidden", False):
            panels.setdefault(getattr(param, "rich_help_panel", None) or "Options", []).append(
                param
            )
    return {title: params for title, params in panels.items() if params}


def _described(param: Any, context: Any) -> str:
    """One parameter as an item of a definition list: what its own help says of it."""
    names, said = param.get_help_record(context)
    said = re.sub(r"(?<![\w-])(--[a-z][a-z-]*)", r"`\1`", " ".join(said.split()))
    return f"`{names}`\n: {said}\n"


def public_names() -> dict[str, list[str]]:
    """Public names by the module that they are documented in: where they are defined.

    What ``acdc`` itself offers has pages of its own, and is in no other.
    """
    found: dict[str, list[str]] = {"acdc": list(acdc.__all__)}
    for package in (acdc, graphs):
        for module in pkgutil.walk_packages(package.__path__, f"{package.__name__}."):
            if module.name.startswith(_COMMAND_LINE):
                continue
            loaded = importlib.import_module(module.name)
            found[module.name] = [
                name
                for name in getattr(loaded, "__all__", [])
                if getattr(getattr(loaded, name), "__module__", module.name) == module.name
                and getattr(acdc, name, None) is not getattr(loaded, name)
            ]
    return found


def _api() -> Iterator[tuple[str, str]]:
    modules = public_names()
    for name in modules.pop("acdc"):
        directive = "autoclass" if isinstance(getattr(acdc, name), type) else "autofunction"
        members = "   :members:\n" if directive == "autoclass" else ""
        yield (
            f"acdc.{name}",
            f"# acdc.{name}\n\n" + _rst(f".. {directive}:: acdc.{name}\n{members}"),
        )
    rooms: dict[str, list[str]] = {}
    for module in sorted(modules):
        rooms.setdefault(".".join(module.split(".")[:2]), []).append(module)
    for room, inside in rooms.items():
        yield (
            room,
            "\n".join(
                [f"# {room}\n", *(_module(name, modules[name], name != room) for name in inside)]
            ),
        )


def _module(module: str, names: list[str], titled: bool) -> str:
    """One module: its docstring and its names."""
    lines = [f".. automodule:: {module}"]
    if names:
        lines += [f"   :members: {', '.join(names)}", "   :show-inheritance:"]
    title = f"## {module}\n\n" if titled else ""
    return title + _rst("\n".join(lines) + "\n")


def _rst(text: str) -> str:
    return f"```{{eval-rst}}\n{text}```\n"


if __name__ == "__main__":
    reference(Path(sys.argv[1]))
