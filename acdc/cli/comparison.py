"""``acdc compare``: circuits, over one basis or several, or one and a reference."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from acdc.cli import options as opt
from acdc.cli.answers import answer
from acdc.cli.completion import listed
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
        typer.Option(
            "--reference",
            help="Reference circuit: name (acdc list references) or file.",
            autocompletion=listed("references"),
        ),
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
    as_json: opt.Json = False,
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
    from acdc.terminal.console import say

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
    from acdc.terminal.comparison import compared_parts
    from acdc.terminal.console import TerminalReporter

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
    if out is not None and dot is not None:
        _write_picture(dot, out)
    answer(
        lambda: _plain(found),
        lambda: compared_parts(found, role or [], list_edges=list_edges),
        as_json=as_json,
        written=None if out is None else f"written to {out}",
    )


def _write_picture(dot: str, out: Path) -> None:
    from graphs.files.whole import write_whole
    from graphs.pictures.draw import render

    if out.suffix == ".dot":
        write_whole(out, dot)
    else:
        render(dot, out)


def _plain(found: Compared) -> dict[str, Any]:
    plain = found.summary()
    alone = not plain["sizes"] and "circuits" not in plain["comparison"]
    if alone:
        more = {key: plain[key] for key in ("model", "other_model", "doubts", "chance")}
        plain = plain["comparison"] | (more if found.reference else {"chance": plain["chance"]})
    return plain
