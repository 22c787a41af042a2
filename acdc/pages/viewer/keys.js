// The keyboard, and the theme.

const typing = element => Boolean(element.closest?.("input, select, textarea"));
const focused = () => document.activeElement?.closest?.(".node")?.dataset.node ?? null;

/** Go from the chosen node along its strongest drawn edge out (1) or in (-1). */
function follow(way) {
  const [own, other] = way > 0 ? [SENDER, NODE] : [NODE, SENDER];
  const next = state.node === null ? null
    : data.edges.filter(edge => drawn(edge) && edge[own] === state.node).sort(byScore)[0];
  step(next ? next[other] : state.node ?? "logits");
}

/** Go to the next node on the right (1) or left (-1) at the same height. */
function aside(way) {
  const all = picture().nodes.map(node => {
    const { left, top, width, height } = node.getBoundingClientRect();
    return { name: node.dataset.node, x: left + width / 2, y: top + height / 2, height };
  });
  const own = all.find(node => node.name === state.node) ?? all[0];
  const near = all.filter(node => Math.abs(node.y - own.y) < own.height / 2 && way * (node.x - own.x) > 0)
    .sort((a, b) => way * (a.x - b.x));
  if (near.length) step(near[0].name);
}

function step(name) {
  choose(name);
  picture().nodes.find(node => node.dataset.node === name)?.focus({ preventScroll: true });
}

function back() {
  if (state.from !== null || state.to !== null) set({ from: null, to: null });
  else if (state.node !== null) choose(null);
  else set({ pins: new Set() });
}

const KEYS = {
  "/": () => $("search").focus(),
  Enter: () => focused() !== null && choose(focused()),
  " ": () => focused() !== null && choose(focused()),
  Escape: back,
  ArrowUp: () => follow(1), ArrowDown: () => follow(-1),
  ArrowRight: () => aside(1), ArrowLeft: () => aside(-1),
  p: () => state.node !== null && pin(state.node),
  f: () => state.node !== null && known(state.node) && set({ from: state.node }),
  t: () => state.node !== null && known(state.node) && set({ to: state.node }),
  g: () => state.pins.size && addGroup([...state.pins], proposedName([...state.pins])),
  "+": () => zoom(1.3), "=": () => zoom(1.3), "-": () => zoom(1 / 1.3), 0: fit, h: fitHeight,
};

addEventListener("keydown", event => {
  if (event.ctrlKey || event.metaKey || event.altKey || typing(event.target)) return;
  const moves = event.key.startsWith("Arrow") || event.key === "Enter" || event.key === " ";
  if (!Object.hasOwn(KEYS, event.key) || (moves && focused() === null)) return;
  event.preventDefault();
  KEYS[event.key]();
});

function showTheme() {
  document.documentElement.style.colorScheme = state.theme || "light dark";
  $("theme").textContent = { dark: "dark", light: "light" }[state.theme] ?? "auto";
}
$("theme").addEventListener("click", () =>
  set({ theme: { "": "dark", dark: "light", light: "" }[state.theme] }));

addEventListener("hashchange", () => { recall(); show(); });
recall();
show();
