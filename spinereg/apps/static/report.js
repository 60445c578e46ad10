"use strict";
// The page of a batch: a table of all cases, one case at a time with its pictures, and what a reader thinks of them.
// Whatever comes from files is put into the page as text (textContent), never as markup.

const data = JSON.parse(document.getElementById("data").textContent);
const $ = id => document.getElementById(id);
const PAGE = 100; // rows of the table at a time
const TILES = ["fixed", "before", "moved", "det J"]; // columns of a picture; its rows are the planes
const PLANES = ["sagittal", "coronal", "axial"];
const JUDGEMENTS = {p: "pass", f: "fail", a: "artefact"};
const HEADS = ["case", "setting", "verdict", "judgement", "remark", "reader", "time"]; // of the CSV

function make(kind, text = "", attributes = {}) {
  const element = document.createElement(kind);
  element.textContent = text;
  for (const [name, value] of Object.entries(attributes)) element.setAttribute(name, value);
  return element;
}

function figure(value) {
  if (value === null || value === undefined) return "";
  if (typeof value !== "number") return String(value);
  if (Number.isInteger(value)) return String(value);
  return Math.abs(value) < 0.0005 ? "0.000" : Math.abs(value) < 1 ? value.toFixed(3) : value.toPrecision(4).replace(/(\.\d*?)0+$/, "$1").replace(/\.$/, "");
}

function say(text) { $("said").textContent = text; }

// cases: one object each, in the order of the page, which begins with the failures

const cases = data.cases.map(([setting, name, verdict, status, why, made, ...figures], number) => ({setting, name, verdict, status, why, made, figures, number}));
const idOf = one => JSON.stringify([one.setting, one.name]);
const byId = new Map(cases.map(one => [idOf(one), one]));
let shownCases = cases, page = 0, order = {column: null, up: true};

// judgements, in localStorage under a name that belongs to this batch

const kept = {reader: "", marks: {}};
const undoable = [];
try {
  const found = JSON.parse(localStorage.getItem(data.key) || "{}");
  if (typeof found.reader === "string") kept.reader = found.reader;
  Object.assign(kept.marks, found.marks || {}); // those of cases that are not on the page now too
} catch { say("This browser keeps nothing for this page: export your judgements before you close it."); }

function keep() {
  try { localStorage.setItem(data.key, JSON.stringify(kept)); } catch { say("The browser could not keep this judgement: export before you close the page."); }
}

const NONE = {judgement: "", remark: "", reader: "", time: ""};

function markOf(one) { // none where the case was done again since it was judged
  const mark = kept.marks[idOf(one)];
  return mark && mark.made === one.made ? mark : NONE;
}

function setMark(one, change) {
  const before = kept.marks[idOf(one)], mark = {...markOf(one), ...change, made: one.made, reader: kept.reader, time: new Date().toISOString()};
  if (mark.judgement || mark.remark) kept.marks[idOf(one)] = mark; else delete kept.marks[idOf(one)];
  keep();
  return before;
}

function judge(one, judgement) {
  undoable.push([one, setMark(one, {judgement})]);
  drawJudgement(one);
  say(`${one.name}: ${judgement}`);
}

function undo() {
  if (!undoable.length) return say("Nothing to undo.");
  const [one, before] = undoable.pop();
  if (before) kept.marks[idOf(one)] = before; else delete kept.marks[idOf(one)];
  keep();
  if (opened === one) drawJudgement(one); else open(one);
  say(`${one.name}: undone`);
}

// the table

const columns = [
  {title: "verdict", of: one => one.verdict, rank: one => data.verdicts.indexOf(one.verdict)},
  {title: "case", of: one => one.name},
  ...(data.several ? [{title: "setting", of: one => one.setting}] : []),
  {title: "reasons", of: one => one.why},
  {title: "judged", of: one => markOf(one).judgement},
  ...data.columns.map((title, k) => ({title: title.replaceAll("_", " "), number: true, of: one => one.figures[k]})),
];

function compare(one, other) {
  const {column, up} = order, value = column.rank || column.of, a = value(one), b = value(other);
  if (a === b) return one.number - other.number;
  if (a === null || a === "") return 1; // what is not known comes last, whichever way
  if (b === null || b === "") return -1;
  return (typeof a === "number" ? a - b : String(a).localeCompare(String(b), undefined, {numeric: true})) * (up ? 1 : -1);
}

