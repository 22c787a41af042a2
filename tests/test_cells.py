"""The table of methods, kinds of nodes and commands is what the commands do."""

from __future__ import annotations

import json
from pathlib import Path

import cells
import pytest

from acdc.methods import METHODS

COMMITTED: cells.Table = json.loads((cells.RESULTS / "cells.json").read_text())
QUICK = [("components", "acdc"), ("spans with latents", "eap"), ("neurons", "nap")]
"""One method for some kinds; the slow test has them all."""


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("cells")
    cells.prepare(folder)
    return folder


def test_the_table_has_every_cell() -> None:
    assert list(COMMITTED) == list(cells.KINDS)
    for methods in COMMITTED.values():
        assert set(methods) == set(METHODS)
        for marks in methods.values():
            assert tuple(marks) == cells.COMMANDS
            assert all(marks.values())


def test_the_page_is_that_of_the_table() -> None:
    assert (cells.RESULTS / "results.md").read_text() == cells.markdown(COMMITTED)


@pytest.mark.parametrize(("kind", "method"), QUICK)
def test_some_cells(kind: str, method: str, place: Path) -> None:
    assert dict(cells.cells(kind, method, place)) == COMMITTED[kind][method]


@pytest.mark.slow
@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("kind", cells.KINDS)
def test_every_cell(kind: str, method: str, place: Path) -> None:
    assert dict(cells.cells(kind, method, place)) == COMMITTED[kind][method]
