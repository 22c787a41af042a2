// Supernodes: sets of nodes with a name and a note, and a picture in which each is one node.

const GROUPS = pictures.length - 1;

/** @param {string[]} nodes @param {string} name */
function addGroup(nodes, name, note = "") {
  const groups = state.groups.map(group => ({ ...group, nodes: group.nodes.filter(one => !nodes.includes(one)) }))
    .filter(group => group.nodes.length);
  set({ groups: [...groups, { name, note, nodes: [...nodes] }], pins: new Set() });
}

/** What a set is called until somebody knows better: what it is and whom it feeds most. */
function proposedName(nodes) {
  const out = data.edges.filter(edge => edge[INSIDE] && nodes.includes(edge[SENDER])).sort(byScore)[0];
  const layers = [...new Set(nodes.map(name => data.nodes[name].layer))].sort((a, b) => a - b);
  const where = layers.length > 1 ? `${layers[0]}\u2013${layers.at(-1)}` : layers[0];
  return `layer ${where}${out ? ` \u2192 ${out[NODE]}` : ""}`;
}

function propose() {
  const free = data.proposed.map(nodes => nodes.filter(name => !groupOf(name))).filter(nodes => nodes.length > 1);
  set({ groups: [...state.groups, ...free.map(nodes => ({ name: proposedName(nodes), note: "", nodes }))] });
}

const change = (i, part) => {
  state.groups = state.groups.map((group, j) => (i === j ? { ...group, ...part } : group));
  update();
  remember();
};

/** Rows of the panel: the groups, to be named, noted, opened and dissolved. */
function groupRows() {
  const pins = [...state.pins];
  const free = data.proposed.some(nodes => nodes.filter(name => !groupOf(name)).length > 1);
  const tools = make("p", {},
    pins.length ? button(`group the ${pins.length} pinned`, () => addGroup(pins, proposedName(pins)), "make one supernode of them (g)") : null,
    free ? button("propose groups", propose, "sets of nodes with similar neighbours") : null,
    state.groups.length ? button("no groups", () => set({ groups: [] }), "dissolve all") : null);
  return [make("h4", {}, "Groups"), tools, ...state.groups.map((group, i) => groupCard(group, i))];
}

function groupCard(group, i) {
  return make("div", { class: "group", style: { borderColor: `var(--g${i % 6})` } },
    make("input", { value: group.name, "aria-label": "name of the group",
      oninput: event => change(i, { name: event.target.value }), onchange: () => show() }),
    button("dissolve", () => set({ groups: state.groups.filter((_, j) => i !== j), node: null })),
    make("p", {}, ...group.nodes.flatMap((name, j) => (j ? [", ", link(name)] : [link(name)]))),
    make("textarea", { rows: 2, placeholder: "note", "aria-label": "note on the group",
      oninput: event => change(i, { note: event.target.value }) }, group.note));
}

// --- the picture of groups -----------------------------------------------------------------

/** Name of the node that a node is drawn as: its group's, or its own. */
function placeOf(name) {
  const i = state.groups.findIndex(group => group.nodes.includes(name));
  return i < 0 ? name : `group:${i}`;
}

/** Draw the first picture with its groups as one node each: rows by layer, lines by summed score. */
function drawGroups() {
  const own = pictures[GROUPS];
  const shown = JSON.stringify(state.groups);
  if (own.shown === shown) return;
  own.shown = shown;
  own.edges = pictures[0].edges;
  const sums = new Map();
  for (const edge of [...own.edges]) {
    const ends = [placeOf(edge[SENDER]), placeOf(edge[NODE])];
    if (ends[0] === ends[1]) continue;
    const key = JSON.stringify(ends);
    if (!sums.has(key)) sums.set(key, { ends, edges: [], score: 0 });
    const line = sums.get(key);
    line.edges.push(edge);
    line.score += edge[SCORE];
  }
  const lines = [...sums.values()];
  const places = arrange(lines);
  const most = Math.max(...lines.map(line => Math.abs(line.score)), 0) || 1;
  for (const [i, line] of lines.sort((a, b) => span(a, places) - span(b, places)).entries()) {
    line.side = sideways(line, i, places);
  }
  const xs = [...places.values()].flatMap(at => [at.x - at.width / 2, at.x + at.width / 2]);
  const bends = lines.map(line => line.side * 0.75);
  const [left, right] = [Math.min(...xs, ...bends) - 20, Math.max(...xs, ...bends) + 20];
  own.home = `${left} -40 ${right - left} ${Math.max(...[...places.values()].map(at => at.y)) + 80}`;
  own.svg.setAttribute("viewBox", own.home);
  own.lines = lines.map(line => ({ edges: line.edges, element: drawLine(line, places, most) }));
  own.nodes = [...places].map(([name, at]) => drawPlace(name, at));
  own.svg.replaceChildren(...own.lines.map(line => line.element), ...own.nodes);
}

