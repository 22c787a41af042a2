// The picture as a file.  PNG is painted shape by shape: the page's policy lets no image in, not
// even one of its own.

const SHAPES = "path, polygon, polyline, rect, ellipse, text";
const LOOKS = ["fill", "stroke", "stroke-width", "stroke-dasharray", "opacity", "fill-opacity",
  "stroke-opacity", "font-size", "font-family", "font-weight", "text-anchor"];

/** Shapes that can be seen, with how faint what they stand in is. */
function* visibleShapes(svg) {
  for (const shape of svg.querySelectorAll(SHAPES)) {
    if (shape.closest(".gone") || getComputedStyle(shape).display === "none") continue;
    const around = shape.closest(".line, .node, .feed");
    yield { shape, faint: around === null ? 1 : +getComputedStyle(around).opacity };
  }
}

/** The whole picture as an SVG file's text, looks written out: it needs no page. */
function pictureText() {
  const { svg, home } = picture();
  const [, , width, height] = home.split(/[\s,]+/).map(Number);
  const out = make("svg", { xmlns: SVG, viewBox: home, width, height });
  const [left, top] = home.split(/[\s,]+/);
  out.append(make("rect", { x: left, y: top, width, height, fill: paper() }));
  for (const { shape, faint } of visibleShapes(svg)) {
    const copy = document.createElementNS(SVG, shape.tagName);
    const looks = getComputedStyle(shape);
    for (const { name, value } of shape.attributes) if (name !== "style" && name !== "class") copy.setAttribute(name, value);
    for (const name of LOOKS) copy.setAttribute(name, looks.getPropertyValue(name));
    copy.setAttribute("opacity", faint);
    copy.setAttribute("transform", svg.querySelector("g").getAttribute("transform") && !picture().groups
      ? svg.querySelector("g").getAttribute("transform") : "");
    copy.textContent = shape.textContent;
    out.append(copy);
  }
  return new XMLSerializer().serializeToString(out);
}

const paper = () => getComputedStyle(document.querySelector(".pictures")).backgroundColor;

/** The whole picture on a canvas, at least 2,000 pixels at its longer side. */
function paint() {
  const { svg, home } = picture();
  const [left, top, width, height] = home.split(/[\s,]+/).map(Number);
  const scale = Math.max(1, Math.min(8, 2400 / Math.max(width, height)));
  const canvas = make("canvas", { width: Math.round(width * scale), height: Math.round(height * scale) });
  const context = canvas.getContext("2d");
  context.fillStyle = paper();
  context.fillRect(0, 0, canvas.width, canvas.height);
  const move = picture().groups ? null : svg.querySelector("g").transform.baseVal.consolidate()?.matrix;
  context.setTransform(scale, 0, 0, scale, -left * scale, -top * scale);
  if (move) context.transform(move.a, move.b, move.c, move.d, move.e, move.f);
  for (const { shape, faint } of visibleShapes(svg)) paintShape(context, shape, faint);
  return canvas;
}

function paintShape(context, shape, faint) {
  const looks = getComputedStyle(shape);
  const number = name => +shape.getAttribute(name) || 0;
  const points = () => shape.getAttribute("points").trim().replaceAll(/\s+/g, " L");
  context.fillStyle = looks.fill;
  context.strokeStyle = looks.stroke;
  if (shape.tagName === "text") {
    context.font = `${looks.fontWeight} ${looks.fontSize} ${looks.fontFamily}`;
    context.textAlign = { middle: "center", end: "right" }[looks.textAnchor] ?? "left";
    context.globalAlpha = faint;
    context.fillText(shape.textContent, number("x"), number("y"));
    return;
  }
  const path = new Path2D({
    path: () => shape.getAttribute("d"),
    polygon: () => `M${points()}Z`,
    polyline: () => `M${points()}`,
    rect: () => "",
    ellipse: () => "",
  }[shape.tagName]());
  if (shape.tagName === "rect") path.roundRect(number("x"), number("y"), number("width"), number("height"), number("rx"));
  if (shape.tagName === "ellipse") path.ellipse(number("cx"), number("cy"), number("rx"), number("ry"), 0, 0, 2 * Math.PI);
  if (looks.fill !== "none") {
    context.globalAlpha = faint * +looks.fillOpacity;
    context.fill(path);
  }
  if (looks.stroke !== "none") {
    context.globalAlpha = faint * +looks.strokeOpacity;
    context.lineWidth = parseFloat(looks.strokeWidth);
    context.setLineDash(looks.strokeDasharray === "none" ? [] : looks.strokeDasharray.split(/[\s,]+/).map(parseFloat));
    context.stroke(path);
  }
}

/** @param {Blob} blob */
function download(blob, name) {
  const href = URL.createObjectURL(blob);
  make("a", { href, download: name }).click();
  setTimeout(() => URL.revokeObjectURL(href), 1000);
}

$("save-svg").addEventListener("click", () =>
  download(new Blob([pictureText()], { type: "image/svg+xml" }), "circuit.svg"));
$("save-png").addEventListener("click", () =>
  paint().toBlob(blob => download(blob, "circuit.png"), "image/png"));
