"""Published circuits in the models they were found in, beside the figures of the ACDC paper.

``pytest -m online`` fetches GPT-2 small and a 4-layer attention-only model from the Hugging Face
hub.  Where it is out of reach, give folders: ``ACDC_GPT2`` (Hugging Face layout) and
``ACDC_ATTN_ONLY_4L`` (``config.json`` and weights in HookedTransformer layout, with
``tokenizer.json``).  A GPU is used if there is one.

``pytest -m slow tests/test_online.py`` runs the same code on random weights of these shapes.
"""

from __future__ import annotations

import json
import os
import shutil
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from command_line import save_gpt2

from acdc.evidence.references import load_reference
from acdc.measure.evaluation import Evaluator
from acdc.methods.eap import Integration, eap_ig
from acdc.methods.sweep import sweep
from acdc.models.lowering.weights import expected_shapes
from acdc.runs.building import build_experiment
from acdc.settings import Settings
from graphs.known.roc import auroc, average_precision, sweep_roc

N_PROMPTS = 50
FRACTIONS = tuple(float(x) for x in np.geomspace(0.3, 3e-5, 17))
"""Thresholds, as shares of what the metric loses without any edge."""

GPT2, ATTN_ONLY = "gpt2", "NeelNanda/Attn_Only_4L512W_C4_Code"
FOLDERS = {GPT2: "ACDC_GPT2", ATTN_ONLY: "ACDC_ATTN_ONLY_4L"}


@dataclass(frozen=True)
class Case:
    """A published circuit, and what ACDC's paper reports for it (edge AUROC, corrupted runs)."""

    task: str
    model: str
    metric: str
    paper: float | None
    prepend_bos: bool = False

    @property
    def name(self) -> str:
        return f"{self.task}, {self.metric}"


CASES = (
    Case("ioi", GPT2, "kl", 0.868),
    Case("greater-than", GPT2, "kl", 0.883),
    Case("docstring", ATTN_ONLY, "kl", None, prepend_bos=True),
    Case("docstring", ATTN_ONLY, "logit_diff", 0.972, prepend_bos=True),
)
"""The paper's docstring metric takes the largest wrong logit, ``logit_diff`` their mean."""


@dataclass(frozen=True)
class Measured:
    """Scores of the edges that were found, against the reference's."""

    acdc: float
    eap_ig: float
    eap_ig_precision: float
    n_edges: tuple[int, ...]


def measure(case: Case, folder: str, n_prompts: int, fractions: tuple[float, ...]) -> Measured:
    """Run ACDC over thresholds, and EAP-IG, and score both against the published circuit."""
    reference = load_reference(case.task)
    ablation = reference.ablation
    experiment = build_experiment(
        Settings(
            case.task,
            model=folder,
            metric=case.metric,
            n_prompts=n_prompts,
            prepend_bos=case.prepend_bos,
            intervention=str(ablation.intervention),
            direction=str(ablation.direction),
            device="cuda" if torch.cuda.is_available() else "cpu",
        )
    )
    assert experiment.graph.shape == reference.graph.shape
    truth = reference.mask()
    evaluator = Evaluator(experiment)
    gap = abs(evaluator.full - evaluator.empty)
    circuits, _ = sweep(experiment, [fraction * gap for fraction in fractions])
    masks = [circuit.in_circuit for circuit in circuits.values()]
    scores = np.abs(eap_ig(experiment, Integration(5)))
    return Measured(
        acdc=sweep_roc(truth, masks).area,
        eap_ig=auroc(truth, scores),
        eap_ig_precision=average_precision(truth, scores),
        n_edges=tuple(int(mask.sum()) for mask in masks),
    )


def line(case: Case, found: Measured) -> str:
    paper = "-" if case.paper is None else f"{case.paper:.3f}"
    sizes = f"{min(found.n_edges):,} to {max(found.n_edges):,} edges"
    return (
        f"{case.name:<24} edge AUROC: acdc {found.acdc:.3f} (paper {paper}), "
        f"eap-ig {found.eap_ig:.3f} (average precision {found.eap_ig_precision:.3f}); {sizes}"
    )


