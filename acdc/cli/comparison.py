"""``acdc compare``: circuits, over one basis or several, or one and a reference."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from acdc.cli import options as opt
from acdc.cli.inputs import check_file

if TYPE_CHECKING:
    from acdc.evidence.comparison import Compared

__all__ = ["compare"]


def compare(
    circuits: Annotated[
        list[Path],
        typer.Argument(help="Folders of runs, or circuit files: two or more, or --reference."),
    ],
    reference: Annotated[
        str | None,
        typer.Option("--reference", help="Reference circuit: name (acdc list references) or file."),
    ] = None,
    role: Annotated[
        list[str] | None,
        typer.Option("--role", help="Show the nodes of this role of the reference (repeatable)."),
    ] = None,
    out: Annotated[
        Path | None, typer.Option("--out", help="Picture of both (.svg, .png, .pdf or .dot).")
    ] = None,
    list_edges: Annotated[
        bool, typer.Option("--list/--no-list", help="List the edges in one and not the other.")
    ] = True,
    faithfulness: Annotated[
        float,
        typer.Option(
            "--faithfulness", help="Runs over different bases: sizes at this faithfulness."
        ),
    ] = 0.9,
    other_model: opt.OtherModel = False,
    n_random: Annotated[
        int | None,
        typer.Option(
            "--n-random",
            help="Random circuits of the same size beside it (default: 1,000, fewer large ones).",
        ),
    ] = None,
    as_json: Annotated[
        bool, typer.Option("--json/--no-json", help="Print JSON instead of tables.")
    ] = False,
    trust_remote_code: opt.Trust = False,
    overwrite: opt.Replace = False,
) -> None:
    """Compare two circuits, or one with a reference: overlap, differing edges, one diagram.

    Beside each agreement stands that of random circuits of the same size.  A reference is of one
    model: with a run of another one it is refused, unless --other-model.

    Circuits over different bases (heads and MLPs, SAEs, transcoders, neurons), and any three or
    more, are compared by the components that their nodes stand for, by what finding them took
    and, for runs, by size at equal faithfulness.

    Example: acdc compare runs/acdc runs/eap-ig --out both.svg

    Example: acdc compare runs/heads runs/saes runs/transcoders runs/neurons

    Example: acdc compare runs/ioi --reference ioi --out both.svg
    """
    from acdc.errors import OptionError
    from acdc.evidence.references import check_roles, load_reference
    from acdc.runs.circuits import circuit_file, load_circuit
    from acdc.terminal.tables import say

    if reference is None and len(circuits) < 2:
        raise OptionError(
            "Missing argument 'second': give a second circuit, or --reference with a name or file"
        )
    if reference is not None and len(circuits) > 1:
        raise OptionError("both 'second' and --reference: give one of them")
    if role and reference is None:
        raise OptionError(f"role {role[0]!r} without a reference: give --reference")
    if out is not None and out.suffix not in (".svg", ".png", ".pdf", ".dot"):
        raise OptionError(
            f"picture {str(out)!r}: expected a name ending in .svg, .png, .pdf or .dot"
        )
    if out is not None:
        check_file(out, overwrite)
    if reference is not None:
        check_roles(load_reference(reference), role or [])
    from acdc.evidence.comparison import check_drawable
    from acdc.evidence.comparison import compare as compare_all
    from acdc.terminal.tables import TerminalReporter

    for path in circuits:
        circuit_file(path)
    if out is not None and reference is None:
        check_drawable([load_circuit(path) for path in circuits])  # before anything is measured
    found = compare_all(
        *circuits, reference=reference, faithfulness=faithfulness, other_model=other_model,
        n_random=n_random, trust_remote_code=trust_remote_code, reporter=TerminalReporter(),
    )  # fmt: skip
    dot = None if out is None else found.dot()
    if found.warning:
        say(f"acdc: warning: {found.warning}", stderr=True)
    if as_json:
        _print_json(found)
    else:
        _show(found, role or [], list_edges)
    if out is not None and dot is not None:
        _write_picture(dot, out)
        say(f"written to {out}", stderr=as_json)


def _show(found: Compared, roles: list[str], list_edges: bool) -> None:
    """Show how circuits compare, as tables."""
    from acdc.terminal.tables import (
        bases_tables,
        comparison_table,
        reference_table,
        roles_table,
        show,
    )
    from graphs import Comparison, ReferenceComparison

    own = found.found
    if isinstance(own, ReferenceComparison):
        assert found.reference is not None
        title = found.labels[0] + (" (of ANOTHER MODEL)" if found.is_other_model else "")
        show(reference_table(own, found.reference, title, found.chance))
        if found.reference.roles:
            show(roles_table(own, roles, found.chance))
        if found.match is not None:
            show(found.match.says)
        for doubt in found.doubts:
            show(f"warning of the run: {doubt}")
        if list_edges:
            overlap, what = (own.nodes, "nodes") if own.edges is None else (own.edges, "edges")
            show(f"missed {what}: " + (", ".join(overlap.only_b) or "none"))
            show(f"extra {what}: " + (", ".join(overlap.only_a) or "none"))
    elif isinstance(own, Comparison):
        labels = (found.labels[0], found.labels[1])
        show(comparison_table(own, labels, found.chance))
        if list_edges:
            for label, names in zip(labels, (own.edges.only_a, own.edges.only_b), strict=True):
                show(f"only in {label}: " + (", ".join(names) or "nothing"))
    else:
        show(*bases_tables(own, found.sizes, found.costs, found.labels, list_edges=list_edges))


def _write_picture(dot: str, out: Path) -> None:
    from graphs.files.whole import write_whole
    from graphs.pictures.draw import render

    if out.suffix == ".dot":
        write_whole(out, dot)
    else:
        render(dot, out)


def _print_json(found: Compared) -> None:
    from graphs.files.whole import json_indented

    plain = found.summary()
    alone = not plain["sizes"] and "circuits" not in plain["comparison"]
    if alone:
        more = {key: plain[key] for key in ("model", "other_model", "doubts", "chance")}
        plain = plain["comparison"] | (more if found.reference else {"chance": plain["chance"]})
    typer.echo(json_indented(plain))
