"""The policy of the pages: what it says, that a browser keeps to it, and pages of hostile files."""

from __future__ import annotations

import base64
import hashlib
import json
import shutil
from html import escape
from pathlib import Path
from xml.etree import ElementTree

import pytest
from browser import EVIL, HOSTILE, Elements, browse, check_policy, policy_of
from jinja2 import UndefinedError
from markupsafe import Markup
from markupsafe import escape as markup_escape

import acdc
from acdc.evidence.latents import look
from acdc.models import MODELS
from acdc.pages import gather, to_html
from acdc.pages.filling import _environment, fill
from acdc.pages.latents import to_html as latents_page
from acdc.pages.page import hashed, page, policy
from graphs import Reference, write_reference

STYLE = "p { color: rgb(1, 2, 3); } .bar i { display: block; height: 1px; }"
SCRIPT = """
document.body.dataset.script = "ran";
document.getElementById("set").style.width = "7px";
"""
BODY = '<p id="p">\u00e9</p><div class="bar"><i id="set"></i></div>'
PROBE = """
const seen = {
  script: document.body.dataset.script ?? null,
  color: getComputedStyle(document.getElementById("p")).color,
  width: getComputedStyle(document.getElementById("set")).width,
};
"""


def test_a_hash_is_that_of_the_text() -> None:
    digest = hashlib.sha256("p { }\u00e9".encode()).digest()
    assert hashed("p { }\u00e9") == f"'sha256-{base64.b64encode(digest).decode()}'"
    # https://www.w3.org/TR/CSP3/, example of 8.2
    assert hashed("doSubmit()") == "'sha256-jzgBGA4UWFFmpOBq0JpdsySukE1FrEN5bUpoK8Z29fY='"


def test_a_page_allows_its_own_style_and_script_and_nothing_else() -> None:
    text = page("title", BODY, style=STYLE, script=SCRIPT, data={"a": EVIL})
    check_policy(text)
    assert policy_of(text)["script-src"] == [hashed(SCRIPT)]
    assert policy("a", "b") != policy("a", "c") != policy("b", "c")


def test_a_browser_runs_what_is_the_page_s_own(tmp_path: Path) -> None:
    found = browse(page("title", BODY, style=STYLE, script=SCRIPT), PROBE, tmp_path)
    assert found["said"] == found["consoles"] == []
    assert found["script"] == "ran"
    assert found["color"] == "rgb(1, 2, 3)"
    assert found["width"] == "7px"


INJECTED = (
    "".join(HOSTILE[:-1])
    + """
<p id=q style="color: rgb(9, 9, 9)">x</p>
<style>p { color: rgb(9, 9, 9) !important; }</style>
<script src="data:text/javascript,window.ran+='i'"></script>
<iframe srcdoc="<script>parent.ran+='j'</script>"></iframe>
<iframe src="data:text/html,x"></iframe>
<object data="data:text/html,x"></object>
<img src="https://example.org/pixel.png">
<link rel=stylesheet href="https://example.org/style.css">
"""
)
CLICK = """
document.querySelector(".click").click();
const seen = { color: getComputedStyle(document.getElementById("p")).color };
"""


def test_a_browser_blocks_what_got_into_a_page(tmp_path: Path) -> None:
    """Were a text taken for markup after all, nothing of it would run, load or look different."""
    text = page("title", BODY + INJECTED, style=STYLE, script=SCRIPT)
    found = browse(text, CLICK, tmp_path)
    assert found["ran"] is None
    assert found["color"] == "rgb(1, 2, 3)"
    assert set(found["said"]) == {
        "base-uri", "frame-src", "img-src", "object-src", "script-src-attr", "script-src-elem",
        "style-src-attr", "style-src-elem",
    }  # fmt: skip


def test_hostile_texts_run_where_nothing_keeps_them(tmp_path: Path) -> None:
    """So that the other tests show something."""
    text = page("title", BODY + INJECTED, style=STYLE, script=SCRIPT)
    start, end = text.index("<meta http-equiv"), text.index("<meta name")
    found = browse(text[:start] + text[end:], CLICK, tmp_path)
    assert set("abcdefgh") <= set(found["ran"])


def test_texts_of_users_are_texts(tmp_path: Path) -> None:
    text = page(EVIL, f"{BODY}<p>{escape(EVIL)}</p>", style=STYLE, script=SCRIPT, data=[EVIL])
    check_policy(text)
    seen = """
    const seen = {
      title: document.title,
      data: JSON.parse(document.getElementById("data").textContent)[0],
      body: document.querySelectorAll("p")[1].textContent,
    };
    """
    found = browse(text, seen, tmp_path)
    assert found["said"] == found["consoles"] == []
    assert found["ran"] is None
    assert found["data"] == found["body"] == EVIL
    assert found["title"] == EVIL


