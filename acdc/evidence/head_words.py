"""What is found of a head, in words: for the terminal and for pages."""

from __future__ import annotations

from collections.abc import Sequence

from acdc.evidence.head_reasons import Cell, HeadReasons, Part

__all__ = ["head_words"]

_N_PAIRS, _N_PARTS, _N_TARGETS, _N_COMPOSED = 4, 3, 4, 5
_LEAST_DISTANCE_SHARE, _LEAST_DIRECT = 0.7, 0.005
_SPLIT = {
    "position": "positions alone",
    "query content": "the query's tokens",
    "key content": "the key's tokens",
    "match": "tokens of both sides",
}


def head_words(one: HeadReasons, metric: str, value: float) -> list[tuple[str, str]]:
    """Return what is said of a head: a heading and a text each.

    Parameters
    ----------
    one
        The head.
    metric, value
        What direct effects are on, and its mean on the clean prompts.
    """
    rows = [("role", ", ".join(one.roles))] if one.roles else []
    rows.append(("attends", _attends(one.cells)))
    rows.append(("because", _because(one)))
    if one.split:
        rows.append(("depends on", _split(one)))
    if one.composition:
        named = (
            f"{x.kind}-composition with {x.sender} ({x.share:.0%})"
            for x in one.composition[:_N_COMPOSED]
        )
        rows.append(("composes", ", ".join(named) + _more(len(one.composition) - _N_COMPOSED)))
    rows.append(("value reads", _shares(one.value)))
    rows.append(("logits", _logits(one, metric, value)))
    if one.onward:
        targets = "; ".join(
            f"{x.receiver} {x.share:.0%} (of {_names(x.by)})" for x in one.onward[:_N_TARGETS]
        )
        rows.append(("read by", targets + _more(len(one.onward) - _N_TARGETS)))
    return rows


def _more(n: int) -> str:
    return f"; {n} more" if n > 0 else ""


def _attends(cells: Sequence[Cell]) -> str:
    """By query place, in the order of the first of each."""
    found = []
    for query in dict.fromkeys(cell.query for cell in cells):
        own = [cell for cell in cells if cell.query == query]
        effect = own[0].importance
        where = f" ({effect:.0%} of its effect)" if effect is not None else ""
        keys = ", ".join(f"{cell.key} {cell.weight:.2f} (even {cell.uniform:.2f})" for cell in own)
        found.append(f"from {query}{where} to {keys}")
    return "; ".join(found)


def _because(one: HeadReasons) -> str:
    at = f"at {one.at.query} → {one.at.key}{_distance(one)} the score is {one.contrast:+.2f}"
    at += " against the mean key"
    if one.pairs and one.pairs[0].share is None:
        return f"{at}: next to even, nothing to explain"
    pairs = ", ".join(f"{x.query} × {x.key} {x.contrast:+.2f}" for x in one.pairs[:_N_PAIRS])
    return f"{at}: {pairs} (query × key)"


def _distance(one: HeadReasons) -> str:
    """Between queries and keys, where it is nearly always the same."""
    if one.distance_share < _LEAST_DISTANCE_SHARE:
        return ""
    apart = {0: "the token itself", 1: "one token apart"}.get(
        one.distance, f"{one.distance} tokens apart"
    )
    return f" ({apart}: {one.distance_share:.0%})"


def _split(one: HeadReasons) -> str:
    ranked = sorted(one.split.items(), key=lambda item: -abs(item[1]))
    return ", ".join(f"{_SPLIT[name]} {share:.0%}" for name, share in ranked)


def _shares(parts: Sequence[Part]) -> str:
    shown = [f"{x.name} {x.share:.0%}" for x in parts[:_N_PARTS] if x.share is not None]
    return ", ".join(shown) or "nothing: it writes nothing there"


def _names(parts: Sequence[Part]) -> str:
    return ", ".join(x.name for x in parts[:2])


def _logits(one: HeadReasons, metric: str, value: float) -> str:
    if abs(one.logits) < _LEAST_DIRECT * abs(value):
        return f"next to nothing directly on {metric}"
    share = f", {one.logits / abs(value):.0%} of {value:.3g}" if abs(value) > 0 else ""
    by = ", ".join(f"{x.name} {x.value:+.2f}" for x in one.logits_by[:_N_PARTS])
    return f"{one.logits:+.3g} directly on {metric}{share}" + (f": {by}" if by else "")
