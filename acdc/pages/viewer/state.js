// What is chosen.  All of it stands in the address after "#?", so that a link opens the same view.

/**
 * @typedef {{name: string, note: string, nodes: string[]}} Group
 * @type {{picture: number, least: number, node: string|null, prompt: number, run: string,
 *   query: number|null, pins: Set<string>, from: string|null, to: string|null, groups: Group[],
 *   theme: string}}
 */
const state = {
  picture: 0, least: 0, node: null, prompt: 0, run: "clean", query: null, pins: new Set(),
  from: null, to: null, groups: [], theme: "",
};
const known = name => Object.hasOwn(data.nodes, name);
const MOST_GROUPS = 60;

/** The state as the address has it; empty where nothing was chosen. */
function address(change = {}) {
  const now = { ...state, ...change };
  const words = new URLSearchParams();
  if (now.picture) words.set("picture", now.picture);
  if (now.least) words.set("least", now.least);
  if (now.node !== null) words.set("node", now.node);
  if (now.pins.size) words.set("pins", JSON.stringify([...now.pins]));
  if (now.from !== null) words.set("from", now.from);
  if (now.to !== null) words.set("to", now.to);
  if (now.groups.length) {
    words.set("groups", JSON.stringify(now.groups.map(({ name, note, nodes }) => [name, note, ...nodes])));
  }
  if (now.prompt) words.set("prompt", now.prompt);
  if (now.run !== "clean") words.set("run", now.run);
  if (now.query !== null) words.set("query", now.query);
  if (now.theme) words.set("theme", now.theme);
  return `#?${words}`;
}

let due = 0;
/** Write the address soon: browsers stop pages that write it too often. */
function remember() {
  clearTimeout(due);
  due = setTimeout(write, 200);
}

function write() {
  const now = address();
  if (now !== "#?" || location.hash.startsWith("#?")) history.replaceState(null, "", now);
}

/** What an address says; what it has no right to say is left out. */
function recall() {
  if (!location.hash.startsWith("#?")) return;
  const words = new URLSearchParams(location.hash.slice(2));
  const list = name => {
    try {
      const value = JSON.parse(words.get(name) ?? "[]");
      return Array.isArray(value) ? value : [];
    } catch {
      return [];
    }
  };
  const whole = (name, end) => {
    const value = Number(words.get(name));
    return Number.isInteger(value) && value >= 0 && value < end ? value : 0;
  };
  const node = name => (known(words.get(name) ?? "") ? words.get(name) : null);
  state.picture = whole("picture", pictures.length);
  state.least = Math.max(0, Number(words.get("least")) || 0);
  state.pins = new Set(list("pins").filter(name => typeof name === "string" && known(name)));
  [state.from, state.to] = [node("from"), node("to")];
  const taken = new Set();
  state.groups = list("groups").filter(Array.isArray).slice(0, MOST_GROUPS)
    .map(([name, note, ...nodes]) => ({
      name: String(name), note: String(note ?? ""),
      nodes: nodes.filter(one => typeof one === "string" && known(one) && !taken.has(one) && taken.add(one)),
    })).filter(group => group.nodes.length);
  state.node = isGroup(words.get("node")) ? words.get("node") : node("node");
  state.prompt = whole("prompt", data.prompts.length);
  state.run = words.get("run") === "corrupt" ? "corrupt" : "clean";
  state.query = words.has("query") ? whole("query", 10000) : null;
  state.theme = ["dark", "light"].includes(words.get("theme")) ? words.get("theme") : "";
}

/** Show the state, all of it. */
function show() {
  if (picture().groups) drawGroups();
  setSteps();
  update();
  showPanel();
  showTheme();
  remember();
}

/** @param {Partial<typeof state>} change */
function set(change) {
  Object.assign(state, change);
  show();
}

const isGroup = name => /^group:[0-9]+$/.test(name ?? "") && Number(name.slice(6)) < state.groups.length;
const groupOf = name => state.groups.find(group => group.nodes.includes(name));
