// Shows how the tasks do: rates, how long they run, how long they wait, and how good predictions were.

import { Histogram, TimeChart, quantile, scatter } from "./charts.js";
import { $, el, list, row, say, show } from "./dom.js";
import { away, count, duration, number, percent, rate } from "./format.js";
import { now } from "./time.js";

const waits = new TimeChart("Wait of jobs that began", {
  series: [
    { key: "p50", name: "median", kind: "c1" },
    { key: "p95", name: "95 %", kind: "c3" },
  ],
  format: (value) => (value ? duration(value) : "0"),
  least: 0.001,
});
$("charts").append(waits.node);

/** The part `tasks`. */
export function showTasks({ tasks, waits: lately }) {
  show($("tasks-empty"), tasks.length === 0);
  show($("tasks-table"), tasks.length > 0);
  const perS = tasks.reduce((sum, task) => sum + (task.perS ?? 0), 0);
  say($("tasks-note"), tasks.length ? `${count(tasks.length, "type")}, ${rate(perS)} runs a second` : "");
  list($("tasks-rows"), tasks, (task) => task.type, taskRow);

  if (lately) waits.add(waitPoint(lately));
  waits.draw();
}

const waitPoint = ({ atMs, bins }) => ({ atMs, p50: quantile(bins, 0.5), p95: quantile(bins, 0.95) });

/** Waits from before this page was opened, if somebody looked then. */
export function showWaits(points) {
  waits.reset(points.map(waitPoint));
}

function taskRow({ type, runBins }) {
  const { node, cells } = row(["type"], ["perS", "n"], ["runs", "n wide"], ["failed", "n"], ["bins", "wide"], ["p50", "n"], ["p95", "n"], ["p99", "n wide"], ["wait", "n wide"]);
  say(cells.type, type);
  const histogram = new Histogram(runBins.length);
  cells.bins.append(histogram.node);
  const update = (task) => {
    const [p50, p95, p99] = [0.5, 0.95, 0.99].map((share) => duration(quantile(task.runBins, share)));
    say(cells.perS, task.perS === null ? "–" : rate(task.perS));
    say(cells.runs, number(task.runs));
    say(cells.failed, percent(task.failed, task.runs));
    cells.failed.classList.toggle("bad-text", task.failed > 0);
    say(cells.p50, p50);
    say(cells.p95, p95);
    say(cells.p99, p99);
    say(cells.wait, duration(quantile(task.waitBins, 0.95)));
    histogram.update(task.runBins, `Run times of ${type}: half below ${p50}, 95 % below ${p95}, 99 % below ${p99}`);
  };
  return { node, update };
}

const CHOSEN = { model: "gradient-boosted trees", hierarchical_mean: "means by kind of payload", type_mean: "means by type", fifo: "nothing that beats the order of entry" };
const RUNGS = { model: "the model", mean: "means", fifo: "the time of entry" };

let drawn = "";

/** The part `predictions`. */
export function showPredictions({ model, runs, pairs, byModel, byMean }) {
  show($("predictions-body"), pairs.length > 0);
  show($("predictions-empty"), pairs.length === 0);
  say($("predictions-note"), pairs.length ? `the last ${count(pairs.length, "captured run")}` : "");
  if (!pairs.length) {
    $("predictions-empty").replaceChildren(...nothing(model, runs));
    return;
  }
  const facts = [
    ["Orders by", RUNGS[model.rung] ?? model.rung ?? "–"],
    ["Learnt", model.chosen ? `${CHOSEN[model.chosen] ?? model.chosen}${model.trainedAt ? `, ${away(Date.parse(model.trainedAt), now())}` : ""}` : "–"],
  ];
  if (byModel) facts.push(["The model is off by", errors(byModel)]);
  if (byMean) facts.push(["Means are off by", errors(byMean)]);
  list($("predictions-facts"), facts, ([name]) => name, ([name]) => {
    const value = el("dd");
    return { node: el("div", {}, el("dt", {}, name), value), update: ([, text]) => say(value, text) };
  });
  const key = JSON.stringify(pairs);
  if (key !== drawn) $("scatter").replaceChildren(scatter(pairs.map(([predicted, real]) => [predicted, real])));
  drawn = key;
}

/** Why nothing is shown, and what to do about it. */
function nothing(model, runs) {
  if (model.version) return ["There is a model, and none of the runs that were captured lately was predicted with it yet."];
  if (!runs) return ["Nothing predicts durations, and no run has been captured to learn from yet."];
  const code = (text) => el("code", {}, text);
  return ["Nothing predicts durations yet. Runs to learn from are there: ", code("tqe ml export"), " and ", code("tqe ml train"), " make a model of them."];
}

const errors = ({ median, withinTwo }) => `a factor of ${median.toFixed(2)} in the median; ${percent(withinTwo, 1)} within a factor of two`;
