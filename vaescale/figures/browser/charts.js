// The charts: SVG from the page's data, drawn again when runs are hidden, with values under the pointer or at the arrow keys.
const MARGIN = { left: 58, right: 12, top: 10, bottom: 34 }, HEIGHT = 250, MOST_IN_TIP = 12, NEAR_PIXELS = 30, NEAR_STEP_PIXELS = 12;
const DASHES = ["", "7 3", "2 3", "9 3 2 3"];
const SYMBOLS = ["M-4 0a4 4 0 1 0 8 0a4 4 0 1 0-8 0", "M-4-4h8v8h-8z", "M0-5l5 9h-10z", "M0-5l5 5l-5 5l-5-5z", "M0 5l5-9h-10z"];
const colour = group => `var(--c${group % data.colours})`;
const dash = group => DASHES[(group + Math.floor(group / 20)) % DASHES.length];
const number = value => String(Number.isInteger(value) ? value : Number(value.toPrecision(5)));

function element(parent, name, attributes, text) {
  const made = document.createElementNS(parent.namespaceURI, name);
  for (const [key, value] of Object.entries(attributes)) made.setAttribute(key, value);
  if (text !== undefined) made.textContent = text;
  parent.append(made);
  return made;
}

for (const swatch of document.querySelectorAll("svg.swatch")) {
  const group = Number(swatch.dataset.group);
  element(swatch, "path", { d: "M0 6H30", stroke: colour(group), "stroke-width": 3, "stroke-dasharray": dash(group) });
  if (swatch.dataset.symbol) // the markers of the rate-distortion plane
    element(swatch, "path", { d: SYMBOLS[group % SYMBOLS.length], transform: "translate(15 6)", fill: colour(group) });
}

// Ticks at round numbers within [low, high].
function ticks(low, high, most) {
  const rough = (high - low) / most || 1, power = 10 ** Math.floor(Math.log10(rough));
  const step = [1, 2, 5, 10].map(factor => factor * power).find(size => size >= rough);
  const count = Math.floor(high / step + 1e-9) - Math.ceil(low / step - 1e-9) + 1;
  return Array.from({ length: Math.max(0, count) }, (_, index) => (Math.ceil(low / step - 1e-9) + index) * step);
}
function logTicks(low, high) {
  let inside = [];
  for (const factors of [[1], [1, 3], [1, 2, 5], [1, 1.5, 2, 3, 4, 5, 6, 8]]) {
    inside = [];
    for (let decade = Math.floor(Math.log10(low)); decade <= Math.ceil(Math.log10(high)); decade++)
      inside.push(...factors.map(factor => Number(`${factor}e${decade}`)).filter(tick => tick >= low && tick <= high));
    if (inside.length >= 4) return inside.filter((_, place) => place % Math.ceil(inside.length / 12) === 0);
  }
  return inside.length > 1 ? inside : ticks(low, high, 4);
}

// The range of an axis with a margin, and its function from values to shares in [0, 1].
function axis(values, isLog) {
  let low = Math.min(...values), high = Math.max(...values);
  if (isLog) {
    const margin = Math.max((high / low) ** 0.05, 1.02);
    [low, high] = [low / margin, high * margin];
    return { low, high, isLog, share: value => Math.log(value / low) / Math.log(high / low) };
  }
  const margin = 0.05 * (high - low) || 0.5 * Math.abs(high) || 1;
  [low, high] = [low - margin, high + margin];
  return { low, high, isLog, share: value => (value - low) / (high - low) };
}

// The few largest values are cut off where they would flatten the rest, such as a steep beginning.
function cropped(values) {
  const sorted = [...values].sort((a, b) => a - b), top = sorted[Math.ceil(0.95 * sorted.length) - 1];
  const height = top - sorted[0];
  return height > 0 && sorted.at(-1) - top > height ? sorted.filter(value => value <= top + 0.1 * height) : sorted;
}

