"""Looking at latents: by hand on small cases, the page parsed, circuits over different bases."""

from __future__ import annotations

import json
import re
import shutil
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
import torch
from browser import EVIL, browse, check_policy
from latent_oracle import random_dictionary
from oracle import small_model, small_task
from rich.console import Console
from safetensors.torch import load_file, save_file
from scipy import sparse

import acdc
from acdc.cli import main
from acdc.dictionaries import activation, write_dictionary
from acdc.dictionaries.attach import attach
from acdc.engine.experiment import Experiment
from acdc.engine.metrics import get_metric
from acdc.errors import OptionError
from acdc.evidence.bases import sizes_at
from acdc.evidence.latents import Gallery, look
from acdc.evidence.latents.activations import Activations, Prompt, record
from acdc.evidence.latents.clusters import cluster_latents, correlations
from acdc.evidence.latents.effects import direct_effects
from acdc.evidence.latents.gallery import End, _link
from acdc.models import load_model
from acdc.pages.latents import to_html
from acdc.runs.discover import measure
from acdc.runs.opened import open_run
from acdc.tasks.texts import Texts, label
from acdc.terminal.latents import gallery_parts
from graphs import Circuit, GraphShape, basis_name, compare_bases, component_graph, select_top
from graphs.errors import GraphError
from graphs.sites import Site

NEURONPEDIA = "ln2/0-tc"


# --- activations, effects, clusters -------------------------------------------------------


def experiment_with(family: str, *places: tuple[str, str, int]):
    model = small_model(family, 0, dtype=torch.float64)
    plain = Experiment(model, small_task(0, 3), get_metric("logit_diff"), batch_size=2)
    return attach(plain, [random_dictionary(model, *place) for place in places]).experiment


def test_recorded_activations_are_the_dictionary_s() -> None:
    experiment = experiment_with(
        "LN", ("standard", "attn_z", 1), ("transcoder", "ln2_normalized", 0)
    )
    nodes = ("m0.f2", "a1.f1", "m0.f0")  # in no order
    found = record(experiment, nodes)
    assert [p.run for p in found.prompts].count("clean") == 3
    by_site = {a.site.name: a.dictionary for a in experiment.attachments}
    for p, prompt in enumerate(found.prompts):
        trace = experiment.model.forward(torch.tensor([prompt.tokens]))
        rows = found.values[found.start[p] : found.start[p + 1]].toarray()
        for column, node in enumerate(nodes):
            dictionary = by_site[node[:2]]
            x = activation(experiment.model, trace, dictionary.reads)[0]
            wanted = dictionary.encode(x)[:, int(node.partition(".f")[2])]
            assert rows[:, column] == pytest.approx(wanted.numpy(), abs=1e-6)
    pairs = {pair.clean for pair in experiment.task.pairs}
    assert {p.tokens for p in found.prompts if p.run == "clean"} == pairs


@pytest.mark.parametrize(
    ("family", "site"),
    [("LN", "attn_z"), ("LN", "mlp_out"), ("grouped rotary", "mlp_out"), ("Gemma2", "attn_z")],
)
def test_direct_effect_is_the_slope_of_the_logits(family: str, site: str) -> None:
    """Adding a little of what the latent writes to the last stream moves the logits so."""
    experiment = experiment_with(family, ("standard", site, 0))
    model, (attachment,) = experiment.model, experiment.attachments
    nodes = [f"{attachment.site.name}.f{i}" for i in attachment.latents]
    single = family in ("grouped rotary", "Gemma2")  # norms in float32 inside
    size, small = 1.7, 1e-3 if single else 1e-5
    effects = direct_effects(experiment, nodes, np.full(len(nodes), size), n_tokens=2)
    uncapped = replace(model, logit_cap=None)
    slopes = torch.zeros(len(nodes), model.d_vocab_out, dtype=torch.float64)
    for pair in experiment.task.pairs:
        trace = model.forward(torch.tensor([pair.clean]))
        final, out = trace.final[0, -1], trace.attention_out[0][0, -1]
        for i, direction in enumerate(attachment.directions_in_stream):
            step = small * direction
            post = model.layers[0].attention_post
            if site == "attn_z" and post is not None:
                step = post(out + step) - post(out)
            moved = uncapped.unembed(final + step) - uncapped.unembed(final - step)
            slopes[i] += size * moved.double() / (2 * small) / len(experiment.task)
    slopes -= slopes.mean(-1, keepdim=True)
    for i, node in enumerate(nodes):
        found = effects[node]
        close = 1e-2 if single else 1e-4
        scale = float(slopes[i].abs().max())
        assert found.up_by == pytest.approx(slopes[i].topk(2).values.numpy(), abs=close * scale)
        assert slopes[i][found.down].numpy() == pytest.approx(found.down_by, abs=close * scale)
        assert found.down_by[0] == pytest.approx(float(slopes[i].min()), abs=close * scale)


