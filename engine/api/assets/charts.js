// Draws charts as SVG: lines over time, small histograms, a scatter of predictions. No library.

import { el, say, svg } from "./dom.js";
import { duration } from "./format.js";

const SPAN_MOST_MS = 600_000;
const SPAN_LEAST_MS = 60_000;
const GAP_MS = 9_000; // no news for longer: the line breaks instead of telling what nobody saw
const POINT_PX = 4; // where points would lie closer, each shows the mean of several
const HEIGHT = 150;
const TOP = 10;
const BOTTOM = 18;

/** Some round number that is not below, so that axes do not jump with every point. */
function roundUp(value) {
  if (!(value > 0)) return 1;
  const size = 10 ** Math.floor(Math.log10(value));
  return [1, 2, 2.5, 5, 10].find((step) => step * size >= value) * size;
}

const charts = new Set(); // all of the page: they share one axis of time

/**
 * A chart over the last minutes. `series` is [{key, name, kind}], kind the class that colours it; with
 * `stacked` each lies on the one before. `add({atMs, key: value})`, then `draw()`.
 */
export class TimeChart {
  constructor(title, { series, format, stacked = false, least = 1 }) {
    this.series = series;
    this.format = format;
    this.stacked = stacked;
    this.least = least;
    this.points = [];
    this.hovered = null;
    this.values = new Map();
    this.legend = el("div", { class: "legend" });
    this.title = title;
    this.picture = svg("svg", { class: "plot", role: "img", height: HEIGHT, preserveAspectRatio: "none" });
    this.node = el("figure", { class: "card chart" }, el("figcaption", {}, el("h3", {}, title), this.legend), this.picture);
    this.relabel();
    this.width = 0;
    charts.add(this);
    new ResizeObserver(([entry]) => {
      this.width = Math.round(entry.contentRect.width);
      this.draw();
    }).observe(this.picture);
    this.picture.addEventListener("pointermove", (event) => this.hover(event.offsetX));
    this.picture.addEventListener("pointerleave", () => this.hover(null));
  }

  /** Other lines than before, as lanes come and go. */
  setSeries(series) {
    if (series.map((one) => one.key).join("\n") === this.series.map((one) => one.key).join("\n")) return;
    this.series = series;
    this.relabel();
  }

  relabel() {
    this.values.clear();
    this.legend.replaceChildren(
      ...this.series.map((one) => {
        const value = el("b");
        this.values.set(one.key, value);
        return el("span", {}, el("i", { class: `key ${one.kind}` }), one.name, " ", value);
      }),
    );
  }

  reset(points) {
    this.points = points.slice(-SPAN_MOST_MS / 1000);
  }

  add(point) {
    if (this.points.length && point.atMs <= this.points.at(-1).atMs) return;
    this.points.push(point);
    while (point.atMs - this.points[0].atMs > SPAN_MOST_MS) this.points.shift();
  }

  hover(x) {
    this.hovered = x;
    this.draw();
  }

  draw() {
    if (!this.width) return;
    const { width } = this;
    const ends = [...charts].filter((one) => one.points.length);
    const end = Math.max(0, ...ends.map((one) => one.points.at(-1).atMs));
    const begin = Math.min(end - SPAN_LEAST_MS, ...ends.map((one) => one.points[0].atMs));
    const span = Math.min(SPAN_MOST_MS, end - begin);
    const points = this.means((span / width) * POINT_PX).filter((point) => point.atMs >= end - span);
    const last = this.points.at(-1);
    const stacks = points.map((point) => this.stack(point));
    const most = roundUp(Math.max(this.least, ...stacks.flat()));
    const x = (ms) => width - ((end - ms) / span) * width;
    const y = (value) => TOP + (1 - value / most) * (HEIGHT - TOP - BOTTOM);
    const shapes = this.grid(most, y, span);
    for (let at = this.series.length - 1; at >= 0; at -= 1) {
      shapes.push(...this.line(this.series[at].kind, points, stacks, at, x, y, at === 0 || this.stacked));
    }
    const near = this.nearest(points, x);
    if (this.hovered !== null && near) {
      shapes.push(svg("line", { class: "cursor", x1: x(near.atMs), x2: x(near.atMs), y1: TOP, y2: HEIGHT - BOTTOM }));
    }
    this.picture.setAttribute("viewBox", `0 0 ${width} ${HEIGHT}`);
    this.picture.replaceChildren(...shapes);
    this.tell(this.hovered !== null ? near : last);
  }

