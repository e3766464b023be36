const rows = [...document.querySelectorAll("tr.row")];
const search = document.getElementById("search");
const selects = ["kind", "method", "evaluations"].map((id) => document.getElementById(id));
const visible = () => rows.filter((row) => !row.hidden);
const anchorOf = (row) => row.querySelector("td.name a").hash.slice(1);

const filter = () => {
  const words = search.value.toLowerCase().split(/\s+/).filter(Boolean);
  for (const row of rows) {
    row.hidden = !(
      words.every((word) => row.dataset.search.includes(word)) &&
      selects.every((select) => !select.value || row.dataset[select.id] === select.value)
    );
  }
  const shown = new Set(visible().map(anchorOf));
  for (const body of document.querySelectorAll("tbody.setup")) body.hidden = !body.querySelector("tr.row:not([hidden])");
  for (const card of document.querySelectorAll("section.card")) card.hidden = !card.querySelector("tr.row:not([hidden])");
  for (const point of document.querySelectorAll("figure.plot svg > a")) point.style.opacity = shown.has(point.getAttribute("href").slice(1)) ? "" : 0.15;
  for (const grid of document.querySelectorAll("figure[data-row]")) grid.hidden = !shown.has(grid.dataset.row);
  for (const gallery of document.querySelectorAll(".gallery")) gallery.hidden = !gallery.querySelector("figure:not([hidden])");
  document.getElementById("none").hidden = shown.size > 0;
  document.getElementById("count").textContent = `${shown.size} of ${rows.length}`;
};
const clear = () => {
  search.value = "";
  for (const select of selects) select.value = "";
  filter();
};
search.addEventListener("input", filter);
for (const select of selects) select.addEventListener("change", filter);
search.form.addEventListener("submit", (event) => event.preventDefault());
document.getElementById("clear").addEventListener("click", () => { clear(); search.focus(); });

// What has no value stays last, whichever way the column is sorted.
const compare = (column, sign) => (a, b) => {
  const [x, y] = [a, b].map((row) => row.cells[column].dataset.value);
  if (x === "" || y === "") return (x === "") - (y === "");
  const numbers = [Number(x), Number(y)];
  return sign * (numbers.some(Number.isNaN) ? x.localeCompare(y, undefined, { numeric: true }) : numbers[0] - numbers[1]);
};
const sortBy = (head) => {
  const descending = head.ariaSort === "ascending";
  for (const other of head.parentNode.cells) other.removeAttribute("aria-sort");
  head.ariaSort = descending ? "descending" : "ascending";
  for (const body of head.closest("table").tBodies) {
    const sorted = [...body.querySelectorAll("tr.row")].sort(compare(head.cellIndex, descending ? -1 : 1));
    body.append(...sorted);
  }
};
for (const button of document.querySelectorAll("section.card th button")) {
  button.addEventListener("click", () => sortBy(button.closest("th")));
}

for (const figure of document.querySelectorAll("figure.plot")) {
  const plots = figure.querySelectorAll("svg");
  figure.addEventListener("input", (event) => plots.forEach((plot, number) => plot.toggleAttribute("hidden", number !== Number(event.target.value))));
}

// The same place in every grid: the same noise.
for (const grids of document.querySelectorAll(".grids")) {
  grids.addEventListener("pointermove", (event) => {
    const box = event.target.closest("a")?.getBoundingClientRect();
    if (!box) return;
    grids.style.setProperty("--x", `${(100 * (event.clientX - box.left)) / box.width}%`);
    grids.style.setProperty("--y", `${(100 * (event.clientY - box.top)) / box.height}%`);
  });
  grids.addEventListener("pointerleave", () => { grids.style.removeProperty("--x"); grids.style.removeProperty("--y"); });
}

const openDialog = () => document.querySelector("dialog[open]");
let opener = null;
const show = () => {
  openDialog()?.close();
  const dialog = location.hash.startsWith("#record-") ? document.getElementById(location.hash.slice(1)) : null;
  dialog?.showModal();
};
const go = (step) => {
  const anchors = [...document.querySelectorAll("tr.row:not([hidden]) td.name a")].map((link) => link.hash);
  const next = anchors[anchors.indexOf(location.hash) + step];
  if (next) history.replaceState(null, "", next), show();
};
const wire = (dialog) => {
  dialog.addEventListener("close", () => {
    if (location.hash !== `#${dialog.id}`) return; // another record has taken its place
    history.replaceState(null, "", location.pathname + location.search);
    opener?.focus();
  });
  dialog.addEventListener("click", (event) => {
    if (event.target === dialog || event.target.closest("[data-close]")) dialog.close();
    const step = event.target.closest("[data-go]")?.dataset.go;
    if (step) go(Number(step));
  });
};
document.querySelectorAll("dialog").forEach(wire);
addEventListener("hashchange", show);
document.addEventListener("click", (event) => {
  const link = event.target.closest("a[href^='#record-']");
  if (!link) return;
  event.preventDefault(); // else the page would scroll to the dialog
  opener = link;
  history.replaceState(null, "", link.getAttribute("href"));
  show();
});

document.addEventListener("keydown", (event) => {
  if (event.altKey || event.ctrlKey || event.metaKey) return;
  const field = event.target.closest("input, select, textarea");
  if (openDialog()) {
    if (event.key === "ArrowRight" || event.key === "ArrowLeft") go(event.key === "ArrowRight" ? 1 : -1);
  } else if (event.key === "/" && !field) {
    event.preventDefault();
    search.focus();
  } else if (event.key === "Escape" && field === search) {
    clear();
  } else if (["ArrowDown", "ArrowUp"].includes(event.key) && (!field || field === search)) {
    const links = [...document.querySelectorAll("tr.row:not([hidden]) td.name a")];
    const from = links.indexOf(document.activeElement);
    if (from < 0 && field !== search) return;
    event.preventDefault();
    (links[from + (event.key === "ArrowDown" ? 1 : -1)] ?? (from < 0 ? links[0] : search)).focus();
  }
});
filter();
show();
