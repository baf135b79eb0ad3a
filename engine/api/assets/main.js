// Starts the page: follows the stream, hands each part to who shows it, and says how fresh all of it is.

import { token } from "./calls.js";
import { showDead } from "./dead.js";
import { $, el, say, show } from "./dom.js";
import { duration } from "./format.js";
import * as jobs from "./jobs.js";
import * as overview from "./overview.js";
import { showSchedules } from "./schedules.js";
import { follow } from "./stream.js";
import { showPredictions, showTasks, showWaits } from "./tasks.js";
import { told } from "./time.js";

const STALE_MS = 4_000;

// Which part of the view goes where: what shows it, and the section that has it.
const shown = {
  history: [overview.showHistory],
  waits: [showWaits],
  backlog: [overview.showBacklog],
  queue: [overview.showQueue, "lanes"],
  workers: [overview.showWorkers, "workers"],
  tasks: [showTasks, "tasks"],
  predictions: [showPredictions, "predictions"],
  dead: [showDead, "dead"],
  cron: [showSchedules, "schedules"],
  state: [showState],
};

/** A section appears with its first news, and with it the way to it, in the order of the page. */
function reveal(id) {
  if (!$(id).hidden) return;
  show($(id), true);
  const sections = [...document.querySelectorAll("main > section[id]:not([hidden])")];
  $("sections").replaceChildren(...sections.map((one) => el("a", { href: `#${one.id}` }, $(`${one.id}-title`).textContent)));
}

let heardMs = 0;
let connection = "waiting";
let reason = "";
let redisError = "";

function showState(state) {
  told(state.atMs);
  redisError = state.error ?? "";
  heardMs = performance.now();
}

/** Texts change only when the state does: a screen reader reads each change aloud. */
function showLink() {
  const age = performance.now() - heardMs;
  let state = connection;
  if (state === "live" && age > STALE_MS) state = "stale";
  if (state === "live" && redisError) state = "stale";
  if (state === "waiting" && reason) state = "lost";
  const texts = { live: "Live", waiting: "Connecting", stale: "Stale", lost: "Reconnecting", paused: "Paused" };
  $("link").dataset.state = state;
  say($("link-text"), texts[state]);
  document.body.dataset.fresh = String(state === "live" || !heardMs);
  const since = heardMs ? `What you see is ${duration(Math.max(1, Math.round(age / 1000)))} old: ` : "";
  if (redisError && connection === "live") alarm(`${since}Redis does not answer the server (${redisError}).`);
  else if (state === "lost" && (age > STALE_MS || !heardMs)) alarm(`${since}${reason}. Trying again.`);
  else if (state === "stale") alarm(`${since}the server says nothing.`);
  else alarm("");
  show($("forget"), Boolean(token.get()));
}

let alarmed = "";

function alarm(text) {
  // Only the first of a row is announced; the age that goes on counting would be read out each second.
  const node = $("alarm");
  node.setAttribute("aria-live", alarmed && text ? "off" : "assertive");
  alarmed = text;
  show(node, text !== "");
  say(node, text.charAt(0).toUpperCase() + text.slice(1));
}

follow(
  (name, data) => {
    const [view, section] = shown[name] ?? [];
    if (!view) return; // a newer server has more
    view(data);
    if (section) reveal(section);
  },
  (state, why) => {
    connection = state;
    if (state === "lost") reason = why;
    else if (state !== "waiting") reason = ""; // while it waits for the answer, what was lost still is
    showLink();
  },
);
setInterval(showLink, 1_000);
jobs.start();

$("forget").addEventListener("click", () => {
  token.forget();
  location.reload();
});
