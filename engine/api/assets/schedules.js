// Shows the schedules: when each comes next, what it submitted last; pauses and resumes them.

import { call } from "./calls.js";
import { attempt, confirm } from "./dialogs.js";
import { $, button, el, list, row, say, show } from "./dom.js";
import { away, count, duration, moment } from "./format.js";
import { linkTo } from "./overview.js";
import { now } from "./time.js";

/** The part `cron`. */
export function showSchedules({ schedules, more, damaged }) {
  const notes = [];
  if (more) notes.push(`${more} more`);
  if (damaged.length) notes.push(`${count(damaged.length, "schedule")} cannot be read: ${damaged.slice(0, 3).join(", ")}`);
  say($("schedules-note"), notes.join("; "));
  show($("schedules-table"), schedules.length > 0);
  show($("schedules-empty"), schedules.length === 0);
  list($("schedules-rows"), schedules, (one) => one.name, scheduleRow);
}

function scheduleRow({ name }) {
  const { node, cells } = row(["name"], ["when"], ["type", "wide"], ["next", "n"], ["last", "wide"], ["acts", "acts"]);
  const flag = el("span", { class: "flag" }, "paused");
  cells.name.append(name, " ", flag);
  const last = el("a", { class: "id" });
  cells.last.append(last);
  let paused = false;
  const toggle = button("", () => (paused ? resume(name) : pause(name)));
  cells.acts.append(toggle);
  const update = (one) => {
    paused = one.paused;
    show(flag, paused);
    say(cells.when, when(one));
    say(cells.type, one.type);
    say(cells.next, one.next ? `${moment(Date.parse(one.next), now())}, ${away(Date.parse(one.next), now())}` : "–");
    linkTo(last, one.lastJob);
    say(toggle, paused ? "Resume" : "Pause");
    toggle.setAttribute("aria-label", `${paused ? "Resume" : "Pause"} schedule ${name}`);
  };
  return { node, update };
}

function when({ expression, every, tz, jitter }) {
  const text = every ? `every ${duration(every)}` : `${expression} ${tz}`;
  return jitter ? `${text}, within ${duration(jitter)}` : text;
}

const verb = (name, what) => call("POST", `api/v1/cron/${encodeURIComponent(name)}/${what}`);

const pause = (name) =>
  confirm({
    title: `Pause schedule ${name}?`,
    text: "It submits nothing until it is resumed. Slots of the pause are not made up for; jobs that it has submitted go on.",
    yes: "Pause",
    danger: false,
    act: async () => (await verb(name, "pause"), `Schedule ${name} is paused`),
  });

const resume = (name) => attempt(async () => (await verb(name, "resume"), `Schedule ${name} runs`));
