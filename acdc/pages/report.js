"use strict";
// The circuit of a report: threshold, zoom, and the panel of the node that was clicked.
//
// The element "data" holds (acdc/report/circuit.py, patterns.py):
//   n_edges   edges of the circuit, of which very many are not all here
//   edges     [sender, node, receiver, score, 1 if in the circuit, runs that kept it or null]
//   pictures  for each picture, for each of its lines, indices of its edges
//   nodes     name -> {about, head: "layer.head" or null, feeds, reads, tokens}
//   prompts   [{clean, corrupt, n_left_out, scored, answers, wrong}]
//   patterns  "layer.head" -> for each prompt [clean, corrupt], bytes [query][key] in base64
//   why       "layer.head" -> [[heading, text]]: where it attends and why (acdc/pages/heads.py)
//   n_runs    repetitions that the last entry of an edge is out of, or null

const data = JSON.parse(document.getElementById("data").textContent);
const [SENDER, NODE, RECEIVER, SCORE, INSIDE, KEPT] = [0, 1, 2, 3, 4, 5];
const $ = id => document.getElementById(id);
const largest = Math.max(...data.edges.map(edge => Math.abs(edge[SCORE])), 0);
const pictures = [...document.querySelectorAll(".picture svg")].map((svg, i) => ({
  svg,
  home: svg.getAttribute("viewBox"),
  edges: new Set(data.pictures[i].flat().map(at => data.edges[at])),
  lines: [...svg.querySelectorAll(".line")].map(element => ({
    element, edges: data.pictures[i][element.dataset.line].map(at => data.edges[at]),
  })),
  nodes: [...svg.querySelectorAll(".node")],
  feeds: [...svg.querySelectorAll(".feed")],
}));
const views = [...document.querySelectorAll("[data-picture]")];

const state = { picture: 0, least: 0, node: null, prompt: 0, run: "clean", query: null };
const picture = () => pictures[state.picture];
const possible = edge => picture().edges.has(edge);
const drawn = edge => possible(edge) && Math.abs(edge[SCORE]) >= state.least;

// --- small helpers -------------------------------------------------------------------------

function make(tag, attributes = {}, ...children) {
  const drawing = ["svg", "g", "rect", "text", "title"].includes(tag);
  const element = drawing
    ? document.createElementNS("http://www.w3.org/2000/svg", tag)
    : document.createElement(tag);
  for (const [name, value] of Object.entries(attributes)) {
    if (name.startsWith("on")) element.addEventListener(name.slice(2), value);
    else if (name === "style") Object.assign(element.style, value);  // no attribute: see the policy
    else element.setAttribute(name, value);
  }
  element.append(...children.filter(child => child !== null));
  return element;
}

const digits = value => Number(value.toPrecision(3)).toString();
const signed = value => (value > 0 ? "+" : value < 0 ? "\u2212" : "") + digits(Math.abs(value));
const plain = token => token.trim() || "\u2423";
const port = edge => (edge[RECEIVER].match(/<([qkv])>/) || [null, ""])[1];

// --- threshold -----------------------------------------------------------------------------

let steps = [];  // absolute scores that the slider stands at, ascending

function setSteps() {
  const scores = data.edges.filter(possible).map(edge => Math.abs(edge[SCORE]));
  steps = [...new Set(scores)].sort((a, b) => a - b);
  const slider = $("threshold");
  slider.max = Math.max(0, steps.length - 1);
  slider.disabled = steps.length < 2;
  const at = steps.findIndex(score => score >= state.least);
  slider.value = at < 0 ? slider.max : at;
  state.least = steps[slider.value] || 0;
}

function counted() {
  const shown = data.edges.filter(drawn);
  const inside = shown.filter(edge => edge[INSIDE]).length;
  const text = `${inside.toLocaleString("en")} of ${data.n_edges.toLocaleString("en")} edges`;
  return [...picture().edges].every(edge => edge[INSIDE])
    ? text : `${text}, ${shown.length - inside} others`;
}