function choose() {
  const words = $("search").value.toLowerCase(), verdict = $("by-verdict").value, setting = $("by-setting").value, judged = $("by-judgement").value;
  shownCases = cases.filter(one => (!verdict || one.verdict === verdict) && (!setting || one.setting === setting)
    && (!judged || (judged === "none" ? !markOf(one).judgement : markOf(one).judgement === judged))
    && (!words || `${one.name}\n${one.setting}\n${one.why}\n${one.status}`.toLowerCase().includes(words)));
  if (order.column) shownCases.sort(compare);
  page = 0;
  drawTable();
}

function drawTable() {
  const pages = Math.max(Math.ceil(shownCases.length / PAGE), 1);
  page = Math.min(Math.max(page, 0), pages - 1);
  const rows = shownCases.slice(page * PAGE, (page + 1) * PAGE);
  $("table").tBodies[0].replaceChildren(...rows.map(drawRow));
  $("count").textContent = rows.length ? `${page * PAGE + 1} to ${page * PAGE + rows.length} of ${shownCases.length}` : "no case";
  $("earlier").disabled = page === 0;
  $("later").disabled = page >= pages - 1;
}

function drawRow(one) {
  const row = make("tr");
  for (const column of columns) {
    const value = column.of(one);
    if (column.title === "case") {
      const cell = make("td", "", {class: "name"});
      cell.append(make("a", one.name, {href: `#case-${one.number}`}));
      row.append(cell);
    } else if (column.title === "verdict") {
      const cell = make("td");
      cell.append(make("span", value, {class: `badge ${value}`}));
      row.append(cell);
    } else row.append(make("td", figure(value), {class: column.number ? "figure" : column.title === "reasons" ? "why" : "name"}));
  }
  return row;
}

function sortBy(column, head) {
  order = {column, up: order.column === column ? !order.up : true};
  for (const other of $("table").tHead.rows[0].cells) other.removeAttribute("aria-sort");
  head.setAttribute("aria-sort", order.up ? "ascending" : "descending");
  choose();
}

function drawHeads() {
  for (const column of columns) {
    const head = make("th", "", {scope: "col", class: column.number ? "figure" : ""}), button = make("button", column.title, {type: "button"});
    button.addEventListener("click", () => sortBy(column, head));
    head.append(button);
    $("table").tHead.rows[0].append(head);
  }
}

// one case

let opened = null, resting = 2, held = null, hovered = false, picture = null;

function tileNow() { return held !== null ? held : hovered ? 0 : resting; }

function drawBox(canvas, column, row) {
  const width = picture.naturalWidth / TILES.length, height = picture.naturalHeight / PLANES.length;
  if (canvas.width !== width || canvas.height !== height) { canvas.width = width; canvas.height = height; }
  canvas.getContext("2d").drawImage(picture, column * width, row * height, width, height, 0, 0, width, height);
  canvas.setAttribute("aria-label", `${TILES[column]}, ${PLANES[row]}`);
}

function drawPictures() {
  const tile = tileNow();
  $("shown").textContent = TILES[tile];
  for (const button of $("chooser").children) button.setAttribute("aria-pressed", String(Number(button.dataset.tile) === resting));
  if (picture && picture.naturalWidth) [...$("planes").children].forEach((canvas, row) => drawBox(canvas, tile, row));
}

function openPicture(detail) {
  const beside = new Map(detail.links).get("planes.webp"), source = detail.picture ? `data:image/webp;base64,${detail.picture}` : beside;
  $("pictures").hidden = !source;
  picture = source ? new Image() : null;
  if (!source) return;
  const mine = picture;
  picture.addEventListener("load", () => {
    if (picture !== mine) return; // another case was opened meanwhile
    drawPictures();
    [...$("maps").children].forEach((canvas, row) => drawBox(canvas, 3, row));
    $("planes").dataset.ready = String(opened.number);
  });
  picture.addEventListener("error", () => { if (picture === mine) { $("pictures").hidden = true; say(`${opened.name}: its picture planes.webp cannot be shown`); } });
  picture.src = source;
}

function pairs(list, values) {
  list.replaceChildren(...Object.entries(values).map(([name, value]) => {
    const row = make("div");
    row.append(make("dt", name), make("dd", typeof value === "number" ? figure(value) : typeof value === "string" ? value : JSON.stringify(value)));
    return row;
  }));
}

