"""Commands that show a circuit elsewhere or closer: ``export`` and ``latents``."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from acdc.cli import options as opt
from acdc.cli.answers import answer
from acdc.cli.inputs import check_file, check_page
from acdc.runs.circuits import circuit_file, read_circuit

if TYPE_CHECKING:
    from graphs import Circuit

__all__ = ["export", "latents"]

_TOP_LATENTS, _TOP_ON_PAGE = 10, 200


def export(
    circuit: opt.CircuitPath,
    format: Annotated[
        str | None,
        typer.Option(
            "--format",
            help="svg, png, pdf, dot, json, graphml or pt (default: as --out ends, or svg); "
            "neuronpedia: the graph JSON of circuit-tracer's and Neuronpedia's viewers; or "
            "model: a model folder with only the circuit's nodes left.",
        ),
    ] = None,
    out: Annotated[
        Path | None,
        typer.Option("--out", help="File (model: folder) to write (default: beside the circuit)."),
    ] = None,
    text: Annotated[
        Path | None,
        typer.Option(
            "--text",
            help="Ordinary text to measure the loss on (model; default: docstrings of Python's "
            "standard library).",
        ),
    ] = None,
    intervention: Annotated[
        str | None,
        typer.Option(
            "--intervention",
            help="What stands in the place of other nodes (model): mean, zero or optimal "
            "(default: the run's; mean where that is resample).",
        ),
    ] = None,
    max_edges: Annotated[
        int | None, typer.Option("--max-edges", help="Draw at most so many lines (default: 60).")
    ] = None,
    negate: Annotated[
        bool,
        typer.Option(
            "--negate/--no-negate",
            help="Turn the scores' sign (json, pt): MIB ranks by signed scores, highest first; "
            "ours of logit_diff are negative where an edge helps.",
        ),
    ] = False,
    error_nodes: Annotated[
        bool,
        typer.Option(
            "--error-nodes/--no-error-nodes",
            help="With the edges of error nodes (circuits with latents), or without.",
        ),
    ] = True,
    overwrite: opt.Replace = False,
) -> None:
    """Write a circuit as a picture, as DOT, GraphML, or JSON and .pt in EAP-IG's and MIB's layout.

    Or for others' viewers; or the model itself, its other heads and MLPs replaced by their means.

    Example: acdc export runs/ioi --format pdf --out ioi.pdf

    Example: acdc export runs/ioi --format neuronpedia --out ioi.json

    Example: acdc export runs/ioi --format model --out ioi-circuit
    """
    from acdc.errors import OptionError
    from acdc.settings import check_count
    from acdc.terminal.console import say
    from graphs.pictures.rendering import FORMATS

    if format == "model":
        for name, given in {
            "--max-edges": max_edges is not None, "--negate": negate,
            "--no-error-nodes": not error_nodes,
        }.items():  # fmt: skip
            if given:
                raise OptionError(f"{name} with --format model: it is for circuits, leave it out")
        _export_model(circuit, out, text, intervention, overwrite)
        return
    if text is not None or intervention is not None:
        raise OptionError("--text and --intervention: they are for --format model")
    formats = (*FORMATS, "dot", "json", "graphml", "pt", "neuronpedia")
    format = format or (out.suffix[1:].lower() if out else "") or "svg"
    if format not in formats:
        raise OptionError(f"format {format!r}: expected one of {', '.join(formats)}, model")
    if max_edges is not None:
        check_count("max-edges", max_edges)
    if negate and format not in ("json", "pt"):
        raise OptionError(f"--negate with format {format}: it is for json and pt")
    if negate and out is None:
        raise OptionError("--negate: say with --out where the other scores go")
    source = circuit_file(circuit)
    found = read_circuit(source)
    if negate:
        found = _negated(found)
    if not error_nodes:
        if out is None or not found.graph.shape.sites:
            raise OptionError("--no-error-nodes: it is for circuits with latents, and needs --out")
        found = _without_error_nodes(found)
    suffix = ".neuronpedia.json" if format == "neuronpedia" else f".{format}"
    target = out or source.with_suffix(suffix)
    if out is None and target == source:
        say(f"{source} is {format} already")
        return
    derived = out is None and (source.suffix == ".json" or format in FORMATS)
    check_file(target, overwrite or derived)
    _write(found, target, format, {} if max_edges is None else {"max_edges": max_edges})
    say(f"written to {target}")


def _negated(circuit: Circuit) -> Circuit:
    """Turn the scores' sign, and what is said of it."""
    from dataclasses import replace

    info = dict(circuit.info)
    if info.get("helps") in (-1, 1):
        info["helps"] = -info["helps"]
    return replace(circuit, scores=-circuit.scores, info=info)


