"""Plans against brute force on a graph in which every node and receiver has its positions."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import networkx as nx
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from graphs import Graph, GraphShape, component_graph
from graphs import plan as plan_module
from graphs.order import edge_order, receiver_order
from graphs.plan import Plan, Planner
from graphs.sites import Site

QUICK = settings(max_examples=60, derandomize=True, deadline=None, database=None)

# --- the definitions, spelled out ---------------------------------------------------------


@dataclass(frozen=True)
class Case:
    graph: Graph
    n_pos: int
    scored: tuple[int, ...]
    causal: bool
    kept: np.ndarray
    seed: int
    layout: tuple[int, ...]  # span of each position

    def planner(self) -> Planner:
        spans = self.layout if self.graph.shape.spans else None
        return Planner(self.graph, self.n_pos, self.scored, causal=self.causal, spans=spans)

    def in_span(self, position: int, span: str) -> bool:
        return not span or self.graph.shape.spans[self.layout[position]] == span

    def unit(self, node: str) -> str:
        """Return what a node is recomputed with: a latent's place, but for transcoders."""
        place = node.split(".")[0]
        site = self.graph.shape.site_at.get(place)
        return node if site is None or site.kind == "transcoder" else place

    @property
    def units(self) -> list[str]:
        return list(dict.fromkeys(self.unit(node) for node in self.graph.components.nodes))

    def receiver(self, v: int) -> tuple[str, int]:
        """Return its name in the graph that is not split, and its span."""
        graph = self.graph
        name = graph.components.receivers[graph.receiver_component[v]]
        return name, int(graph.receiver_span[v])


@st.composite
def cases(
    draw: Any, n_pos: int | None = None, *, split: bool = False, latents: bool = False
) -> Case:
    kv_heads = draw(st.integers(1, 2))
    shape = GraphShape(
        n_layers=draw(st.integers(0, 3)),
        n_heads=kv_heads * draw(st.integers(1, 2)),
        n_kv_heads=kv_heads,
        has_mlp=draw(st.booleans()),
        parallel=draw(st.booleans()),
        split_qkv=draw(st.booleans()),
        split_embed=draw(st.booleans()),
    )
    n_pos = draw(st.integers(1, 5)) if n_pos is None else n_pos
    scored = draw(st.sets(st.integers(0, n_pos - 1), min_size=1, max_size=2))
    layout = (0,) * n_pos
    if split:  # spans in any order, some of them in none of these prompts
        layout = tuple(draw(st.lists(st.integers(0, 3), min_size=n_pos, max_size=n_pos)))
        spans = tuple("ABCD")
        there = tuple(spans[s] for s in sorted({layout[p] for p in scored}))
        every = tuple((s, t) for s in range(4) for t in range(4))
        shape = dataclasses.replace(shape, spans=spans, scored_spans=there, reaches=every)
    if latents:
        shape = dataclasses.replace(shape, sites=draw(sites(shape)))
    graph = component_graph(shape)
    seed = draw(st.integers(0, 2**32 - 1))
    density = draw(st.sampled_from([0.05, 0.2, 0.5, 0.9, 1.0]))
    kept = np.random.default_rng(seed).random(graph.n_edges) < density
    return Case(graph, n_pos, tuple(sorted(scored)), draw(st.booleans()), kept, seed, layout)


@st.composite
def sites(draw: Any, shape: GraphShape) -> tuple[Site, ...]:
    """At most one site at each place of the model, of up to three latents."""
    found = []
    for layer in range(shape.n_layers + 1):
        kinds: list[tuple[str, ...]] = [("resid_pre",)]
        if layer < shape.n_layers:
            kinds.append(("attn_out", "attn_z"))
            if shape.has_mlp:
                kinds.append(("mlp_out", "neurons", "transcoder"))
                kinds += [] if shape.parallel else [("resid_mid",)]
        for some in kinds:
            if draw(st.booleans()):
                latents = tuple(range(draw(st.integers(0, 3))))
                found.append(Site(draw(st.sampled_from(some)), layer, latents))
    return tuple(found)


