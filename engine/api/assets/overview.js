// Shows the queue as a whole: tiles, charts, lanes, workers.

import { call } from "./calls.js";
import { TimeChart } from "./charts.js";
import { attempt, confirm } from "./dialogs.js";
import { $, button, el, list, row, say, show } from "./dom.js";
import { count, duration, number, rate, short, shortId } from "./format.js";
import { now } from "./time.js";

const LANE_KINDS = ["c1", "c2", "c3", "c4", "c5", "c6"];

const throughput = new TimeChart("Jobs a second", {
  series: [
    { key: "completedPerS", name: "done", kind: "c1" },
    { key: "submittedPerS", name: "submitted", kind: "c0" },
    { key: "failedPerS", name: "failed", kind: "bad" },
  ],
  format: (value) => (value >= 1000 ? short(value) : rate(value)),
});
const waiting = new TimeChart("Jobs that wait", { series: [], format: short, stacked: true });
$("charts").append(throughput.node, waiting.node);

const tiles = {};
for (const [key, name] of [
  ["queued", "Waiting"],
  ["oldest", "Oldest waits"],
  ["running", "Running"],
  ["rate", "Done a second"],
  ["scheduled", "Scheduled"],
  ["dead", "Dead"],
]) {
  tiles[key] = el("dd");
  $("tiles").append(el("div", { class: "card tile" }, el("dt", {}, name), tiles[key]));
}

const flat = (point) => ({ ...point, ...Object.fromEntries(Object.entries(point.queued).map(([lane, jobs]) => [`lane ${lane}`, jobs])) });

/** What happened before this page was opened. */
export function showHistory(points) {
  const found = points.map(flat);
  throughput.reset(found);
  waiting.reset(found);
}

let work = {};

/** The part `backlog`. */
export function showBacklog({ lanes }) {
  work = lanes;
}

/** The part `queue`. */
export function showQueue(queue) {
  const lanes = queue.queues;
  const queued = lanes.reduce((sum, lane) => sum + lane.queued, 0);
  const oldest = Math.max(0, ...lanes.map((lane) => lane.oldestAgeMs ?? 0));
  say(tiles.queued, number(queued));
  say(tiles.oldest, queued ? duration(oldest / 1000) : "–");
  say(tiles.running, number(queue.running));
  say(tiles.rate, rate(queue.endedPerS));
  say(tiles.scheduled, number(queue.scheduled));
  say(tiles.dead, number(queue.dead));
  tiles.dead.classList.toggle("bad", queue.dead > 0);

  waiting.setSeries(lanes.map((lane, at) => ({ key: `lane ${lane.name}`, name: lane.name, kind: LANE_KINDS[at % LANE_KINDS.length] })));
  if (queue.point) {
    throughput.add(flat(queue.point));
    waiting.add(flat(queue.point));
  }
  throughput.draw();
  waiting.draw();

  const most = Math.max(1, ...lanes.map((lane) => lane.queued));
  list($("lanes-rows"), lanes.map((lane) => ({ ...lane, share: lane.queued / most })), (lane) => lane.name, laneRow);
  const aside = [];
  if (queue.quarantinedFrames) aside.push(`${count(queue.quarantinedFrames, "damaged frame")} in quarantine`);
  if (queue.parkedFrames) aside.push(`${count(queue.parkedFrames, "frame")} of a newer version parked`);
  say($("lanes-note"), aside.join(", "));
}

