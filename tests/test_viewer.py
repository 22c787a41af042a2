"""The viewer of a circuit, driven by mouse and keyboard in a browser; and which nodes are alike."""

from __future__ import annotations

import json
import re
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from urllib.parse import parse_qs, quote, urlencode
from xml.etree import ElementTree

import networkx as nx
import numpy as np
import pytest
from browser import EVIL, browse, check_policy
from oracle import small_model, small_task

import acdc.pages.render as render_module
from acdc.engine.experiment import Experiment
from acdc.engine.metrics import get_metric
from acdc.pages.circuit import CircuitView, view_circuit
from acdc.pages.filling import fill, resource
from acdc.pages.page import page
from acdc.tasks.texts import Texts
from graphs import Circuit, GraphShape, component_graph
from graphs.similar import similar_nodes


@pytest.fixture(scope="module")
def view() -> CircuitView:
    """Return a circuit of 32 edges in which two heads are alike, and the best of the others."""
    experiment = Experiment(small_model("LN", 0), small_task(0, 2), get_metric("logit_diff"))
    graph = experiment.graph
    scores = np.random.default_rng(1).normal(size=graph.n_edges)
    for name in graph.edge_names():
        if "a0.h0" in name:
            scores[graph.edge_index(name.replace("a0.h0", "a0.h1"))] = (
                scores[graph.edge_index(name)] * 1.1
            )
    inside = np.argsort(np.argsort(-np.abs(scores))) < 32
    circuit = Circuit(graph, scores, inside, {"helps": 1})
    return view_circuit(circuit, experiment, Texts(None), n_prompts=1)


@pytest.fixture(scope="module")
def text(view: CircuitView) -> str:
    report = SimpleNamespace(view=view, settings=SimpleNamespace(saes=None), folder="run")
    body = fill(
        "report/circuit.html", report=report, wide=False, names=list(view.data["nodes"]),
        reading={"meaning": "its worth", "signed": True, "above": True},
        drawings=[render_module.Markup(one.drawing.svg) for one in view.pictures],
        keys=render_module._KEYS,
    )  # fmt: skip
    script = "\n".join(resource(f"viewer/{name}.js") for name in render_module._SCRIPTS)
    data = view.data | {"n_runs": None}
    return page("viewer", body, style=resource("report.css"), script=script, data=data)


def test_the_page_keeps_to_its_policy(text: str) -> None:
    check_policy(text)
    files = (Path(render_module.__file__).parent / "viewer").glob("*.js")
    assert sorted(path.stem for path in files) == sorted(render_module._SCRIPTS)


HELPERS = """
const press = (key, on = document.activeElement) =>
  on.dispatchEvent(new KeyboardEvent("keydown", { key, bubbles: true, cancelable: true }));
const here = name => [...document.querySelectorAll(".picture:not([hidden]) .node")]
  .find(node => node.dataset.node === name);
const click = (name, more = {}) =>
  here(name).dispatchEvent(new MouseEvent("click", { bubbles: true, ...more }));
const written = () => { write(); return location.hash; };
const all = kind => [...document.querySelectorAll(`.picture:not([hidden]) .node.${kind}`)]
  .map(node => node.dataset.node);
const panel = () => document.getElementById("panel").innerText;
const named = words => [...document.querySelectorAll("#panel button, .tools button")]
  .find(one => one.textContent.startsWith(words));
const type = (element, words) => {
  element.focus();
  element.value = words;
  element.dispatchEvent(new Event("input", { bubbles: true }));
};
const bright = () =>
  document.querySelectorAll(".picture:not([hidden]) .line:not(.gone):not(.away)").length;
"""
PROBE = (
    HELPERS
    + """
const seen = { start: location.hash };
// search
press("/");
seen.focus = document.activeElement.id;
type($("search"), "m1");
seen.found = all("found");
seen.hits = $("hits").textContent;
press("Enter");
seen.entered = panel().split("\\n")[0];
press("Escape");
seen.left = [$("search").value, document.activeElement.id];
// pins, by mouse and by key
click("m1", { shiftKey: true });
here("logits").focus();
press("Enter");
seen.logits = panel().split("\\n")[0];
press("p");
seen.pins = all("pinned");
seen.pinHash = written();
press("Escape");
press("Escape");
seen.unpinned = all("pinned");
// paths
here("input").focus();
press("Enter");
press("f");
click("logits");
press("t");
seen.paths = panel();
seen.onPath = bright();
seen.rows = [...document.querySelectorAll("#panel .paths li")].map(row => row.textContent);
seen.pathHash = written();
press("Escape");
seen.noPath = written();
// along edges
click("logits");
here("logits").focus();
press("ArrowDown");
seen.down = panel().split("\\n")[0];
press("ArrowUp");
seen.up = panel().split("\\n")[0];
seen.link = (() => {
  const link = document.querySelector("#panel table.ends a");
  link.focus();
  const found = [document.activeElement === link, link.getAttribute("href"), link.textContent];
  link.click();
  return [...found, panel().split("\\n")[0]];
})();
// groups
press("Escape");
named("propose").click();
seen.groups = state.groups.map(group => group.nodes);
document.querySelector("#panel .group input").focus();
type(document.querySelector("#panel .group input"), "movers <b>");
type(document.querySelector("#panel .group textarea"), "a note & more");
document.activeElement.blur();
const views = [...document.querySelectorAll("[data-picture]")];
views.at(-1).click();
seen.places = [...document.querySelectorAll("#groups .node")].map(node => node.dataset.node);
seen.sums = pictures.at(-1).lines.map(line => line.edges.length);
here("group:0").focus();
press("Enter");
seen.group = [panel().split("\\n")[0], document.querySelector("#panel .group textarea").value];
seen.groupHash = written();
// files
const saved = [];
HTMLAnchorElement.prototype.click = function () {
  saved.push([this.download, this.href.slice(0, 5)]);
};
for (const at of [0, views.length - 1]) {
  views[at].click();
  $("save-svg").click();
  const canvas = paint();
  const pixels = canvas.getContext("2d").getImageData(0, 0, canvas.width, canvas.height).data;
  const colours = new Set();
  for (let i = 0; i < pixels.length; i += 28) colours.add(pixels.slice(i, i + 3).join());
  const size = [canvas.width, canvas.height];
  (seen.files ??= []).push({ svg: pictureText(), size, colours: colours.size });
}
seen.saved = saved;
// height, theme
views[0].click();
const svg = document.querySelector(".picture:not([hidden]) svg");
press("h", document.body);
seen.high = box(svg)[3] === Number(pictures[0].home.split(" ")[3]);
const back = () => getComputedStyle(document.body).backgroundColor;
$("theme").click();
seen.dark = [back(), written().includes("theme=dark")];
$("theme").click();
seen.light = back();
"""
)


