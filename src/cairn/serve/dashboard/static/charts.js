// Charts over time, drawn as SVG: a column (or a row of dots) stands for a span of time.

import { clock } from "./format.js";

const SVG = "http://www.w3.org/2000/svg";
const LEFT = 46, RIGHT = 6, TOP = 8, BOTTOM = 20, HEIGHT = 190;
/** Pixels of a column with its gap. */
const COLUMN = 9;
const TABLE_ROWS = 20;
const SPARKS = 24;
/** Seconds between two marks of the time axis. */
const STEPS = [10, 30, 60, 120, 300, 600];

/** An HTML element; texts among the children are text, whatever they hold. */
export function h(tag, attributes = {}, ...children) {
  return fill(document.createElement(tag), attributes, children);
}

/** An SVG element. */
export function s(tag, attributes = {}, ...children) {
  return fill(document.createElementNS(SVG, tag), attributes, children);
}

function fill(element, attributes, children) {
  for (const [name, value] of Object.entries(attributes)) if (value != null) element.setAttribute(name, value);
  element.append(...children.flat().filter((child) => child != null));
  return element;
}

/** Adds up samples into spans of time that begin at multiples of their length, so that columns do not flicker. */
export function spans(samples, period, width, first) {
  const periods = Math.max(1, (samples.at(-1)?.t - first) / period);
  const length = period * Math.max(1, Math.ceil((periods * COLUMN) / Math.max(1, width)));
  const found = new Map();
  for (const sample of samples) {
    const start = Math.floor(sample.t / length) * length;
    if (!found.has(start)) found.set(start, { t: start, length, seconds: 0, samples: [] });
    const span = found.get(start);
    span.seconds += period;
    span.samples.push(sample);
  }
  return [...found.values()];
}

/** Marks of a linear axis: round figures up to at least `most`, in powers of `base`. */
export function linear(most, base = 1000) {
  const unit = most > 0 ? base ** Math.floor(Math.log(most) / Math.log(base)) : 1;
  const size = 10 ** Math.floor(Math.log10(most / unit || 1));
  const step = [0.5, 1, 2, 2.5, 5, 10].find((one) => one * size * unit * 3 >= most) * size * unit || 1;
  return Array.from({ length: Math.max(2, Math.ceil(most / step - 1e-9) + 1) }, (_, i) => i * step);
}

/** Marks of a logarithmic axis around these values: 1 2 5 10, or powers of ten where those would be many. */
export function logarithmic(least, most, digits = [1, 2, 5]) {
  const all = Array.from({ length: 10 }, (_, i) => digits.map((digit) => digit * 10 ** (i - 5))).flat();
  const from = Math.max(0, all.findLastIndex((one) => one <= least)), to = Math.max(from + 1, all.findIndex((one) => one >= most));
  return to - from > 5 && digits.length > 1 ? logarithmic(least, most, [1]) : all.slice(from, to + 1);
}

/** What charts have in common: axes, legend, the figures of one span by pointer and keys, and all of them as a table. */
export class Chart {
  /**
   * plot(spans) -> {marks, log, label(mark), draw(x, y, width) -> elements, legend: [{cls, label, value}], said} ;
   * rows(span) -> [{cls, label, value}]. empty: what is said where nothing was measured.
   */
  constructor(section, { plot, rows, empty }) {
    this.plot = plot;
    this.rows = rows;
    this.at = null; // the start of the span that is read out
    const title = section.querySelector("h2").firstChild.textContent.trim();
    this.title = title;
    this.legend = h("ul", { class: "legend", "aria-label": "Legend" });
    this.svg = s("svg", { role: "img", height: HEIGHT });
    this.readout = h("div", { class: "readout", role: "status", hidden: "" });
    this.none = h("div", { class: "none" }, h("span", {}, empty));
    this.figure = h("figure", { tabindex: 0, role: "group", "aria-label": `${title}: chart. Left and right arrow keys read single columns.` }, this.svg, this.none, this.readout);
    this.table = h("table");
    this.details = h("details", {}, h("summary", {}, "As a table"), h("div", { class: "scroll", tabindex: 0, role: "region", "aria-label": `${title}: table` }, this.table));
    section.append(this.legend, this.figure, this.details);
    this.listen();
    new ResizeObserver(() => this.samples && this.draw()).observe(this.figure);
  }

