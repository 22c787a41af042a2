"""Shared by all tests: none but those marked online asks the Hugging Face hub for anything."""

import gc
import os

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # before torch is imported; see acdc.cli
if n_workers := os.environ.get("PYTEST_XDIST_WORKER_COUNT"):  # pytest -n: cores are shared out
    os.environ.setdefault("OMP_NUM_THREADS", str(max(1, (os.cpu_count() or 1) // int(n_workers))))

from pathlib import Path

import pytest
import quick
import shapes
from command_line import call, gpt2, place, shared

__all__ = ["call", "gpt2", "place", "shared"]

DATA = Path(__file__).parent / "data"


def pytest_configure(config: pytest.Config) -> None:
    """Close the hub before any test module imports transformers, unless ``-m online`` asks."""
    if config.getoption("markexpr") != "online":
        os.environ["HF_HUB_OFFLINE"] = "1"
    shapes.install()
    quick.install()


def pytest_collection_finish() -> None:
    """Look at no imported module again whenever garbage is collected: 7 % of the time."""
    gc.collect()
    gc.freeze()


@pytest.fixture(autouse=True)
def fast_low_precision(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let models of low precision be computed in it whatever the machine, as on a GPU."""
    monkeypatch.setattr("acdc.models.devices._FAST", {})


@pytest.fixture
def shipped(monkeypatch: pytest.MonkeyPatch) -> None:
    """Tasks run on the model that they run on for a user."""
    from acdc.tasks import TASKS

    monkeypatch.setattr(TASKS, "_things", dict(TASKS._things))
    quick.restore()


@pytest.fixture(scope="session")
def data() -> Path:
    """Return the folder of test data."""
    return DATA


@pytest.fixture(scope="session")
def stories() -> Path:
    """Return the folder of the stories260k model, which is not part of the repository."""
    beside = Path(__file__).parents[2] / "shared" / "stories260k"
    folder = Path(os.environ.get("ACDC_STORIES260K", beside))
    if not (folder / "config.json").is_file():
        pytest.skip("stories260k is not here: set ACDC_STORIES260K to its folder")
    return folder