EVERY_KIND = cases() | cases(split=True) | cases(latents=True)


def reads_as(graph: Graph, receiver: str, node: str) -> set[str]:
    """Return ``point`` (own position only) and ``spread`` (as key or value: later ones too)."""
    if node == "logits" or node[0] in "mr":
        return {"point"}
    if receiver.endswith("<q>"):
        return {"point"}
    if receiver.endswith(("<k>", "<v>")) or ".kv" in receiver:
        return {"spread"}
    return {"point"} if graph.shape.grouped else {"point", "spread"}


def explicit(case: Case, kept: np.ndarray) -> nx.DiGraph:
    """Vertices ``("in", receiver, pos)`` and ``("out", node, pos)``; kept edges only."""
    graph, every = case.graph.components, range(case.n_pos)
    view = nx.DiGraph()
    for v, name in enumerate(graph.receivers):
        for index in graph.fed_by(v):
            node = graph.nodes[index]
            kinds = reads_as(graph, name, node)
            for p in every:
                view.add_edge(("in", name, p), ("out", node, p)) if "point" in kinds else None
                if "spread" in kinds:
                    later = range(p, case.n_pos) if case.causal else every
                    view.add_edges_from((("in", name, p), ("out", node, t)) for t in later)
    for edge in np.flatnonzero(kept):
        (u, span), (v, _) = ends(case.graph.edge_name(edge))
        here = (p for p in every if case.in_span(p, span))
        view.add_edges_from((("out", u, p), ("in", v, p)) for p in here)
    return view


def ends(edge: str) -> list[tuple[str, str]]:
    """Names of sender and receiver without their span, and the span."""
    return [(name, span) for name, _, span in (end.partition("@") for end in edge.split("->"))]


def before_goal(view: nx.DiGraph, case: Case) -> set[Any]:
    """Vertices from which a scored logit can be reached."""
    goals = {("out", "logits", p) for p in case.scored}
    return goals.union(*(nx.ancestors(view, g) for g in goals if g in view))


def steps_of(case: Case) -> Iterator[tuple[Planner, int, nx.DiGraph]]:
    """Visit receivers in ACDC's order with all later ones finished."""
    planner = case.planner()
    done = np.zeros(case.graph.n_edges, dtype=bool)
    for receiver in receiver_order(case.graph):
        yield planner, receiver, explicit(case, case.kept & done)
        edges = edge_order(case.graph, receiver)
        planner.finish(receiver, edges[case.kept[edges]])
        done[edges] = True


def touched_at(case: Case, receiver: int) -> np.ndarray:
    return np.random.default_rng([case.seed, receiver]).random(case.n_pos) < 0.5


# --- plans --------------------------------------------------------------------------------


@QUICK
@given(EVERY_KIND)
def test_live_positions_are_those_from_which_a_scored_logit_can_be_reached(case: Case) -> None:
    for planner, receiver, view in steps_of(case):
        goal, (name, span) = before_goal(view, case), case.receiver(receiver)
        live = [("in", name, p) in goal and case.layout[p] == span for p in range(case.n_pos)]
        assert planner.live(receiver).tolist() == live


@QUICK
@given(EVERY_KIND)
def test_plans_walk_exactly_the_live_vertices_that_the_change_reaches(case: Case) -> None:
    graph = case.graph.components
    for planner, receiver, view in steps_of(case):
        touched, (name, span) = touched_at(case, receiver), case.receiver(receiver)
        at = np.flatnonzero(touched & (np.array(case.layout) == span))
        seeds = {("in", name, int(p)) for p in at}
        reached = seeds.union(*(nx.descendants(view, s) for s in seeds))
        goal = before_goal(view, case)
        changed = {
            (kind, case.unit(name) if kind == "out" else name, p)
            for kind, name, p in reached & goal
        }
        plan = planner.plan(receiver, touched)
        got = {("out", case.units[s.unit], p) for s in plan.steps for p in s.positions}
        got |= {
            ("in", graph.receivers[f.receiver], p) for f in plan.flows.values() for p in f.positions
        }
        assert got == changed
        assert plan.reaches_logits == any(kind == "out" for kind, _, _ in changed)
        wanted = {name for kind, name, _ in goal if kind == "out"}
        for step in plan.steps:
            parts = [n for n in graph.senders if case.unit(n) == case.units[step.unit]]
            assert [graph.senders[u] for u in step.senders] == [n for n in parts if n in wanted]
        check_structure(case, plan, graph.receiver_index[name])