def test_templates_take_nothing_for_markup_but_markup() -> None:
    figure = "{% from 'report/figure.html' import figure %}{{ figure(a, b, c) }}"
    text = _environment().from_string(figure).render(a=EVIL, b=Markup("<svg/>"), c=EVIL)
    assert text.count(str(markup_escape(EVIL))) == 2
    assert "<svg/>" in text
    assert {tag for tag, _ in Elements(text).found} == {"figure", "h4", "svg", "figcaption"}
    with pytest.raises(UndefinedError):
        fill("report/stability.html")
    folder = Path(acdc.__file__).parent / "pages" / "templates"
    texts = [path.read_text() for path in folder.rglob("*.html")]
    assert len(texts) > 5
    assert not [text for text in texts if "|safe" in text.replace(" ", "") or "autoescape" in text]


# --- files that somebody else made ---------------------------------------------------------


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a run whose model, task, tokens and further files hold hostile texts."""
    folder = tmp_path_factory.mktemp("hostile")
    model = Path(shutil.copytree(MODELS["ioi-small"], folder / HOSTILE[1]))  # no slash in it
    tokenizer = json.loads((model / "tokenizer.json").read_text())
    vocabulary = tokenizer["model"]["vocab"]
    tokens = [f"{text}{i}" for i, text in enumerate(HOSTILE)]
    ids = list(range(20, 20 + len(tokens)))
    words = {i: word for word, i in vocabulary.items()} | dict(zip(ids, tokens, strict=True))
    tokenizer["model"]["vocab"] = {words[i]: i for i in sorted(words)}
    (model / "tokenizer.json").write_text(json.dumps(tokenizer))
    task = folder / f"{HOSTILE[2].replace('/', '')}.jsonl"
    rows = [
        {"clean": [1, *ids, i], "corrupt": [1, *ids[::-1], i], "answers": [ids[0]],
         "wrong_answers": [ids[1]]}
        for i in range(40, 48)
    ]  # fmt: skip
    task.write_text("".join(json.dumps(row) + "\n" for row in rows))
    found = acdc.discover(
        str(task), model=str(model), method="eap", n_edges=60, holdout=0.5,
        saes=str(model / "dictionaries" / "blocks.0.hook_attn_out"), max_latents=8,
    )  # fmt: skip
    found.save(folder / "run")
    summary = json.loads((folder / "run" / "run.json").read_text())
    stability = {
        **summary, "method": EVIL, "edges": {EVIL: 1}, "mean_jaccard": 0.5,
        "runs": [{"seed": 0, "n_edges_kept": 3, "faithfulness": None}],
    }  # fmt: skip
    (folder / "run" / "stability.json").write_text(json.dumps(stability))
    summary["versions"] = {EVIL: EVIL}
    summary["timings"][EVIL] = 1.0
    summary["task_info"]["corruption"] = EVIL
    (folder / "run" / "run.json").write_text(json.dumps(summary))
    true = Reference(
        EVIL, EVIL, str(model), EVIL, EVIL, EVIL, found.circuit.graph,
        tuple(found.circuit.edges()[:5]),
    )  # fmt: skip
    write_reference(true, folder / "reference.json")
    return folder / "run"


def test_the_report_of_a_hostile_run_is_text(run: Path, tmp_path: Path) -> None:
    reference = str(run.parent / "reference.json")
    text = to_html(gather(run, tests=False, n_prompts=1, reference=reference))
    check_policy(text)
    click = """
      for (const node of document.querySelectorAll(".picture:not([hidden]) .node")) {
        node.dispatchEvent(new MouseEvent("click", { bubbles: true }));
        document.querySelectorAll("#panel a").forEach(link => link.click());
      }
      document.querySelector("[data-node='a0.h0']")
        .dispatchEvent(new MouseEvent("click", { bubbles: true }));
      const seen = { text: document.body.innerText, title: document.title };
    """
    found = browse(text, click, tmp_path)
    assert found["said"] == found["consoles"] == []
    assert found["ran"] is None
    assert found["title"].startswith(f"Circuit of {HOSTILE[2].replace('/', '')} in <img src=x")
    for words in (EVIL, *HOSTILE[:9]):
        assert words in found["text"]


def test_the_latents_of_a_hostile_run_are_text(run: Path, tmp_path: Path) -> None:
    text = latents_page(look(run, top=5, n_examples=2, clusters=2))
    check_policy(text)
    open_all = """
      document.querySelectorAll("details").forEach(one => { one.open = true; });
      const seen = { text: document.body.innerText };
    """
    found = browse(text, open_all, tmp_path)
    assert found["said"] == found["consoles"] == []
    assert found["ran"] is None
    for words in HOSTILE[:9]:
        assert words in found["text"]


def test_the_picture_of_a_hostile_run_is_shapes_and_texts(run: Path) -> None:
    """It is opened by itself, without a page's policy."""
    elements = list(ElementTree.parse(run / "circuit.svg").iter())
    kinds = {element.tag.rpartition("}")[2] for element in elements if isinstance(element.tag, str)}
    assert kinds <= {
        "svg", "g", "a", "title", "path", "polygon", "polyline", "ellipse", "text"
    }  # fmt: skip
    names = {name for element in elements for name in element.attrib}
    assert not [name for name in names if name.startswith("on") or name.endswith("href")]
    assert any("<img src=x" in (element.text or "") for element in elements)
