// The panel: the node that is chosen, or the strongest edges, what is pinned, and the groups.

const button = (text, onclick, title = "") => make("button", { onclick, title, type: "button" }, text);

/** A link that opens the same view with a node chosen. */
function link(name) {
  const onclick = event => {
    if (event.ctrlKey || event.metaKey || event.shiftKey) return;
    event.preventDefault();
    choose(name);
  };
  return make("a", { href: address({ node: name }), onclick }, name);
}

function showPanel() {
  const panel = $("panel");
  if (panel.contains(document.activeElement) && typing(document.activeElement) &&
    document.activeElement.id !== "prompt") return;  // nobody's words are taken away
  panel.replaceChildren(...(state.node === null ? home()
    : isGroup(state.node) ? aboutGroup(state.node) : aboutNode(state.node)));
}

function home() {
  const best = data.edges.filter(drawn).sort(byScore).slice(0, 16);
  return [
    ...pathRows(), ...pinned(),
    make("h3", { class: "words" }, "Strongest edges"),
    make("p", { class: "soft" }, "Click a node for its attention pattern and its edges."),
    table(best, edge => [link(edge[SENDER]), " \u2192 ", link(edge[NODE])], "pairs"),
    ...groupRows()];
}

function pinned() {
  const names = [...state.pins];
  if (!names.length) return [];
  return [make("h4", {}, "Pinned"), make("p", {},
    ...names.flatMap((name, i) => (i ? [", ", link(name)] : [link(name)])), " ",
    button("unpin all", () => set({ pins: new Set() })))];
}

function aboutGroup(name) {
  const nodes = members(name);
  const found = data.edges.filter(possible).sort(byScore);
  const inside = edge => nodes.includes(edge[SENDER]) && nodes.includes(edge[NODE]);
  return [
    make("h3", {}, titled(name)), groupCard(state.groups[name.slice(6)], Number(name.slice(6))),
    ...ends("edges in", found.filter(edge => nodes.includes(edge[NODE]) && !inside(edge)), SENDER),
    ...ends("edges out", found.filter(edge => nodes.includes(edge[SENDER]) && !inside(edge)), NODE)];
}

function aboutNode(name) {
  const { about, head, feeds, reads, tokens } = data.nodes[name];
  const found = data.edges.filter(possible).sort(byScore);
  return [
    make("h3", {}, name), make("p", { class: "soft" }, about),
    make("p", { class: "acts" },
      button(state.pins.has(name) ? "unpin" : "pin", () => pin(name), "keep it lit (p, or Shift and click)"),
      button("paths from here", () => set({ from: name }), "f"),
      button("paths to here", () => set({ to: name }), "t"),
      grouped(name)),
    ...pathRows(),
    ...(tokens.length ? [fires(tokens)] : []),
    ...(head !== null ? why(head) : []),
    ...(head !== null ? attention(head) : []),
    ...related("computed from", reads), ...related("read by", feeds),
    ...ends("edges in", found.filter(edge => edge[NODE] === name), SENDER),
    ...ends("edges out", found.filter(edge => edge[SENDER] === name), NODE)];
}

/** Which group a node is in, as a choice. */
function grouped(name) {
  const own = state.groups.indexOf(groupOf(name));
  const options = ["no group", ...state.groups.map(group => group.name)].map((text, i) =>
    make("option", { value: i - 1, ...(i - 1 === own ? { selected: "" } : {}) }, text));
  if (!state.groups.length) return null;
  return make("select", { "aria-label": "group of the node", onchange: event => {
    const to = Number(event.target.value);
    event.target.blur();
    set({ groups: state.groups.map((group, i) => ({ ...group,
      nodes: [...group.nodes.filter(one => one !== name), ...(i === to ? [name] : [])] }))
      .filter(group => group.nodes.length) });
  } }, ...options);
}

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
  const names = all.filter(name => here.has(drawnAs(name)));
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