function drawVertebrae(table) {
  $("bones").hidden = !table.rows.length;
  $("vertebrae").tHead.rows[0].replaceChildren(...table.columns.map(name => make("th", name.replaceAll("_", " "), {scope: "col", class: name === "vertebra" || name === "doubt" ? "" : "figure"})));
  $("vertebrae").tBodies[0].replaceChildren(...table.rows.map(values => {
    const row = make("tr");
    row.append(...values.map((value, k) => {
      const name = table.columns[k], text = name === "doubt" && value ? `? ${value}` : figure(value);
      return name === "vertebra" ? make("th", text, {scope: "row"}) : make("td", text, {class: name === "doubt" ? "why WARN" : "figure"});
    }));
    return row;
  }));
}

function drawReasons(one, detail) {
  const reasons = detail.reasons.map(({reason, value, threshold, concerns}) => {
    const measured = value === null || value === undefined ? "" : `: ${figure(value)}${threshold === null || threshold === undefined ? "" : `, limit ${figure(threshold)}`}`;
    const item = make("li", `${reason}${measured}`, {class: concerns === "whole" ? "FAIL" : "WARN"});
    return item;
  });
  $("why").replaceChildren(...(reasons.length ? reasons : [make("li", one.verdict === "PASS" ? "nothing that was measured speaks against it" : one.why || one.status)]));
  const error = [detail.stage && `failed in: ${detail.stage}`, detail.error, detail.hint && `What to do: ${detail.hint}`].filter(Boolean).join("\n");
  $("error").hidden = !error;
  $("error").textContent = error;
}

function drawFiles(detail) {
  $("files").replaceChildren(...detail.links.map(([name, href]) => {
    const item = make("li");
    item.append(make("a", name, {href, target: "_blank", rel: "noopener"}));
    return item;
  }));
}

function drawJudgement(one) {
  const mark = markOf(one);
  for (const button of $("judge").children) button.setAttribute("aria-pressed", String(button.dataset.judgement === mark.judgement));
  $("remark").value = mark.remark;
  $("judged-by").textContent = mark.time ? `${mark.reader || "no reader's name"}, ${mark.time}` : "";
}

function open(one) { location.hash = `case-${one.number}`; }

function drawCase(one) {
  const detail = JSON.parse($(`detail-${one.number}`).textContent), at = shownCases.indexOf(one);
  opened = one;
  held = null;
  hovered = false;
  $("overview").hidden = true;
  $("case").hidden = false;
  $("case-title").textContent = data.several ? `${one.name} (${one.setting})` : one.name;
  $("case-verdict").textContent = one.verdict;
  $("case-verdict").className = `badge ${one.verdict}`;
  $("case-status").textContent = one.status;
  $("place").textContent = at < 0 ? "not among the rows that are shown" : `${at + 1} of ${shownCases.length}`;
  $("previous").disabled = at <= 0;
  $("next").disabled = at >= shownCases.length - 1;
  drawReasons(one, detail);
  drawVertebrae(detail.vertebrae);
  drawFiles(detail);
  pairs($("figures"), detail.figures);
  pairs($("parameters"), {...data.parameters, ...detail.parameters, ...detail.inputs});
  pairs($("versions"), {...data.versions, ...detail.versions});
  drawJudgement(one);
  const before = kept.marks[idOf(one)];
  if (before && markOf(one) === NONE) say(`An earlier result of this case was judged ${before.judgement || "with a remark"}; this one is new.`);
  delete $("planes").dataset.ready;
  openPicture(detail);
  drawPictures();
  $("case-title").focus({preventScroll: true});
  scrollTo(0, 0);
}

function step(way) {
  const next = opened ? shownCases[shownCases.indexOf(opened) + way] : shownCases[page * PAGE];
  if (next) open(next); else say(way > 0 ? "This was the last case." : "This was the first case.");
}

function close() {
  const left = opened;
  opened = null;
  $("case").hidden = true;
  $("overview").hidden = false;
  if (!left) return;
  page = Math.max(Math.floor(shownCases.indexOf(left) / PAGE), 0);
  drawTable();
  const link = document.querySelector(`a[href="#case-${left.number}"]`);
  if (link) link.focus();
}

function follow() {
  const found = /^#case-(\d+)$/.exec(location.hash), one = found && cases[Number(found[1])];
  if (one) drawCase(one); else close();
}

// CSV: out, in, and two readers

function cell(text) {
  const safe = /^'*[=+\-@\t\r]/.test(text) ? `'${text}` : text; // a spreadsheet must not take it for a formula
  return /[",\n\r]/.test(safe) ? `"${safe.replaceAll('"', '""')}"` : safe;
}