  listen() {
    const point = (event) => this.read(this.near(event.clientX - this.svg.getBoundingClientRect().left));
    this.svg.addEventListener("pointermove", point);
    this.svg.addEventListener("pointerdown", point);
    this.svg.addEventListener("pointerleave", () => this.read(null));
    this.figure.addEventListener("blur", () => this.read(null));
    this.figure.addEventListener("keydown", (event) => {
      const last = this.spans?.length - 1, i = this.spans?.findIndex((span) => span.t === this.at);
      const to = { ArrowLeft: i < 0 ? last : Math.max(0, i - 1), ArrowRight: i < 0 ? last : Math.min(last, i + 1), Home: 0, End: last }[event.key];
      if (event.key === "Escape") this.read(null);
      else if (to != null && last >= 0) {
        this.read(this.spans[to]);
        event.preventDefault();
      }
    });
    this.details.addEventListener("toggle", () => this.samples && this.tabulate());
  }

  update(samples, period, from, now) {
    Object.assign(this, { samples, period, from, now });
    this.draw();
  }

  draw() {
    const width = this.figure.clientWidth, inner = width - LEFT - RIGHT;
    if (inner < 20) return;
    const all = spans(this.samples, this.period, inner, this.from);
    this.spans = all.filter((span) => span.t >= this.from || all.length === 1);
    this.to = Math.max(this.now, ...this.spans.map((span) => span.t + span.length));
    const { marks, log, label, draw, legend, said } = this.plot(this.spans);
    const least = marks[0], most = marks.at(-1), scaled = log ? Math.log : (value) => value;
    this.x = (t) => LEFT + ((t - this.from) / (this.to - this.from)) * inner;
    const y = (value) => TOP + (HEIGHT - TOP - BOTTOM) * (1 - (scaled(value) - scaled(least)) / (scaled(most) - scaled(least)));
    const grid = marks.map((mark) => [
      s("line", { class: mark === 0 ? "axis" : "grid", x1: LEFT, x2: width - RIGHT, y1: y(mark), y2: y(mark) }),
      s("text", { x: LEFT - 8, y: y(mark) + 4, "text-anchor": "end" }, label(mark)),
    ]);
    this.svg.setAttribute("viewBox", `0 0 ${width} ${HEIGHT}`);
    this.cross = s("line", { class: "cross", y1: TOP, y2: HEIGHT - BOTTOM, visibility: "hidden" });
    const clip = Math.max(1, this.x(this.from + (this.spans[0]?.length ?? 1)) - LEFT - 1.5);
    this.svg.replaceChildren(...grid.flat(), ...this.times(inner), ...draw(this.x, y, clip), this.cross);
    this.svg.setAttribute("aria-label", `${this.title}, the last ${Math.round((this.to - this.from) / 60)} minutes: ${said || "nothing measured"}`);
    this.none.hidden = Boolean(said);
    this.legend.replaceChildren(...legend.map((one) => h("li", {}, h("i", { class: `key ${one.cls}` }), `${one.label} `, h("b", {}, one.value))));
    this.tabulate();
    if (this.at != null) this.read(this.spans.find((span) => span.t === this.at) ?? null);
  }

  times(inner) {
    const room = (60 * (this.to - this.from)) / inner;
    const step = STEPS.find((one) => one >= room) ?? STEPS.at(-1), found = [];
    for (let t = Math.ceil(this.from / step) * step; t <= this.to; t += step) {
      const x = this.x(t);
      if (x > LEFT + 14 && x < LEFT + inner - 14) found.push(s("text", { x, y: HEIGHT - 4, "text-anchor": "middle" }, clock(t, step < 60)));
    }
    return found;
  }

