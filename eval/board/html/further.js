// The rows of long tables that the page does not hold, made from data when they are asked for.
const further = JSON.parse(document.getElementById("further-rows").textContent);
const atOnce = 500;

const make = (tag, attributes, ...children) => {
  const made = document.createElement(tag);
  for (const [name, value] of Object.entries(attributes)) if (value !== null) made.setAttribute(name, value);
  made.append(...children);
  return made;
};
const makeCell = ([text, value, spread, title, isBest, isPrimary]) =>
  make(
    "td",
    { class: isPrimary ? "number primary" : "number", "data-value": value ?? "" },
    make("span", { class: isBest ? "best" : null, title: title || null }, text),
    ...(spread ? [make("span", { class: "spread" }, `± ${spread}`)] : []),
  );
const makeRow = (row) =>
  make(
    "tr",
    { class: row.rank === 1 ? "row best-row" : "row", "data-kind": "measured", "data-method": row.method, "data-evaluations": row.evaluations, "data-search": row.search },
    make("td", { class: "rank", "data-value": row.rank ?? "" }, `${row.rank ?? "–"}`),
    make("td", { class: "name", "data-value": row.name }, make("a", { href: `#${row.anchor}` }, make("bdi", {}, row.name)), make("small", {}, row.subtitle)),
    ...row.cells.map(makeCell),
  );
const makeButton = (attributes, text) => make("button", { class: "button", type: "button", ...attributes }, text);
const makeDialog = (row, table) => {
  const id = `${row.anchor}-name`;
  const heads = ["Metric", "Shown", "Mean", "Std", "Min", "Each value"];
  const kind = (index) => (index ? "number" : null);
  const order = ["label", "headline", "mean", "std", "min", "each"];
  const scores = make(
    "table",
    {},
    make("thead", {}, make("tr", {}, ...heads.map((head, index) => make("th", { scope: "col", class: kind(index) }, head)))),
    make("tbody", {}, ...row.scores.map((score) => make("tr", {}, ...order.map((name, index) => make("td", { class: kind(index) }, score[name]))))),
  );
  const records = row.records.map(([origin, record]) =>
    make("details", {}, make("summary", {}, "The record in ", make("bdi", {}, origin)), make("pre", {}, JSON.stringify({ ...record, protocol: table.protocol }, null, 1))),
  );
  return make(
    "dialog",
    { id: row.anchor, "aria-labelledby": id },
    make(
      "header",
      {},
      make("div", {}, make("h2", { id }, make("bdi", {}, row.name)), make("p", {}, make("span", { class: "tag measured" }, "measured"), " ", make("bdi", {}, table.name))),
      make("div", { class: "actions" }, makeButton({ "data-go": "-1", "aria-label": "Record before" }, "←"), makeButton({ "data-go": "1", "aria-label": "Next record" }, "→"), makeButton({ "data-close": "" }, "Close")),
    ),
    make(
      "div",
      { class: "body" },
      make("div", { class: "lead bare" }, make("div", {}, make("h3", {}, "Scores"), make("div", { class: "scroller" }, scores))),
      ...(row.notes.length ? [make("div", {}, make("h3", {}, "Notes"), ...row.notes.map((note) => make("p", {}, make("bdi", {}, note))))] : []),
      ...records,
    ),
  );
};

const isAsked = () => search.value.trim() || selects.some((select) => select.value);
const matches = (row) => {
  const known = { kind: "measured", method: row.method, evaluations: row.evaluations };
  const words = search.value.toLowerCase().split(/\s+/).filter(Boolean);
  return words.every((word) => row.search.includes(word)) && selects.every((select) => !select.value || known[select.id] === select.value);
};
const tableOf = (anchor) => document.getElementById(anchor).closest("section").querySelector("table");

// Put rows into their table, which stays sorted as it is, and their dialogs into the page.
const add = (anchor, added) => {
  if (!added.length) return;
  const table = further[anchor];
  const gone = new Set(added);
  table.rows = table.rows.filter((row) => !gone.has(row));
  const made = added.map(makeRow);
  rows.push(...made);
  const body = tableOf(anchor).tBodies[0];
  const head = tableOf(anchor).querySelector("th[aria-sort]");
  body.append(...[...body.rows, ...made].sort(compare(head.cellIndex, head.ariaSort === "descending" ? -1 : 1)));
  for (const row of added) {
    const dialog = makeDialog(row, table);
    wire(dialog);
    document.getElementById("content").append(dialog);
  }
};
const label = () => {
  for (const button of document.querySelectorAll("button[data-further]")) {
    const left = further[button.dataset.further].rows.filter(matches).length;
    button.hidden = !left;
    button.textContent = `Show ${Math.min(left, atOnce).toLocaleString("en")} more of ${left.toLocaleString("en")}`;
  }
};
const update = () => {
  filter();
  label();
};
// What is filtered for is looked for among all rows.
const addMatching = () => {
  if (isAsked()) for (const anchor of Object.keys(further)) add(anchor, further[anchor].rows.filter(matches).slice(0, atOnce));
  update();
};
search.addEventListener("input", addMatching);
for (const select of selects) select.addEventListener("change", addMatching);
document.getElementById("clear").addEventListener("click", update);
for (const button of document.querySelectorAll("button[data-further]")) {
  const anchor = button.dataset.further;
  button.addEventListener("click", () => {
    add(anchor, further[anchor].rows.filter(matches).slice(0, atOnce));
    update();
  });
  tableOf(anchor).tHead.addEventListener(
    "click",
    (event) => {
      if (event.target.closest("button")) add(anchor, further[anchor].rows); // a column is sorted as a whole
      update();
    },
    { capture: true },
  );
}
const showFurther = () => {
  for (const anchor of Object.keys(further)) add(anchor, further[anchor].rows.filter((row) => `#${row.anchor}` === location.hash));
  update();
  show();
};
addEventListener("hashchange", () => document.getElementById(location.hash.slice(1)) ?? showFurther());
if (location.hash.startsWith("#record-") && !document.getElementById(location.hash.slice(1))) showFurther();
else label();