function toCsv() {
  const rows = cases.filter(one => markOf(one) !== NONE).map(one => {
    const mark = markOf(one);
    return [one.name, one.setting, one.verdict, mark.judgement, mark.remark, mark.reader, mark.time];
  });
  return [HEADS, ...rows].map(row => row.map(cell).join(",")).join("\r\n") + "\r\n";
}

function parseCsv(text) {
  const rows = [[]], pattern = /(?:"((?:[^"]|"")*)"|([^",\r\n]*))(,|\r\n|\n|\r|$)/y;
  text = text.replace(/^\ufeff/, "");
  while (pattern.lastIndex < text.length) {
    const found = pattern.exec(text);
    if (!found) throw new Error("it is no CSV: a quote is not closed, or stands within a value");
    const value = found[1] !== undefined ? found[1].replaceAll('""', '"') : found[2];
    rows.at(-1).push(/^'+[=+\-@\t\r]/.test(value) ? value.slice(1) : value);
    if (found[3] !== ",") rows.push([]);
  }
  return rows.filter(row => row.some(Boolean));
}

async function readMarks(file) {
  const [heads, ...rows] = parseCsv(await file.text());
  const missing = HEADS.slice(0, 4).filter(name => !heads || !heads.includes(name));
  if (missing.length) throw new Error(`it has no column ${missing.join(", ")}; expected a CSV that this page exported`);
  const marks = {}, strange = [];
  for (const row of rows) {
    const mark = Object.fromEntries(heads.map((name, k) => [name, row[k] || ""])), id = JSON.stringify([mark.setting, mark.case]);
    if (mark.judgement && !Object.values(JUDGEMENTS).includes(mark.judgement)) throw new Error(`judgement ${mark.judgement}, expected pass, fail or artefact`);
    if (byId.has(id)) marks[id] = {judgement: mark.judgement, remark: mark.remark || "", reader: mark.reader || "", time: mark.time || "", made: byId.get(id).made}; else strange.push(mark.case);
  }
  return {name: file.name, marks, strange};
}

async function importCsv(input) {
  try {
    const {marks, strange} = await readMarks(input.files[0]);
    Object.assign(kept.marks, marks);
    keep();
    choose();
    say(`${Object.keys(marks).length} judgements taken` + (strange.length ? `; ${strange.length} of cases that are not in this batch left out, the first ${strange[0]}` : ""));
  } catch (error) { say(`${input.files[0].name}: ${error.message}`); }
  input.value = "";
}

function kappa(pairs) {
  const n = pairs.length, same = pairs.filter(([a, b]) => a === b).length / n, share = (k, what) => pairs.filter(pair => pair[k] === what).length / n;
  const chance = Object.values(JUDGEMENTS).reduce((sum, what) => sum + share(0, what) * share(1, what), 0);
  return chance === 1 ? null : (same - chance) / (1 - chance);
}

async function compareReaders(input) {
  const place = $("agreement"), files = [...input.files].slice(0, 2);
  place.replaceChildren();
  try {
    const readers = await Promise.all(files.map(readMarks));
    if (readers.length === 1) readers.unshift({name: "this browser", marks: kept.marks});
    const [one, other] = readers, both = cases.filter(each => one.marks[idOf(each)]?.judgement && other.marks[idOf(each)]?.judgement);
    const judged = both.map(each => [one.marks[idOf(each)].judgement, other.marks[idOf(each)].judgement]), apart = both.filter((_, k) => judged[k][0] !== judged[k][1]);
    if (!both.length) { place.append(make("p", `${one.name} and ${other.name} judged no case both.`)); return; }
    const k = kappa(judged);
    place.append(make("p", `${one.name} and ${other.name} agree on ${both.length - apart.length} of ${both.length} cases that both judged; Cohen's kappa ${k === null ? "is not defined, as both gave one judgement only" : k.toFixed(2)}.`));
    if (apart.length) place.append(make("h3", "Where they disagree"));
    const list = make("ul");
    for (const each of apart) {
      const item = make("li"), [a, b] = [one, other].map(reader => reader.marks[idOf(each)]);
      item.append(make("a", data.several ? `${each.name} (${each.setting})` : each.name, {href: `#case-${each.number}`}), `: ${a.judgement}, ${b.judgement}`, a.remark || b.remark ? ` (${[a.remark, b.remark].filter(Boolean).join("; ")})` : "");
      list.append(item);
    }
    place.append(list);
  } catch (error) { place.append(make("p", `They cannot be compared: ${error.message}`)); }
  input.value = "";
}