def activations_of(values: np.ndarray) -> Activations:
    n = len(values)
    prompt = Prompt("clean", tuple(range(n)), ("scored",) * n)
    return Activations(
        tuple(f"m0.f{i}" for i in range(values.shape[1])), (prompt,), sparse.csc_matrix(values)
    )


def test_clusters_are_the_latents_that_are_active_together() -> None:
    rng = np.random.default_rng(0)
    drives = rng.random((60, 3)) * (rng.random((60, 3)) < 0.3)
    of = [0, 1, 0, 2, 1, 0]
    values = drives[:, of] * rng.uniform(0.5, 2, 6) + 0.01 * (rng.random((60, 6)) < 0.05)
    found = activations_of(values)
    assert correlations(found) == pytest.approx(np.corrcoef(values.T), abs=1e-9)
    clusters = cluster_latents(found, 3)
    assert {c.latents for c in clusters} == {(0, 2, 5), (1, 4), (3,)}
    assert clusters[0].together == pytest.approx(
        np.corrcoef(values.T)[[0, 0, 2], [2, 5, 5]].mean(), abs=1e-9
    )
    assert clusters[2].together is None
    assert [c.latents for c in cluster_latents(found, 1)] == [(0, 1, 2, 3, 4, 5)]
    with pytest.raises(OptionError, match="clusters 7: expected 1 to 6"):
        cluster_latents(found, 7)


def test_a_constant_latent_is_alone() -> None:
    values = np.array([[1.0, 2.0, 5.0], [2.0, 4.0, 5.0], [0.0, 0.0, 5.0], [3.0, 6.0, 5.0]])
    alike = correlations(activations_of(values))
    assert alike[2].tolist() == [0, 0, 1]
    assert {c.latents for c in cluster_latents(activations_of(values), 2)} == {(0, 1), (2,)}


class Words:
    """A tokenizer of words that decodes with spaces in between, as the bundled models' do."""

    bos_token_id = None

    def decode(self, ids: list[int]) -> str:
        return " ".join(f"w{i}" for i in ids)


def test_texts_keep_the_space_that_decoding_adds() -> None:
    assert Texts(Words(), 3)(5) == " w5"
    assert Texts(None)(5) == " 5"
    assert [label(text) for text in (" a", " ", "\n")] == ["a", "␣", "⏎"]


# --- a run --------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def files(data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a folder with a model, a task, two dictionaries and three runs."""
    folder = tmp_path_factory.mktemp("looking")
    shutil.copytree(data / "parity" / "ln2", folder / "model")
    batch = load_file(data / "parity" / "ln2" / "batch.safetensors")
    columns = (batch[key][:6].tolist() for key in ("clean", "corrupt", "answer", "wrong"))
    keys = ("clean", "corrupt", "answers", "wrong_answers")
    rows = [dict(zip(keys, row, strict=True)) for row in zip(*columns, strict=True)]
    task = folder / "pairs.jsonl"
    task.write_text("".join(json.dumps(row) + "\n" for row in rows + rows))  # each one twice
    model, _ = load_model(str(folder / "model"))
    transcoder = random_dictionary(model, "transcoder", "ln2_normalized", 0)
    transcoder = replace(transcoder, metadata={"neuronpedia_id": NEURONPEDIA})
    write_dictionary(transcoder, folder / "saes" / "tc")
    write_dictionary(random_dictionary(model, "standard", "attn_out", 1), folder / "saes" / "sae")
    common = {"model": str(folder / "model"), "method": "eap-ig"}
    saes = str(folder / "saes")
    acdc.discover(str(task), **common, saes=saes, n_edges=120).save(folder / "run")
    acdc.discover(str(task), **common, n_edges=30).save(folder / "plain")
    return folder


