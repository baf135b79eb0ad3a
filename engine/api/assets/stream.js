// Keeps the stream of server-sent events open. Read by fetch: an EventSource cannot send a token.

import { open } from "./calls.js";

const SILENCE_MS = 12_000; // the server says something every five seconds, if only that it lives
const RETRY_FIRST_MS = 500;
const RETRY_MOST_MS = 5_000;
const HIDDEN_MS = 60_000; // a page that nobody sees stops asking after that

/**
 * `heard(name, data)` gets each event, `changed(state, why)` how the connection is: "live", "waiting" (for the
 * first answer), "lost" (and tried again by itself), "paused" (the page is hidden).
 */
export function follow(heard, changed) {
  let stop = new AbortController();
  let hiding = 0;

  const wait = (ms) =>
    new Promise((resolve) => {
      const timer = setTimeout(resolve, ms);
      stop.signal.addEventListener("abort", () => (clearTimeout(timer), resolve()), { once: true });
    });

  async function run() {
    let delay = RETRY_FIRST_MS;
    for (;;) {
      if (document.hidden && stop.signal.aborted) {
        changed("paused");
        await new Promise((resolve) => document.addEventListener("visibilitychange", resolve, { once: true }));
      }
      stop = new AbortController();
      changed("waiting");
      try {
        await read(stop, (name, data) => {
          delay = RETRY_FIRST_MS;
          changed("live");
          heard(name, data);
        });
        changed("lost", "the server has ended the stream");
      } catch (error) {
        changed("lost", error instanceof TypeError || error.name === "AbortError" ? "the server cannot be reached" : error.message);
      }
      if (stop.signal.aborted && document.hidden) continue;
      stop = new AbortController();
      await wait(delay * (0.7 + 0.6 * Math.random())); // viewers must not all come back at once
      delay = Math.min(2 * delay, RETRY_MOST_MS);
    }
  }

  document.addEventListener("visibilitychange", () => {
    clearTimeout(hiding);
    if (document.hidden) hiding = setTimeout(() => stop.abort(), HIDDEN_MS);
  });
  run();
}

async function read(stop, heard) {
  const answer = await open("GET", "api/v1/events", { signal: stop.signal });
  const reader = answer.body.pipeThrough(new TextDecoderStream()).getReader();
  let silence = 0;
  let rest = "";
  const heardSomething = () => {
    clearTimeout(silence);
    silence = setTimeout(() => stop.abort(), SILENCE_MS);
  };
  try {
    for (;;) {
      heardSomething();
      const { value, done } = await reader.read();
      if (done) return;
      const pieces = (rest + value).split("\n\n");
      rest = pieces.pop();
      for (const piece of pieces) {
        const found = /^event: (\w+)\ndata: (.*)$/s.exec(piece);
        if (found) heard(found[1], JSON.parse(found[2]));
      }
    }
  } finally {
    clearTimeout(silence);
    reader.cancel().catch(() => {});
  }
}