function exportCsv() {
  const link = make("a", "", {download: `judgements${kept.reader ? `-${kept.reader.replace(/[^\w-]+/g, "_")}` : ""}.csv`});
  link.href = URL.createObjectURL(new Blob([toCsv()], {type: "text/csv"}));
  link.click();
  URL.revokeObjectURL(link.href);
}

// what the reader does

function writing(event) { return event.target.closest("input, textarea, select") || event.ctrlKey || event.altKey || event.metaKey; }

const KEYS = {
  ArrowRight: () => step(1), j: () => step(1), ArrowLeft: () => step(-1), k: () => step(-1),
  "?": () => $("keys").showModal(), u: undo, Escape: () => { if (opened) location.hash = ""; },
};
const CASE_KEYS = {
  p: () => judge(opened, "pass"), f: () => judge(opened, "fail"), a: () => judge(opened, "artefact"), r: () => $("remark").focus(),
  1: () => rest(0), 2: () => rest(1), 3: () => rest(2), 4: () => rest(3), " ": () => hold(0), b: () => hold(1),
};

function rest(tile) { resting = tile; drawPictures(); }
function hold(tile) { if (held !== tile) { held = tile; drawPictures(); } }

document.addEventListener("keydown", event => {
  if ($("keys").open) return;
  if (event.key === "Escape" && event.target === $("remark")) { $("case-title").focus(); return; }
  if (writing(event) || (event.key === " " && event.target.closest("button, a, summary"))) return;
  const act = KEYS[event.key] || (opened && CASE_KEYS[event.key]);
  if (!act) return;
  event.preventDefault();
  if (!event.repeat || event.key.startsWith("Arrow") || "jk".includes(event.key)) act();
});
document.addEventListener("keyup", event => { if (held !== null && (event.key === " " || event.key === "b")) { held = null; drawPictures(); } });
addEventListener("blur", () => { if (held !== null) { held = null; drawPictures(); } });
addEventListener("hashchange", follow);
$("planes").addEventListener("pointermove", event => { // and not when a case was opened under a pointer that rests
  if (!hovered && (event.movementX || event.movementY)) { hovered = true; drawPictures(); }
});
$("planes").addEventListener("pointerleave", () => { hovered = false; drawPictures(); });
$("remark").addEventListener("input", () => setMark(opened, {remark: $("remark").value}));
$("remark").addEventListener("change", () => { setMark(opened, {remark: $("remark").value}); drawJudgement(opened); });
$("reader").addEventListener("change", () => { kept.reader = $("reader").value; keep(); });
$("back").addEventListener("click", () => { location.hash = ""; });
$("previous").addEventListener("click", () => step(-1));
$("next").addEventListener("click", () => step(1));
$("earlier").addEventListener("click", () => { page -= 1; drawTable(); });
$("later").addEventListener("click", () => { page += 1; drawTable(); });
$("keys-button").addEventListener("click", () => $("keys").showModal());
$("keys-close").addEventListener("click", () => $("keys").close());
$("export").addEventListener("click", exportCsv);
$("import").addEventListener("change", event => importCsv(event.target));
$("agree").addEventListener("change", event => compareReaders(event.target));
for (const id of ["search", "by-verdict", "by-setting", "by-judgement"]) $(id).addEventListener("input", choose);

for (const canvas of document.querySelectorAll("canvas")) canvas.setAttribute("role", "img");
for (const [key, judgement] of Object.entries(JUDGEMENTS)) {
  const button = make("button", `${judgement} `, {type: "button", "data-judgement": judgement, "aria-pressed": "false"});
  button.append(make("kbd", key));
  button.addEventListener("click", () => judge(opened, judgement));
  $("judge").append(button);
}
TILES.forEach((name, tile) => {
  const button = make("button", `${name} `, {type: "button", "data-tile": String(tile)});
  button.append(make("kbd", String(tile + 1)));
  button.addEventListener("click", () => rest(tile));
  $("chooser").append(button);
});
for (const verdict of data.verdicts.filter(name => cases.some(one => one.verdict === name))) $("by-verdict").append(make("option", verdict));
for (const setting of new Set(cases.map(one => one.setting))) $("by-setting").append(make("option", setting, {value: setting}));
$("setting-filter").hidden = !data.several;
$("reader").value = kept.reader;
drawHeads();
choose();
follow();
document.documentElement.dataset.ready = "yes";