  /** The points, or means of those of each step of time; steps stand still, or the line would shimmer. */
  means(stepMs) {
    if (stepMs <= 1_500) return this.points;
    const steps = [];
    let current = null;
    for (const point of this.points) {
      const step = Math.floor(point.atMs / stepMs);
      if (step !== current) steps.push([]);
      current = step;
      steps.at(-1).push(point);
    }
    return steps.map((step) => {
      const found = { atMs: step.reduce((sum, point) => sum + point.atMs, 0) / step.length };
      for (const { key } of this.series) {
        const values = step.map((point) => point[key]).filter((value) => value !== undefined && value !== null);
        if (values.length) found[key] = values.reduce((sum, value) => sum + value, 0) / values.length;
      }
      return found;
    });
  }

  stack(point) {
    let below = 0;
    return this.series.map(({ key }) => {
      const value = point[key] ?? 0;
      below = this.stacked ? below + value : value;
      return below;
    });
  }

  grid(most, y, span) {
    const shapes = [];
    for (const part of [0, 0.5, 1]) {
      const at = Math.round(y(most * part)) + 0.5;
      shapes.push(svg("line", { class: part ? "grid" : "axis", x1: 0, x2: this.width, y1: at, y2: at }));
      if (part) shapes.push(svg("text", { class: "tick", x: 0, y: at - 3 }, this.format(most * part)));
    }
    shapes.push(
      svg("text", { class: "tick", x: 0, y: HEIGHT - 4 }, `${duration(span / 1000)} ago`),
      svg("text", { class: "tick end", x: this.width, y: HEIGHT - 4 }, "now"),
    );
    return shapes;
  }

  line(kind, points, stacks, at, x, y, filled) {
    const runs = [];
    let before = null;
    points.forEach((point, k) => {
      if (point[this.series[at].key] === undefined || point[this.series[at].key] === null) return;
      if (before === null || point.atMs - before > GAP_MS) runs.push([]);
      const px = x(point.atMs).toFixed(1);
      const floor = this.stacked && at > 0 ? stacks[k][at - 1] : 0;
      runs.at(-1).push([`${px} ${y(stacks[k][at]).toFixed(1)}`, `${px} ${y(floor).toFixed(1)}`]);
      before = point.atMs;
    });
    const upper = (run) => run.map(([top]) => top).join("L");
    const lower = (run) => run.map(([, floor]) => floor).reverse().join("L");
    const drawn = [svg("path", { class: `line ${kind}`, d: runs.map((run) => `M${upper(run)}`).join("") })];
    if (filled) drawn.unshift(svg("path", { class: `area ${kind}`, d: runs.map((run) => `M${upper(run)}L${lower(run)}Z`).join("") }));
    return drawn;
  }

  nearest(points, x) {
    let found = null;
    for (const point of points) {
      if (found === null || Math.abs(x(point.atMs) - this.hovered) < Math.abs(x(found.atMs) - this.hovered)) found = point;
    }
    return found;
  }

  tell(point) {
    const told = [];
    for (const { key, name } of this.series) {
      const value = point?.[key];
      const text = value === undefined || value === null ? "–" : this.format(value);
      say(this.values.get(key), text);
      told.push(`${name} ${text}`);
    }
    this.picture.setAttribute("aria-label", `${this.title}, now: ${told.join(", ")}`);
  }
}

const BIN_FIRST_US = 1;

