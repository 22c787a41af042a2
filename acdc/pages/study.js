for (const button of document.querySelectorAll(".legend button")) {
  button.addEventListener("click", () => {
    document.body.classList.toggle("off" + button.dataset.series);
    button.classList.toggle("away");
  });
}
const value = (row, at) => {
  const cell = row.cells[at], known = cell.dataset.v ?? cell.textContent;
  return cell.classList.contains("n") ? (known === "" ? -Infinity : Number(known)) : known;
};
for (const head of document.querySelectorAll("th[data-by]")) {
  head.addEventListener("click", () => {
    const body = head.closest("table").tBodies[0], at = head.cellIndex;
    const down = head.dataset.by = head.dataset.by === "up" ? "down" : "up";
    const sign = down === "up" ? 1 : -1;
    [...body.rows].sort((a, b) => {
      const x = value(a, at), y = value(b, at);
      return sign * (x < y ? -1 : x > y ? 1 : 0);
    }).forEach(row => body.append(row));
  });
}
