"""Pictures: what is in the DOT text, and that the same files come out on every machine."""

from __future__ import annotations

import os
import re
import shutil
import stat
import sys
import time
import xml.etree.ElementTree as ElementTree
from dataclasses import replace
from pathlib import Path

import numpy as np
import pygraphviz
import pytest

from graphs import (
    Circuit,
    GraphError,
    GraphShape,
    InputError,
    compare,
    component_graph,
    prune,
    read_dot,
    render,
    to_dot,
    to_dot_comparison,
)
from graphs.known.compare import Overlap
from graphs.pictures.layout import place
from graphs.pictures.rendering import _FONTCONFIG, _font, draw_dot
from graphs.pictures.simplify import simplify

DOCSTRING_EDGES = """
a0.h5->a1.h2<k> a0.h5->a1.h2<q> a0.h5->a1.h4<v> a0.h5->a2.h0<k> a0.h5->a2.h0<q> a0.h5->a3.h0<v>
a0.h5->a3.h6<v> a1.h2->a3.h0<k> a1.h2->a3.h6<k> a1.h4->a2.h0<v> a1.h4->a3.h0<q> a1.h4->a3.h6<q>
a2.h0->a3.h0<k> a2.h0->a3.h6<k> a3.h0->logits a3.h6->logits input->a0.h5<v> input->a1.h2<k>
input->a1.h2<q> input->a1.h4<v> input->a2.h0<k> input->a2.h0<q> input->a3.h0<v> input->a3.h6<v>
"""
DOCSTRING = DOCSTRING_EDGES.split()
MAGIC = {"svg": b"<?xml", "png": b"\x89PNG\r\n\x1a\n", "pdf": b"%PDF-"}


@pytest.fixture(autouse=True)
def no_dot_program(monkeypatch, tmp_path):
    monkeypatch.setenv("PATH", str(tmp_path / "empty"))


def docstring() -> Circuit:
    return Circuit.from_edges(
        component_graph(GraphShape(4, 8, has_mlp=False)), DOCSTRING, task="docstring"
    )


def scored(n_edges: int, shape: GraphShape | None = None) -> Circuit:
    """Return a connected circuit of random backward walks, with heavy-tailed scores."""
    graph = component_graph(shape or GraphShape(12, 12))
    rng = np.random.default_rng(2)
    feeding: dict[int, list[int]] = {}
    for receiver in range(len(graph.receivers)):
        for node in graph.fed_by(receiver):
            feeding.setdefault(int(node), []).append(receiver)
    mask = np.zeros(graph.n_edges, dtype=bool)
    while mask.sum() < n_edges:
        node = graph.n_senders
        while not graph.source[node] and mask.sum() < n_edges + 20:
            receiver = rng.choice(feeding[node])
            edge = rng.integers(graph.receiver_start[receiver], graph.receiver_start[receiver + 1])
            mask[edge], node = True, int(graph.edge_sender[edge])
    scores = rng.lognormal(0, 1.5, graph.n_edges) * rng.choice([-1, 1], graph.n_edges)
    return Circuit(graph, scores, prune(graph, mask))


def drawn(dot: str) -> tuple[set[str], dict[str, dict[str, str]]]:
    """Names of the drawn nodes, and the attributes of the drawn edges by full name."""
    view = pygraphviz.AGraph(string=dot)
    nodes = {n for n in view.nodes() if not n.startswith("axis")}
    edges = {}
    for edge in view.edges_iter():
        attributes = {key: value for key, value in edge.attr.items() if value}
        for receiver in attributes.get("receiver", "").split():
            edges[f"{edge[0]}->{receiver}"] = attributes
    return nodes, edges


def test_dot_holds_exactly_the_circuit():
    nodes, edges = drawn(to_dot(docstring()))
    assert sorted(edges) == sorted(DOCSTRING)
    assert nodes == {"input", "logits", *(e.split("->")[0] for e in DOCSTRING)}