@pytest.fixture(scope="module")
def gallery(files: Path) -> Gallery:
    return look(files / "run", top=100, n_examples=4, clusters=3)


def refused(capsys: pytest.CaptureFixture[str], *arguments: object) -> str:
    """Run a command that must end with one line and status 2; return the line."""
    with pytest.raises(SystemExit) as stop:
        main([str(a) for a in arguments])
    captured = capsys.readouterr()
    assert stop.value.code == 2
    assert captured.out == ""
    assert captured.err.count("\n") == 1
    assert captured.err.startswith("acdc: ")
    return captured.err


def printed(capsys: pytest.CaptureFixture[str], *arguments: object) -> str:
    with pytest.raises(SystemExit) as stop:
        main([str(a) for a in arguments])
    assert stop.value.code == 0
    return capsys.readouterr().out


def test_a_gallery_says_of_each_latent_what_the_run_holds(files: Path, gallery: Gallery) -> None:
    circuit = acdc.load_run(files / "run").circuit
    edges, nodes = circuit.edges(), [n for n in circuit.nodes() if ".f" in n]
    assert sorted(x.name for x in gallery.latents) == sorted(nodes)
    assert gallery.n_latents == len(nodes) > 3
    sizes = [abs(x.score) for x in gallery.latents]
    assert sizes == sorted(sizes, reverse=True)
    for x in gallery.latents:
        outgoing = {e for e in edges if e.startswith(f"{x.name}->")}
        assert {end.edge for end in x.outgoing} == outgoing
        # a transcoder's latent has a receiver of its own; an SAE's are fed by the layer's heads
        feeds = rf"->{re.escape(x.name)}$" if x.site == "m0" else r"->a1\.h\d<[qkv]>$"
        incoming = {e for e in edges if re.search(feeds, e)}
        assert {end.edge for end in x.incoming} == incoming
        best = [max(example.values) for example in x.examples]
        assert best == sorted(best, reverse=True)
        assert best[0] == pytest.approx(x.largest)
        assert len({example.tokens for example in x.examples}) == len(x.examples) <= 4
        assert sum(share.value for share in x.places) <= 1 + 1e-9
        assert 0 <= x.clean_share <= 1
        number = x.name.partition(".f")[2]
        link = f"https://www.neuronpedia.org/{NEURONPEDIA}/{number}" if x.site == "m0" else None
        assert x.link == link


def test_the_clusters_of_a_gallery_are_all_its_latents(gallery: Gallery) -> None:
    assert gallery.clusters is not None
    names = [name for cluster in gallery.clusters for name in cluster.latents]
    assert sorted(names) == sorted(x.name for x in gallery.latents)
    assert sum(cluster.share for cluster in gallery.clusters) == pytest.approx(1)
    score = {x.name: abs(x.score) for x in gallery.latents}
    first = gallery.clusters[0]
    total = sum(score.values())
    assert first.share == pytest.approx(sum(score[name] for name in first.latents) / total)


def test_the_terminal_shows_latents_and_clusters(
    files: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    gallery: Gallery,
) -> None:
    monkeypatch.setenv("COLUMNS", "200")
    text = printed(capsys, "latents", files / "run", "--top", 2, "--clusters", 2)
    first, second, third = (x.name for x in gallery.latents[:3])
    assert f"{first} " in text
    assert f"{second} " in text
    assert f"2 of {gallery.n_latents} shown" in text
    assert f"\n{third}  score" not in text
    assert "latents that are active together" in text
    for word in ("fires on", "logits up", "logits down", "from", "to", "expl. var.", "«"):
        assert word in text