def check_structure(case: Case, plan: Plan, tested: int) -> None:
    """Order of the steps, receivers of each, senders of each flow."""
    graph, out = case.graph.components, {step.unit: set(step.positions) for step in plan.steps}
    units = [step.unit for step in plan.steps]
    assert units == sorted(set(units))
    assert not units or case.units[units[-1]] == "logits"
    unit_of = [case.units.index(case.unit(name)) for name in graph.nodes]
    assert plan.n_positions == sum(len(step.positions) for step in plan.steps)
    kept_at: dict[tuple[str, str], set[int]] = {}
    for edge in np.flatnonzero(case.kept):
        (u, span), (v, _) = ends(case.graph.edge_name(edge))
        here = {p for p in range(case.n_pos) if case.in_span(p, span)}
        kept_at.setdefault((u, v), set()).update(here)
    for step in plan.steps:
        feeds = [
            v
            for v in range(len(graph.receivers))
            if step.unit in {unit_of[node] for node in graph.fed_by(v)}
        ]
        assert sorted(step.receivers) == [v for v in feeds if v in plan.flows]
        assert list(step.positions) == sorted(set(step.positions))
    for v, flow in plan.flows.items():
        assert flow.receiver == v
        senders = {
            u: at
            for u in range(graph.n_senders)
            if (at := kept_at.get((graph.senders[u], graph.receivers[v]), set()))
            & out.get(unit_of[u], set())
        }
        assert list(flow.units) == sorted(flow.units)  # topological order is index order
        assert sum(map(len, flow.senders)) == (0 if v == tested else len(senders))
        for unit, some, at in zip(flow.units, flow.senders, flow.kept_at, strict=True):
            assert some
            assert list(some) == sorted(some)
            for u in some:
                assert unit_of[u] == unit
                assert senders[u] == set(range(case.n_pos) if at is None else at)
            assert at is None or list(at) == sorted(at)
        assert flow.positions


@QUICK
@given(EVERY_KIND)
def test_units_are_named_neighbours(case: Case) -> None:
    graph = case.graph.components
    assert [case.units[unit] for unit in graph.unit] == [case.unit(name) for name in graph.nodes]


@QUICK
@given(cases())
def test_without_dictionaries_a_unit_is_a_node(case: Case) -> None:
    assert case.graph.unit.tolist() == list(range(case.graph.n_nodes))


@QUICK
@given(cases(n_pos=1))
def test_planned_nodes_are_descendants_along_kept_edges_that_reach_logits(case: Case) -> None:
    graph = case.graph
    for planner, receiver, _ in steps_of(case):
        view = nx.DiGraph()
        view.add_nodes_from(graph.nodes)
        finished = set(receiver_order(graph)[: receiver_order(graph).index(receiver)])
        for edge in np.flatnonzero(case.kept):
            if graph.edge_receiver[edge] in finished:
                for node in graph.fed_by(graph.edge_receiver[edge]):
                    view.add_edge(graph.senders[graph.edge_sender[edge]], graph.nodes[node])
        fed = {graph.nodes[node] for node in graph.fed_by(receiver)}
        below = fed.union(*(nx.descendants(view, n) for n in fed))
        wanted = below & ({"logits"} | nx.ancestors(view, "logits"))
        plan = planner.plan(receiver, np.array([True]))
        assert {graph.nodes[step.unit] for step in plan.steps} == wanted


@QUICK
@given(cases())
def test_planning_changes_nothing(case: Case) -> None:
    for planner, receiver, _ in steps_of(case):
        touched = touched_at(case, receiver)
        first = planner.plan(receiver, touched)
        planner.live(receiver)
        assert planner.plan(receiver, touched) == first