def test_heads_mlps_and_ports_look_different():
    graph = component_graph(GraphShape(1, 2))
    dot = to_dot(Circuit.from_edges(graph, ["input->a0.h1<k>", "a0.h1->m0", "m0->logits"]))
    view = pygraphviz.AGraph(string=dot)
    assert view.get_node("m0").attr["shape"] == "hexagon"
    assert ">a0.h1<" in view.get_node("a0.h1").attr["label"]
    assert 'PORT="k"' in view.get_node("a0.h1").attr["label"]
    assert 'PORT="q"' not in view.get_node("a0.h1").attr["label"]
    assert view.get_node("a0.h1").attr["tooltip"] == "a0.h1"
    assert view.get_edge("input", "a0.h1").attr["headport"] == "k:s"
    assert view.graph_attr["rankdir"] == "BT"


def test_ranks_go_from_input_to_logits():
    dot = to_dot(scored(40, GraphShape(3, 4, 2)))
    ranks = [re.findall(r'^ {4}"([^"]+)" \[', block, re.M) for block in dot.split("rank=same")[1:]]
    assert ranks[0] == ["input"]
    assert ranks[-1] == ["logits"]
    kinds = [{re.sub(r"\d+$", "", name) for name in rank} for rank in ranks]
    assert all(len(kind) == 1 for kind in kinds)


def test_edges_on_no_path_are_marked_and_the_first_to_go():
    graph = component_graph(GraphShape(2, 2))
    names = ["input->m0", "m0->logits", "a0.h1->m1", "input->a1.h0<q>"]
    circuit = Circuit.from_edges(graph, names)
    dot = to_dot(circuit)
    _, edges = drawn(dot)
    assert set(edges) == set(names)
    styles = {name: edges[name].get("style", "solid") for name in names}
    assert list(styles.values()) == ["solid", "solid", "dotted", "dotted"]
    assert "2 on no path dotted" in dot
    assert "</B></FONT> on no path" in dot
    without = to_dot(circuit, max_edges=3)
    nodes, edges = drawn(without)
    assert set(edges) == {"input->m0", "m0->logits"}
    assert nodes == {"input", "m0", "logits"}
    assert "2 on no path not drawn" in without


def test_score_sets_colour_and_width():
    graph = component_graph(GraphShape(1, 1))
    circuit = Circuit.from_edges(graph, ["input->m0", "m0->logits", "input->logits"])
    for name, score in (("input->m0", 2.0), ("m0->logits", -0.5), ("input->logits", 0.0)):
        circuit.scores[graph.edge_index(name)] = score
    _, edges = drawn(to_dot(circuit))
    assert edges["input->m0"]["color"] == "#0072B2"
    red, green, blue = bytes.fromhex(edges["m0->logits"]["color"][1:])
    assert red > green > blue
    red, green, blue = bytes.fromhex(edges["input->logits"]["color"][1:])
    assert red == green == blue
    widths = [float(edges[n]["penwidth"]) for n in ("input->m0", "m0->logits", "input->logits")]
    assert widths == sorted(widths, reverse=True)
    assert "score &gt; 0" in to_dot(circuit)
    assert "score &lt; 0" in to_dot(circuit)


