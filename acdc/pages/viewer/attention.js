// Where a head attends on the example prompts.

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
  const ask = query => set({ query });
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
  const change = event => set({ prompt: +event.target.value, query: null });
  const runs = ["clean", "corrupt"].map(run => make("button", {
    "aria-pressed": run === state.run, onclick: () => set({ run }),
  }, run));
  return make("div", { class: "choice" },
    make("select", { id: "prompt", "aria-label": "prompt", onchange: change }, ...options), ...runs);
}

function words(tokens, prompt, asked, weight, ask) {
  const spans = tokens.map((token, i) => make("span", {
    class: `${i === asked ? "asked" : ""} ${prompt.scored.includes(i) ? "scored" : ""}`,
    style: { background: `color-mix(in srgb, var(--hot) ${(100 * weight(asked, i)).toFixed(1)}%, transparent)` },
    tabindex: 0, role: "button",
    onkeydown: event => { if (event.key === "Enter") ask(i); },
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
