// The interactive parts of the page: theme, plots, selectors, table, copy buttons.
const data = JSON.parse(document.getElementById("data").textContent);
const views = new Map(); // id of a plot -> its Vega view
const chosen = new Map(); // id of a plot -> values of its parameters
const root = document.documentElement;
const system = matchMedia("(prefers-color-scheme: dark)");

const theme = () => root.dataset.theme || (system.matches ? "dark" : "light");

// Plots

function parameters(plot) {
  const values = { ...chosen.get(plot.id) };
  if (plot.dataset.plot === "layers") {
    // All panels share one scale of colours, from the lowest to the highest value of the recipes they show.
    const spans = [...chosen].filter(([id]) => id.startsWith("layers-"))
      .map(([, one]) => data.ranges[one.recipe]?.[values.measure]).filter(Boolean);
    if (spans.length) {
      values.low = Math.min(...spans.map((span) => span[0]));
      values.high = Math.max(...spans.map((span) => span[1]));
    }
  }
  return values;
}

function fitLegends(part, width) {
  if (part === null || typeof part !== "object") return;
  if (part.legend?.columns) {
    const longest = Math.max(...part.legend.values.map((value) => `${value}${part.legend.labelExpr ? " bits" : ""}`.length));
    part.legend.columns = Math.max(1, Math.floor((width - 60) / (7 * longest + 40)));
  }
  for (const [key, one] of Object.entries(part)) if (key !== "values") fitLegends(one, width);
}

async function draw(plot) {
  const spec = structuredClone(data.plots[plot.dataset.plot]);
  fitLegends(spec, plot.clientWidth);
  const values = parameters(plot);
  for (const one of spec.params) if (one.name in values) one.value = values[one.name];
  views.get(plot.id)?.finalize();
  const made = await window.vegaEmbed(plot, spec, {
    mode: "vega-lite", renderer: "svg", actions: false, config: data.themes[theme()], tooltip: { disableDefaultStyle: true },
  });
  views.set(plot.id, made.view);
}

async function drawEach() {
  for (const plot of document.querySelectorAll(".plot")) {
    try {
      await draw(plot);
    } catch (error) {
      console.error(plot.id, error);
      plot.textContent = "This plot cannot be drawn. Its numbers are in the tables.";
    }
  }
  root.dataset.drawn = theme();
}

let drawing = Promise.resolve();
const drawAll = () => { drawing = drawing.then(drawEach); }; // one after another

async function update(plot) {
  const view = views.get(plot.id);
  if (!view) return;
  for (const [name, value] of Object.entries(parameters(plot))) view.signal(name, value);
  await view.runAsync();
}

// Selectors

function showTest(test) {
  for (const one of document.querySelectorAll("[data-test]")) one.hidden = one.dataset.test !== test;
  for (const select of document.querySelectorAll('select[data-param="test"]')) {
    if (select.value !== test) { select.value = test; take(select); }
  }
}

function show(select) {
  // Another plot in the same place: the specification has its own data and axis.
  const plot = document.getElementById(select.dataset.targets);
  plot.dataset.plot = select.value;
  for (const one of document.querySelectorAll("[data-view]")) one.hidden = one.dataset.view !== select.value;
  drawing = drawing.then(() => draw(plot));
}

function take(select) {
  const { param, targets } = select.dataset;
  if (param === "view") return [];
  const plots = targets.split(" ").map((id) => document.getElementById(id)).filter((one) => one?.matches(".plot"));
  for (const plot of plots) chosen.set(plot.id, { ...chosen.get(plot.id), [param]: select.value });
  return plots;
}

function onSelect(event) {
  const select = event.target;
  if (select.dataset.param === "view") { show(select); return; }
  const plots = new Set(take(select));
  if (select.dataset.param === "test") {
    showTest(select.value);
    for (const one of document.querySelectorAll(".plot")) plots.add(one);
    count();
  }
  if (select.id === "table-bits") filter(select.value);
  if (select.id.startsWith("layers-")) for (const one of document.querySelectorAll('[data-plot="layers"]')) plots.add(one);
  for (const plot of plots) update(plot);
}

// Table

function filter(bits) {
  for (const row of document.querySelectorAll(".results tbody tr")) row.hidden = bits !== "all" && row.dataset.bits !== bits;
  count();
}

function count() {
  const table = document.querySelector(".scroll:not([hidden]) > .results");
  const status = document.getElementById("count");
  if (!table || !status) return;
  const rows = [...table.tBodies[0].rows];
  const shown = rows.filter((row) => !row.hidden).length;
  status.textContent = shown === rows.length ? `${shown} rows` : `${shown} of ${rows.length} rows`;
}

function sort(heading) {
  const table = heading.closest("table");
  const column = heading.cellIndex;
  const direction = heading.getAttribute("aria-sort") === "ascending" ? -1 : 1;
  for (const one of heading.parentElement.cells) one.setAttribute("aria-sort", "none");
  heading.setAttribute("aria-sort", direction > 0 ? "ascending" : "descending");
  const key = (row) => {
    const value = row.cells[column].dataset.value;
    return column === 0 ? value : value === "" ? null : Number(value);
  };
  const order = (a, b) => {
    const [x, y] = [key(a), key(b)];
    if (x === null || y === null) return (x === null) - (y === null); // rows without a value come last in both directions
    return direction * (typeof x === "string" ? x.localeCompare(y, "en", { numeric: true }) : x - y);
  };
  table.tBodies[0].append(...[...table.tBodies[0].rows].sort(order));
}

// Copying

async function copy(button) {
  const text = button.parentElement.querySelector("code").textContent;
  let done = true;
  try {
    await navigator.clipboard.writeText(text);
  } catch {
    const area = Object.assign(document.createElement("textarea"), { value: text });
    document.body.append(area);
    area.select();
    done = document.execCommand("copy");
    area.remove();
    button.focus();
  }
  button.textContent = done ? "Copied" : "Failed";
  setTimeout(() => { button.textContent = "Copy"; }, 1600);
}

// Theme

function label() {
  document.getElementById("theme").setAttribute("aria-pressed", String(theme() === "dark"));
}

function toggle() {
  root.dataset.theme = theme() === "dark" ? "light" : "dark";
  try { localStorage.setItem("gyroquant-theme", root.dataset.theme); } catch { /* not remembered */ }
  label();
  drawAll();
}

label();
document.getElementById("theme").addEventListener("click", toggle);
let drawnAt = innerWidth;
let settling;
addEventListener("resize", () => {
  clearTimeout(settling);
  settling = setTimeout(() => {
    if (innerWidth !== drawnAt) { drawnAt = innerWidth; drawAll(); }
  }, 200);
});
system.addEventListener("change", () => { label(); drawAll(); });
for (const plot of document.querySelectorAll(".plot")) {
  const { params } = data.plots[plot.dataset.plot];
  chosen.set(plot.id, Object.fromEntries(params.map((one) => [one.name, one.value])));
}
for (const select of document.querySelectorAll("select[data-param]")) {
  take(select);
  select.addEventListener("change", onSelect);
}
for (const button of document.querySelectorAll(".results thead button")) {
  button.addEventListener("click", () => sort(button.parentElement));
}
for (const button of document.querySelectorAll(".copy")) button.addEventListener("click", () => copy(button));
count();
drawAll();