class Chart {
  constructor(figure, panel, isPlane) {
    Object.assign(this, { figure, panel, isPlane, isLog: panel.log, isWhole: false, at: null });
    this.svg = figure.querySelector(":scope > svg");
    this.tip = figure.querySelector(".tip");
    this.spoken = figure.querySelector(".unseen");
    for (const button of figure.querySelectorAll(".choice")) {
      const name = button.dataset.choice;
      button.setAttribute("aria-pressed", String(this[name]));
      button.addEventListener("click", () => {
        this[name] = !this[name];
        button.setAttribute("aria-pressed", String(this[name]));
        this.draw();
      });
    }
    this.svg.addEventListener("pointermove", event => this.point(event));
    this.svg.addEventListener("pointerdown", event => this.point(event));
    this.svg.addEventListener("pointerleave", () => this.leave());
    this.svg.addEventListener("blur", () => this.leave());
    this.svg.addEventListener("keydown", event => this.key(event));
  }

  lines() { return this.panel.lines.filter(line => seen.groups.has(line.group) && (line.run === undefined || seen.runs.has(line.run))); }

  draw() {
    const { svg, figure } = this, lines = this.lines();
    svg.replaceChildren();
    this.leave();
    this.pointed = null;
    const width = Math.max(200, svg.clientWidth || figure.clientWidth);
    svg.setAttribute("viewBox", `0 0 ${width} ${HEIGHT}`);
    svg.setAttribute("height", HEIGHT);
    const points = lines.flatMap(line => line.points);
    const empty = figure.querySelector(".empty");
    empty.hidden = points.length > 0;
    if (!points.length) return;
    const heights = points.flatMap(point => point.length > 2 ? [point[1], point[2], point[3]] : [point[1]]);
    const isPositive = Math.min(...heights) > 0, isLog = this.isLog && isPositive;
    figure.querySelector("[data-choice=isLog]").disabled = !isPositive;
    const range = isLog || this.isWhole || this.isPlane ? heights : cropped(heights);
    figure.querySelector(".cut").hidden = range.length === heights.length;
    const x = axis(points.map(point => point[0]), false), y = axis(range, isLog);
    this.x = value => MARGIN.left + x.share(value) * (width - MARGIN.left - MARGIN.right);
    this.y = value => HEIGHT - MARGIN.bottom - y.share(value) * (HEIGHT - MARGIN.top - MARGIN.bottom);
    this.frame(x, y, width);
    const inside = this.clip(width);
    for (const line of lines) this.isPlane ? this.mark(inside, line) : this.curve(inside, line);
    if (this.isPlane) this.names(lines, width);
    this.pointed = element(svg, "g", {});
  }

  frame(x, y, width) {
    const { svg } = this, bottom = HEIGHT - MARGIN.bottom;
    for (const tick of ticks(x.low, x.high, width / 90)) {
      element(svg, "path", { d: `M${this.x(tick)} ${MARGIN.top}V${bottom}`, class: "axis" });
      element(svg, "text", { x: this.x(tick), y: bottom + 15, "text-anchor": "middle" }, number(tick));
    }
    for (const tick of y.isLog ? logTicks(y.low, y.high) : ticks(y.low, y.high, 5)) {
      element(svg, "path", { d: `M${MARGIN.left} ${this.y(tick)}H${width - MARGIN.right}`, class: "axis" });
      element(svg, "text", { x: MARGIN.left - 6, y: this.y(tick) + 4, "text-anchor": "end" }, number(tick));
    }
    const scale = y.isLog ? " \u00b7 vertical axis: log scale" : "";
    element(svg, "text", { x: (width + MARGIN.left) / 2, y: HEIGHT - 4, "text-anchor": "middle" }, this.panel.x + scale);
  }

  clip(width) {
    const id = `inside-${this.panel.id}`, clip = element(this.svg, "clipPath", { id });
    const height = HEIGHT - MARGIN.top - MARGIN.bottom + 8;
    element(clip, "rect", { x: MARGIN.left - 4, y: MARGIN.top - 4, width: width - MARGIN.left - MARGIN.right + 8, height });
    return element(this.svg, "g", { "clip-path": `url(#${id})` });
  }