@QUICK
@given(cases())
def test_a_change_nowhere_needs_nothing(case: Case) -> None:
    for planner, receiver, _ in steps_of(case):
        assert planner.plan(receiver, np.zeros(case.n_pos, dtype=bool)) == Plan({}, ())


@QUICK
@given(cases())
def test_nothing_is_recomputed_before_the_first_change_of_a_causal_model(case: Case) -> None:
    case = dataclasses.replace(case, causal=True)
    first = case.seed % case.n_pos
    for planner, receiver, _ in steps_of(case):
        plan = planner.plan(receiver, np.arange(case.n_pos) >= first)
        assert all(step.positions[0] >= first for step in plan.steps)
        assert all(flow.positions[0] >= first for flow in plan.flows.values())


@QUICK
@given(cases())
def test_plans_are_plain_data(case: Case) -> None:
    for planner, receiver, _ in steps_of(case):
        plan = planner.plan(receiver, np.ones(case.n_pos, dtype=bool))
        as_json = json.loads(json.dumps(dataclasses.asdict(plan)))  # numpy scalars would fail
        assert len(as_json["steps"]) == len(plan.steps)
        assert hash(plan.steps) == hash(planner.plan(receiver, np.ones(case.n_pos, bool)).steps)


# --- hand-made cases ----------------------------------------------------------------------


def planner_with(graph: Graph, kept: list[str], n_pos: int, until: str) -> Planner:
    """Finish the receivers before ``until`` with the kept edges."""
    mask, planner = graph.edge_mask(kept), Planner(graph, n_pos, (n_pos - 1,))
    for receiver in receiver_order(graph):
        if graph.receivers[receiver] == until:
            return planner
        edges = edge_order(graph, receiver)
        planner.finish(receiver, edges[mask[edges]])
    raise AssertionError(until)


def positions(graph: Graph, plan: Plan) -> dict[str, tuple[int, ...]]:
    return {graph.nodes[step.unit]: step.positions for step in plan.steps}


EVERYWHERE = np.ones(4, dtype=bool)


def test_dead_receivers_have_empty_plans() -> None:
    graph = component_graph(GraphShape(2, 2))
    planner = planner_with(graph, ["a1.h0->logits"], 4, "a1.h1<v>")
    assert not planner.live(graph.receiver_index["a1.h1<v>"]).any()
    assert planner.plan(graph.receiver_index["a1.h1<v>"], EVERYWHERE) == Plan({}, ())
    assert planner.plan(graph.receiver_index["m1"], EVERYWHERE) == Plan({}, ())
    assert planner.plan(graph.receiver_index["a1.h0<v>"], EVERYWHERE).reaches_logits


def test_what_is_read_at_the_scored_position_is_recomputed_there_only() -> None:
    graph = component_graph(GraphShape(2, 2))
    planner = planner_with(graph, ["m1->logits", "a1.h0->m1"], 4, "a1.h0<v>")
    for kind in "vk":  # the head's input matters everywhere, its output at the end
        v = graph.receiver_index[f"a1.h0<{kind}>"]
        assert planner.live(v).all()
        only_last = {"a1.h0": (3,), "m1": (3,), "logits": (3,)}
        assert positions(graph, planner.plan(v, EVERYWHERE)) == only_last
    assert planner.live(graph.receiver_index["a1.h0<q>"]).tolist() == [False] * 3 + [True]


def test_queries_do_not_widen_what_is_recomputed_but_values_do() -> None:
    graph = component_graph(GraphShape(2, 2))
    for kind, where in (("q", (3,)), ("v", (0, 1, 2, 3)), ("k", (0, 1, 2, 3))):
        kept = ["a1.h0->logits", f"m0->a1.h0<{kind}>"]
        planner = planner_with(graph, kept, 4, "m0")
        plan = planner.plan(graph.receiver_index["m0"], EVERYWHERE)
        assert positions(graph, plan) == {"m0": where, "a1.h0": (3,), "logits": (3,)}