def test_colour_means_helps_or_hurts_where_a_circuit_says_which_sign_helps():
    circuit = Circuit.from_edges(
        component_graph(GraphShape(1, 1)), ["input->m0", "m0->logits", "input->logits"]
    )
    for name, score in (("input->m0", 2.0), ("m0->logits", -0.5), ("input->logits", 1.0)):
        circuit.scores[circuit.graph.edge_index(name)] = score

    def drawn(helps: int | None) -> str:
        return to_dot(replace(circuit, info={} if helps is None else {"helps": helps}))

    def colour(dot: str, edge: str) -> str:
        sender, receiver = edge.split("->")
        (found,) = re.findall(rf'"{sender}"(?::\w)? -> "{receiver}"(?::\w)? .*?color="#(\w+)"', dot)
        return "blue" if int(found[4:6], 16) > int(found[:2], 16) else "vermilion"

    assert colour(drawn(1), "input->m0") == colour(drawn(-1), "m0->logits") == "blue"
    assert colour(drawn(-1), "input->m0") == colour(drawn(1), "m0->logits") == "vermilion"
    assert drawn(None).count("score &gt; 0") == 1
    for helps in (1, -1):
        assert "</B></FONT> helps" in drawn(helps)
        assert "hurts" in drawn(helps)
        assert "score &gt; 0" not in drawn(helps)
    assert "has no sign" in drawn(0)
    assert "hurts" not in drawn(0)


def test_title_tells_model_task_and_edges():
    circuit = docstring()
    circuit.info.update(model="attn4", method="acdc", metric="kl", faithfulness=0.98765)
    dot = to_dot(circuit)
    assert "<B>docstring · attn4</B>" in dot
    assert "24 of 1,281 edges · acdc · kl · faithfulness 0.988" in dot
    assert '<B>a "b" \\ &lt;c&gt;</B>'.replace('"', "&quot;") in to_dot(
        circuit, title='a "b" \\ <c>'
    )
    assert "1,281" not in to_dot(circuit, title="")


def test_large_circuits_merge_the_lines_into_one_head():
    dot = to_dot(scored(900), max_edges=None)
    _, edges = drawn(dot)
    circuit = scored(900)
    assert sorted(edges) == sorted(circuit.edges())
    assert dot.count("receiver=") < circuit.n_edges
    assert 'layout="nop2"' in dot


def test_max_edges_draws_the_strongest_and_says_so():
    circuit = scored(200)
    dot = to_dot(circuit, max_edges=50)
    _, edges = drawn(dot)
    assert 45 < n_lines(dot) <= 50 < len(edges)
    left = circuit.n_edges - len(edges)
    assert f"32,491 edges · the {len(edges)} strongest drawn, {left} left out" in dot


def test_a_picture_has_what_a_reader_takes_in_and_its_text_has_all():
    circuit = scored(200)
    dot = to_dot(circuit)
    _, edges = drawn(dot)
    assert 50 < n_lines(dot) <= 60
    assert set(edges) < set(circuit.edges())
    assert f"{circuit.n_edges} of 32,491 edges · the {len(edges)} strongest drawn" in dot


def n_lines(dot: str) -> int:
    """Lines that stand for edges."""
    view = pygraphviz.AGraph(string=dot)
    return sum(": " in (edge.attr["tooltip"] or "") for edge in view.edges_iter())


def test_every_drawn_edge_is_on_a_path_and_the_strongest_is_drawn():
    for shape in (
        GraphShape(12, 12),
        GraphShape(6, 8, 2),
        GraphShape(4, 4, spans=("A", "B"), scored_spans=("B",)),
    ):
        circuit = scored(300, shape)
        for most in (20, 60):
            shown = simplify(circuit, circuit.in_circuit, most)
            assert (prune(circuit.graph, shown.mask) == shown.mask).all()
            assert shown.mask.any()
            scores = np.abs(circuit.scores) * circuit.in_circuit
            assert shown.mask[scores.argmax()]
            assert n_lines(to_dot(circuit, max_edges=most)) <= most


def alike() -> Circuit:
    """Two groups of heads in a row, every one of the second reading every one of the first."""
    graph = component_graph(GraphShape(2, 6, has_mlp=False))
    names = [f"input->a0.h{i}<{p}>" for i in range(6) for p in "qkv"]
    names += [f"a0.h{i}->a1.h{j}<{p}>" for i in range(6) for j in range(4) for p in "kv"]
    names += [f"a1.h{j}->logits" for j in range(4)]
    circuit = Circuit.from_edges(graph, names, helps=1)
    circuit.scores[:] *= np.linspace(1, 2, graph.n_edges)
    return circuit


