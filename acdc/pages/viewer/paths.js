// All paths between two nodes, along the edges that are drawn.

/**
 * Whom a node leads to: along an edge, or (edge null) because the one is computed from what the
 * other reads, as heads are from keys that they share.
 * @returns {Map<string, {to: string, edge: Edge|null}[]>}
 */
function onwardSteps() {
  const onward = new Map(Object.keys(data.nodes).map(name => [name, []]));
  for (const edge of data.edges.filter(drawn)) onward.get(edge[SENDER]).push({ to: edge[NODE], edge });
  for (const [name, { feeds }] of Object.entries(data.nodes)) {
    for (const to of feeds) onward.get(name)?.push({ to, edge: null });
  }
  return onward;
}

/**
 * Nodes and edges on any path, how many paths there are (edges side by side count once), and the
 * best of them: those whose weakest edge is strongest.  Null if no two ends are chosen.
 */
function onPaths(most = 8) {
  const { from, to } = state;
  if (from === null || to === null) return null;
  const onward = onwardSteps();
  const ways = new Map();  // node -> {count, best: [[weakest, [nodes]]]} of its paths to the end
  const walk = name => {
    if (ways.has(name)) return ways.get(name);
    const found = { count: name === to ? 1 : 0, best: name === to ? [[Infinity, [to]]] : [] };
    ways.set(name, found);
    if (name === to) return found;
    const next = new Map();
    for (const { to: other, edge } of onward.get(name) ?? []) {
      const score = edge === null ? Infinity : Math.abs(edge[SCORE]);
      next.set(other, Math.max(next.get(other) ?? 0, score));
    }
    for (const [other, score] of next) {
      const rest = walk(other);
      found.count += rest.count;
      found.best.push(...rest.best.map(([weakest, way]) => [Math.min(weakest, score), [name, ...way]]));
    }
    found.best.sort((a, b) => b[0] - a[0]);
    found.best.length = Math.min(found.best.length, most);
    return found;
  };
  const { count, best } = walk(from);
  const nodes = new Set([...ways].filter(([, way]) => way.count).map(([name]) => name));
  const edges = new Set();
  for (const name of nodes) {
    for (const { to: other, edge } of onward.get(name)) if (edge && nodes.has(other)) edges.add(edge);
  }
  return { nodes, edges, count, best };
}

function pathRows() {
  const { from, to } = state;
  if (from === null && to === null) return [];
  const clear = button("clear", () => set({ from: null, to: null }), "forget both ends (Esc)");
  const head = make("h4", {}, "Paths from ", from === null ? "\u2026" : link(from), " to ",
    to === null ? "\u2026" : link(to), " ", clear);
  if (from === null || to === null) {
    return [head, make("p", { class: "soft" }, `Choose a node and press \u201c${from === null ? "paths from" : "paths to"} here\u201d.`)];
  }
  const { count, best, edges } = onPaths();
  const many = count < 1e6 ? count.toLocaleString("en") : count.toExponential(1);
  const says = `${many} path${count === 1 ? "" : "s"} along ${edges.size} edges; the best by their weakest edge:`;
  return [head, make("p", { class: "soft" }, count ? says : "No path along the edges that are drawn."),
    make("ol", { class: "paths" }, ...best.map(([weakest, way]) => make("li", {},
      ...way.flatMap((name, i) => (i ? [" \u2192 ", link(name)] : [link(name)])),
      make("span", { class: "soft" }, weakest < Infinity ? ` ${digits(weakest)}` : ""))))];
}