function update() {
  const { svg, lines, nodes, feeds } = picture();
  pictures.forEach(one => { one.svg.parentElement.hidden = one.svg !== svg; });
  const lit = new Set(["logits"]);
  for (const { element, edges } of lines) {
    const here = edges.filter(drawn);
    element.classList.toggle("gone", !here.length);
    element.classList.toggle("away", state.node !== null &&
      !edges.some(edge => edge[SENDER] === state.node || edge[NODE] === state.node));
    here.forEach(edge => lit.add(edge[SENDER]).add(edge[NODE]));
  }
  feeds.forEach(feed => feed.classList.toggle("gone",
    !lit.has(feed.dataset.from) || !lit.has(feed.dataset.to)));
  nodes.forEach(node => {
    node.classList.toggle("away", !lit.has(node.dataset.node));
    node.classList.toggle("chosen", node.dataset.node === state.node);
  });
  $("at").textContent = steps.length ? digits(state.least) : "";
  $("count").textContent = counted();
  views.forEach((view, i) => view.setAttribute("aria-pressed", i === state.picture));
}

$("threshold").addEventListener("input", event => {
  state.least = steps[event.target.value];
  update();
  showPanel();
});
views.forEach((view, i) => view.addEventListener("click", () => {
  state.picture = i;
  state.least = 0;
  if (!picture().nodes.some(node => node.dataset.node === state.node)) state.node = null;
  setSteps();
  update();
  showPanel();
}));

// --- zoom ----------------------------------------------------------------------------------

const box = svg => svg.getAttribute("viewBox").split(/[\s,]+/).map(Number);

function zoom(factor, x = 0.5, y = 0.5) {
  const { svg } = picture();
  const [left, top, width, height] = box(svg);
  const [w, h] = [width / factor, height / factor];
  svg.setAttribute("viewBox", [left + x * (width - w), top + y * (height - h), w, h].join(" "));
}

$("in").addEventListener("click", () => zoom(1.3));
$("out").addEventListener("click", () => zoom(1 / 1.3));
$("fit").addEventListener("click", () => picture().svg.setAttribute("viewBox", picture().home));

for (const { svg } of pictures) {
  svg.addEventListener("wheel", event => {
    if (!event.ctrlKey && !event.metaKey) return;
    event.preventDefault();
    const area = svg.getBoundingClientRect();
    zoom(Math.exp(-event.deltaY / 300), (event.clientX - area.left) / area.width,
      (event.clientY - area.top) / area.height);
  }, { passive: false });
  let from = null;
  svg.addEventListener("pointerdown", event => {
    from = { x: event.clientX, y: event.clientY, box: box(svg), moved: false };
  });
  svg.addEventListener("pointermove", event => {
    if (from === null || !event.buttons) return;
    const [dx, dy] = [event.clientX - from.x, event.clientY - from.y];
    if (!from.moved && Math.hypot(dx, dy) < 4) return;
    if (!from.moved) svg.setPointerCapture(event.pointerId);
    from.moved = true;
    svg.classList.add("moving");
    const [left, top, width, height] = from.box;
    const area = svg.getBoundingClientRect();
    const unit = Math.max(width / area.width, height / area.height);
    svg.setAttribute("viewBox", [left - dx * unit, top - dy * unit, width, height].join(" "));
  });
  svg.addEventListener("pointerup", () => svg.classList.remove("moving"));
  svg.addEventListener("click", event => {
    if (from?.moved) return;
    const node = event.target.closest(".node");
    choose(node === null ? null : node.dataset.node);
  });
  svg.addEventListener("keydown", event => {
    if (event.key === "Enter" || event.key === " ") {
      event.preventDefault();
      choose(event.target.dataset.node);
    }
  });
}
addEventListener("keydown", event => { if (event.key === "Escape") choose(null); });

function choose(name) {
  state.node = name;
  update();
  showPanel();
}

// --- panel ---------------------------------------------------------------------------------

