"use strict";
// The table: sorting, filtering, and hiding runs by a click. `seen` says what the charts draw.
const rows = [...document.querySelectorAll("tbody tr")];
const strips = [...document.querySelectorAll(".strip")];
const data = JSON.parse(document.getElementById("data").textContent);
const off = new Set(data.groups.map((_, group) => group).filter(group => group >= data.first)); // groups that are hidden by a click
const seen = { groups: new Set(), runs: new Set() };

function show() {
  seen.groups.clear();
  seen.runs.clear();
  for (const row of rows) {
    const group = Number(row.dataset.group);
    row.classList.toggle("off", off.has(group));
    if (!row.hidden && !off.has(group)) {
      seen.groups.add(group);
      seen.runs.add(Number(row.dataset.run));
    }
  }
  for (const button of document.querySelectorAll("[data-toggle]"))
    button.setAttribute("aria-pressed", String(!off.has(Number(button.dataset.toggle))));
  for (const picture of document.querySelectorAll(".strip figure"))
    picture.hidden = !seen.runs.has(Number(picture.dataset.run));
  for (const button of document.querySelectorAll(".legend [data-toggle]")) {
    const group = Number(button.dataset.toggle);
    button.hidden = !rows.some(row => !row.hidden && Number(row.dataset.group) === group);
  }
  const shown = rows.filter(row => !row.hidden).length;
  document.getElementById("count").textContent = shown === rows.length ? "" : `${shown} of ${rows.length} runs`;
  document.dispatchEvent(new Event("shown"));
}

function filter(text) {
  const words = text.toLowerCase().split(/\s+/).filter(Boolean);
  for (const row of rows) row.hidden = !words.every(word => row.textContent.toLowerCase().includes(word));
  show();
}

function sort(column, head) {
  const up = head.getAttribute("aria-sort") !== "ascending";
  for (const other of document.querySelectorAll("thead th")) other.removeAttribute("aria-sort");
  head.setAttribute("aria-sort", up ? "ascending" : "descending");
  const text = row => row.cells[column].dataset.value ?? row.cells[column].textContent.trim();
  const numeric = rows.every(row => text(row) === "" || Number.isFinite(Number(text(row))));
  const order = (a, b) => numeric ? Number(a) - Number(b) : a.localeCompare(b, undefined, { numeric: true });
  rows.sort((one, other) => {
    const [a, b] = [text(one), text(other)];
    if (a === "" || b === "") return (a === "") - (b === ""); // what is missing is last in both orders
    return up ? order(a, b) : order(b, a);
  });
  document.querySelector("tbody").append(...rows);
  const place = new Map(rows.map((row, number) => [row.dataset.run, number]));
  for (const strip of strips)
    strip.append(...[...strip.children].sort((a, b) => place.get(a.dataset.run) - place.get(b.dataset.run)));
}

document.querySelectorAll("thead th").forEach((head, column) =>
  head.querySelector("button").addEventListener("click", () => sort(column, head)));
document.getElementById("filter").addEventListener("input", event => filter(event.target.value));
document.addEventListener("click", event => {
  const toggle = event.target.closest("[data-toggle]");
  const enlarge = event.target.closest(".strip button");
  if (toggle) {
    const group = Number(toggle.dataset.toggle);
    if (!off.delete(group)) off.add(group);
    show();
  } else if (enlarge) {
    const large = enlarge.parentElement.classList.toggle("large");
    enlarge.setAttribute("aria-expanded", String(large));
  }
});
document.getElementById("all").addEventListener("click", () => { off.clear(); show(); });
document.getElementById("none").addEventListener("click", () => {
  data.groups.forEach((_, group) => off.add(group));
  show();
});