  near(x) {
    const distance = (span) => Math.abs(this.x(span.t + span.length / 2) - x);
    return this.spans?.reduce((best, span) => (best && distance(best) <= distance(span) ? best : span), null);
  }

  read(span) {
    this.at = span?.t ?? null;
    this.readout.hidden = !span;
    this.cross?.setAttribute("visibility", span ? "visible" : "hidden");
    if (!span) return;
    const x = this.x(span.t + span.length / 2);
    this.cross.setAttribute("x1", x);
    this.cross.setAttribute("x2", x);
    const rows = this.rows(span).map((row) => h("div", {}, h("span", {}, h("i", { class: `key ${row.cls}` }), row.label), h("b", {}, row.value)));
    this.readout.replaceChildren(h("div", {}, `${clock(span.t, true)} to ${clock(span.t + span.length, true)}`), ...rows);
    const wide = this.readout.offsetWidth, all = this.figure.clientWidth;
    this.readout.style.left = `${Math.max(0, Math.min(all - wide, x > all / 2 ? x - wide - 10 : x + 10))}px`;
  }

  tabulate() {
    if (!this.details.open) return this.table.replaceChildren();
    const last = this.spans.slice(-TABLE_ROWS).reverse(), rows = last.map((span) => this.rows(span));
    const labels = [...new Map(rows.flat().map((row) => [row.label, row])).keys()];
    const cell = (row, label) => h("td", { class: "n" }, row.find((one) => one.label === label)?.value ?? "–");
    this.table.replaceChildren(
      h("thead", {}, h("tr", {}, h("th", { scope: "col" }, "From"), labels.map((label) => h("th", { scope: "col", class: "n" }, label)))),
      h("tbody", {}, rows.map((row, i) => h("tr", {}, h("th", { scope: "row" }, clock(last[i].t, true)), labels.map((label) => cell(row, label))))),
    );
  }
}

/** Columns of parts that stand on each other. parts: [{cls, values: [a span], down}]; spans without a value are left out. */
export function columns(found, parts) {
  return (x, y, width) => {
    const above = found.map(() => 0), below = found.map(() => 0);
    return parts.map((part) => {
      const path = found.map((span, i) => {
        if (!part.values[i]) return "";
        const from = part.down ? below : above, start = from[i];
        from[i] += part.down ? -part.values[i] : part.values[i];
        const [high, low] = [y(Math.max(start, from[i])), y(Math.min(start, from[i]))];
        return `M${(x(span.t) + 0.75).toFixed(1)} ${high.toFixed(1)}h${width.toFixed(1)}v${Math.max(0.5, low - high).toFixed(1)}h-${width.toFixed(1)}z`;
      });
      return s("path", { class: `fill ${part.cls}`, d: path.join("") });
    });
  };
}

/** Dots, and a line through the spans' medians. parts: [{cls, mark: "ring" | "dot", points: [[t, value]], line: [[t, value]]}]. */
export function dots(parts) {
  return (x, y) =>
    parts.flatMap((part) => [
      ...part.points.map(([t, value]) => s("circle", { class: `${part.mark} ${part.cls}`, cx: x(t).toFixed(1), cy: y(value).toFixed(1), r: part.mark === "ring" ? 2.75 : 2.5 })),
      s("polyline", { class: `line ${part.cls}`, points: part.line.map(([t, value]) => `${x(t).toFixed(1)},${y(value).toFixed(1)}`).join(" ") }),
    ]);
}

/** A small chart without axes, for what is said beside it. */
export function spark(values, cls) {
  const last = values.slice(-SPARKS), most = Math.max(...last, 1e-12), width = 64 / SPARKS, first = SPARKS - last.length;
  const path = last.map((value, i) => (value ? `M${((first + i) * width).toFixed(2)} 28v-${Math.max(1, (26 * value) / most).toFixed(1)}h${(width - 0.8).toFixed(2)}V28z` : ""));
  return s("svg", { viewBox: "0 0 64 28", "aria-hidden": "true" }, s("path", { class: `fill ${cls}`, d: path.join("") }));
}