function laneRow({ name }) {
  const { node, cells } = row(["name"], ["queued", "n"], ["share", "wide"], ["work", "n wide"], ["oldest", "n"], ["wait", "n wide"], ["acts", "acts"]);
  const label = el("span", {}, name);
  const flag = el("span", { class: "flag", hidden: true }, "paused");
  cells.name.append(label, " ", flag);
  const bar = el("progress", { max: 1, "aria-hidden": "true", tabindex: -1 });
  cells.share.append(bar);
  let last = {};
  const toggle = button("", () => (last.paused ? resume(name) : pause(name)));
  const purge = button("Purge", () => purgeLane(last), { kind: "quiet danger-text", label: `Purge lane ${name}` });
  cells.acts.append(toggle, purge);
  const update = (lane) => {
    last = lane;
    show(flag, lane.paused);
    say(cells.queued, number(lane.queued));
    say(cells.work, lane.queued && work[name] !== undefined ? duration(work[name] / 1000) : "–");
    say(cells.oldest, lane.oldestAgeMs === null ? "–" : duration(lane.oldestAgeMs / 1000));
    say(cells.wait, lane.predictedWaitMs === null ? "unknown" : duration(lane.predictedWaitMs / 1000));
    bar.value = lane.share;
    say(toggle, lane.paused ? "Resume" : "Pause");
    toggle.setAttribute("aria-label", `${lane.paused ? "Resume" : "Pause"} lane ${name}`);
  };
  return { node, update };
}

const verb = (lane, what) => call("POST", `api/v1/queues/${encodeURIComponent(lane)}/${what}`);

const pause = (lane) =>
  confirm({
    title: `Pause lane ${lane}?`,
    text: "Workers take nothing more from it until it is resumed. What runs goes on, and new jobs can still be submitted.",
    yes: "Pause",
    danger: false,
    act: async () => (await verb(lane, "pause"), `Lane ${lane} is paused`),
  });

const resume = (lane) => attempt(async () => (await verb(lane, "resume"), `Lane ${lane} runs`));

const purgeLane = ({ name, queued }) =>
  confirm({
    title: `Purge lane ${name}?`,
    text: `What waits in it now is cancelled: ${count(queued, "job")} at the moment. Jobs that run go on; delayed jobs and retries stay. This cannot be undone.`,
    yes: "Cancel what waits",
    act: async () => `${count((await verb(name, "purge")).purged, "job")} of lane ${name} cancelled`,
  });

/** The part `workers`. */
export function showWorkers({ workers, more }) {
  const hosts = new Set(workers.map((worker) => worker.host));
  const busy = workers.filter((worker) => worker.running).length;
  say($("workers-note"), workers.length ? `${busy} of ${workers.length + more} busy${hosts.size > 1 ? `, on ${hosts.size} hosts` : ""}` : "");
  show($("workers-empty"), workers.length === 0);
  show($("workers-empty").previousElementSibling, workers.length > 0);
  list($("workers-rows"), workers.map((worker) => ({ ...worker, several: hosts.size > 1 })), (worker) => worker.incarnation, workerRow);
}

function workerRow() {
  const { node, cells } = row(["name"], ["state"], ["runs", "runs"], ["since", "n"], ["pid", "n wide"], ["cpu", "n wide"]);
  const state = el("span", { class: "state" });
  cells.state.append(state);
  const kind = el("span", { class: "kind" });
  const id = el("a", { class: "id" });
  const others = el("span", { class: "dim" });
  cells.runs.append(kind, " ", id, " ", others);
  const update = (worker) => {
    const [job] = worker.jobs;
    say(cells.name, worker.several ? `${worker.worker} · ${worker.host}` : worker.worker);
    say(state, worker.state);
    state.dataset.state = worker.running ? "busy" : worker.state;
    say(kind, job ? job.type || "async" : "");
    linkTo(id, job?.id);
    say(others, worker.running > 1 ? `and ${number(worker.running - 1)} more` : "");
    say(cells.since, job ? duration(Math.max(0, now() - job.sinceMs) / 1000) : "");
    say(cells.pid, worker.pid);
    say(cells.cpu, worker.cpu ?? "");
  };
  return { node, update };
}

/** Let a link lead to a job, or to nothing. */
export function linkTo(node, id) {
  if (node.dataset.job === (id ?? "")) return;
  node.dataset.job = id ?? "";
  if (id) {
    node.setAttribute("href", `#job/${id}`);
    node.setAttribute("title", id);
    node.setAttribute("aria-label", `Job ${id}`);
  } else for (const name of ["href", "title", "aria-label"]) node.removeAttribute(name);
  say(node, id ? shortId(id) : "");
}
