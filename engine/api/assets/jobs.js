// Finds one job by its id and shows what is known of it. The address of the page says which: `#job/ID`.

import { Problem, call } from "./calls.js";
import { replayed } from "./dead.js";
import { confirm, sentence } from "./dialogs.js";
import { $, button, el } from "./dom.js";
import { away, duration, moment } from "./format.js";
import { now } from "./time.js";

const AGAIN_MS = 1_500;
const ENDED = new Set(["completed", "dead", "cancelled"]);

let shownId = "";
let timer = 0;
let asked = 0;

/** Follow the search field, and links to jobs. */
export function start() {
  $("search").addEventListener("submit", (event) => {
    event.preventDefault();
    const id = $("job-id").value.trim();
    if (!id) return;
    if (location.hash === `#job/${id}`) look();
    else location.hash = `job/${encodeURIComponent(id)}`;
  });
  addEventListener("hashchange", look);
  $("job-close").addEventListener("click", () => $("job").close());
  $("job").addEventListener("close", () => {
    clearTimeout(timer);
    shownId = "";
    if (location.hash.startsWith("#job/")) history.replaceState(null, "", location.pathname + location.search);
  });
  look();
}

function look() {
  const found = /^#job\/(.+)$/.exec(location.hash);
  if (!found) {
    if ($("job").open) $("job").close();
    return;
  }
  try {
    shownId = decodeURIComponent(found[1]);
  } catch {
    shownId = found[1];
  }
  $("job-body").replaceChildren(el("p", {}, "Looking …"));
  $("job-buttons").replaceChildren();
  if (!$("job").open) $("job").showModal();
  refresh();
}

/** Ask again while the job has not ended; answers that are overtaken by another question are dropped. */
async function refresh() {
  clearTimeout(timer);
  const id = shownId;
  const question = (asked += 1);
  const current = () => question === asked && shownId === id && $("job").open;
  try {
    const path = encodeURIComponent(id);
    const job = await call("GET", `api/v1/jobs/${path}`).catch((error) => {
      if (error instanceof Problem && error.status === 404) return { missing: sentence(error) };
      throw error;
    });
    const dead =
      job.missing || job.status === "dead"
        ? await call("GET", `api/v1/dlq/${path}`).catch((error) => {
            if (error instanceof Problem && error.status === 404) return null;
            throw error;
          })
        : null;
    if (!current()) return;
    if (job.missing && !dead) {
      $("job-body").replaceChildren(el("p", {}, job.missing));
      return;
    }
    fill(job.missing ? { ...dead, status: "dead" } : job, dead);
    if (!job.missing && !ENDED.has(job.status)) timer = setTimeout(refresh, AGAIN_MS);
  } catch (error) {
    if (current()) $("job-body").replaceChildren(el("p", { class: "fault" }, sentence(error)));
  }
}

function fill(job, dead) {
  const facts = el("dl", { class: "facts" });
  const fact = (name, value) => {
    if (value !== null && value !== undefined && value !== "") facts.append(el("dt", {}, name), el("dd", {}, value));
  };
  fact("Id", el("span", { class: "id" }, job.id));
  fact("Type", job.type);
  fact("Status", el("span", { class: "flag", "data-status": job.status }, job.status));
  fact("Lane", job.lane);
  fact("Attempts", job.attempts);
  fact("Crashes", dead?.crashes || null);
  fact("Reason", dead?.reason);
  fact("Submitted", time(job.submittedAt));
  fact("Started", time(job.startedAt));
  fact("Finished", time(job.finishedAt));
  fact("Died", time(dead?.diedAt));
  if (job.startedAt && job.finishedAt) fact("Ran for", duration((Date.parse(job.finishedAt) - Date.parse(job.startedAt)) / 1000));
  const parts = [facts];
  if (job.error ?? dead?.error) parts.push(el("h3", {}, "Error"), el("pre", { tabindex: 0 }, job.error ?? dead.error));
  if (job.result !== null && job.result !== undefined) parts.push(el("h3", {}, "Result"), el("pre", { tabindex: 0 }, JSON.stringify(job.result, null, 2)));
  if (dead?.payload) parts.push(el("h3", {}, "Payload"), el("pre", { tabindex: 0 }, JSON.stringify(dead.payload, null, 2)));
  const before = document.activeElement?.dataset?.act;
  $("job-body").replaceChildren(...parts);
  $("job-buttons").replaceChildren(...acts(job, dead));
  if (before) $("job-buttons").querySelector(`[data-act="${before}"]`)?.focus();
}

const time = (text) => (text ? `${moment(Date.parse(text), now())} (${away(Date.parse(text), now())})` : null);

function acts(job, dead) {
  const path = encodeURIComponent(job.id);
  const act = (name, text, kind, question) => {
    const node = button(
      text,
      async () => {
        await confirm(question);
        await refresh();
      },
      { kind },
    );
    node.dataset.act = name;
    return node;
  };
  if (dead) {
    return [
      act("delete", "Delete", "plain danger-text", {
        title: "Delete this dead job?",
        text: "It is gone for good, with its payload. This cannot be undone.",
        yes: "Delete",
        act: async () => (await call("DELETE", `api/v1/dlq/${path}`), "Deleted"),
      }),
      act("replay", "Replay", "plain", {
        title: "Replay this job?",
        text: "It runs again from its first attempt, under its old id.",
        yes: "Replay",
        danger: false,
        act: async () => replayed(await call("POST", `api/v1/dlq/${path}/replay`)),
      }),
    ];
  }
  if (ENDED.has(job.status)) return [];
  return [
    act("cancel", "Cancel job", "plain danger-text", {
      title: "Cancel this job?",
      text: "If it has not begun, it never will. If it runs, its worker is asked to stop it.",
      yes: "Cancel job",
      act: async () => ((await call("DELETE", `api/v1/jobs/${path}`)).outcome === "cancelled" ? "Cancelled" : "Its worker was asked to stop it"),
    }),
  ];
}

