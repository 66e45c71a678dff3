"use strict";
// Draws the page from the JSON in #data. Texts of the user become text nodes and attributes, never markup.
const data = JSON.parse(document.getElementById("data").textContent);
const runs = data.runs, metric = data.metric;
const byId = (id) => document.getElementById(id);
const VIRIDIS = [[68, 1, 84], [59, 82, 139], [33, 145, 140], [94, 201, 98], [220, 200, 30]];
const NOTHING = "#9aa1ad";

function make(parent, name, attributes = {}, text = null) {
  const svg = parent.namespaceURI === "http://www.w3.org/2000/svg";
  const node = svg ? document.createElementNS(parent.namespaceURI, name) : document.createElement(name);
  for (const [key, value] of Object.entries(attributes)) node.setAttribute(key, value);
  if (text !== null) node.textContent = text;
  parent.appendChild(node);
  return node;
}
const isNumber = (value) => typeof value === "number" && Number.isFinite(value);
function show(value) {
  if (value === null || value === undefined) return "-";
  if (isNumber(value)) return Number.isInteger(value) ? String(value) : String(Number(value.toPrecision(5)));
  return typeof value === "object" ? JSON.stringify(value) : String(value);
}
function blend(share) {
  const at = Math.min(Math.max(share, 0), 1) * (VIRIDIS.length - 1), low = Math.min(Math.floor(at), VIRIDIS.length - 2);
  const part = VIRIDIS[low].map((value, i) => Math.round(value + (VIRIDIS[low + 1][i] - value) * (at - low)));
  return `rgb(${part.join(",")})`;
}

// ---- scales: a column of the runs as positions from 0 to 1 ------------------------------------------------------------
function scaleOf(values) {
  const there = values.filter((value) => value !== null && value !== undefined);
  if (there.length && there.every(isNumber)) {
    const low = Math.min(...there), high = Math.max(...there);
    const log = low > 0 && high / low >= 20;
    const f = log ? Math.log : (x) => x, span = f(high) - f(low);
    const at = (x) => (isNumber(x) ? (span > 0 ? (f(x) - f(low)) / span : 0.5) : null);
    const distinct = [...new Set(there)].sort((a, b) => a - b);
    const ticks = distinct.length <= 6 ? distinct : [0, 0.25, 0.5, 0.75, 1].map((s) => (log ? Math.exp : (x) => x)(f(low) + s * span));
    return { at, ticks: ticks.map((x) => [at(x), show(x)]) };
  }
  const names = [...new Set(there.map(show))];
  const at = (x) => (x === null || x === undefined ? null : names.length > 1 ? names.indexOf(show(x)) / (names.length - 1) : 0.5);
  return { at, ticks: names.slice(0, 30).map((name) => [names.length > 1 ? names.indexOf(name) / (names.length - 1) : 0.5, name]) };
}
const valueOf = (run, column) => (column === metric ? run.result : run.values[column]);
const columns = [...data.settings, metric];
const scales = Object.fromEntries(columns.map((column) => [column, scaleOf(runs.map((run) => valueOf(run, column)))]));
let colorBy = metric;
function colorOf(run) {
  const at = scales[colorBy].at(valueOf(run, colorBy));
  return at === null ? NOTHING : blend(at);
}

// ---- one run is hot at a time: in both pictures and the table ---------------------------------------------------------
const parts = runs.map(() => []);
const tip = byId("tip");
function heat(index) {
  parts.forEach((nodes, i) => nodes.forEach((node) => {
    node.classList.toggle("hot", i === index);
    if (node.tagName !== "TR") node.classList.toggle("dim", index !== null && i !== index);
  }));
}
function say(event, lines) {
  tip.textContent = lines.join("\n");
  tip.style.display = "block";
  const box = tip.getBoundingClientRect();
  tip.style.left = `${Math.max(4, Math.min(event.clientX + 14, innerWidth - box.width - 8))}px`;
  tip.style.top = `${event.clientY + 18 + box.height > innerHeight ? event.clientY - box.height - 10 : event.clientY + 18}px`;
}
function quiet() {
  tip.style.display = "none";
  heat(null);
}
function about(run) {
  return [`${run.run_id}${run.run_name ? ` (${run.run_name})` : ""}: ${run.status}`,
    ...data.settings.map((key) => `${key} = ${show(run.values[key])}`), `${metric} = ${show(run.result)}`];
}
function inside(svg, event) {
  const point = new DOMPoint(event.clientX, event.clientY);
  return point.matrixTransform(svg.getScreenCTM().inverse());
}