def _without_error_nodes(circuit: Circuit) -> Circuit:
    from dataclasses import replace

    from acdc.measure.error_nodes import error_edges

    return replace(circuit, in_circuit=circuit.in_circuit & ~error_edges(circuit.graph))


def _write(circuit: Circuit, target: Path, format: str, limits: dict[str, Any]) -> None:
    """Write a circuit; ``limits`` are of pictures."""
    from graphs.files import formats
    from graphs.pictures.draw import render
    from graphs.pictures.rendering import FORMATS

    if format in FORMATS:
        render(circuit, target, format, **limits)
    elif format == "dot":
        formats.write_dot(circuit, target, **limits)
    elif format == "graphml":
        formats.write_graphml(circuit, target)
    elif format == "neuronpedia":
        formats.write_attribution_graph(circuit, target)
    elif format == "pt":
        from acdc.runs.pt import write_pt  # torch takes seconds

        write_pt(circuit, target)
    else:
        formats.write_circuit_json(circuit, target)


def _export_model(
    run: Path, out: Path | None, text: Path | None, intervention: str | None, overwrite: bool
) -> None:
    """Write a model folder, and say what is left."""
    from acdc.errors import OptionError
    from acdc.evidence.circuit_model import export_model
    from acdc.terminal.circuit_model import circuit_model_parts
    from acdc.terminal.console import TerminalReporter, show

    if out is None:
        raise OptionError("--format model: say with --out which folder to write")
    asked: dict[str, Any] = {} if intervention is None else {"intervention": intervention}
    found = export_model(
        run, out, text=text, overwrite=overwrite, reporter=TerminalReporter(), **asked
    )
    show(*circuit_model_parts(found))


def latents(
    run: Annotated[Path, typer.Argument(help="Folder of a run that was found with --saes.")],
    top: Annotated[
        int | None,
        typer.Option("--top", help="Latents to show (default: 10; 200 on a page)."),
    ] = None,
    prompts: Annotated[int, typer.Option("--prompts", help="Prompts to show of each latent.")] = 5,
    clusters: Annotated[
        int | None,
        typer.Option("--clusters", help="Put latents that are active together into so many sets."),
    ] = None,
    html: Annotated[
        Path | None, typer.Option("--html", help="Write a page (.html) that needs no network.")
    ] = None,
    as_json: opt.Json = False,
    trust_remote_code: opt.Trust = False,
    overwrite: opt.Replace = False,
) -> None:
    """Show the latents of a circuit: what they fire on, what they write, and their edges.

    Example: acdc latents runs/ioi --top 5

    Example: acdc latents runs/ioi --clusters 8 --html latents.html
    """
    from acdc.evidence.latents import look
    from acdc.pages.latents import to_html
    from acdc.terminal.console import TerminalReporter
    from acdc.terminal.latents import gallery_parts
    from graphs.files.whole import write_whole

    if html is not None:
        check_page(html, overwrite)
    n_shown = top if top is not None else (_TOP_LATENTS if html is None else _TOP_ON_PAGE)
    with TerminalReporter().phase("look at latents", None):
        gallery = look(
            run, top=n_shown, n_examples=prompts, clusters=clusters,
            trust_remote_code=trust_remote_code,
        )  # fmt: skip
    written = None
    if html is not None:
        write_whole(html, to_html(gallery))
        written = f"written to {html}: {len(gallery.latents)} of {gallery.n_latents} latents"
    answer(
        lambda: asdict(gallery),
        lambda: gallery_parts(gallery) if html is None else (),
        as_json=as_json,
        written=written,
    )
