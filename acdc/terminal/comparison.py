"""What a comparison of circuits, or of one with a reference, shows."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

from acdc.terminal.circuits import bases_tables, comparison_table, reference_table, roles_table
from graphs import Comparison, ReferenceComparison

if TYPE_CHECKING:
    from acdc.evidence.comparison import Compared

__all__ = ["compared_parts"]


def compared_parts(
    found: Compared, roles: Sequence[str] = (), *, list_edges: bool = False
) -> Iterator[Any]:
    """Yield how circuits compare, as tables.

    Parameters
    ----------
    found
        Two circuits, one and a reference, or several of different bases.
    roles
        Of a reference: only these; none given: all.
    list_edges
        Whether the edges in one and not in the other are listed.
    """
    own = found.found
    if isinstance(own, ReferenceComparison):
        yield from _with_reference(found, own, roles, list_edges)
    elif isinstance(own, Comparison):
        labels = (found.labels[0], found.labels[1])
        yield comparison_table(own, labels, found.chance)
        if list_edges:
            for label, names in zip(labels, (own.edges.only_a, own.edges.only_b), strict=True):
                yield f"only in {label}: " + (", ".join(names) or "nothing")
    else:
        yield from bases_tables(own, found.sizes, found.costs, found.labels, list_edges=list_edges)


def _with_reference(
    found: Compared, own: ReferenceComparison, roles: Sequence[str], list_edges: bool
) -> Iterator[Any]:
    assert found.reference is not None
    title = found.labels[0] + (" (of ANOTHER MODEL)" if found.is_other_model else "")
    yield reference_table(own, found.reference, title, found.chance)
    if found.reference.roles:
        yield roles_table(own, roles, found.chance)
    if found.match is not None:
        yield found.match.says
    for doubt in found.doubts:
        yield f"warning of the run: {doubt}"
    if list_edges:
        overlap, what = (own.nodes, "nodes") if own.edges is None else (own.edges, "edges")
        yield f"missed {what}: " + (", ".join(overlap.only_b) or "none")
        yield f"extra {what}: " + (", ".join(overlap.only_a) or "none")
