/* Tables that sort: a click on a column sorts it up, another down, a third puts the rows back as they were written. */

/** What a row sorts by: the figure that a cell begins with, else its words. */
function key(row, column) {
  const words = row.cells[column].textContent.trim();
  const figure = words.match(/^[-−]?\d[\d,]*(\.\d+)?(e[-+]?\d+)?/);
  return { words, figure: figure && Number(figure[0].replaceAll(",", "").replace("−", "-")) };
}

/** Figures before words, and both before empty cells, which stay last in either direction. */
function compare(one, two, sign) {
  const [first, second] = [one, two].map(({ words, figure }) => (words === "" ? 2 : figure === null ? 1 : 0));
  if (first !== second) return first - second;
  return sign * (first === 0 ? one.figure - two.figure : one.words.localeCompare(two.words, "en"));
}

function sort(table, written, head) {
  const next = { ascending: "descending", descending: null }[head.getAttribute("aria-sort")];
  const order = next === undefined ? "ascending" : next;
  for (const other of head.parentElement.cells) other.removeAttribute("aria-sort");
  if (order) head.setAttribute("aria-sort", order);
  const keyed = written.map((row) => [key(row, head.cellIndex), row]);
  if (order) keyed.sort(([one], [two]) => compare(one, two, order === "ascending" ? 1 : -1));
  table.tBodies[0].append(...keyed.map(([, row]) => row));
}

for (const table of document.querySelectorAll("table.sortable")) {
  const written = [...table.tBodies[0].rows];
  if (written.length < 2) continue;
  for (const head of table.tHead.rows[0].cells) {
    const button = Object.assign(document.createElement("button"), { type: "button", textContent: head.textContent });
    button.addEventListener("click", () => sort(table, written, head));
    head.replaceChildren(button);
  }
}