def test_a_change_at_one_key_reaches_all_later_queries() -> None:
    graph = component_graph(GraphShape(2, 1))
    kept = ["a0.h0->a1.h0<v>", "a1.h0->logits"]
    planner = planner_with(graph, kept, 4, "a0.h0<k>")
    touched = np.array([False, True, False, False])
    plan = planner.plan(graph.receiver_index["a0.h0<k>"], touched)
    assert positions(graph, plan) == {"a0.h0": (1, 2, 3), "a1.h0": (3,), "logits": (3,)}
    v = graph.receiver_index["a1.h0<v>"]
    assert plan.flows[v].positions == (1, 2, 3)
    assert plan.flows[v].senders == ((graph.sender_index["a0.h0"],),)


def test_grouped_key_receiver_feeds_every_head_of_its_group() -> None:
    graph = component_graph(GraphShape(1, 4, n_kv_heads=2))
    kept = ["a0.h0->logits", "a0.h1->logits", "a0.h2->logits"]
    planner = planner_with(graph, kept, 4, "a0.kv1<v>")
    plan = planner.plan(graph.receiver_index["a0.kv0<k>"], EVERYWHERE)
    assert positions(graph, plan) == {"a0.h0": (3,), "a0.h1": (3,), "logits": (3,)}
    plan = planner.plan(graph.receiver_index["a0.kv1<k>"], EVERYWHERE)
    assert positions(graph, plan) == {"a0.h2": (3,), "logits": (3,)}  # a0.h3 is dead


def test_keys_after_the_query_do_nothing_in_a_causal_model() -> None:
    graph = component_graph(GraphShape(1, 1, has_mlp=False))
    late = np.array([False, False, True])
    for causal, reaches in ((True, False), (False, True)):
        planner = Planner(graph, 3, (1,), causal=causal)
        logits = graph.receiver_index["logits"]
        planner.finish(logits, edge_order(graph, logits))
        assert planner.plan(graph.receiver_index["a0.h0<v>"], late).reaches_logits == reaches


# --- kernels ------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["_live_positions", "_walk"])
@QUICK
@given(case=EVERY_KIND)
def test_kernel_equals_its_python_function(name: str, case: Case) -> None:
    kernel = getattr(plan_module, name)
    for planner, receiver, _ in steps_of(case):
        component = int(case.graph.receiver_component[receiver])
        fed = planner._fed(component)
        if name == "_live_positions":
            how = (bool(planner.point[component]), bool(planner.spread[component]))
            arguments = (planner.need[fed], *how, planner.causal)
        else:
            start, kept = planner._kept_csr()
            seed = touched_at(case, receiver) & planner.live(receiver)
            spans = (planner._span_start, planner._by_span)
            ports = (planner._port_start, planner._ports, planner.point, planner.spread)
            state = (planner._live, planner.need, planner.causal)
            arguments = (component, seed, fed.start, start, kept, *spans, *ports, *state)
        np.testing.assert_equal(kernel(*arguments), kernel.py_func(*arguments))


# --- planted bugs -------------------------------------------------------------------------


@pytest.mark.parametrize("bug", ["narrow keys", "untouched", "forgets senders"])
def test_brute_force_sees_planted_bugs(bug: str, monkeypatch: pytest.MonkeyPatch) -> None:
    if bug == "narrow keys":  # keys and values only matter at the scored position
        live = Planner.live
        monkeypatch.setattr(Planner, "live", lambda self, v: live(self, v) & self.need[-1])
    elif bug == "untouched":  # every live position is planned
        plan = Planner.plan
        monkeypatch.setattr(Planner, "plan", lambda self, v, touched: plan(self, v, touched | True))
    else:  # only the first kept sender is remembered
        finish = Planner.finish
        monkeypatch.setattr(Planner, "finish", lambda self, v, edges: finish(self, v, edges[:1]))
    live_test = test_live_positions_are_those_from_which_a_scored_logit_can_be_reached
    plan_test = test_plans_walk_exactly_the_live_vertices_that_the_change_reaches
    with pytest.raises(AssertionError):
        (plan_test if bug == "untouched" else live_test)()