function showPanel() {
  const panel = $("panel");
  const name = state.node;
  if (name === null) {
    const best = data.edges.filter(drawn).sort(byScore).slice(0, 16);
    panel.replaceChildren(
      make("h3", { class: "words" }, "Strongest edges"),
      make("p", { class: "soft" }, "Click a node for its attention pattern and its edges."),
      table(best, edge => [link(edge[SENDER]), " \u2192 ", link(edge[NODE])], "pairs"));
    return;
  }
  const { about, head, feeds, reads, tokens } = data.nodes[name];
  const found = data.edges.filter(possible).sort(byScore);
  panel.replaceChildren(
    make("h3", {}, name), make("p", { class: "soft" }, about),
    ...(tokens.length ? [fires(tokens)] : []),
    ...(head !== null ? why(head) : []),
    ...(head !== null ? attention(head) : []),
    ...related("computed from", reads), ...related("read by", feeds),
    ...ends("edges in", found.filter(edge => edge[NODE] === name), SENDER),
    ...ends("edges out", found.filter(edge => edge[SENDER] === name), NODE));
}

const byScore = (a, b) => Math.abs(b[SCORE]) - Math.abs(a[SCORE]);
const link = name => make("a", { onclick: () => choose(name) }, name);

function fires(tokens) {
  const words = tokens.map(([token, share]) => `${plain(token)} ${Math.round(100 * share)} %`);
  return make("p", {}, "fires on ", make("span", { class: "mono" }, words.join(", ")));
}

function why(head) {
  const rows = data.why[head];
  if (rows === undefined) return [];
  return [make("dl", { class: "why" }, ...rows.flatMap(([heading, text]) =>
    [make("dt", {}, heading), make("dd", {}, text)]))];
}

function related(title, all) {
  const here = new Set(picture().nodes.map(node => node.dataset.node));
  const names = all.filter(name => here.has(name));
  if (!names.length) return [];
  const links = names.flatMap((name, i) => i ? [", ", link(name)] : [link(name)]);
  return [make("p", {}, `${title} `, ...links)];
}

function ends(title, edges, other) {
  const shown = edges.filter(drawn).length;
  const count = shown === edges.length ? shown : `${shown} of ${edges.length} above the threshold`;
  return [make("h4", {}, `${title} (${count})`), table(edges, edge => [link(edge[other])])];
}

function table(edges, names, kind = "") {
  return make("table", { class: `ends ${kind}` }, ...edges.map(edge => {
    const width = largest ? Math.max(1, 100 * Math.abs(edge[SCORE]) / largest) : 0;
    const look = [edge[SCORE] * data.helps < 0 && "minus", drawn(edge) || "faint", edge[INSIDE] || "outside"]
      .filter(name => typeof name === "string").join(" ");
    const title = `${edge[SENDER]}->${edge[RECEIVER]}: ${edge[SCORE]}` +
      (edge[INSIDE] ? "" : ", not in the circuit");
    const kept = edge[KEPT] === null ? "" : `${edge[KEPT]}/${data.n_runs}`;
    return make("tr", { class: look, title },
      make("td", {}, port(edge) ? make("span", { class: `port ${port(edge)}` }, port(edge)) : ""),
      make("td", {}, ...names(edge)),
      make("td", {}, make("i", { style: { width: `${width}%` } })),
      make("td", {}, signed(edge[SCORE])),
      make("td", { title: "runs over other prompts that kept it" }, kept));
  }));
}

// --- attention -----------------------------------------------------------------------------

function attention(head) {
  const encoded = data.patterns[head];
  if (encoded === undefined) {
    return [make("p", { class: "soft" }, "Its attention pattern found no room on this page.")];
  }
  const prompt = data.prompts[state.prompt];
  const tokens = prompt[state.run];
  const bytes = atob(encoded[state.prompt][state.run === "clean" ? 0 : 1]);
  const weight = (query, key) => bytes.charCodeAt(query * tokens.length + key) / 255;
  const last = prompt.scored.length ? prompt.scored[prompt.scored.length - 1] : tokens.length - 1;
  const asked = Math.min(state.query ?? last, tokens.length - 1);
  const says = make("p", { class: "says" });
  const ask = query => { state.query = query; showPanel(); };
  return [
    chooser(), words(tokens, prompt, asked, weight, ask),
    make("p", { class: "soft" }, answers(prompt)),
    grid(tokens, asked, weight, ask, text => { says.textContent = text; }), says,
  ];
}

