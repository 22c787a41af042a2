// Search: nodes whose name holds what was typed, or a token that they fire on.

const sought = () => $("search").value.trim().toLowerCase() || null;

/** @param {string} name @param {string} words in small letters */
function matches(name, words) {
  const about = data.nodes[name];
  return name.toLowerCase().includes(words) ||
    (about?.tokens ?? []).some(([token]) => token.toLowerCase().includes(words)) ||
    (groupOf(name)?.name.toLowerCase().includes(words) ?? false);
}

/** All nodes that match, those that begin with the words first. */
function hits() {
  const words = sought();
  if (words === null) return [];
  const first = name => !name.toLowerCase().startsWith(words);
  return Object.keys(data.nodes).filter(name => matches(name, words))
    .sort((a, b) => first(a) - first(b) || a.length - b.length);
}

$("search").addEventListener("input", () => {
  const found = hits();
  $("hits").textContent = sought() === null ? "" : `${found.length} node${found.length === 1 ? "" : "s"}`;
  update();
});
$("search").addEventListener("keydown", event => {
  if (event.key === "Enter" && hits().length) {
    const found = hits();
    choose(found[(found.indexOf(state.node) + 1) % found.length]);
  } else if (event.key === "Escape") {
    event.target.value = "";
    event.target.dispatchEvent(new Event("input"));
    event.target.blur();
    event.stopPropagation();
  }
});