@pytest.fixture(scope="module")
def seen(text: str, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    found = browse(text, PROBE, tmp_path_factory.mktemp("viewer"))
    assert found["said"] == found["consoles"] == []
    return found


def words(address: str) -> dict[str, str]:
    return {name: values[0] for name, values in parse_qs(address.removeprefix("#?")).items()}


def test_nodes_are_found_by_name(seen: dict[str, Any], view: CircuitView) -> None:
    matching = [name for name in view.data["nodes"] if "m1" in name]
    assert seen["start"] == ""
    assert seen["focus"] == "search"
    assert set(seen["found"]) <= set(matching)
    assert "m1" in seen["found"]
    assert seen["hits"] == f"{len(matching)} node{'s' if len(matching) > 1 else ''}"
    assert seen["entered"] == "m1"
    assert seen["left"] == ["", ""]


def test_nodes_are_pinned_and_the_address_says_so(seen: dict[str, Any]) -> None:
    assert seen["logits"] == "logits"
    assert set(seen["pins"]) == {"m1", "logits"}
    assert json.loads(words(seen["pinHash"])["pins"]) == ["m1", "logits"]
    assert words(seen["pinHash"])["node"] == "logits"
    assert seen["unpinned"] == []


def test_all_paths_between_two_nodes_are_traced(seen: dict[str, Any], view: CircuitView) -> None:
    drawn = {at for line in view.data["pictures"][0] for at in line}
    ends = nx.DiGraph()
    for edge in (view.data["edges"][at] for at in drawn):
        before = ends.get_edge_data(edge[0], edge[1], {"score": 0.0})["score"]
        ends.add_edge(edge[0], edge[1], score=max(before, abs(edge[3])))
    ways = list(nx.all_simple_paths(ends, "input", "logits"))
    weakest = sorted(
        (min(ends.edges[pair]["score"] for pair in nx.utils.pairwise(way)) for way in ways),
        reverse=True,
    )
    said = re.search(r"([\d,]+) paths? along ([\d,]+) edges", seen["paths"])
    assert said is not None
    assert int(said[1].replace(",", "")) == len(ways) > 3
    shown = [float(row.split()[-1]) for row in seen["rows"]]
    assert shown == pytest.approx(weakest[: len(shown)], rel=5e-3)
    assert seen["rows"][0].startswith("input → ")
    assert 0 < seen["onPath"] <= len(view.pictures[0].lines)
    assert (words(seen["pathHash"])["from"], words(seen["pathHash"])["to"]) == ("input", "logits")
    assert "from" not in words(seen["noPath"])


def test_arrows_and_links_go_along_edges(seen: dict[str, Any], view: CircuitView) -> None:
    drawn = [view.data["edges"][at] for line in view.data["pictures"][0] for at in line]
    into = max((edge for edge in drawn if edge[1] == "logits"), key=lambda edge: abs(edge[3]))
    assert seen["down"] == into[0]
    out = max((edge for edge in drawn if edge[0] == into[0]), key=lambda edge: abs(edge[3]))
    assert seen["up"] == out[1]
    focused, address, name, shown = seen["link"]
    assert focused
    assert words(address)["node"] == name == shown


def test_groups_have_names_notes_and_a_picture(seen: dict[str, Any], view: CircuitView) -> None:
    assert seen["groups"] == view.data["proposed"] != []
    assert seen["group"] == ["movers <b>", "a note & more"]
    first = json.loads(words(seen["groupHash"])["groups"])[0]
    assert first == ["movers <b>", "a note & more", *seen["groups"][0]]
    grouped = {name for nodes in seen["groups"] for name in nodes}
    assert grouped.isdisjoint(seen["places"])
    assert {f"group:{i}" for i in range(len(seen["groups"]))} <= set(seen["places"])
    inside = [set(nodes) for nodes in seen["groups"]]
    drawn = {at for line in view.data["pictures"][0] for at in line}
    edges = [view.data["edges"][at] for at in drawn]
    between = [e for e in edges if not any({e[0], e[1]} <= nodes for nodes in inside)]
    assert sum(seen["sums"]) == len(between)


def test_pictures_are_saved(seen: dict[str, Any], view: CircuitView) -> None:
    assert seen["saved"] == [["circuit.svg", "blob:"]] * 2
    for file, name in zip(seen["files"], ("a1.h0", "group"), strict=True):
        root = ElementTree.fromstring(file["svg"])
        assert root.get("viewBox")
        kinds = {element.tag.rpartition("}")[2] for element in root.iter()}
        assert kinds <= {"svg", "rect", "path", "polygon", "polyline", "ellipse", "text"}, name
        assert not any("var(" in value for e in root.iter() for value in e.attrib.values())
        assert max(file["size"]) >= 1500
        assert file["colours"] > 20
    texts = [e.text for e in ElementTree.fromstring(seen["files"][1]["svg"]).iter() if e.text]
    assert "movers <b>" in texts


def test_height_and_theme(seen: dict[str, Any]) -> None:
    assert seen["high"]
    assert seen["dark"] == ["rgb(21, 24, 28)", True]
    assert seen["light"] == "rgb(255, 255, 255)"


def test_an_address_opens_the_view_that_it_was_of_and_nothing_of_it_is_markup(
    text: str, view: CircuitView, tmp_path: Path
) -> None:
    nodes = view.data["proposed"][0]
    asked = {
        "node": "logits", "pins": json.dumps(["m1", EVIL, 3]), "from": EVIL, "to": "logits",
        "groups": json.dumps([[EVIL, EVIL, *nodes, EVIL], [1], 2, ["again", "", *nodes]]),
        "picture": "7", "least": "none", "theme": EVIL,
    }  # fmt: skip
    probe = f"""
      location.hash = {json.dumps("#?" + urlencode(asked, quote_via=quote))};
      recall();
      show();
      const seen = {{ node: state.node, pins: [...state.pins], from: state.from, to: state.to,
        groups: state.groups, picture: state.picture, least: state.least, theme: state.theme }};
      choose(null);
      views.at(-1).click();
      seen.text = document.getElementById("groups").textContent;
      seen.value = document.querySelector("#panel .group input").value;
    """
    found = browse(text, HELPERS + probe, tmp_path)
    assert found["said"] == found["consoles"] == []
    assert found["ran"] is None
    kept = {
        name: found[name] for name in ("node", "pins", "from", "to", "picture", "least", "theme")
    }
    assert kept == {"node": "logits", "pins": ["m1"], "from": None, "to": "logits", "picture": 0,
                    "least": 0, "theme": ""}  # fmt: skip
    assert found["groups"] == [{"name": EVIL, "note": EVIL, "nodes": nodes}]
    assert EVIL in found["text"]
    assert found["value"] == EVIL


# --- nodes that are alike -----------------------------------------------------------------


def test_nodes_are_alike_that_have_the_same_neighbours() -> None:
    graph = component_graph(GraphShape(3, 4))
    edges = {
        "input->a0.h0<v>": 2.0, "input->a0.h1<v>": 1.0, "input->a0.h2<k>": 1.0,
        "a0.h0->a1.h0<k>": 1.0, "a0.h1->a1.h0<k>": 0.5, "a0.h2->a1.h0<k>": 1.0,
        "input->a1.h1<v>": 1.0, "input->a1.h2<v>": 1.0,
        "a1.h1->logits": 1.0, "a1.h2->logits": -1.0, "a1.h0->logits": 1.0,
        "input->a2.h3<v>": 3.0, "a2.h3->logits": 2.0,
    }  # fmt: skip
    scores = np.zeros(graph.n_edges)
    for name, score in edges.items():
        scores[graph.edge_index(name)] = score
    circuit = Circuit(graph, scores, graph.edge_mask(edges))
    # not a0.h2, which reads by another port; not a1.h2, which hurts where a1.h1 helps
    both = [("a1.h1", "a2.h3"), ("a0.h0", "a0.h1")]
    found = similar_nodes(circuit, circuit.in_circuit, least=0.9)
    assert [set(nodes) for nodes in found] == [set(nodes) for nodes in both]
    assert similar_nodes(circuit, circuit.in_circuit, least=0.9, one_layer=True) == [
        ("a0.h0", "a0.h1")
    ]
    nothing = np.zeros(graph.n_edges, dtype=bool)
    assert similar_nodes(circuit, nothing) == []