// ---- curves -----------------------------------------------------------------------------------------------------------
function niceTicks(low, high, count) {
  const raw = (high - low) / count || 1, power = 10 ** Math.floor(Math.log10(raw));
  const step = [1, 2, 5, 10].map((x) => x * power).find((x) => x >= raw);
  const ticks = [];
  for (let i = Math.ceil(low / step - 1e-9); i * step <= high + step * 1e-9; i++) ticks.push(Number((i * step).toPrecision(12)));
  return ticks;
}
const lineNodes = [];
function drawCurves() {
  const svg = byId("curves"), name = byId("series").value, wantsLog = byId("log").checked;
  svg.replaceChildren();
  lineNodes.splice(0).forEach(([i, node]) => parts[i].splice(parts[i].indexOf(node), 1));
  const curves = runs.map((run) => (run.curves[name] || []).filter(([x, y]) => isNumber(x) && isNumber(y) && (!wantsLog || y > 0)));
  const points = curves.flat();
  if (!points.length) {
    make(svg, "text", { x: 580, y: 180, "text-anchor": "middle" }, "No run has logged anything to draw here.");
    return;
  }
  const [left, right, top, bottom] = [70, 1140, 14, 330];
  const f = wantsLog ? Math.log10 : (y) => y;
  const xs = points.map((p) => p[0]), ys = points.map((p) => f(p[1]));
  const min = (list) => list.reduce((a, b) => Math.min(a, b)), max = (list) => list.reduce((a, b) => Math.max(a, b));
  const [x0, x1] = [Math.min(0, min(xs)), max(xs)], pad = (max(ys) - min(ys)) * 0.05 || 0.5, [y0, y1] = [min(ys) - pad, max(ys) + pad];
  const px = (x) => left + ((x - x0) / (x1 - x0 || 1)) * (right - left), py = (y) => bottom - ((f(y) - y0) / (y1 - y0)) * (bottom - top);
  for (const y of niceTicks(y0, y1, 6)) {
    const at = bottom - ((y - y0) / (y1 - y0)) * (bottom - top);
    make(svg, "line", { class: "frame", x1: left, x2: right, y1: at, y2: at });
    make(svg, "text", { x: left - 8, y: at + 4, "text-anchor": "end" }, show(wantsLog ? 10 ** y : y));
  }
  for (const x of niceTicks(x0, x1, 10)) make(svg, "text", { x: px(x), y: bottom + 20, "text-anchor": "middle" }, show(x));
  make(svg, "text", { x: (left + right) / 2, y: bottom + 42, "text-anchor": "middle" }, "training step");
  make(svg, "text", { x: 16, y: (top + bottom) / 2, "text-anchor": "middle", transform: `rotate(-90 16 ${(top + bottom) / 2})` }, name);
  curves.forEach((curve, i) => {
    if (!curve.length) return;
    const path = curve.map(([x, y], n) => `${n ? "L" : "M"}${px(x).toFixed(1)} ${py(y).toFixed(1)}`).join("");
    const node = make(svg, "path", { class: "run", d: curve.length > 1 ? path : `${path}h0.1`, stroke: colorOf(runs[i]), "data-run": runs[i].run_id });
    node.style.strokeLinecap = "round";
    parts[i].push(node);
    lineNodes.push([i, node]);
  });
  svg.onmousemove = (event) => {
    const at = inside(svg, event);
    let best = null;
    curves.forEach((curve, i) => curve.forEach(([x, y]) => {
      const far = Math.hypot(px(x) - at.x, py(y) - at.y);
      if (best === null || far < best.far) best = { far, i, x, y };
    }));
    if (best === null || best.far > 60) return quiet();
    heat(best.i);
    say(event, [`step ${show(best.x)}: ${name} ${show(best.y)}`, ...about(runs[best.i])]);
  };
  svg.onmouseleave = quiet;
}

// ---- parallel coordinates ---------------------------------------------------------------------------------------------
const parallelNodes = [];
function drawParallel() {
  const svg = byId("parallel"), [left, right, top, bottom] = [90, 1060, 40, 310];
  svg.replaceChildren();
  parallelNodes.splice(0).forEach(([i, node]) => parts[i].splice(parts[i].indexOf(node), 1));
  const px = (n) => (columns.length > 1 ? left + (n / (columns.length - 1)) * (right - left) : (left + right) / 2);
  const py = (share) => bottom - share * (bottom - top);
  runs.forEach((run, i) => {
    const points = columns.map((column, n) => [px(n), scales[column].at(valueOf(run, column))]).filter((p) => p[1] !== null);
    if (points.length < 1) return;
    const path = points.map(([x, share], n) => `${n ? "L" : "M"}${x.toFixed(1)} ${py(share).toFixed(1)}`).join("");
    const node = make(svg, "path", { class: isNumber(run.result) ? "run" : "run none", d: path, stroke: colorOf(run), "data-run": run.run_id });
    node.addEventListener("mousemove", (event) => { heat(i); say(event, about(run)); });
    node.addEventListener("mouseleave", quiet);
    parts[i].push(node);
    parallelNodes.push([i, node]);
  });
  columns.forEach((column, n) => {
    make(svg, "line", { x1: px(n), x2: px(n), y1: top, y2: bottom, stroke: "#4b5563" });
    const anchor = n === 0 && columns.length > 1 ? "start" : n === columns.length - 1 ? "end" : "middle";
    const shift = anchor === "start" ? -60 : anchor === "end" ? 70 : 0;
    make(svg, "text", { class: "axis", x: px(n) + shift, y: 20, "text-anchor": anchor }, column);
    let last = -1; // ticks that would cover each other are left out
    for (const [share, text] of scales[column].ticks) {
      if (last >= 0 && share - last < 0.06) continue;
      last = share;
      const short = text.length > 18 ? `${text.slice(0, 17)}\u2026` : text;
      make(svg, "text", { x: px(n) + 7, y: py(share) + 4, style: "paint-order:stroke;stroke:#fff;stroke-width:4px" }, short);
    }
  });
}