def test_ports_are_merged_and_heads_put_together_before_anything_is_dropped(tmp_path):
    circuit = alike()  # 18 + 48 + 4 edges, 6 + 24 + 4 lines once merged, 3 between groups
    for most, lines, merged, grouped in ((70, 70, 0, 0), (69, 34, 1, 0), (33, 3, 1, 1)):
        dot = to_dot(circuit, max_edges=most)
        assert n_lines(dot) == lines
        assert ("strongest drawn" in dot) is False
        assert (">qkv<" in dot) == merged
        assert ("a0.h0, h1, h2,<BR/>h3, h4, h5" in dot) == grouped
        assert ("nodes that read and are read alike; a line: of at least one" in dot) == grouped
        (tmp_path / "c.dot").write_text(dot)
        again = read_dot(tmp_path / "c.dot")
        assert (again.in_circuit == circuit.in_circuit).all()
        assert (again.scores == circuit.scores * circuit.in_circuit).all()
        render(dot, tmp_path / "c.svg")
    marked = to_dot(circuit, max_edges=33, highlight=["a1.h3"])
    assert 'BORDER="2"' in re.search(r'"a1.h0" \[.*', marked)[0]


def test_the_legend_has_strokes_as_wide_as_lines():
    dot = to_dot(scored(50))
    widths = [int(height) for height in re.findall(r'HEIGHT="(\d+)" FIXEDSIZE', dot)]
    assert len(widths) == 3
    assert widths == sorted(widths, reverse=True)
    largest = np.abs(scored(50).scores[scored(50).in_circuit]).max()
    said = re.findall(r">([\d.,]+)&#160;&#160;</FONT>", dot)
    assert [float(x.replace(",", "")) for x in said] == pytest.approx(
        [largest, largest / 4, largest / 16], rel=0.05
    )
    assert "FIXEDSIZE" not in to_dot(docstring())  # all scores are the same


def test_layers_of_a_dense_picture_are_bands():
    dot = to_dot(scored(900), max_edges=None)
    assert dot.count("subgraph cluster_layer") == 6
    assert "cluster_layer" not in to_dot(scored(900))


def test_highlight():
    dot = to_dot(docstring(), highlight=["a0.h5"])
    assert 'BORDER="2"' in re.search(r'"a0.h5" \[.*', dot)[0]
    assert 'BORDER="1"' in re.search(r'"a1.h2" \[.*', dot)[0]
    with pytest.raises(GraphError, match=r"highlight 'a9\.h5': no such node; did you mean"):
        to_dot(docstring(), highlight=["a9.h5"])


def empty() -> Circuit:
    return Circuit.from_edges(component_graph(GraphShape(2, 2)), [], task='a"b\\c\n<&>\x00')


def grouped() -> Circuit:
    return scored(60, GraphShape(5, 8, 4))


@pytest.mark.parametrize("format", ["svg", "png", "pdf"])
@pytest.mark.parametrize("make", [docstring, empty, grouped])
def test_render_without_a_dot_program(tmp_path, make, format, capfd):
    path = tmp_path / f"picture.{format}"
    render(make(), path)
    assert path.read_bytes().startswith(MAGIC[format])
    assert [p.name for p in tmp_path.iterdir()] == [path.name]
    assert capfd.readouterr() == ("", "")


def test_svg_shows_every_node_and_edge_and_needs_nothing_else(tmp_path):
    render(docstring(), tmp_path / "c.svg")
    text = (tmp_path / "c.svg").read_text()
    titles = {
        e.text for e in ElementTree.fromstring(text).iter("{http://www.w3.org/2000/svg}title")
    }
    assert {"a0.h5", "input", "logits", "input->logits"} - titles == {"input->logits"}
    assert text.count('class="edge"') >= len(DOCSTRING)
    for reference in re.findall(r'https?://[^"\s<]+', text):
        assert reference.startswith(("http://www.w3.org/", "https://www.w3.org/"))


