// Asks and tells the operator: confirmations, the token, short notes of what was done.

import { $, say, show } from "./dom.js";

/**
 * Ask before something is done; `act` does it when the answer is yes, and the dialog stays open with the
 * reason where that fails. `danger`: it cannot be undone.
 */
export function confirm({ title, text, yes, act, danger = true }) {
  const dialog = $("ask");
  say($("ask-title"), title);
  say($("ask-text"), text);
  say($("ask-yes"), yes);
  $("ask-yes").className = danger ? "danger" : "primary";
  show($("ask-fault"), false);
  return new Promise((resolve) => {
    const over = new AbortController();
    const { signal } = over;
    let busy = false;
    $("ask-no").addEventListener("click", () => dialog.close(), { signal });
    dialog.addEventListener("cancel", (event) => busy && event.preventDefault(), { signal });
    $("ask-yes").addEventListener(
      "click",
      async () => {
        if (busy) return;
        busy = true;
        dialog.setAttribute("aria-busy", "true");
        try {
          const told = await act();
          dialog.close();
          if (told) toast(told);
        } catch (error) {
          say($("ask-fault"), sentence(error));
          show($("ask-fault"), true);
        } finally {
          busy = false;
          dialog.removeAttribute("aria-busy");
        }
      },
      { signal },
    );
    dialog.addEventListener("close", () => (over.abort(), resolve()), { signal });
    dialog.showModal();
    $("ask-no").focus(); // what does no harm is what Enter presses
  });
}

/** Do something at once; a failure is told. */
export async function attempt(act) {
  try {
    const told = await act();
    if (told) toast(told);
  } catch (error) {
    toast(sentence(error), true);
  }
}

let hiding = 0;

/** A short note at the edge. */
export function toast(text, fault = false) {
  const node = $("toast");
  node.dataset.kind = fault ? "fault" : "done";
  say(node, text);
  clearTimeout(hiding);
  hiding = setTimeout(() => say(node, ""), fault ? 12_000 : 5_000);
}

/** What went wrong, as a sentence. */
export function sentence(error) {
  const text = error instanceof TypeError ? "the server cannot be reached" : error.message;
  return text.charAt(0).toUpperCase() + text.slice(1);
}

/** The token that the operator gives. */
export function askToken(refused) {
  const dialog = $("token");
  const input = $("token-value");
  say(
    $("token-text"),
    refused ? "The server does not take this token (any more)." : "This server asks for an access token. It is kept until this tab is closed.",
  );
  return new Promise((resolve) => {
    const over = new AbortController();
    const { signal } = over;
    dialog.addEventListener("cancel", (event) => event.preventDefault(), { signal });
    $("token-form").addEventListener(
      "submit",
      (event) => {
        event.preventDefault();
        const given = input.value.trim();
        if (!given) return;
        input.value = "";
        over.abort();
        dialog.close();
        resolve(given);
      },
      { signal },
    );
    if (!dialog.open) dialog.showModal();
    input.focus();
  });
}