def test_shading_grows_with_activation(gallery: Gallery) -> None:
    console = Console(width=200, force_terminal=True, color_system="truecolor", record=True)
    with console.capture() as caught:
        for part in gallery_parts(replace(gallery, latents=gallery.latents[:1], clusters=None)):
            console.print(part, highlight=False)
    assert "48;2;255;176;0m" in caught.get()  # the strongest token


# --- the page -----------------------------------------------------------------------------


class Page(HTMLParser):
    """Ids, links, and everything that a browser would fetch or run."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.ids: list[str] = []
        self.links: list[str] = []
        self.fetched: list[str] = []
        self.handlers: list[str] = []
        self.tags: list[str] = []
        self.open: list[str] = []
        self.feed(text)
        self.close()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        if tag not in ("meta", "rect", "br"):
            self.open.append(tag)
        for name, value in attrs:
            if name == "id":
                self.ids.append(value or "")
            elif name == "href" and tag == "a":
                self.links.append(value or "")
            elif name in ("src", "href", "srcset", "data", "action", "xlink:href"):
                self.fetched.append(value or "")
            elif name.startswith("on"):
                self.handlers.append(name)

    def handle_endtag(self, tag: str) -> None:
        if tag != "rect":
            assert self.open.pop() == tag


def test_the_page_needs_nothing_and_its_anchors_resolve(gallery: Gallery) -> None:
    text = to_html(gallery)
    page = Page(text)
    check_policy(text)
    assert page.open == []
    assert page.fetched == page.handlers == []
    assert "@import" not in text
    assert "url(" not in text
    inside = [link[1:] for link in page.links if link.startswith("#")]
    outside = [link for link in page.links if not link.startswith("#")]
    assert len(set(page.ids)) == len(page.ids)
    assert {x.name for x in gallery.latents} | {"m0", "a1"} <= set(page.ids)
    assert set(inside) <= set(page.ids)
    assert all(link.startswith("https://www.neuronpedia.org/") for link in outside)
    assert set(outside) == {x.link for x in gallery.latents if x.link}
    assert set(re.findall(r"https?://[^\s\"'<]+", text)) == set(outside)
    # the other end of an edge is a link to that latent: sites and overview link once each
    ends = [end for x in gallery.latents for end in (*x.incoming[:12], *x.outgoing[:12])]
    shown = {x.name for x in gallery.latents}
    linked = sum(end.node in shown for end in ends)
    assert linked > 0
    assert len([i for i in inside if i in shown]) == linked + 2 * len(shown)


def spoiled(gallery: Gallery) -> Gallery:
    """Return a gallery whose names, tokens and links try to get out of their place."""
    latent, site = gallery.latents[0], gallery.sites[0]
    example = replace(latent.examples[0], tokens=(EVIL,) * len(latent.examples[0].tokens))
    share = replace(latent.tokens[0], name=EVIL)
    end = End(EVIL, EVIL, EVIL, 1.0)
    bad = replace(
        latent, name=EVIL, examples=(example,), tokens=(share,), up=(share,), context=(share,),
        places=(share,), incoming=(end,), outgoing=(end,), link="javascript:window.ran='link'",
    )  # fmt: skip
    summary = {**gallery.summary, "task": EVIL, "model": EVIL, "metric": EVIL, "method": EVIL}
    quality = replace(site.quality, hook=EVIL, architecture=EVIL)
    return replace(
        gallery,
        latents=(bad,),
        sites=(replace(site, name=EVIL, quality=quality),),
        summary=summary,
        slots=((EVIL, "scored"), (EVIL, f"slot {EVIL}")),
    )


def test_the_page_escapes_what_is_in_it(gallery: Gallery) -> None:
    text = to_html(spoiled(gallery))
    check_policy(text)
    assert Page(text).tags.count("script") == 1
    assert "&lt;img src=x onerror" in text


def test_only_dictionaries_known_to_neuronpedia_have_links(gallery: Gallery) -> None:
    dictionary = random_dictionary(small_model("LN", 0), "standard", "attn_out", 1)
    for name in ("javascript:alert(1)", "a/b/../c", "a/b?c", "//evil.example/a", "a/b\n", 7, None):
        spoilt = replace(dictionary, metadata={"neuronpedia_id": name})
        assert _link(spoilt, 3) is None
    good = replace(dictionary, metadata={"neuronpedia_id": "gpt2-small/9-res"})
    assert _link(good, 3) == "https://www.neuronpedia.org/gpt2-small/9-res/3"


def test_the_command_writes_the_page(
    files: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], gallery: Gallery
) -> None:
    path = tmp_path / "latents.html"
    assert "2 of" in printed(capsys, "latents", files / "run", "--top", 2, "--html", path)
    ids = Page(path.read_text(encoding="utf-8")).ids
    assert [i for i in ids if ".f" in i] == [x.name for x in gallery.latents[:2]]
    line = refused(capsys, "latents", files / "run", "--html", path)
    assert "exists" in line


def test_a_browser_opens_the_page(gallery: Gallery, tmp_path: Path) -> None:
    """It complains of nothing, the key j works, and shades and colours are there."""
    probe = """
      dispatchEvent(new KeyboardEvent("keydown", { key: "j" }));
      const color = (kind, what) => getComputedStyle(document.querySelector(kind))[what];
      const seen = {
        hash: location.hash,
        shades: ["b.b1", "b.b9"].map(kind => color(kind, "backgroundColor")),
        signs: [".up", ".down"].map(kind => color(kind, "color")),
        bars: [...document.querySelectorAll("svg.hist rect")]
          .filter(bar => bar.getBoundingClientRect().height > 0).length,
      };
    """
    found = browse(to_html(gallery), probe, tmp_path)
    assert found["said"] == found["consoles"] == []
    assert found["hash"] == f"#{gallery.latents[0].name}"
    assert found["shades"] == ["rgba(255, 150, 0, 0.1)", "rgb(255, 150, 0)"]
    assert found["signs"] == ["rgb(0, 114, 178)", "rgb(179, 71, 0)"]
    counts = [count for site in gallery.sites for count in site.quality.density_counts]
    assert found["bars"] == sum(count > 0 for count in counts)


def test_a_browser_runs_nothing_of_what_users_wrote(gallery: Gallery, tmp_path: Path) -> None:
    text = to_html(spoiled(gallery))
    click = """
      document.querySelectorAll("a").forEach(link => link.click());
      document.querySelectorAll("details").forEach(one => { one.open = true; });
      const seen = { text: document.body.innerText };
    """
    found = browse(text, click, tmp_path)
    assert found["said"] == found["consoles"] == []
    assert found["ran"] is None
    assert found["text"].count("onerror=") > 10


# --- bad input ----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("--top", 0), "top 0: expected at least 1"),
        (("--prompts", 0), "prompts 0: expected at least 1"),
        (("--clusters", 0), "clusters 0: expected 1 to"),
        (("--clusters", 999), "clusters 999: expected 1 to"),
        (("--html", "page.txt"), "page 'page.txt': expected a name ending in .html"),
        (("--html", "nowhere/page.html"), "folder 'nowhere' does not exist"),
    ],
)
def test_bad_options(
    files: Path,
    capsys: pytest.CaptureFixture[str],
    arguments: tuple[object, ...],
    words: str,
) -> None:
    assert words in refused(capsys, "latents", files / "run", *arguments)


def test_bad_runs(files: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    page = tmp_path / "page.html"

    def line(run: Path) -> str:
        text = refused(capsys, "latents", run, "--html", page)
        assert not page.exists()
        return text

    assert "give the folder of a run" in line(tmp_path / "nothing")
    assert "give the folder of a run" in line(files / "run" / "circuit.json")
    assert "no latents; find a circuit with acdc discover --saes" in line(files / "plain")

    copy = Path(shutil.copytree(files / "run", tmp_path / "copy"))
    summary = json.loads((copy / "run.json").read_text())
    (copy / "run.json").write_text(json.dumps(summary | {"saes": str(tmp_path / "gone")}))
    assert "there is no such folder" in line(copy)
    (copy / "run.json").write_text(json.dumps(summary | {"latents": None}))
    assert "says nothing of its dictionaries" in line(copy)

    saes = Path(shutil.copytree(files / "saes", tmp_path / "saes"))
    weights = load_file(saes / "tc" / "sae_weights.safetensors")
    weights["W_dec"][0, 0] += 1
    save_file(weights, saes / "tc" / "sae_weights.safetensors")
    (copy / "run.json").write_text(json.dumps(summary | {"saes": str(saes)}))
    changed = line(copy)
    assert "has changed, find the circuit anew" in changed
    assert str(saes / "tc") in changed
    shutil.rmtree(saes / "tc")
    assert "the circuit has latents at" in line(copy)

    model = Path(shutil.copytree(files / "model", tmp_path / "model"))
    weights = load_file(model / "model.safetensors")
    weights = {name: 1.1 * x for name, x in weights.items()}
    save_file(weights, model / "model.safetensors")
    (copy / "run.json").write_text(json.dumps(summary | {"model": str(model)}))
    assert "model or task have changed" in line(copy)
    (copy / "run.json").write_text(json.dumps(summary | {"model": "docstring-small"}))
    line(copy)


def test_a_circuit_that_keeps_no_latent(
    files: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    copy = Path(shutil.copytree(files / "run", tmp_path / "copy"))
    text = (copy / "circuit.json").read_text()
    (copy / "circuit.json").write_text(text.replace('"in_graph": true', '"in_graph": false'))
    assert "no latent is in the circuit" in refused(capsys, "latents", copy)


# --- circuits over different bases --------------------------------------------------------


def circuit(sites: tuple[Site, ...], *edges: str, **info: object) -> Circuit:
    return Circuit.from_edges(component_graph(GraphShape(2, 2, sites=sites)), edges, **info)


PLAIN = circuit(
    (),
    "input->m0", "m0->a1.h0<q>", "a1.h0->logits", "a1.h1->m1", "input->a1.h1<v>", "m1->logits",
)  # fmt: skip


def test_latents_stand_for_their_component() -> None:
    site = Site("transcoder", 0, (3, 5))
    fine = circuit(
        (site,),
        "input->m0.f3", "input->m0.err", "m0.f3->a1.h0<q>", "m0.err->a1.h0<k>", "a1.h0->logits",
    )  # fmt: skip
    found = compare_bases(PLAIN, fine)
    assert found.circuits[0].basis == "components"
    assert found.circuits[1].basis == basis_name(fine.graph.shape) == "transcoders at m0"
    assert found.circuits[1].edges["input->m0"] == ("input->m0.f3", "input->m0.err")
    assert found.edges.common == ("input->m0", "m0->a1.h0<q>", "a1.h0->logits")
    assert set(found.edges.only(0)) == {"a1.h1->m1", "input->a1.h1<v>", "m1->logits"}
    assert found.edges.only(1) == ("m0->a1.h0<k>",)
    assert found.circuits[1].by_errors == ("m0->a1.h0<k>",)
    assert found.circuits[1].other == ("m0.err->a1.h0<k>",)
    assert len(found.circuits[1].shared) == 4
    assert len(found.circuits[0].shared) == len(found.circuits[0].other) == 3
    assert found.components.common == ("a1.h0", "input", "m0")
    assert found.components.only(0) == ("a1.h1", "m1")
    assert (found.circuits[1].n_nodes, found.circuits[1].n_latents, found.circuits[1].n_edges) == (
        4,
        1,
        5,
    )


def test_heads_are_not_told_apart_where_latents_stand_for_all_of_them() -> None:
    fine = circuit((Site("attn_out", 1, (0, 7)),), "input->a1.h0<v>", "a1.f7->logits")
    found = compare_bases(PLAIN, fine)
    assert found.edges.common == ("a1->logits",)
    assert "a1->m1" in found.edges.only(0)
    assert found.edges.only(1) == ("input->a1.h0<v>",)
    assert found.circuits[0].edges["a1->logits"] == ("a1.h0->logits",)
    assert found.components.common == ("a1", "input")


def test_edges_through_cuts_are_chains() -> None:
    cuts = (Site("resid_pre", 1, (4,)), Site("resid_mid", 1, (2,)))
    fine = circuit(
        cuts,
        "input->m0", "m0->r1", "r1.f4->a1.h0<q>", "a1.h0->r1mid", "r1.err->r1mid",
        "r1mid.f2->logits",
    )  # fmt: skip
    found = compare_bases(PLAIN, fine).circuits[1]
    assert set(found.edges) == {"input->m0", "m0->a1.h0<q>", "a1.h0->logits", "m0->logits"}
    assert found.edges["m0->a1.h0<q>"] == ("m0->r1", "r1.f4->a1.h0<q>")
    assert found.edges["m0->logits"] == ("m0->r1", "r1.err->r1mid", "r1mid.f2->logits")
    assert found.components == ("a1.h0", "input", "m0")


def test_two_dictionaries_and_coarser_receivers() -> None:
    one = circuit((Site("mlp_out", 0, (1,)),), "input->m0", "m0.f1->a1.h0<q>", "a1.h0->logits")
    two = circuit((Site("transcoder", 0, (9,)),), "input->m0.f9", "m0.f9->logits")
    found = compare_bases(one, two)
    assert found.edges.common == ("input->m0",)
    graph = component_graph(GraphShape(2, 2, split_qkv=False))
    coarse = Circuit.from_edges(graph, ["input->m0", "m0->a1.h0", "a1.h0->logits"])
    assert compare_bases(one, coarse).edges.jaccard(0, 1) == 1


def test_circuits_of_different_models_are_refused() -> None:
    site = (Site("mlp_out", 0, (1,)),)
    other = Circuit.from_edges(component_graph(GraphShape(3, 2, sites=site)), ["input->m0"])
    with pytest.raises(GraphError, match="different models: n_layers is 2 in one and 3 in the"):
        compare_bases(PLAIN, other)
    with pytest.raises(GraphError, match="one is of 'x', the other of 'y'"):
        compare_bases(replace(PLAIN, info={"model": "x"}), circuit(site, model="y"))


def test_several_bases_side_by_side() -> None:
    mlp = circuit((Site("mlp_out", 0, (1,)),), "input->m0", "m0.f1->a1.h0<q>", "a1.h0->logits")
    heads = circuit((Site("attn_out", 1, (7,)),), "input->a1.h0<v>", "a1.f7->logits")
    found = compare_bases(PLAIN, mlp, heads)
    assert [one.basis for one in found.circuits] == ["components", "SAEs at m0", "SAEs at a1"]
    assert found.edges.members["input->m0"] == (0, 1)
    assert found.edges.members["a1->logits"] == (0, 1, 2)  # heads are joined in all of them
    assert found.edges.common == ("a1->logits",)
    assert found.edges.only(2) == ("input->a1.h0<v>",)
    assert found.circuits[0].edges["a1->logits"] == ("a1.h0->logits",)
    assert found.components.jaccard(1, 2) == 2 / 3  # input and a1 of input, m0 and a1
    assert found.circuits[1].shared == ("a1.h0->logits",)
    two = compare_bases(mlp, heads)
    assert two.edges.common == ("a1->logits",)


def test_runs_side_by_side(
    files: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Components, latents and neurons: sizes at equal faithfulness, components, cost."""
    monkeypatch.setenv("COLUMNS", "250")
    plain = acdc.load_run(files / "plain")
    asked = vars(plain.settings.replace(n_edges=60, neurons=True, max_latents=8))
    acdc.discover(**asked).save(files / "neurons")
    runs = [files / name for name in ("plain", "run", "neurons")]
    found = acdc.compare(*runs, faithfulness=0.8)
    assert [size.basis for size in found.sizes][::2] == ["components", "neurons at m0 m1"]
    for run, size in zip(runs, found.sizes, strict=True):
        one = acdc.load_run(run)
        (pair,) = {s for s in acdc.compare(run, files / "run", faithfulness=0.8).sizes or ()
                   if s.basis == size.basis} or {size}  # fmt: skip
        assert size == pair
        assert size.n_edges_total == one.circuit.graph.n_edges
        assert size.faithfulness >= 0.8
    for run, cost in zip(runs, found.costs, strict=True):
        summary = json.loads((run / "run.json").read_text())
        assert cost.seconds == summary["timings"]["discover"] > 0
        assert cost.forwards == summary["forwards"] >= summary["n_prompts"]
    assert json.loads(found.save(files / "all").read_text())["labels"] == [str(r) for r in runs]
    assert len(repr(found)) <= 160
    text = printed(capsys, "compare", *runs, "--faithfulness", 0.8)
    assert "forward passes of a prompt" in text
    assert "neurons at m0 m1" in text
    again = json.loads(printed(capsys, "compare", *runs, "--faithfulness", 0.8, "--json"))
    assert again["sizes"] == json.loads(json.dumps(found.summary()))["sizes"]


