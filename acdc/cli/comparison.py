"""``acdc compare``: two circuits, over one basis or two, or one and a reference."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from acdc.cli import options as opt
from acdc.cli.inputs import check_file
from acdc.runs.circuits import load_circuit

if TYPE_CHECKING:
    from graphs import Ablation, Circuit

__all__ = ["compare"]


def compare(
    first: opt.CircuitPath,
    second: Annotated[
        Path | None, typer.Argument(help="What it is compared with (or give --reference).")
    ] = None,
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
    as_json: Annotated[
        bool, typer.Option("--json/--no-json", help="Print JSON instead of tables.")
    ] = False,
    trust_remote_code: opt.Trust = False,
    overwrite: opt.Replace = False,
) -> None:
    """Compare two circuits, or one with a reference: overlap, differing edges, one diagram.

    Circuits over different bases (heads and MLPs, latents of other dictionaries) are compared by
    the components that their nodes stand for and, for runs, by size at equal faithfulness.

    Example: acdc compare runs/acdc runs/eap-ig --out both.svg

    Example: acdc compare runs/ioi --reference ioi --out both.svg
    """
    from acdc.errors import OptionError
    from acdc.terminal.tables import say

    if (second is None) == (reference is None):
        got = "Missing argument 'second'" if second is None else "both 'second' and --reference"
        raise OptionError(f"{got}: give a second circuit, or --reference with a name or file")
    if role and reference is None:
        raise OptionError(f"role {role[0]!r} without a reference: give --reference")
    if out is not None and out.suffix not in (".svg", ".png", ".pdf", ".dot"):
        raise OptionError(
            f"picture {str(out)!r}: expected a name ending in .svg, .png, .pdf or .dot"
        )
    if out is not None:
        check_file(out, overwrite)
    if second is not None:
        sizes = {"level": faithfulness, "trust_remote_code": trust_remote_code}
        draw = _compare_circuits(first, second, list_edges, sizes, as_json, out)
    else:
        assert reference is not None
        draw = _compare_reference(first, reference, role or [], list_edges, as_json)
    if out is not None:
        _write_picture(draw(), out)
        say(f"written to {out}", stderr=as_json)


def _compare_circuits(
    first: Path,
    second: Path,
    list_edges: bool,
    sizes: dict[str, Any],
    as_json: bool,
    out: Path | None,
) -> Callable[[], str]:
    """Show how two circuits compare; return what draws both.

    ``sizes`` says how runs over different bases are measured.
    """
    from acdc.terminal.tables import comparison_table, show
    from graphs.known.compare import compare as overlap
    from graphs.known.compare import to_dot_comparison

    a, b = load_circuit(first), load_circuit(second)
    labels = (str(first), str(second))
    if a.graph.shape.sites != b.graph.shape.sites:
        return _compare_bases((a, b), (first, second), list_edges, sizes, as_json, out)
    found = overlap(a, b)
    if as_json:
        _print_json(found)
        return lambda: to_dot_comparison(a, b, labels)
    show(comparison_table(found, labels))
    if list_edges:
        for label, names in zip(labels, (found.edges.only_a, found.edges.only_b), strict=True):
            show(f"only in {label}: " + (", ".join(names) or "nothing"))
    return lambda: to_dot_comparison(a, b, labels)


def _compare_bases(
    circuits: tuple[Circuit, Circuit],
    paths: tuple[Path, Path],
    list_edges: bool,
    how: dict[str, Any],
    as_json: bool,
    out: Path | None,
) -> Callable[[], str]:
    """Show how circuits over different bases compare; there is no one diagram of both."""
    from acdc.errors import OptionError
    from acdc.evidence.bases import sizes_at
    from acdc.terminal.tables import TerminalReporter, bases_tables, show
    from graphs.known.bases import compare_bases

    if out is not None:
        raise OptionError(
            f"picture {str(out)!r}: circuits over different bases have no common diagram; draw "
            "each with acdc export"
        )
    found = compare_bases(*circuits)
    sizes = None
    if all(path.is_dir() for path in paths):
        with TerminalReporter().phase("size at equal faithfulness", None):
            sizes = sizes_at(paths, **how)
    if as_json:
        _print_json({"comparison": found, "sizes": sizes})
    else:
        show(*bases_tables(found, sizes, (str(paths[0]), str(paths[1])), list_edges=list_edges))
    return lambda: ""


def _compare_reference(
    path: Path, name: str, roles: list[str], list_edges: bool, as_json: bool
) -> Callable[[], str]:
    """Show how a circuit compares with a reference; return what draws both."""
    from acdc.evidence.references import ablation_warning, check_roles, load_reference
    from acdc.terminal.tables import reference_table, roles_table, say, show
    from graphs.known.compare import compare_reference, to_dot_reference

    reference = load_reference(name)
    check_roles(reference, roles)
    circuit, ablation = _circuit_and_ablation(path)
    found = compare_reference(circuit, reference)
    if warning := ablation_warning(reference, ablation):
        say(f"acdc: warning: {warning}", stderr=True)
    if as_json:
        _print_json(found)
        return lambda: to_dot_reference(circuit, reference, str(path))
    show(reference_table(found, reference, str(path)))
    if reference.roles:
        show(roles_table(found, roles))
    if list_edges:
        overlap, what = (found.nodes, "nodes") if found.edges is None else (found.edges, "edges")
        show(f"missed {what}: " + (", ".join(overlap.only_b) or "none"))
        show(f"extra {what}: " + (", ".join(overlap.only_a) or "none"))
    return lambda: to_dot_reference(circuit, reference, str(path))


def _circuit_and_ablation(path: Path) -> tuple[Circuit, Ablation]:
    """A circuit, and under which ablation it was found as far as its files say."""
    from acdc.errors import CircuitFileError, GraphError
    from acdc.evidence.references import check_ablation
    from acdc.runs.folder import read_run
    from graphs.known.reference import Ablation

    if path.is_dir():
        settings, circuit, _ = read_run(path)
        return circuit, Ablation(settings.intervention, settings.direction)
    circuit = load_circuit(path)
    try:
        ablation = Ablation(circuit.info.get("intervention"), circuit.info.get("direction"))
        check_ablation(ablation)
    except GraphError as error:
        raise CircuitFileError(f"{path}: {error}") from error
    return circuit, ablation


def _write_picture(dot: str, out: Path) -> None:
    from graphs.files.whole import write_whole
    from graphs.pictures.draw import render

    if out.suffix == ".dot":
        write_whole(out, dot)
    else:
        render(dot, out)


def _print_json(value: Any) -> None:
    import json
    from dataclasses import asdict, is_dataclass

    def plain(one: Any) -> Any:
        if is_dataclass(one) and not isinstance(one, type):
            return asdict(one)
        raise TypeError(f"{type(one).__name__} is no plain value")

    typer.echo(json.dumps(value, default=plain, indent=1))