@pytest.mark.parametrize(("n_edges", "seconds"), [(150, 5), (963, 30), (2000, 30)])
def test_large_pictures_are_drawn_in_time(tmp_path, n_edges, seconds):
    circuit = scored(n_edges)
    start = time.perf_counter()
    render(circuit, tmp_path / "c.svg", max_edges=None)
    assert time.perf_counter() - start < seconds
    assert (tmp_path / "c.svg").read_text().count('class="edge"') > 100


def test_an_installed_dot_is_not_asked(tmp_path, monkeypatch):
    wanted = draw_dot(to_dot(docstring()), "svg")
    program = tmp_path / "bin" / "dot"
    program.parent.mkdir()
    program.write_text(f"#!{sys.executable}\nprint('<?xml from the installed dot')\n")
    program.chmod(program.stat().st_mode | stat.S_IXUSR)
    monkeypatch.setenv("PATH", f"{program.parent}{os.pathsep}/usr/bin")
    assert draw_dot(to_dot(docstring()), "svg") == wanted


@pytest.mark.parametrize("format", ["svg", "png", "pdf"])
def test_the_same_bytes_under_other_fonts_languages_and_times(tmp_path, monkeypatch, format):
    (tmp_path / "fonts").mkdir()
    serif = Path(_font("DejaVuSans.ttf")).with_name("DejaVuSerif-Bold.ttf")
    shutil.copy(serif, tmp_path / "fonts")
    (tmp_path / "other.conf").write_text(_FONTCONFIG.format(folder=tmp_path / "fonts"))
    dot = to_dot(scored(60))
    wanted, start = draw_dot(dot, format), time.time()
    for name, value in {
        "FONTCONFIG_FILE": str(tmp_path / "other.conf"),
        "LANG": "ja_JP.UTF-8",
        "LC_ALL": "tr_TR.UTF-8",
        "GVBINDIR": str(tmp_path),
        "GV_FILE_PATH": str(tmp_path),
        "SOURCE_DATE_EPOCH": "no number",
        "TZ": "Asia/Tokyo",
    }.items():
        monkeypatch.setenv(name, value)
    time.sleep(max(0, 1.01 - (time.time() - start)))  # a PDF's date is in seconds
    assert draw_dot(dot, format) == wanted


def test_a_pdf_whose_date_is_gone_is_whole():
    """Every part still begins where the table at its end says."""
    pdf = draw_dot(to_dot(docstring()), "pdf")
    assert b"/CreationDate (D:19700101000000Z)" in pdf
    table = int(pdf.rsplit(b"startxref", 1)[1].split()[0])
    entries = pdf[table:].split(b"trailer")[0].splitlines()[3:]
    assert len(entries) > 10
    for number, entry in enumerate(entries, 1):
        assert pdf[int(entry.split()[0]) :].startswith(f"{number} 0 obj".encode())


def test_a_file_in_the_working_folder_is_not_run(tmp_path, monkeypatch):
    for name in ("pygraphviz.py", "graphviz.py"):
        (tmp_path / name).write_text("open('ran', 'w')")
    monkeypatch.chdir(tmp_path)
    assert draw_dot("digraph { a -> b }", "svg").startswith(MAGIC["svg"])
    assert not (tmp_path / "ran").exists()


def test_without_its_font_nothing_is_drawn(monkeypatch):
    monkeypatch.setattr("graphs.pictures.rendering._FONTS", ("Papyrus.ttf",))
    with pytest.raises(InputError, match=r"need the font Papyrus\.ttf of matplotlib: install"):
        draw_dot("digraph { a -> b }", "svg")


def test_render_takes_a_format_beside_the_suffix(tmp_path):
    render("digraph { a -> b }", tmp_path / "picture", "PNG")
    assert (tmp_path / "picture").read_bytes().startswith(MAGIC["png"])


