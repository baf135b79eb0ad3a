// Shows the dead letters, grouped by what killed them, and acts on a whole group.

import { call } from "./calls.js";
import { attempt, confirm } from "./dialogs.js";
import { $, button, el, list, row, say, show } from "./dom.js";
import { away, count, number } from "./format.js";
import { linkTo } from "./overview.js";
import { now } from "./time.js";

const keyOf = (group) => JSON.stringify([group.type, group.reason, group.error]);

/** The part `dead`. */
export function showDead({ groups, jobs, more, moreGroups }) {
  say($("dead-note"), jobs ? `${count(jobs, "job")}${more ? ", the newest" : ""}${moreGroups ? `; the ${groups.length} largest groups` : ""}` : "");
  show($("dead-table"), jobs > 0);
  show($("dead-empty"), jobs === 0);
  list($("dead-rows"), groups, keyOf, groupRow);
}

function groupRow(first) {
  const { node, cells } = row(["count", "n"], ["type"], ["error", "error"], ["reason", "wide dim"], ["newest", "n wide dim"], ["acts", "acts"]);
  let group = first;
  const what = first.error || first.reason || "no error";
  const text = el("span", { class: "clamp", title: what });
  const sample = el("a", { class: "id" });
  cells.error.append(text, sample);
  say(text, what);
  say(cells.type, first.type ?? "?");
  say(cells.reason, first.reason ?? "");
  const of = `${first.type ?? "?"}, ${what}`;
  cells.acts.append(
    button("Replay", () => replayGroup(group), { label: `Replay: ${of}` }),
    button("Delete", () => deleteGroup(group), { kind: "quiet danger-text", label: `Delete: ${of}` }),
  );
  const update = (found) => {
    group = found;
    say(cells.count, number(found.count));
    say(cells.newest, found.newest ? away(Date.parse(found.newest), now()) : "");
    linkTo(sample, found.sample);
  };
  return { node, update };
}

/** The group as it is now, with the ids of its jobs: what is confirmed is then exactly what is done. */
async function fresh(group) {
  const found = (await call("GET", "api/v1/dlq/groups")).groups.find((one) => keyOf(one) === keyOf(group));
  if (!found) throw new Error("these jobs are not dead any more");
  return found;
}

const replayGroup = (group) =>
  attempt(async () => {
    const { ids, type } = await fresh(group);
    await confirm({
      title: `Replay ${count(ids.length, "job")} of ${type ?? "unknown type"}?`,
      text: `They died with: ${group.error || group.reason || "no error"}. Each runs again from its first attempt, under its old id. If the cause is still there, they come back here.`,
      yes: `Replay ${count(ids.length, "job")}`,
      danger: false,
      act: async () => replayed(await call("POST", "api/v1/dlq:replay", { ids })),
    });
  });

const deleteGroup = (group) =>
  attempt(async () => {
    const { ids, type } = await fresh(group);
    await confirm({
      title: `Delete ${count(ids.length, "job")} of ${type ?? "unknown type"}?`,
      text: `They died with: ${group.error || group.reason || "no error"}. They are gone for good, with their payloads. This cannot be undone.`,
      yes: `Delete ${count(ids.length, "job")}`,
      act: async () => `${count((await call("POST", "api/v1/dlq:delete", { ids })).deleted, "dead job")} deleted`,
    });
  });

/** What a replay has done, in words. */
export function replayed(done) {
  const rest = [
    [done.missing.length, "not dead any more"],
    [done.damaged.length, "damaged, left where they are"],
    [done.unknown.length, "with no answer"],
  ].filter(([jobs]) => jobs > 0);
  return [`${count(done.replayed, "job")} replayed`, ...rest.map(([jobs, why]) => `${number(jobs)} ${why}`)].join("; ");
}
