"""Compile the programs: ``python -m benchmarks.compiled.build [NAME...]``.

Needs tracr (``pip install 'acdc-circuits[compile]'``), nothing else does.  The same versions give
the same bytes: every program is compiled in a process of its own, with fixed hashing.  With
``--check`` nothing is written; the programs are compiled beside and compared byte by byte.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import subprocess
import sys
import tempfile
from collections import defaultdict
from collections.abc import Mapping, Sequence
from importlib.metadata import version
from pathlib import Path
from random import Random
from typing import Any

import jax
import numpy as np
from numpy.typing import NDArray
from safetensors.numpy import save_file
from tracr.compiler import compiling, rasp_to_graph
from tracr.rasp import causal_eval, rasp

from benchmarks.compiled.programs import PROGRAMS, Program, Value
from benchmarks.compiled.truth import CompiledModel, Intervention, Truth, derive
from benchmarks.references.signed import sign
from graphs.files.whole import write_json
from graphs.graph import GraphShape, shape_to_config

__all__ = ["build", "main"]

FOLDER = Path(__file__).parent / "models"
BOS, PAD = "BOS", "PAD"
NEAR = 0.05
"""A numerical variable of the compiled model may be this far from the program's."""

Weights = dict[str, NDArray[np.float32]]


def main() -> None:
    """Compile the programs that are named, or all."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.compiled.build")
    parser.add_argument("names", nargs="*", metavar="NAME", help=f"any of {', '.join(PROGRAMS)}")
    parser.add_argument("--out", type=Path, default=FOLDER, help="where the model folders go")
    parser.add_argument("--here", action="store_true", help=argparse.SUPPRESS)
    parser.add_argument("--check", action="store_true", help="compare, do not write")
    options = parser.parse_args()
    names = options.names or list(PROGRAMS)
    for name in names:
        if name not in PROGRAMS:
            parser.error(f"unknown program {name!r}: expected any of {', '.join(PROGRAMS)}")
    if options.here:
        for name in names:
            build(name, options.out / f"tracr-{name}")
    elif options.check:
        with tempfile.TemporaryDirectory() as folder:
            _build_apart(names, Path(folder))
            sys.exit(_compare(names, Path(folder), options.out))
    else:
        _build_apart(names, options.out)


def _build_apart(names: Sequence[str], out: Path) -> None:
    """Build every program in a process of its own: tracr numbers expressions per process."""
    environment = os.environ | {"PYTHONHASHSEED": "0", "JAX_PLATFORMS": "cpu"}
    for name in names:
        command = [sys.executable, "-m", "benchmarks.compiled.build", "--here", name]
        subprocess.run([*command, "--out", str(out)], check=True, env=environment)


def _compare(names: Sequence[str], built: Path, shipped: Path) -> int:
    """Print which files differ; the exit status."""
    different = [
        path.relative_to(built)
        for name in names
        for path in sorted((built / f"tracr-{name}").iterdir())
        if not (old := shipped / path.relative_to(built)).is_file()
        or old.read_bytes() != path.read_bytes()
    ]
    for path in different:
        print(f"differs: {path}")
    print("the same bytes" if not different else f"{len(different)} files differ")
    return int(bool(different))


def build(name: str, folder: Path) -> None:
    """Compile one program, check it against the RASP interpreter and write its folder."""
    program = PROGRAMS[name]
    sop = program.make()
    compiled = compiling.compile_rasp_to_model(
        sop,
        vocab=set(program.vocabulary),
        max_seq_len=program.max_length,
        causal=program.causal,
        compiler_bos=BOS,
        compiler_pad=PAD,
    )
    tokens = _by_id(compiled.input_encoder.encoding_map)
    outputs = _by_id(getattr(compiled.output_encoder, "encoding_map", {}))
    weights = _weights(compiled, sop, outputs)
    config = _config(compiled, program, weights)
    pairs = program.pairs(Random(f"tracr-{name}"))
    rows = [_row(program, sop, pair, tokens, outputs) for pair in pairs]
    expected = _expected(compiled, sop, program, rows, weights["unembed.W_U"])
    model = CompiledModel(config, {k: x.astype(np.float64) for k, x in weights.items()})
    truths = {kind: _truth(model, rows, kind) for kind in ("zero", "resample")}

    folder.mkdir(parents=True, exist_ok=True)
    save_file(weights, folder / "model.safetensors")
    save_file(expected, folder / "expected.safetensors")
    write_json(folder / "config.json", config)
    card = _card(name, program, compiled, weights, tokens, outputs)
    card["derivation"] = {
        kind: {"least_kept": truth.least_kept, "most_dropped": truth.most_dropped}
        for kind, truth in truths.items()
    }
    write_json(folder / "card.json", card)
    lines = [json.dumps(row) + "\n" for row in rows]
    (folder / "pairs.jsonl").write_text("".join(lines), encoding="utf-8")
    for kind, truth in truths.items():
        write_json(
            folder / f"reference-{kind}.json", _reference(name, program, config, kind, truth)
        )
    sign(folder)
    print(
        f"{name}: {len(truths['zero'].edges)} edges (zero), "
        f"{len(truths['resample'].edges)} (resample)"
    )


def _by_id(encoding: Mapping[Value, int]) -> list[Value]:
    return sorted(encoding, key=encoding.__getitem__)


# --- weights ------------------------------------------------------------------------------


def _weights(compiled: Any, sop: rasp.SOp, outputs: Sequence[Value]) -> Weights:
    """Turn haiku's parameters into HookedTransformer layout."""
    cfg, params = compiled.model_config, compiled.params
    heads, d_head = cfg.num_heads, cfg.key_size
    state = {
        "embed.W_E": params["token_embed"]["embeddings"],
        "pos_embed.W_pos": params["pos_embed"]["embeddings"],
    }
    has_mlp = any(
        np.any(params[f"transformer/layer_{i}/mlp/linear_2"]["w"]) for i in range(cfg.num_layers)
    )
    for i in range(cfg.num_layers):
        layer, block = f"transformer/layer_{i}", f"blocks.{i}"
        for kind, theirs in (("Q", "query"), ("K", "key"), ("V", "value")):
            linear = params[f"{layer}/attn/{theirs}"]
            d_model = len(linear["w"])
            state[f"{block}.attn.W_{kind}"] = np.moveaxis(
                np.reshape(linear["w"], (d_model, heads, d_head)), 1, 0
            )
            state[f"{block}.attn.b_{kind}"] = np.reshape(linear["b"], (heads, d_head))
        linear = params[f"{layer}/attn/linear"]
        state[f"{block}.attn.W_O"] = np.reshape(linear["w"], (heads, d_head, -1))
        state[f"{block}.attn.b_O"] = linear["b"]
        if has_mlp:
            for kind, theirs in (("in", "linear_1"), ("out", "linear_2")):
                linear = params[f"{layer}/mlp/{theirs}"]
                state[f"{block}.mlp.W_{kind}"] = linear["w"]
                state[f"{block}.mlp.b_{kind}"] = linear["b"]
    state["unembed.W_U"] = _unembedding(compiled.residual_labels, sop, outputs)
    return {key: np.ascontiguousarray(x, dtype=np.float32) for key, x in state.items()}