  curve(parent, { group, points }) {
    const path = (values, column) => values.map(point => `${this.x(point[0])} ${this.y(point[column] ?? point[1])}`).join("L");
    if (points.some(point => point.length > 2))
      element(parent, "path", { d: `M${path(points, 2)}L${path([...points].reverse(), 3)}Z`, fill: colour(group), opacity: 0.18 });
    element(parent, "path", {
      d: `M${path(points, 1)}`, fill: "none", stroke: colour(group), "stroke-width": 2, "stroke-dasharray": dash(group),
      "stroke-linejoin": "round", "data-group": group,
    });
    if (points.length === 1) this.symbol(parent, group, points[0]);
  }

  mark(parent, { group, points }) { this.symbol(parent, group, points[0]); }

  symbol(parent, group, point) {
    const transform = `translate(${this.x(point[0])} ${this.y(point[1])})`;
    element(parent, "path", { d: SYMBOLS[group % SYMBOLS.length], transform, fill: colour(group), "data-group": group });
  }

  // Names beside the markers, where there is room for them; the others have theirs under the pointer.
  names(lines, width) {
    const taken = lines.map(({ points: [[x, y]] }) => ({ left: this.x(x) - 5, right: this.x(x) + 5, middle: this.y(y) }));
    lines.forEach(({ name, points: [[x, y]] }, own) => {
      const text = element(this.svg, "text", { class: "halo" }, name), length = text.getComputedTextLength();
      const middle = this.y(y), right = this.x(x) + 9, left = this.x(x) - 9 - length;
      const free = start => start > MARGIN.left && start + length < width && taken.every((box, other) =>
        other === own || box.right < start || box.left > start + length || Math.abs(box.middle - middle) > 13);
      const start = [right, left].find(free);
      if (start === undefined) return text.remove();
      text.setAttribute("x", start);
      text.setAttribute("y", middle + 4);
      taken.push({ left: start, right: start + length, middle });
    });
  }

  point(event) {
    if (!this.pointed) return;
    const box = this.svg.getBoundingClientRect(), scale = this.svg.viewBox.baseVal.width / box.width;
    const [x, y] = [(event.clientX - box.left) * scale, (event.clientY - box.top) * scale];
    if (this.isPlane) {
      const near = line => Math.hypot(this.x(line.points[0][0]) - x, this.y(line.points[0][1]) - y);
      const nearest = this.lines().sort((a, b) => near(a) - near(b))[0];
      return nearest && near(nearest) < NEAR_PIXELS ? this.tell(nearest.points[0][0], y, [nearest]) : this.leave();
    }
    const steps = this.steps();
    if (steps.length) this.tell(steps.reduce((a, b) => Math.abs(this.x(b) - x) < Math.abs(this.x(a) - x) ? b : a), y, this.lines());
  }

  steps() { return [...new Set(this.lines().flatMap(line => line.points.map(point => point[0])))].sort((a, b) => a - b); }

  key(event) {
    const way = { ArrowRight: 1, ArrowLeft: -1 }[event.key];
    if (event.key === "Escape") this.leave();
    if (!way || !this.pointed) return;
    event.preventDefault();
    const stops = this.isPlane ? this.lines() : this.steps(), last = stops.length - 1;
    const before = this.at === null ? (way > 0 ? -1 : stops.length) : this.at;
    const at = Math.min(last, Math.max(0, before + way));
    if (this.isPlane) this.tell(stops[at].points[0][0], this.y(stops[at].points[0][1]), [stops[at]]);
    else this.tell(stops[at], HEIGHT / 2, this.lines());
    this.at = at;
    this.spoken.textContent = this.tip.dataset.spoken;
  }