/** Where each place stands: rows from the lowest layer (below) up, sorted by their neighbours. */
function arrange(lines) {
  const names = new Set(["logits", ...lines.flatMap(line => line.ends)]);
  const height = new Map([...names].map(name => [name, depth(name)]));
  const rows = [...new Set(height.values())].sort((a, b) => b - a)
    .map(layer => [...names].filter(name => height.get(name) === layer));
  const places = new Map();
  rows.forEach((row, y) => spread(row, y, places));
  for (let round = 0; round < 6; round++) {
    for (const [y, row] of (round % 2 ? [...rows.entries()].reverse() : [...rows.entries()])) {
      const middle = new Map(row.map(name => {
        const near = lines.filter(line => line.ends.includes(name))
          .map(line => places.get(line.ends[line.ends[0] === name ? 1 : 0]).x);
        return [name, near.length ? near.reduce((a, b) => a + b) / near.length : places.get(name).x];
      }));
      spread(row.sort((a, b) => middle.get(a) - middle.get(b)), y, places);
    }
  }
  return places;
}

const members = name => (isGroup(name) ? state.groups[name.slice(6)].nodes : [name]);
const titled = name => (isGroup(name) ? state.groups[name.slice(6)].name : name);

function depth(name) {
  const layers = members(name).map(one => data.nodes[one].layer);
  const mlps = members(name).every(one => /^m\d/.test(one)) ? 0.5 : 0;
  return Math.round(layers.reduce((a, b) => a + b) / layers.length) + mlps;
}

function spread(row, y, places) {
  const widths = row.map(name => Math.max(46, 7 * Math.max(titled(name).length, isGroup(name) ? 12 : 0) + 18));
  let x = -(widths.reduce((a, b) => a + b, 0) + 26 * (row.length - 1)) / 2;
  row.forEach((name, i) => {
    places.set(name, { x: x + widths[i] / 2, y: ROW * y, width: widths[i] });
    x += widths[i] + 26;
  });
}

const ROW = 86;
const span = ({ ends }, places) => Math.round((places.get(ends[0]).y - places.get(ends[1]).y) / ROW);

/** How far to the side a line bends that would go through rows between its ends: 0 if it does not. */
function sideways(line, i, places) {
  const rows = span(line, places);
  if (rows < 2) return 0;
  const [from, to] = line.ends.map(name => places.get(name));
  const between = [...places.values()].filter(at => at.y < from.y && at.y > to.y);
  const way = from.x + to.x > 4 ? 1 : from.x + to.x < -4 ? -1 : i % 2 ? 1 : -1;
  const clear = Math.max(0, ...between.map(at => way * at.x + at.width / 2));
  return way * (clear + 16 + 5 * (i % 7)) / 0.75;  // a Bezier curve goes 3/4 of the way
}

function drawLine({ ends, edges, score, side }, places, most) {
  const [from, to] = ends.map(name => places.get(name));
  const [y, end] = [from.y - 17, to.y + 17];
  const bend = Math.max(30, (y - end) / 2);
  const [x1, x2] = side ? [side, side] : [from.x, to.x];
  const group = make("g", { class: `line ${helps(score) ? "helps" : "hurts"}` },
    make("title", {}, `${titled(ends[0])} \u2192 ${titled(ends[1])}: ${signed(score)} in ${edges.length} edges`),
    make("path", { fill: "none", "stroke-width": 0.6 + 5 * Math.sqrt(Math.abs(score) / most),
      d: `M${from.x},${y} C${x1},${y - (side ? 0.2 * bend : bend)} ${x2},${end + (side ? 0.2 * bend : bend)} ${to.x},${end}` }));
  group.style.setProperty("--strength", 0.35 + 0.65 * Math.sqrt(Math.abs(score) / most));
  return group;
}

function drawPlace(name, { x, y, width }) {
  const group = isGroup(name);
  const size = members(name).length;
  const node = make("g", { class: `node place${group ? " super" : ""}`, tabindex: 0, role: "button" },
    make("title", {}, group ? members(name).join(", ") : name),
    make("rect", { x: x - width / 2, y: y - 17, width, height: 34, rx: group ? 12 : 5 }),
    make("text", { x, y: y + (group ? 0 : 4), "text-anchor": "middle", "font-size": 12 }, titled(name)),
    ...(group ? [make("text", { x, y: y + 12, "text-anchor": "middle", "font-size": 9 }, `${size} nodes`)] : []));
  node.dataset.node = name;
  if (group) node.style.setProperty("--group", `var(--g${name.slice(6) % 6})`);
  return node;
}
