// Building blocks of the page. Text goes in as text, never as markup.

const SVG = "http://www.w3.org/2000/svg";

/** An element; `props` are attributes, besides `text` and `on` ({event: handler}). */
export function el(tag, props = {}, ...children) {
  const node = document.createElement(tag);
  for (const [name, value] of Object.entries(props)) {
    if (value === undefined || value === null || value === false) continue;
    if (name === "text") node.textContent = value;
    else if (name === "on") for (const [event, handler] of Object.entries(value)) node.addEventListener(event, handler);
    else node.setAttribute(name, value === true ? "" : value);
  }
  node.append(...children);
  return node;
}

/** One of the drawings in index.html. */
export function icon(name) {
  const svg = document.createElementNS(SVG, "svg");
  svg.setAttribute("class", "icon");
  svg.setAttribute("aria-hidden", "true");
  const use = document.createElementNS(SVG, "use");
  use.setAttribute("href", `#i-${name}`);
  svg.append(use);
  return svg;
}

/** A button with a drawing and a label; `quiet` shows the drawing alone. */
export function button(name, label, act, { quiet = false, kind = "" } = {}) {
  const node = el("button", { type: "button", class: `button ${kind}`.trim(), on: { click: act } }, icon(name));
  if (quiet) {
    node.setAttribute("aria-label", label);
    node.title = label;
    node.classList.add("quiet");
  } else {
    node.append(el("span", { text: label }));
  }
  return node;
}

/** A button that copies what `text()` gives, and says that it did. */
export function copyButton(label, text, options) {
  const node = button("copy", label, async () => {
    const done = await copied(text());
    say(done ? "Copied" : "The browser did not let this page copy");
    if (!done) return;
    node.querySelector("use").setAttribute("href", "#i-check");
    setTimeout(() => node.querySelector("use").setAttribute("href", "#i-copy"), 1500);
  }, options);
  return node;
}

async function copied(text) {
  if (navigator.clipboard) {
    try {
      await navigator.clipboard.writeText(text);
      return true;
    } catch {
      // Not allowed here: the older way is tried.
    }
  }
  const focused = document.activeElement;
  const area = el("textarea", { class: "unseen", "aria-hidden": "true" });
  area.value = text;
  document.body.append(area);
  area.select();
  const done = document.execCommand("copy");
  area.remove();
  focused?.focus();
  return done;
}

/** Read out by screen readers, politely. */
export function say(text) {
  const place = document.getElementById("spoken");
  place.textContent = "";
  requestAnimationFrame(() => (place.textContent = text.slice(0, 3000)));
}

/** Makes `nodes` the children of `parent`. The one with the focus is never moved, since moving takes it away. */
export function arrange(parent, nodes) {
  const wanted = new Set(nodes);
  for (const child of [...parent.children]) if (!wanted.has(child)) child.remove();
  const still = [...parent.children].find((child) => child.contains(document.activeElement));
  let at = parent.firstChild;
  for (const node of nodes) {
    while (node === still && at !== still) {
      const later = at;
      at = at.nextSibling;
      parent.append(later);
    }
    if (node === at) at = at.nextSibling;
    else parent.insertBefore(node, at);
  }
}

/** Whether an input method takes this key (Safari tells it by the code alone). */
export const composing = (event) => event.isComposing || event.keyCode === 229;

let hiding = 0;

/** A line at the bottom that goes away by itself, but not while its button has the focus; `act` undoes what it tells. Gives what closes it. */
export function notice(text, { label = "", act = null } = {}) {
  const place = document.getElementById("notice");
  clearTimeout(hiding);
  const close = () => {
    place.replaceChildren();
    place.hidden = true;
  };
  const words = el("span", { text });
  place.replaceChildren(words);
  if (act) place.append(el("button", { type: "button", class: "button link", text: label, on: { click: () => (close(), act()) } }));
  place.hidden = false;
  const ms = act ? 10_000 : 6_000;
  const over = () => (place.contains(document.activeElement) ? (hiding = setTimeout(over, ms)) : close());
  hiding = setTimeout(over, ms);
  return () => words.isConnected && close();
}

/** Text as it is, cut into pieces so that one enormous paragraph cannot stop the page. */
export function plain(root, text) {
  for (let from = 0; from < text.length || from === 0; ) {
    const to = edge(text, from + 4000);
    root.append(el("p", { class: from ? "more" : undefined, dir: "auto", text: text.slice(from, to) }));
    if (to >= text.length) return;
    from = to;
  }
}

/** The nearest place at or after `at` that cuts no surrogate pair. */
export function edge(text, at) {
  if (at >= text.length) return text.length;
  const code = text.charCodeAt(at);
  return code >= 0xdc00 && code <= 0xdfff ? at + 1 : at;
}