// ---- table ------------------------------------------------------------------------------------------------------------
const table = [["run_id", (run) => run.run_id], ["run_name", (run) => run.run_name], ["status", (run) => run.status],
  ...data.settings.map((key) => [key, (run) => run.values[key]]), [metric, (run) => run.result ?? run.metrics[metric]],
  ...data.metrics.map((key) => [key, (run) => run.metrics[key]]), ["error", (run) => run.error]]
  .filter(([name, get]) => ["run_id", "status", metric].includes(name) || runs.some((run) => get(run) !== null && get(run) !== undefined));
let order = { name: metric, down: data.maximize };
function drawTable() {
  const head = document.querySelector("#table thead"), body = document.querySelector("#table tbody");
  head.replaceChildren();
  body.replaceChildren();
  const titles = make(head, "tr"), get = table.find(([name]) => name === order.name)[1];
  for (const [name] of table) {
    const cell = make(titles, "th", { scope: "col", tabindex: "0" }, name);
    if (name === order.name) cell.setAttribute("aria-sort", order.down ? "descending" : "ascending");
    const sort = () => { order = { name, down: order.name === name ? !order.down : false }; drawTable(); };
    cell.addEventListener("click", sort);
    cell.addEventListener("keydown", (event) => { if (event.key === "Enter") sort(); });
  }
  const key = (run) => { const value = get(run); return isNumber(value) ? value : value === null || value === undefined ? null : show(value); };
  const indexes = runs.map((_, i) => i).sort((i, j) => {
    const [a, b] = [key(runs[i]), key(runs[j])];
    if (a === null || b === null) return (a === null) - (b === null);
    const less = typeof a === typeof b ? (a < b ? -1 : a > b ? 1 : 0) : isNumber(a) ? -1 : 1;
    return order.down ? -less : less;
  });
  for (const i of indexes) {
    const run = runs[i], row = make(body, "tr", { "data-run": run.run_id });
    if (run.run_id === data.best) row.classList.add("best");
    for (const [name, of] of table) {
      const value = of(run), cell = make(row, "td", { class: isNumber(value) ? "number" : "" });
      if (name === "run_id") make(cell, "span", { class: "swatch", style: `background:${colorOf(run)}` });
      cell.append(show(value));
      cell.title = show(value);
    }
    row.addEventListener("mouseenter", () => heat(i));
    row.addEventListener("mouseleave", quiet);
    const old = parts[i].findIndex((node) => node.tagName === "TR");
    if (old >= 0) parts[i].splice(old, 1);
    parts[i].push(row);
  }
}

// ---- page -------------------------------------------------------------------------------------------------------------
function drawScale() {
  const place = byId("scale"), numbers = runs.map((run) => valueOf(run, colorBy)).filter(isNumber);
  place.replaceChildren();
  if (!numbers.length) return;
  make(place, "span", {}, `${show(Math.min(...numbers))} `);
  const bar = make(place, "span", { class: "legend" });
  bar.style.display = "inline-block";
  bar.style.background = `linear-gradient(90deg, ${[0, 0.25, 0.5, 0.75, 1].map(blend).join(",")})`;
  make(place, "span", {}, ` ${show(Math.max(...numbers))}`);
}
function drawAll() {
  drawScale();
  drawCurves();
  drawParallel();
  drawTable();
}
byId("title").textContent = data.title;
byId("summary").textContent = data.summary;
for (const name of data.series) make(byId("series"), "option", { value: name }, name);
for (const name of [metric, ...data.settings]) make(byId("color"), "option", { value: name }, name);
byId("series").addEventListener("change", drawCurves);
byId("log").addEventListener("change", drawCurves);
byId("color").addEventListener("change", () => { colorBy = byId("color").value; drawAll(); });
drawAll();