/** The value below which a share of a histogram lies, in seconds. Bin k has what took 2^k to 2^(k+1) µs. */
export function quantile(bins, share) {
  const all = bins.reduce((sum, one) => sum + one, 0);
  if (!all) return 0;
  let left = share * all;
  for (let k = 0; k < bins.length; k += 1) {
    if (bins[k] >= left && bins[k] > 0) return BIN_FIRST_US * 2 ** (k + left / bins[k]) * 1e-6;
    left -= bins[k];
  }
  return 2 ** bins.length * 1e-6;
}

const BAR = 9;
const BARS_HEIGHT = 30;

/** How long jobs took, on an axis that doubles from bar to bar and is the same for all tasks. */
export class Histogram {
  constructor(bins) {
    const width = bins * BAR;
    this.bars = Array.from({ length: bins }, (_, k) => svg("rect", { class: "bar", x: k * BAR + 1, width: BAR - 2 }));
    this.marks = [0.5, 0.95].map((share) => svg("line", { class: share === 0.5 ? "mark" : "mark far", y1: 0, y2: BARS_HEIGHT }));
    this.node = svg(
      "svg",
      { class: "bins", role: "img", viewBox: `0 0 ${width} ${BARS_HEIGHT + 1}`, width, height: BARS_HEIGHT + 1 },
      svg("line", { class: "axis", x1: 0, x2: width, y1: BARS_HEIGHT + 0.5, y2: BARS_HEIGHT + 0.5 }),
      ...this.bars,
      ...this.marks,
    );
  }

  update(bins, label) {
    const most = Math.max(1, ...bins);
    bins.forEach((number, k) => {
      const height = number ? Math.max(1.5, (number / most) * BARS_HEIGHT) : 0;
      this.bars[k].setAttribute("y", BARS_HEIGHT - height);
      this.bars[k].setAttribute("height", height);
    });
    [0.5, 0.95].forEach((share, at) => {
      const value = quantile(bins, share);
      const x = value ? Math.min(bins.length, Math.log2(value * 1e6)) * BAR : -9;
      this.marks[at].setAttribute("x1", x);
      this.marks[at].setAttribute("x2", x);
    });
    this.node.setAttribute("aria-label", label);
  }
}

const SIDE = 220;
const EDGE = 40;

/** Predicted against real durations, both in seconds on axes that grow by tens. */
export function scatter(pairs) {
  const values = pairs.flat().filter((one) => one > 0);
  const low = Math.floor(Math.log10(Math.min(...values)));
  const high = Math.max(low + 1, Math.ceil(Math.log10(Math.max(...values))));
  const at = (value) => ((Math.log10(Math.max(value, 10 ** low)) - low) / (high - low)) * (SIDE - EDGE);
  const x = (value) => EDGE + at(value);
  const y = (value) => SIDE - EDGE - at(value);
  const shapes = [svg("path", { class: "ideal", d: `M${x(10 ** low)} ${y(10 ** low)}L${x(10 ** high)} ${y(10 ** high)}` })];
  for (let power = low; power <= high; power += 1) {
    const value = 10 ** power;
    shapes.push(
      svg("line", { class: "grid", x1: x(value), x2: x(value), y1: 0, y2: SIDE - EDGE }),
      svg("line", { class: "grid", x1: EDGE, x2: SIDE, y1: y(value), y2: y(value) }),
    );
    if (power < high) {
      shapes.push(
        svg("text", { class: "tick middle", x: x(value), y: SIDE - EDGE + 14 }, duration(value)),
        svg("text", { class: "tick end", x: EDGE - 4, y: y(value) + 3 }, duration(value)),
      );
    }
  }
  shapes.push(...pairs.map(([predicted, real]) => svg("circle", { class: "dot", cx: x(predicted), cy: y(real), r: 2 })));
  shapes.push(
    svg("text", { class: "tick end", x: SIDE, y: SIDE - 4 }, "predicted"),
    svg("text", { class: "tick end", x: EDGE - 4, y: 10 }, "real"),
  );
  return svg("svg", { class: "plot", role: "img", viewBox: `0 0 ${SIDE} ${SIDE}`, "aria-label": `${pairs.length} runs, predicted against real durations; the facts beside it say how good` }, ...shapes);
}