function chooser() {
  const options = data.prompts.map((prompt, i) => {
    const text = prompt.clean.join("").trim();
    const shown = text.length > 52 ? `${text.slice(0, 50)} \u2026` : text;
    return make("option", { value: i, ...(i === state.prompt ? { selected: "" } : {}) }, shown);
  });
  const change = event => { state.prompt = +event.target.value; state.query = null; showPanel(); };
  const runs = ["clean", "corrupt"].map(run => make("button", {
    "aria-pressed": run === state.run, onclick: () => { state.run = run; showPanel(); },
  }, run));
  return make("div", { class: "choice" },
    make("select", { id: "prompt", "aria-label": "prompt", onchange: change }, ...options), ...runs);
}

function words(tokens, prompt, asked, weight, ask) {
  const spans = tokens.map((token, i) => make("span", {
    class: `${i === asked ? "asked" : ""} ${prompt.scored.includes(i) ? "scored" : ""}`,
    style: { background: `rgb(var(--hot) / ${weight(asked, i).toFixed(3)})` },
    title: `${weight(asked, i).toFixed(2)} of the attention from \u201c${plain(tokens[asked])}\u201d`,
    onclick: () => ask(i),
  }, token));
  const before = prompt.n_left_out ? [`(${prompt.n_left_out} tokens) \u2026 `] : [];
  return make("p", { class: "prompt" }, ...before, ...spans);
}

function answers(prompt) {
  const right = prompt.answers.map(plain).join(", ");
  const wrong = prompt.wrong.map(plain).join(", ");
  const said = right ? `Answer ${right}${wrong ? `, not ${wrong}` : ""}. ` : "";
  return `${said}Shaded: attention from the outlined token; click another one. ` +
    "Underlined: scored.";
}

function grid(tokens, asked, weight, ask, say) {
  const n = tokens.length;
  const size = 300 / n;
  const letters = Math.max(...tokens.map(token => plain(token).length));
  const font = Math.min(11, 0.86 * size);
  const label = font < 5 ? 4 : Math.min(90, 0.62 * font * letters + 8);
  const whole = label + 300 + 2;
  const svg = make("svg", { class: "pattern", viewBox: `0 0 ${whole} ${whole}` });
  svg.append(make("rect", { class: "frame", x: label, y: label, width: 300, height: 300 }));
  for (let query = 0; query < n; query++) {
    for (let key = 0; key < n; key++) {
      const value = weight(query, key);
      if (value < 0.004) continue;
      svg.append(make("rect", {
        class: "cell", x: label + key * size, y: label + query * size,
        width: size, height: size, opacity: value.toFixed(3),
      }));
    }
    if (font >= 5) {
      const middle = label + (query + 0.5) * size + 0.35 * font;
      const text = plain(tokens[query]);
      const look = { "font-size": font.toFixed(1) };
      svg.append(
        make("text", { ...look, x: label - 4, y: middle, "text-anchor": "end" }, text),
        make("text", { ...look, transform: `translate(${middle} ${label - 4}) rotate(-90)` }, text));
    }
  }
  svg.append(make("rect", { class: "asked", x: label, y: label + asked * size, width: 300, height: size }));
  const place = event => {
    const area = svg.getBoundingClientRect();
    const at = [event.clientY - area.top, event.clientX - area.left]
      .map(pixels => Math.floor((pixels * whole / area.width - label) / size));
    return at.every(i => i >= 0 && i < n) ? at : null;
  };
  svg.addEventListener("mousemove", event => {
    const at = place(event);
    say(at === null ? "" :
      `from \u201c${plain(tokens[at[0]])}\u201d to \u201c${plain(tokens[at[1]])}\u201d: ${weight(...at).toFixed(2)}`);
  });
  svg.addEventListener("click", event => { if (place(event)) ask(place(event)[0]); });
  return svg;
}

setSteps();
update();
showPanel();
