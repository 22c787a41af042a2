"""Find circuits in transformers: exact ACDC, edge attribution, evaluation and diagrams.

>>> import acdc
>>> run = acdc.discover("ioi", method="eap-ig")  # doctest: +SKIP
>>> print(run.circuit.n_edges, run.faithfulness)  # doctest: +SKIP
"""

from __future__ import annotations

import importlib
import importlib.util
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from acdc.dictionaries.sources import load_dictionaries
    from acdc.engine.experiment import Experiment
    from acdc.evidence.assessment import evaluate
    from acdc.evidence.circuit_model import export_model
    from acdc.evidence.comparison import compare
    from acdc.evidence.conditions import conditions
    from acdc.evidence.development import develop
    from acdc.evidence.directions import discover_both
    from acdc.evidence.doses import dose
    from acdc.evidence.frontier import sweep
    from acdc.evidence.groups import groups
    from acdc.evidence.heads import heads
    from acdc.evidence.interactions import interactions
    from acdc.evidence.matching import match
    from acdc.evidence.references import load_reference
    from acdc.evidence.self_repair import self_repair
    from acdc.evidence.sharing import shared
    from acdc.evidence.stability import stability
    from acdc.evidence.study import study
    from acdc.evidence.what_if import what_if
    from acdc.models import load_model
    from acdc.pages.report import report
    from acdc.runs.circuits import load_circuit
    from acdc.runs.discover import discover
    from acdc.runs.folder import Run, load_run
    from acdc.settings import Settings
    from acdc.tasks import load_task
    from acdc.terminal.notebook import as_html, progress, show

_HOMES = {
    "Experiment": "acdc.engine.experiment",
    "Run": "acdc.runs.folder",
    "Settings": "acdc.settings",
    "as_html": "acdc.terminal.notebook",
    "compare": "acdc.evidence.comparison",
    "conditions": "acdc.evidence.conditions",
    "develop": "acdc.evidence.development",
    "discover": "acdc.runs.discover",
    "discover_both": "acdc.evidence.directions",
    "dose": "acdc.evidence.doses",
    "evaluate": "acdc.evidence.assessment",
    "export_model": "acdc.evidence.circuit_model",
    "groups": "acdc.evidence.groups",
    "heads": "acdc.evidence.heads",
    "interactions": "acdc.evidence.interactions",
    "load_circuit": "acdc.runs.circuits",
    "load_dictionaries": "acdc.dictionaries.sources",
    "load_model": "acdc.models",
    "load_reference": "acdc.evidence.references",
    "load_run": "acdc.runs.folder",
    "load_task": "acdc.tasks",
    "match": "acdc.evidence.matching",
    "progress": "acdc.terminal.notebook",
    "report": "acdc.pages.report",
    "self_repair": "acdc.evidence.self_repair",
    "shared": "acdc.evidence.sharing",
    "show": "acdc.terminal.notebook",
    "stability": "acdc.evidence.stability",
    "study": "acdc.evidence.study",
    "sweep": "acdc.evidence.frontier",
    "what_if": "acdc.evidence.what_if",
}

__all__ = [
    "Experiment",
    "Run",
    "Settings",
    "as_html",
    "compare",
    "conditions",
    "develop",
    "discover",
    "discover_both",
    "dose",
    "evaluate",
    "export_model",
    "groups",
    "heads",
    "interactions",
    "load_circuit",
    "load_dictionaries",
    "load_model",
    "load_reference",
    "load_run",
    "load_task",
    "match",
    "progress",
    "report",
    "self_repair",
    "shared",
    "show",
    "stability",
    "study",
    "sweep",
    "what_if",
]


def _hidden() -> str | None:
    """Say which file or folder hides a package of ours: beside a script Python finds it first."""
    home = Path(__file__).resolve().parents[1]
    for name in ("graphs", "benchmarks"):
        found = importlib.util.find_spec(name)
        if found is None:  # its own import says so
            continue
        places = [found.origin] if found.origin else list(found.submodule_search_locations or ())
        for place in map(Path, places):
            if home not in place.resolve().parents:
                return (
                    f"{str(place)!r} hides the package {name!r} that acdc needs: rename it, or run "
                    "from another folder"
                )
    return None


_why = _hidden()
if _why is not None:
    if Path(sys.argv[0]).stem in ("-m", "acdc"):  # the command line: one line, no traceback
        print(f"acdc: {_why}", file=sys.stderr)
        raise SystemExit(2)
    raise ImportError(_why)


def __getattr__(name: str) -> Any:
    """Import public names when they are first used: torch takes seconds."""
    if name not in _HOMES:
        raise AttributeError(f"module 'acdc' has no attribute {name!r}")
    return getattr(importlib.import_module(_HOMES[name]), name)


def __dir__() -> list[str]:
    """Public names."""
    return __all__
