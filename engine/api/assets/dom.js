// Makes and updates elements. Text only ever goes in as text: nothing here, or elsewhere, parses markup.

const SVG = "http://www.w3.org/2000/svg";

export const $ = (id) => document.getElementById(id);

/** An element with attributes and children; `on` has listeners, strings become text. */
export function el(name, attributes = {}, ...children) {
  return filled(document.createElement(name), attributes, children);
}

/** The same in SVG. */
export function svg(name, attributes = {}, ...children) {
  return filled(document.createElementNS(SVG, name), attributes, children);
}

function filled(node, attributes, children) {
  for (const [key, value] of Object.entries(attributes)) {
    if (key === "on") {
      for (const [kind, listener] of Object.entries(value)) node.addEventListener(kind, listener);
    } else if (value === true) node.setAttribute(key, "");
    else if (value !== false && value !== null && value !== undefined) node.setAttribute(key, value);
  }
  node.append(...children.filter((one) => one !== null && one !== undefined));
  return node;
}

/** Set a text, if it is another one: an equal one would still cost a layout, and end a selection. */
export function say(node, text) {
  const wanted = String(text);
  if (node.textContent !== wanted) node.textContent = wanted;
}

/** Show or hide. */
export function show(node, shown) {
  if (node.hidden === shown) node.hidden = !shown;
}

const made = new WeakMap();

/**
 * Let a parent show these items, one node for each key. `make(item)` gives `{node, update}`. Nodes that stay
 * are kept, so that focus and selection survive each second's update.
 */
export function list(parent, items, keyOf, make) {
  const before = made.get(parent) ?? new Map();
  const now = new Map();
  for (const item of items) {
    const key = keyOf(item);
    if (now.has(key)) continue;
    const entry = before.get(key) ?? make(item);
    entry.update(item);
    now.set(key, entry);
  }
  for (const [key, entry] of before) if (!now.has(key)) entry.node.remove();
  let at = parent.firstChild;
  for (const entry of now.values()) {
    if (entry.node === at) at = at.nextSibling;
    else parent.insertBefore(entry.node, at);
  }
  made.set(parent, now);
}

/** A row of a table: cells by name, of `[name, class]` pairs; the first is its heading. */
export function row(...columns) {
  const cells = {};
  const node = el("tr");
  columns.forEach(([name, kind], at) => {
    cells[name] = at === 0 ? el("th", { scope: "row", class: kind }) : el("td", { class: kind });
    node.append(cells[name]);
  });
  return { node, cells };
}

/** A button that cannot be pressed again while what it began goes on. */
export function button(text, act, { kind = "quiet", label } = {}) {
  const node = el("button", { class: kind, type: "button", "aria-label": label ?? null }, text);
  node.addEventListener("click", async () => {
    if (node.getAttribute("aria-disabled") === "true") return;
    node.setAttribute("aria-disabled", "true");
    try {
      await act();
    } finally {
      node.removeAttribute("aria-disabled");
    }
  });
  return node;
}