def test_render_errors(tmp_path):
    with pytest.raises(InputError, match="picture format 'gif': expected one of svg, png, pdf"):
        render(docstring(), tmp_path / "c.gif")
    with pytest.raises(InputError, match="Graphviz could not draw this DOT text: "):
        render("digraph { a -> ", tmp_path / "c.svg")
    assert not list(tmp_path.iterdir())


def test_place_keeps_wide_heads_apart():
    rows = [["input"], ["a0.h0", "a0.h1", "a0.h2"], ["m0"], ["logits"]]
    ports = {"a0.h0": ("q", "qk", "qv", "qkv", "k", "kv", "v"), "a0.h1": ("q",)}
    placement = place(rows, frozenset({"input", "m0", "logits"}), ports, [("input", "a0.h0")])
    left, right = placement.centre["a0.h0"][0], placement.centre["a0.h1"][0]
    assert abs(left - right) > 80
    assert placement.path("input", "logits", "").startswith("e,-14.0,")
    assert placement.path("input", "m0", "").startswith("e,0.0,")


def comparison_pair() -> tuple[Circuit, Circuit]:
    graph = component_graph(GraphShape(4, 8, has_mlp=False))
    a = Circuit.from_edges(graph, [*DOCSTRING[4:], "input->a1.h4<k>", "input->logits"])
    return a, Circuit.from_edges(graph, DOCSTRING)


def test_compare():
    a, b = comparison_pair()
    result = compare(a, b)
    assert len(result.edges.common) == 20
    assert result.edges.only_a == ("input->a1.h4<k>", "input->logits")
    assert set(result.edges.only_b) == set(DOCSTRING[:4])
    assert result.edges.precision == pytest.approx(20 / 22)
    assert result.edges.recall == pytest.approx(20 / 24)
    assert result.edges.f1 == pytest.approx(2 * 20 / (22 + 24))
    assert result.edges.jaccard == pytest.approx(20 / 26)
    assert result.nodes.only_a == result.nodes.only_b == ()
    assert (result.nodes.precision, result.nodes.f1) == (1, 1)
    back = compare(b, a).edges
    assert (back.precision, back.only_a) == (result.edges.recall, result.edges.only_b)


def test_overlap_of_empty_sets():
    nothing, half = Overlap((), (), ()), Overlap((), (), ("x",))
    assert [nothing.precision, nothing.recall, nothing.f1, nothing.jaccard] == [1, 1, 1, 1]
    assert [half.precision, half.recall, half.f1, half.jaccard] == [0, 0, 0, 0]


def test_compare_refuses_other_graphs():
    a = Circuit.from_edges(component_graph(GraphShape(2, 2)), [])
    b = Circuit.from_edges(component_graph(GraphShape(2, 4, 2)), [])
    message = "different graphs: n_heads is 2 in one and 4 in the other; compare circuits"
    with pytest.raises(GraphError, match=message):
        compare(a, b)
    with pytest.raises(GraphError, match="different graphs"):
        to_dot_comparison(a, b)


def test_comparison_diagram(tmp_path):
    a, b = comparison_pair()
    dot = to_dot_comparison(a, b, ("mine", "reference"))
    _, edges = drawn(dot)
    assert len(edges) == 26
    styles = {
        name: (edges[name]["color"], edges[name].get("style", "solid"))
        for name in ("input->a1.h4<k>", DOCSTRING[0], DOCSTRING[-1])
    }
    assert [style for _, style in styles.values()] == ["dashed", "dotted", "solid"]
    assert len({color for color, _ in styles.values()}) == 3
    for words in ("in both: 20", "only mine: 2", "only reference: 4", "F1 0.87"):
        assert words in dot
    render(dot, tmp_path / "c.png")
    assert (tmp_path / "c.png").read_bytes().startswith(MAGIC["png"])
