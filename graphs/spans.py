"""Spans: the parts of a prompt by which nodes and edges are split.

A span is a token position (``p5``) or the labelled tokens of a templated task (``IO``, ``END``).
Every position of a prompt belongs to exactly one span.  Names carry the span behind ``@``:
``a3.h7@END``, ``a3.h7<k>@IO``, ``a0.h1@S2->a7.h3<k>@S2``.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from graphs.errors import GraphError, did_you_mean

__all__ = [
    "Reaches",
    "check_span_name",
    "check_spans",
    "reach_matrix",
    "span_name",
    "spans_from_config",
    "spans_to_config",
    "split_span",
]

Reaches = tuple[tuple[int, int], ...]
"""Pairs ``(s, t)`` of span indices: in some prompt a position of s can be read at one of t."""

_NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_+-]*")
_KEYS = ("spans", "scored_spans", "reaches")
_MOST_SPANS = 10_000


def span_name(name: str, span: str) -> str:
    """Return the name of a sender or receiver in a span.

    Examples
    --------
    >>> span_name("a3.h7<k>", "IO")
    'a3.h7<k>@IO'
    """
    return f"{name}@{span}"


def split_span(name: str) -> tuple[str, str]:
    """Return a name without its span, and the span; empty where it has none.

    Examples
    --------
    >>> split_span("a3.h7<k>@IO"), split_span("m3")
    (('a3.h7<k>', 'IO'), ('m3', ''))
    """
    component, _, span = name.partition("@")
    return component, span


def check_span_name(name: str) -> None:
    """Raise GraphError for a name that cannot be part of a node's name."""
    if not _NAME.fullmatch(name):
        raise GraphError(
            f"span {name!r}: expected a name of letters, digits, '_', '+' and '-', as S1 or S1+1"
        )


def check_spans(
    spans: tuple[str, ...], scored: tuple[str, ...], reaches: Reaches | None
) -> tuple[tuple[str, ...], Reaches | None]:
    """Check the spans of a shape.

    Returns
    -------
    scored, reaches
        In the order of ``spans``; ``reaches`` is None where it says no more than that order.

    Raises
    ------
    GraphError
        If a name is unusable, unknown or comes twice, no span is scored, or a pair is none of
        two spans.
    """
    if not spans:
        if scored or reaches:
            raise GraphError("scored_spans and reaches are of spans: name the spans, or leave out")
        return (), None
    if len(spans) > _MOST_SPANS:
        raise GraphError(f"{len(spans):,} spans: expected at most {_MOST_SPANS:,}")
    for names in (spans, scored):
        for name in names:
            check_span_name(name)
        if len(set(names)) != len(names):
            twice, _ = Counter(names).most_common(1)[0]
            raise GraphError(f"span {twice!r} is listed twice")
    known = set(spans)
    for name in scored:
        if name not in known:
            raise GraphError(f"scored span {name!r} is no span; {did_you_mean(name, spans)}")
    if not scored:
        raise GraphError("no span is scored: name those in which logits are read")
    read = set(scored)
    return tuple(name for name in spans if name in read), _checked_reaches(len(spans), reaches)


def _checked_reaches(n_spans: int, reaches: Reaches | None) -> Reaches | None:
    if reaches is None:
        return None
    for pair in reaches:
        if len(pair) != 2 or not all(type(i) is int and 0 <= i < n_spans for i in pair):
            raise GraphError(
                f"reaches has {pair!r}: expected pairs of span indices, 0 to {n_spans - 1}"
            )
    given = set(reaches) | {(s, s) for s in range(n_spans)}
    in_order = len(given) == n_spans * (n_spans + 1) // 2 and all(s <= t for s, t in given)
    return None if in_order else tuple(sorted(given))


def reach_matrix(n_spans: int, reaches: Reaches | None) -> NDArray[np.bool_]:
    """``[from, to]``: whether keys and values of a span can be read in another one.

    Without ``reaches`` spans follow each other: each is read in itself and all later ones.
    """
    if reaches is None:
        return np.triu(np.ones((n_spans, n_spans), dtype=bool))
    matrix = np.zeros((n_spans, n_spans), dtype=bool)
    matrix[tuple(np.array(reaches).T)] = True
    return matrix


def spans_to_config(
    spans: Sequence[str], scored: Sequence[str], reaches: Reaches | None
) -> dict[str, Any]:
    """Return the keys of a circuit file's ``cfg`` for spans; none where there are no spans.

    Each value is one word, so that it is the same in files whose attributes are texts.

    Examples
    --------
    >>> spans_to_config(("S1", "IO", "END"), ("END",), ((0, 0), (0, 2), (1, 1), (1, 2), (2, 2)))
    {'spans': 'S1,IO,END', 'scored_spans': 'END', 'reaches': '0:0,2;1:1,2;2:2'}
    """
    if not spans:
        return {}
    config = {"spans": ",".join(spans), "scored_spans": ",".join(scored)}
    if reaches is not None:
        rows = {s: [t for first, t in reaches if first == s] for s, _ in reaches}
        config["reaches"] = ";".join(f"{s}:{','.join(map(str, row))}" for s, row in rows.items())
    return config


def spans_from_config(
    cfg: Mapping[str, Any],
) -> tuple[tuple[str, ...], tuple[str, ...], Reaches | None]:
    """Read what :func:`spans_to_config` wrote: spans, scored spans and reaches.

    Raises
    ------
    GraphError
        If a value is something else; the message names the key.
    """
    for key in _KEYS:
        if not isinstance(cfg.get(key, ""), str):
            raise GraphError(f"circuit cfg has {key}={str(cfg[key])[:60]!r}: expected one word")
    spans, scored = (_words(cfg.get(key, "")) for key in ("spans", "scored_spans"))
    return spans, scored, _reaches_from_word(cfg["reaches"]) if "reaches" in cfg else None


def _words(text: str) -> tuple[str, ...]:
    return tuple(text.split(",")) if text else ()


def _reaches_from_word(text: str) -> Reaches:
    pairs = []
    for row in text.split(";"):
        if not re.fullmatch(r"[0-9]{1,9}:[0-9]{1,9}(,[0-9]{1,9})*", row):
            raise GraphError(
                f"circuit cfg has reaches {row[:60]!r}: expected span:spans, as 0:0,2,3"
            )
        first, _, targets = row.partition(":")
        pairs += [(int(first), int(target)) for target in targets.split(",")]
    return tuple(pairs)