def test_compare_shows_sizes_and_refinements(
    files: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "200")
    asked = ("compare", files / "plain", files / "run", "--faithfulness", 0.8)
    text = printed(capsys, *asked)
    assert "edges for faithfulness 0.8" in text
    assert "transcoders at m0, SAEs at a1" in text or "SAEs at a1, transcoders at m0" in text
    found = json.loads(printed(capsys, *asked, "--json"))
    small, fine = found["sizes"]
    assert small["n_edges"] < small["n_edges_total"] < fine["n_edges_total"]
    assert min(small["faithfulness"], fine["faithfulness"]) >= 0.8
    own = found["comparison"]["circuits"][1]
    kept = acdc.load_circuit(files / "run")
    assert {*own["shared"], *own["other"]} <= set(kept.edges())
    assert set(own["edges"]) == {
        name for name, at in found["comparison"]["edges"]["members"].items() if 1 in at
    }  # fmt: skip
    # circuit files are compared too, without sizes
    circuits = [files / name / "circuit.json" for name in ("plain", "run")]
    assert "give the folders of runs" in printed(capsys, "compare", *circuits)


def test_sizes_are_measured_under_the_first_run_s_conditions(files: Path, tmp_path: Path) -> None:
    other = Path(shutil.copytree(files / "plain", tmp_path / "other"))
    summary = json.loads((other / "run.json").read_text())
    (other / "run.json").write_text(json.dumps(summary | {"metric": "kl", "n_prompts": 2}))
    first, second = sizes_at([open_run(files / "plain"), open_run(other)], 0.8)
    assert first == second
    plain = acdc.load_run(files / "plain")
    circuit = plain.circuit
    smaller = select_top(circuit.graph, circuit.scores, first.n_edges // 2)
    less, _ = measure(replace(circuit, in_circuit=smaller), plain.settings)
    assert less.faithfulness < 0.8 <= first.faithfulness


def test_comparisons_of_bases_that_are_refused(
    files: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    pair = ("compare", files / "plain", files / "run")
    assert "no common diagram" in refused(capsys, *pair, "--out", tmp_path / "both.svg")
    for level in (0, 1.5, "nan"):
        assert "expected a number above 0" in refused(capsys, *pair, "--faithfulness", level)
    other = Path(shutil.copytree(files / "plain", tmp_path / "other"))
    summary = json.loads((other / "run.json").read_text())
    (other / "run.json").write_text(json.dumps(summary | {"task": "ioi"}))
    assert "need one task" in refused(capsys, "compare", files / "run", other)