def _unembedding(
    labels: Sequence[str], sop: rasp.SOp, outputs: Sequence[Value]
) -> NDArray[np.float32]:
    """``[d_model, output]``: the directions of the program's output."""
    names = _directions(sop, outputs)
    W_U = np.zeros((len(labels), len(names)), dtype=np.float32)
    W_U[[labels.index(name) for name in names], range(len(names))] = 1
    return W_U


def _directions(sop: rasp.SOp, values: Sequence[Value]) -> list[str]:
    """Names of a variable's directions: one per value, or one of a numerical variable."""
    return [f"{sop.label}:{v}" for v in values] if rasp.is_categorical(sop) else [sop.label]


def _config(compiled: Any, program: Program, weights: Weights) -> dict[str, Any]:
    cfg = compiled.model_config
    n_tokens, d_model = weights["embed.W_E"].shape
    return {
        "n_layers": cfg.num_layers,
        "n_heads": cfg.num_heads,
        "d_model": d_model,
        "d_head": cfg.key_size,
        "d_mlp": cfg.mlp_hidden_size,
        "n_ctx": len(weights["pos_embed.W_pos"]),
        "d_vocab": n_tokens,
        "d_vocab_out": weights["unembed.W_U"].shape[1],
        "act_fn": "relu",
        "normalization_type": None,
        "positional_embedding_type": "standard",
        "attention_dir": "causal" if program.causal else "bidirectional",
        "attn_only": "blocks.0.mlp.W_in" not in weights,
    }


# --- prompts and what is expected ---------------------------------------------------------


def _interpret(program: Program, expr: rasp.RASPExpr, values: Sequence[Value]) -> Any:
    """What the RASP interpreter says."""
    return causal_eval.evaluate(expr, values) if program.causal else expr(values)


def _row(
    program: Program,
    sop: rasp.SOp,
    pair: tuple[tuple[Value, ...], tuple[Value, ...]],
    tokens: Sequence[Value],
    outputs: Sequence[Value],
) -> dict[str, Any]:
    """One row of pairs.jsonl; ``program_input`` and ``program_output`` are for the reader."""
    clean, corrupt = ([tokens.index(v) for v in (BOS, *side)] for side in pair)
    row: dict[str, Any] = {
        "clean": clean, "corrupt": corrupt, "scored": list(program.scored(len(pair[0]))),
    }  # fmt: skip
    if program.contrast is not None:
        right, wrong = program.contrast(*pair)
        row |= {"answers": [outputs.index(right)], "wrong_answers": [outputs.index(wrong)]}
    said = _interpret(program, sop, list(pair[0]))
    if rasp.is_numerical(sop):
        said = [float(value) for value in said]
    return row | {"program_input": list(pair[0]), "program_output": list(said)}