def folder_or_skip(model: str) -> str:
    """Return the local folder that the environment names, or the name if the hub answers."""
    variable = FOLDERS[model]
    if variable in os.environ:
        folder = Path(os.environ[variable])
        if not (folder / "config.json").is_file():
            pytest.fail(f"{variable} is {str(folder)!r}: no config.json there")
        return str(folder)
    if reason := why_not_on_hub(model):
        pytest.skip(f"{model}: hub out of reach ({reason}); set {variable} to a local folder")
    return model


@cache
def why_not_on_hub(model: str) -> str | None:
    """Ask the hub, or its cache here, for a small file of the model: it tries for half a minute."""
    from huggingface_hub import hf_hub_download

    try:
        hf_hub_download(model, "config.json", etag_timeout=5)
    except OSError as error:
        return str(error).split("\n")[0]
    return None


@pytest.mark.online
@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_published_circuits(case: Case, capsys: pytest.CaptureFixture[str]) -> None:
    found = measure(case, folder_or_skip(case.model), N_PROMPTS, FRACTIONS)
    with capsys.disabled():
        print("\n" + line(case, found))
    assert found.acdc >= (case.paper or 0.9) - 0.1
    assert found.eap_ig >= 0.7


# --- the same code without the hub --------------------------------------------------------


@pytest.fixture(scope="module")
def random_models(tmp_path_factory: pytest.TempPathFactory, data: Path) -> dict[str, Path]:
    """Random weights in the layouts of the two models: as many layers and heads, far narrower."""
    place = tmp_path_factory.mktemp("online")
    folders = {
        GPT2: save_gpt2(place / "gpt2", data, layers=12, width=48, heads=12),
        ATTN_ONLY: save_attn_only(place / "attn", data),
    }
    return folders


def save_attn_only(folder: Path, data: Path) -> Path:
    from safetensors.torch import save_file
    from transformer_lens.config import TransformerBridgeConfig

    config: dict[str, Any] = {
        "n_layers": 4, "n_heads": 8, "d_model": 32, "d_head": 4, "n_ctx": 128, "d_vocab": 50257,
        "act_fn": "gelu", "attn_only": True, "normalization_type": "LN", "gated_mlp": False,
    }  # fmt: skip
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(config))
    for path in (data / "gpt2-tokenizer").glob("tokenizer*"):
        shutil.copy(path, folder)
    generator = torch.Generator().manual_seed(0)
    shapes = expected_shapes(TransformerBridgeConfig(**config))
    weights = {name: torch.randn(shape, generator=generator) / 4 for name, shape in shapes.items()}
    save_file(weights, folder / "model.safetensors")
    return folder


@pytest.mark.slow
@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_the_code_path_on_random_weights(case: Case, random_models: dict[str, Path]) -> None:
    found = measure(case, str(random_models[case.model]), n_prompts=2, fractions=(0.1, 0.01))
    assert 0 <= found.acdc <= 1
    assert 0.2 < found.eap_ig < 0.8  # random weights know nothing of the circuit
    assert found.n_edges[0] <= found.n_edges[1]
    assert found.n_edges[1] > 0
    assert f"{found.acdc:.3f}" in line(case, found)
    assert ("0.868" in line(case, found)) == (case.task == "ioi")


def test_skipped_with_a_reason_where_the_hub_is_out_of_reach(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.delenv("ACDC_GPT2", raising=False)
    with pytest.raises(pytest.skip.Exception, match=r"gpt2: hub out of reach .* set ACDC_GPT2 to"):
        folder_or_skip(GPT2)
    monkeypatch.setenv("ACDC_GPT2", str(tmp_path))
    with pytest.raises(pytest.fail.Exception, match=r"ACDC_GPT2 is .*: no config\.json there"):
        folder_or_skip(GPT2)
    (tmp_path / "config.json").touch()
    assert folder_or_skip(GPT2) == str(tmp_path)
