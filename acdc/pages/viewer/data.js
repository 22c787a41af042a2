"use strict";
// What the page holds, and small helpers.  The files of this folder are one script, in the order
// of acdc/pages/render.py; each is one part of the circuit's viewer.
//
// The element "data" (acdc/pages/circuit.py, patterns.py):
//   n_edges   edges of the circuit, of which very many are not all here
//   helps     sign of a score that helps
//   edges     [sender, node, receiver, score, 1 if in the circuit, runs that kept it or null]
//   pictures  for each picture, for each of its lines, indices of its edges
//   nodes     name -> {about, head: "layer.head" or null, feeds, reads, tokens, layer}
//   proposed  sets of nodes with similar neighbours (graphs/similar.py)
//   prompts   [{clean, corrupt, n_left_out, scored, answers, wrong}]
//   patterns  "layer.head" -> for each prompt [clean, corrupt], bytes [query][key] in base64
//   why       "layer.head" -> [[heading, text]]: where it attends and why (acdc/pages/heads.py)
//   n_runs    repetitions that the last entry of an edge is out of, or null

/** @typedef {[string, string, string, number, number, number|null]} Edge */

const data = JSON.parse(document.getElementById("data").textContent);
const [SENDER, NODE, RECEIVER, SCORE, INSIDE, KEPT] = [0, 1, 2, 3, 4, 5];
const SVG = "http://www.w3.org/2000/svg";
const $ = id => document.getElementById(id);
const largest = Math.max(...data.edges.map(edge => Math.abs(edge[SCORE])), 0);

/**
 * An element with attributes, listeners (on...), style properties and children.  Texts are texts.
 * @param {string} tag
 * @param {Object<string, any>} attributes
 * @param {...(Node|string|null)} children
 */
function make(tag, attributes = {}, ...children) {
  const drawing = ["svg", "g", "rect", "text", "title", "path"].includes(tag);
  const element = drawing ? document.createElementNS(SVG, tag) : document.createElement(tag);
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
const byScore = (a, b) => Math.abs(b[SCORE]) - Math.abs(a[SCORE]);
const helps = score => score * data.helps >= 0;
