// Asks the server: with the token where one is needed, and with its problems as errors that say what is wrong.

import { askToken } from "./dialogs.js";

const KEY = "tqe.token";

/** What the server refused, in its own words. */
export class Problem extends Error {
  constructor(status, detail) {
    super(detail);
    this.status = status;
  }
}

export const token = {
  get: () => sessionStorage.getItem(KEY),
  forget: () => sessionStorage.removeItem(KEY),
};

let asking = null;

/** Have the operator give a token; all who need one at that moment wait for the same answer. */
function renewToken(refused) {
  if (token.get() && token.get() !== refused) return Promise.resolve(); // somebody has it already
  asking ??= askToken(Boolean(refused)).then((given) => {
    sessionStorage.setItem(KEY, given);
    asking = null;
  });
  return asking;
}

/** A request that the server has accepted. Raises Problem, or TypeError where there is no connection. */
export async function open(method, path, { body, signal } = {}) {
  for (;;) {
    const used = token.get();
    const headers = { Accept: "application/json" };
    if (used) headers.Authorization = `Bearer ${used}`;
    // JSON, and always said so: no other site can make a browser send that here unasked.
    if (method !== "GET") headers["Content-Type"] = "application/json";
    const answer = await fetch(new URL(path, document.baseURI), {
      method,
      headers,
      body: body === undefined ? null : JSON.stringify(body),
      credentials: "omit",
      cache: "no-store",
      redirect: "error",
      signal: signal ?? null,
    });
    if (answer.status === 401) {
      await answer.body?.cancel();
      await renewToken(used);
      continue;
    }
    if (!answer.ok) throw new Problem(answer.status, await detailOf(answer));
    return answer;
  }
}

/** The same, its JSON. */
export async function call(method, path, body) {
  return (await open(method, path, { body })).json();
}

async function detailOf(answer) {
  try {
    const told = await answer.json();
    return String(told.detail ?? told.title);
  } catch {
    return `the server answered ${answer.status}`;
  }
}