  // Show the values at a step, the nearest to the height `y` in bold. A run without a value near the step is left out.
  tell(step, y, lines) {
    const { pointed, tip } = this;
    pointed.replaceChildren();
    let values = lines.map(line => ({ line, point: line.points.reduce((a, b) => Math.abs(b[0] - step) < Math.abs(a[0] - step) ? b : a) }))
      .filter(({ point }) => Math.abs(this.x(point[0]) - this.x(step)) <= NEAR_STEP_PIXELS);
    const distance = ({ point }) => Math.abs(this.y(point[1]) - y);
    const nearest = [...values].sort((a, b) => distance(a) - distance(b));
    const left = nearest.length - MOST_IN_TIP;
    values = nearest.slice(0, MOST_IN_TIP).sort((a, b) => b.point[1] - a.point[1]);
    if (!this.isPlane) element(pointed, "path", { d: `M${this.x(step)} ${MARGIN.top}V${HEIGHT - MARGIN.bottom}`, class: "guide" });
    const table = document.createElement("table"), spoken = [];
    for (const { line, point } of values) {
      this.symbol(pointed, line.group, point);
      const row = table.insertRow(), key = element(row.insertCell().appendChild(this.svg.cloneNode(false)), "path",
        { d: "M0 6H24", stroke: colour(line.group), "stroke-width": 3, "stroke-dasharray": dash(line.group) });
      for (const name of ["class", "role", "aria-label", "tabindex", "height"]) key.parentNode.removeAttribute(name);
      key.parentNode.setAttribute("viewBox", "0 0 24 12");
      key.parentNode.style.width = "24px";
      const name = line.name ?? data.groups[line.group];
      const spread = point.length > 2 && point[2] !== point[3] ? ` (${number(point[2])} to ${number(point[3])})` : "";
      const other = point[0] !== step ? ` at ${number(point[0])}` : "";
      const value = this.isPlane ? `${number(point[0])}, ${number(point[1])}` : number(point[1]) + spread + other;
      row.insertCell().textContent = name;
      row.insertCell().textContent = value;
      row.classList.toggle("near", line === nearest[0].line && values.length > 1);
      spoken.push(`${name} ${value}`);
    }
    const head = document.createElement("div");
    head.textContent = this.isPlane ? `${this.panel.x}, ${this.panel.title}` : `step ${number(step)}`;
    const more = document.createElement("div");
    more.textContent = left > 0 ? `and ${left} more` : "";
    tip.replaceChildren(head, table, more);
    tip.dataset.spoken = [head.textContent, ...spoken, more.textContent].filter(Boolean).join("; ");
    tip.hidden = false;
    const box = this.svg.getBoundingClientRect(), around = this.figure.getBoundingClientRect();
    const x = box.left - around.left + this.x(step) * box.width / this.svg.viewBox.baseVal.width;
    // Beside the pointer, over the next chart if need be, but within the window.
    const room = document.documentElement.clientWidth - around.left - tip.offsetWidth - 4;
    const beside = x + 14 <= room ? x + 14 : x - tip.offsetWidth - 14;
    tip.style.left = `${Math.max(4 - around.left, Math.min(room, beside))}px`;
    tip.style.top = `${box.top - around.top + 4}px`;
  }

  leave() {
    this.pointed?.replaceChildren();
    this.tip.hidden = true;
    this.at = null;
  }
}

// The line of a name under the pointer, or with the focus, stands out.
function stress(event) {
  const group = event.type === "focusout" ? undefined : event.target.closest?.("[data-toggle]")?.dataset.toggle;
  for (const path of document.querySelectorAll(".panel path[data-group]"))
    path.classList.toggle("faint", group !== undefined && path.dataset.group !== group);
}
for (const type of ["pointerover", "focusin", "focusout"]) document.addEventListener(type, stress);

const charts = [...document.querySelectorAll(".panel")].map(figure => {
  const panel = data.panels[Number(figure.dataset.panel)];
  return new Chart(figure, { ...panel, id: figure.dataset.panel }, panel.plane);
});
const redraw = () => charts.forEach(chart => chart.draw());
document.addEventListener("shown", redraw);
let width = 0;
new ResizeObserver(([entry]) => {
  if (entry.contentRect.width !== width) redraw();
  width = entry.contentRect.width;
}).observe(document.body);
show();
