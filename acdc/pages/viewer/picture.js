// The pictures: which lines and nodes are drawn, lit and faint; threshold; zoom.

const pictures = [...document.querySelectorAll(".picture svg")].map((svg, i) => ({
  svg,
  home: svg.getAttribute("viewBox"),
  groups: svg.id === "groups",
  edges: new Set((data.pictures[i] ?? []).flat().map(at => data.edges[at])),
  lines: [...svg.querySelectorAll(".line")].map(element => ({
    element, edges: data.pictures[i][element.dataset.line].map(at => data.edges[at]),
  })),
  nodes: [...svg.querySelectorAll(".node")],
  feeds: [...svg.querySelectorAll(".feed")],
}));
const views = [...document.querySelectorAll("[data-picture]")];
const picture = () => pictures[state.picture];
const possible = edge => picture().edges.has(edge);
const drawn = edge => possible(edge) && Math.abs(edge[SCORE]) >= state.least;
/** Name of the node that stands for one in this picture: its group, if groups are drawn. */
const drawnAs = name => (picture().groups ? placeOf(name) : name);

const alike = new Set(data.edges.map(edge => edge[SCORE])).size < 2;  // scores say nothing
for (const { lines } of pictures) if (!alike) lines.forEach(colour);

/** A line's colour is of the page's theme, its strength that of its largest score. */
function colour({ element, edges }) {
  const score = [...edges].sort(byScore)[0][SCORE];
  element.classList.add(helps(score) ? "helps" : "hurts");
  element.style.setProperty("--strength", 0.4 + 0.6 * Math.sqrt(Math.abs(score) / (largest || 1)));
}

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
  if (state.least) state.least = steps[slider.value] || 0;
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
  const on = onPaths();
  const focus = new Set([...state.pins, ...(state.node === null ? [] : [state.node])].map(drawnAs));
  const lit = new Set(["logits"]);
  for (const { element, edges } of lines) {
    const here = edges.filter(drawn);
    const touches = edge => focus.has(drawnAs(edge[SENDER])) || focus.has(drawnAs(edge[NODE]));
    const away = on !== null ? !here.some(edge => on.edges.has(edge))
      : focus.size > 0 && !edges.some(touches);
    element.classList.toggle("gone", !here.length);
    element.classList.toggle("away", away);
    here.forEach(edge => lit.add(drawnAs(edge[SENDER])).add(drawnAs(edge[NODE])));
  }
  feeds.forEach(feed => feed.classList.toggle("gone",
    !lit.has(feed.dataset.from) || !lit.has(feed.dataset.to)));
  const onPath = on === null ? null : new Set([...on.nodes].map(drawnAs));
  const words = sought();
  for (const node of nodes) {
    const name = node.dataset.node;
    node.classList.toggle("away", !lit.has(name) || (onPath !== null && !onPath.has(name)));
    node.classList.toggle("chosen", name === state.node);
    node.classList.toggle("pinned", state.pins.has(name));
    node.classList.toggle("found", words !== null && members(name).some(one => matches(one, words)));
    const group = isGroup(name) ? Number(name.slice(6)) : state.groups.indexOf(groupOf(name));
    node.classList.toggle("member", group >= 0);
    node.style.setProperty("--group", group < 0 ? "" : `var(--g${group % 6})`);
    node.setAttribute("aria-label", titled(name));
  }
  $("at").textContent = steps.length ? digits(steps[$("threshold").value]) : "";
  $("count").textContent = counted();
  views.forEach((view, i) => view.setAttribute("aria-pressed", i === state.picture));
}

$("threshold").addEventListener("input", event => {
  set({ least: +event.target.value ? steps[event.target.value] : 0 });
});
views.forEach((view, i) => view.addEventListener("click", () => turnTo(i)));

/** Go to another picture; what is chosen stays if it is on it. */
function turnTo(i) {
  state.picture = i;
  state.least = 0;
  if (picture().groups) drawGroups();
  const here = new Set(picture().nodes.map(node => node.dataset.node));
  set({ node: here.has(state.node) ? state.node : null });
}

// --- zoom ----------------------------------------------------------------------------------

const box = svg => svg.getAttribute("viewBox").split(/[\s,]+/).map(Number);

function zoom(factor, x = 0.5, y = 0.5) {
  const { svg } = picture();
  const [left, top, width, height] = box(svg);
  const [w, h] = [width / factor, height / factor];
  svg.setAttribute("viewBox", [left + x * (width - w), top + y * (height - h), w, h].join(" "));
}

const fit = () => picture().svg.setAttribute("viewBox", picture().home);

/** Show the picture as high as its frame, the middle of it if it is wider. */
function fitHeight() {
  const { svg, home } = picture();
  const [left, top, width, height] = home.split(/[\s,]+/).map(Number);
  const area = svg.getBoundingClientRect();
  const w = Math.min(width, height * area.width / (area.height || 1));
  svg.setAttribute("viewBox", [left + (width - w) / 2, top, w, height].join(" "));
}

$("in").addEventListener("click", () => zoom(1.3));
$("out").addEventListener("click", () => zoom(1 / 1.3));
$("fit").addEventListener("click", fit);
$("fit-height").addEventListener("click", fitHeight);

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
    if (node !== null && event.shiftKey) pin(node.dataset.node);
    else choose(node === null ? null : node.dataset.node);
  });
}

/** @param {string|null} name */
function choose(name) {
  const here = picture().nodes.some(node => node.dataset.node === name);
  const other = pictures.findIndex(one => one.nodes.some(node => node.dataset.node === name));
  if (name !== null && !here && other >= 0) Object.assign(state, { picture: other, least: 0 });
  set({ node: name });
}

function pin(name) {
  const pins = new Set(state.pins);
  if (!pins.delete(name) && known(name)) pins.add(name);
  set({ pins });
}
