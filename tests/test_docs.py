"""What the README and ``docs/`` say is so: blocks run, commands parse, links lead somewhere."""

from __future__ import annotations

import importlib.util
import json
import re
import sys
import tomllib
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
from doc_blocks import DOCS, MADE, README, ROOT, Block, blocks, pages, prose

import acdc
from acdc import tasks
from acdc.cli import main
from acdc.engine.metrics import METRICS
from acdc.methods import METHODS
from acdc.runs import prompts

PAGES = pages()
BLOCKS = [block for page in PAGES for block in blocks(page)]
SHELL = [block for block in BLOCKS if block.language in ("sh", "bash")]
COMMANDED = [p for p in PAGES if any(b.page == p and "parsed" not in b.words for b in SHELL)]
NOTEBOOKS = [
    page for page in PAGES if page.read_text(encoding="utf-8").startswith("---\njupytext:")
]


def name(page: Path) -> str:
    return page.relative_to(ROOT).as_posix()


@pytest.fixture(scope="module")
def made() -> ModuleType:
    """``docs/generate.py``, which writes the pages of commands and names."""
    spec = importlib.util.spec_from_file_location("generate", DOCS / "generate.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def commands(made: ModuleType) -> dict[str, Any]:
    return made.commands()


# --- Python -------------------------------------------------------------------------------


@pytest.fixture
def few(monkeypatch: pytest.MonkeyPatch) -> None:
    """Built-in tasks draw few prompts unless a block asks for a number."""
    monkeypatch.setattr(tasks, "DEFAULT_N_PROMPTS", 8)
    monkeypatch.setattr(prompts, "DEFAULT_N_OTHERS", 8)


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """An empty folder to run a page in; what the page registers and imports is gone after it."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    for known in (METHODS, METRICS):
        assert len(known)  # filled
        monkeypatch.setattr(known, "_things", dict(known._things))
    before = set(sys.modules)
    yield tmp_path
    for module in set(sys.modules) - before:
        if str(tmp_path) in str(getattr(sys.modules[module], "__file__", None)):
            del sys.modules[module]


def write_files(page: Path, folder: Path) -> None:
    for block in blocks(page):
        if block.file is not None:
            (folder / block.file).write_text(block.text, encoding="utf-8")


@pytest.mark.usefixtures("few")
@pytest.mark.parametrize(
    "page",
    [p for p in PAGES if p != README and any(b.language == "python" for b in blocks(p))],
    ids=name,
)
def test_python_blocks_run_from_top_to_bottom(page: Path, here: Path) -> None:
    write_files(page, here)
    variables: dict[str, Any] = {}
    for block in blocks(page):
        if block.language == "python" and block.file is None:
            code = compile("\n" * block.line + block.text, str(page), "exec")
            if "parsed" not in block.words:
                exec(code, variables)


# --- the shell ----------------------------------------------------------------------------


def parsed(words: list[str], commands: dict[str, Any]) -> Any:
    """The command of some words, as the command line itself reads them."""
    n_words = 2 if words[1] == "bench" else 1
    command = commands[" ".join(words[1 : 1 + n_words])]
    return command.make_context(words[1], list(words[1 + n_words :]))


@pytest.mark.parametrize("block", SHELL, ids=lambda block: block.place)
def test_commands_of_blocks_parse(block: Block, commands: dict[str, Any]) -> None:
    for words in block.commands():
        if words[0] == "acdc":
            given = parsed(words, commands).params
            for option, names in (("method", METHODS), ("metric", METRICS)):
                named = given.get(option)  # of acdc study several
                assert named is None or set(named.split(",")) <= set(names)


@pytest.mark.parametrize("page", PAGES, ids=name)
def test_commands_and_options_named_in_the_text_exist(
    page: Path, commands: dict[str, Any], made: ModuleType
) -> None:
    known = {"--version", "--help", "--install-completion"}
    for command in commands.values():
        for params in made.panels(command).values():
            known |= {flag for param in params for flag in (*param.opts, *param.secondary_opts)}
    known |= {"--extra-index-url", "--to", "--benchmark-enable", "--dist", "--check", "--measure"}
    for code in re.findall(r"`([^`\n]+)`", prose(page)):
        for named in re.findall(r"^acdc ([a-z][a-z-]+)", code):
            assert named in {words.split()[0] for words in commands}, f"acdc {named}"
        if code.startswith(("acdc ", "--")):
            assert set(re.findall(r"(?<!\S)--[a-z][a-z-]+", code)) <= known, code


@pytest.mark.slow
@pytest.mark.usefixtures("shipped")
@pytest.mark.parametrize("page", [p for p in COMMANDED if p not in NOTEBOOKS], ids=name)
def test_commands_of_blocks_run_from_top_to_bottom(page: Path, here: Path) -> None:
    """Beside them stands ``runs/ioi``, unless they make it themselves."""
    write_files(page, here)
    asked = [w for b in blocks(page) if b in SHELL and "parsed" not in b.words
             for w in b.commands() if w[0] == "acdc"]  # fmt: skip
    if not any(words[1] == "discover" and "runs/ioi" in words for words in asked):
        asked.insert(0, ["acdc", "discover", "ioi", "--method", "eap-ig", "--out", "runs/ioi"])
    for words in asked:
        with pytest.raises(SystemExit) as stop:
            main(words[1:])
        assert stop.value.code == 0, " ".join(words)


@pytest.mark.slow
@pytest.mark.parametrize("page", NOTEBOOKS, ids=name)
def test_notebooks_run_in_a_kernel(page: Path, here: Path) -> None:
    """As Jupyter opens and runs them, on the model that comes with the package."""
    jupytext, nbclient = pytest.importorskip("jupytext"), pytest.importorskip("nbclient")
    notebook = jupytext.read(page)
    assert sum(cell.cell_type == "code" for cell in notebook.cells) >= 5
    where = {"metadata": {"path": str(here)}}
    nbclient.NotebookClient(notebook, timeout=1800, resources=where).execute()


# --- what else there is -------------------------------------------------------------------


def test_every_block_has_a_language_that_is_checked() -> None:
    for block in BLOCKS:
        known = ("python", "sh", "bash", "text", "json", "toml")
        assert block.language in known or block.language.startswith("{"), block.place
        if block.language == "json":
            for line in block.text.splitlines():
                json.loads(line)
        if block.language == "toml":
            tomllib.loads(block.text)


@pytest.mark.parametrize("page", PAGES, ids=name)
def test_links_to_files_lead_somewhere(page: Path) -> None:
    for target in re.findall(r"\]\(([^)\s]+)\)", prose(page)):
        if not target.startswith(("http", "#")):
            assert (page.parent / target.partition("#")[0]).exists(), target


def test_every_page_is_reached_from_the_readme() -> None:
    """What no toctree holds is found by Sphinx; the README leads to each part."""
    text = README.read_text(encoding="utf-8")
    for part in ("tutorial", "howto/index", "reference/index", "gallery", "notebooks/index"):
        assert f"docs/{part}.md" in text
    assert "](docs/explanation/" in text


def test_the_readme_is_one_page_with_a_picture() -> None:
    text = README.read_text(encoding="utf-8")
    assert len(text.split()) < 1000
    (picture,) = re.findall(r'src="(docs/pictures/[a-z-]+\.svg)"', text)
    assert (ROOT / picture).stat().st_size < 200_000


def test_every_public_name_and_every_command_has_its_place(
    made: ModuleType, commands: dict[str, Any], tmp_path: Path
) -> None:
    made.reference(tmp_path)
    api = {page.stem: page.read_text() for page in (tmp_path / "api").iterdir()}
    assert {f"acdc.{public}" for public in acdc.__all__} <= api.keys()
    listed = "\n".join(api.values())
    for module, names in made.public_names().items():
        if module != "acdc" and names:
            assert f".. automodule:: {module}\n   :members: {', '.join(names)}\n" in listed
    pages = {page.stem: page.read_text() for page in (tmp_path / "commands").iterdir()}
    assert pages.keys() == {words.replace(" ", "-") for words in commands}
    for flag in ("--threshold", "--sparsity", "--out"):  # a setting, a method's, the command's
        assert f"`{flag}" in pages["discover"]
    for one in commands:
        assert f"`acdc {one.split()[0]}" in (DOCS / "reference" / "commands.md").read_text()


def test_every_public_name_is_documented_once(made: ModuleType) -> None:
    """A name that a package offers is on the page of the module that it is defined in."""
    by_name = made.public_names()
    everything = [id(getattr(sys.modules[m], n)) for m, names in by_name.items() for n in names
                  if isinstance(getattr(sys.modules[m], n), type)]  # fmt: skip
    assert len(everything) == len(set(everything))


def test_pages_that_are_made_are_no_part_of_the_repository() -> None:
    ignored = (ROOT / ".gitignore").read_text().split()
    assert all(f"{folder.relative_to(ROOT).as_posix()}/" in ignored for folder in MADE)