def _expected(
    compiled: Any, sop: rasp.SOp, program: Program, rows: Sequence[Mapping[str, Any]],
    W_U: NDArray[np.float32],
) -> Weights:  # fmt: skip
    """Logits that tracr computes for the clean prompts, by length; checks every variable."""
    labels = compiled.residual_labels
    graph = rasp_to_graph.extract_rasp_graph(sop).graph
    variables = [
        node["EXPR"] for node in graph.nodes.values() if isinstance(node["EXPR"], rasp.SOp)
    ]
    logits = defaultdict(list)
    for row in rows:
        values = row["program_input"]
        ran = compiled.apply([BOS, *values])
        stream = np.asarray(ran.transformer_output[0])
        for variable in variables:
            said = _interpret(program, variable, values)
            for at, value in enumerate(said, start=1):
                _check_variable(variable, value, stream[at], labels)
        logits[len(row["clean"])].append(stream @ W_U)
    return {f"logits.{length}": np.stack(some) for length, some in sorted(logits.items())}


def _check_variable(
    variable: rasp.SOp, value: Any, stream: NDArray[np.float32], labels: Sequence[str]
) -> None:
    """Compare a variable in the final stream with the interpreter's value of it."""
    if rasp.is_categorical(variable):
        own = [i for i, label in enumerate(labels) if label.startswith(f"{variable.label}:")]
        wanted = [float(labels[i] == f"{variable.label}:{value}") for i in own]
    else:
        own, wanted = [labels.index(variable.label)], [0.0 if value is None else float(value)]
    if not np.allclose(stream[own], wanted, atol=NEAR):
        raise SystemExit(f"{variable.label}: compiled {stream[own]}, interpreted {value!r}")


# --- the circuits -------------------------------------------------------------------------


def _truth(model: CompiledModel, rows: Sequence[Mapping[str, Any]], kind: Intervention) -> Truth:
    groups = defaultdict(list)
    for row in rows:
        groups[len(row["clean"]), tuple(row["scored"])].append((row["clean"], row["corrupt"]))
    prompts = [
        (np.array([clean for clean, _ in some]), np.array([corrupt for _, corrupt in some]), scored)
        for (_, scored), some in sorted(groups.items())
    ]
    return derive(model, prompts, kind, split_embed=kind == "zero")


def _reference(
    name: str, program: Program, config: Mapping[str, Any], kind: str, truth: Truth
) -> dict[str, Any]:
    shape = GraphShape(
        n_layers=config["n_layers"],
        n_heads=config["n_heads"],
        has_mlp=not config["attn_only"],
        split_embed=kind == "zero",
    )
    what = {"zero": "carries zero", "resample": "carries the corrupt run's value"}[kind]
    return {
        "name": f"tracr-{name}-{kind}",
        "description": f"{program.description}: edges whose component errs when one {what}",
        "model": f"tracr-{name}",
        "task": "pairs.jsonl",
        "ablation": {"intervention": kind, "direction": "noising"},
        "granularity": "edges",
        "citation": f"{program.citation}; compiler: Lindner et al. 2023, arXiv 2301.05062",
        "open": _open(truth, program.remarks.get(kind, "")),
        "graph": shape_to_config(shape),
        "roles": {},
        "edges": truth.edges,
    }


def _open(truth: Truth, remark: str) -> str:
    left_out = (
        "Wired by the compiler but left out, since the component computes the same without it on "
        f"these prompts at the positions that are read: {', '.join(truth.unneeded)}."
        if truth.unneeded
        else "Nothing is left out: every wired edge into the circuit's components is needed."
    )
    return f"{left_out} {remark}".strip()


# --- files --------------------------------------------------------------------------------


def _card(
    name: str, program: Program, compiled: Any, weights: Weights,
    tokens: Sequence[Value], outputs: Sequence[Value],
) -> dict[str, Any]:  # fmt: skip
    return {
        "name": f"tracr-{name}",
        "license": "MIT",
        "description": f"compiled from RASP: {program.description}",
        "made_by": f"python -m benchmarks.compiled.build {name}",
        "versions": {package: version(package) for package in ("tracr-pypi", "jax", "numpy")},
        "citation": program.citation,
        "n_parameters": sum(math.prod(x.shape) for x in weights.values()),
        "tokens": list(tokens),
        "outputs": list(outputs) or None,
        "directions": list(compiled.residual_labels),
    }


if __name__ == "__main__":
    jax.config.update("jax_default_matmul_precision", "highest")
    main()
