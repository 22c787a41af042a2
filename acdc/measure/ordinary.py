"""Loss on ordinary text: what a model loses beside a task."""

from __future__ import annotations

import ast
import sysconfig
import warnings
from collections.abc import Sequence
from pathlib import Path

import torch

from acdc.models.lowering import LoweredModel

__all__ = ["docstrings", "text_loss"]

_CHUNK = 256
_TOGETHER = 8
_MOST_CHARACTERS = 200_000


def docstrings(most: int = _MOST_CHARACTERS) -> str:
    """Return docstrings of Python's standard library, as much as is asked for.

    The text is that of the Python that runs; the bundled model has been trained on such text.

    Parameters
    ----------
    most
        Characters.
    """
    found: list[str] = []
    size = 0
    for path in sorted(Path(sysconfig.get_paths()["stdlib"]).glob("*.py")):
        for text in _docstrings(path):
            found.append(text)
            size += len(text) + 2
            if size >= most:
                return "\n\n".join(found)[:most]
    return "\n\n".join(found)


def _docstrings(path: Path) -> list[str]:
    with warnings.catch_warnings():  # of old escapes in a file that is not ours
        warnings.simplefilter("ignore")
        tree = ast.parse(path.read_bytes())
    kinds = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
    texts = (ast.get_docstring(node) for node in ast.walk(tree) if isinstance(node, kinds))
    return [text for text in texts if text]


@torch.no_grad()
def text_loss(model: LoweredModel, tokens: Sequence[int], first: Sequence[int] = ()) -> float:
    """Mean negative log probability of the tokens of a text, nats.

    The text is read in pieces of at most 256 tokens, each for itself; of each piece all tokens but
    the first are predicted.

    Parameters
    ----------
    model
        That reads in one direction.
    tokens
        Ids.
    first
        What each piece begins with, as a token that says so.
    """
    size = min(_CHUNK, model.n_ctx) - len(first)
    pieces = [[*first, *tokens[i : i + size]] for i in range(0, len(tokens), size)]
    by_length: dict[int, list[list[int]]] = {}
    for piece in pieces:
        by_length.setdefault(len(piece), []).append(piece)
    total, n = 0.0, 0
    for length, some in by_length.items():
        if length < 2:
            continue
        for part in torch.tensor(some, device=model.device).split(_TOGETHER):
            logits = model.unembed(model.forward(part).at(("final", 0))[:, :-1])
            log = torch.log_softmax(logits.float(), -1)
            total -= float(log.gather(-1, part[:, 1:, None]).double().sum())
            n += part[:, 1:].numel()
    return total / n
