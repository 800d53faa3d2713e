// A model's text as paragraphs, lists, quotes and code: elements and text nodes only, never markup.
// The text comes in pieces. What is finished is not touched again, so a long answer costs as much as it has characters.

import { copyButton, edge, el } from "./elements.js";

const LEAF = 4000; // characters of one paragraph or piece of code; beyond that another is begun
const WAITING = 2000; // characters of an unfinished line that are drawn anew with each piece
const DEEPEST = 6; // levels of lists

const FENCE = /^ {0,3}(`{3,}|~{3,})\s*([\w+#.-]{0,40})[^`]*$/;
const ITEM = /^(\s{0,40})([-*+]|\d{1,9}[.)])[ \t]+(?=\S)/;
const HEADING = /^ {0,3}#{1,6}[ \t]+(?=\S)/;
const QUOTE = /^ {0,3}> ?/;
const RULE = /^ {0,3}([-*_])[ \t]*(?:\1[ \t]*){2,}$/;

export class Writer {
  constructor(root) {
    this.root = root;
    this.rest = ""; // an unfinished line
    this.midline = false; // the beginning of the line at hand is finished already
    this.code = null; // {mark, body, node, pieces}
    this.lists = []; // [{indent, list, item}]
    this.leaf = null; // {node, raw, kind}
    this.gap = false;
    this.added = null; // what a draft of the unfinished line added
    this.kept = null;
  }

  /** Draws the next piece. */
  feed(piece) {
    this.undo();
    const text = this.rest + piece;
    let from = 0;
    for (let end = text.indexOf("\n"); end >= 0; end = text.indexOf("\n", from)) {
      this.line(text.slice(from, end).replace(/\r$/, ""));
      this.midline = false;
      from = end + 1;
    }
    while (text.length - from > WAITING) {
      const to = edge(text, from + WAITING);
      this.line(text.slice(from, to));
      this.midline = true;
      from = to;
    }
    this.rest = text.slice(from);
    if (this.rest) this.draft();
    this.settle();
  }

  /** The text is complete. */
  end() {
    this.undo();
    if (this.rest) this.line(this.rest);
    this.rest = "";
    this.settle();
  }

  draft() {
    const { code, lists, leaf, gap, midline } = this;
    this.kept = { code, lists: [...lists], leaf, gap, midline, raw: leaf?.raw, node: code?.node, data: code?.node.data, pieces: code?.pieces.length };
    this.kept.items = lists.map((level) => level.item);
    this.added = [];
    this.line(this.rest);
  }

  undo() {
    if (!this.added) return;
    for (const node of this.added.reverse()) node.remove();
    const { code, lists, leaf, gap, midline, raw, node, data, pieces, items } = this.kept;
    Object.assign(this, { code, lists, leaf, gap, midline, added: null, kept: null });
    lists.forEach((level, i) => (level.item = items[i]));
    if (leaf) {
      leaf.raw = raw;
      leaf.stale = true;
    }
    if (code) {
      code.node = node;
      code.node.data = data;
      code.pieces.length = pieces;
    }
  }

  put(parent, node) {
    this.added?.push(node);
    parent.append(node);
    return node;
  }

  line(text) {
    if (this.code) return this.codeLine(text);
    if (this.midline) return this.more(text, "");
    const fence = FENCE.exec(text);
    if (fence) return this.openCode(fence[1], fence[2]);
    if (!text.trim()) {
      this.settle();
      this.leaf = null;
      this.gap = true;
      return undefined;
    }
    const quote = QUOTE.exec(text);
    if (quote) return this.quoteLine(text.slice(quote[0].length));
    if (text.length < 100 && RULE.test(text)) {
      this.close();
      return this.put(this.root, el("hr"));
    }
    const heading = HEADING.exec(text);
    if (heading) {
      this.close();
      this.begin(this.put(this.root, el("p", { class: "heading", dir: "auto" })), "heading");
      return this.more(text.slice(heading[0].length), "");
    }
    const item = ITEM.exec(text);
    if (item) return this.itemLine(item, text.slice(item[0].length));
    const inside = this.lists.length && (!this.gap || /^\s{2,}/.test(text));
    if (this.leaf && this.leaf.kind !== "heading" && this.leaf.kind !== "quote") return this.more(text.trimStart(), "\n");
    if (inside) {
      this.begin(this.put(this.lists.at(-1).item, el("p", { dir: "auto" })), "item");
      this.gap = false;
      return this.more(text.trimStart(), "");
    }
    this.close();
    this.begin(this.put(this.root, el("p", { dir: "auto" })), "paragraph");
    return this.more(text, "");
  }

  close() {
    this.settle();
    this.leaf = null;
    this.lists = [];
    this.gap = false;
  }

  begin(node, kind) {
    this.settle();
    this.leaf = { node, raw: "", kind, stale: false };
  }

  /** Adds to the paragraph at hand. */
  more(text, glue) {
    this.leaf ??= { node: this.put(this.root, el("p", { dir: "auto" })), raw: "", kind: "paragraph", stale: false };
    let left = glue + text;
    while (this.leaf.raw.length + left.length > LEAF) {
      const to = edge(left, Math.max(0, LEAF - this.leaf.raw.length));
      this.leaf.raw += left.slice(0, to);
      this.leaf.stale = true;
      left = left.slice(to);
      const { node, kind } = this.leaf;
      this.begin(this.put(node.parentNode, el("p", { class: "more", dir: "auto" })), kind);
    }
    this.leaf.raw += left;
    this.leaf.stale = true;
  }

  /** Draws the paragraph at hand if it has changed. */
  settle() {
    if (!this.leaf?.stale) return;
    this.leaf.stale = false;
    this.leaf.node.replaceChildren(...inline(this.leaf.raw));
  }

  quoteLine(text) {
    if (this.leaf?.kind !== "quote") {
      this.close();
      const quote = this.put(this.root, el("blockquote"));
      this.begin(this.put(quote, el("p", { dir: "auto" })), "quote");
      return this.more(text, "");
    }
    return this.more(text, "\n");
  }

  itemLine([, space, mark], text) {
    const indent = space.replaceAll("\t", "    ").length;
    this.settle();
    while (this.lists.length > 1 && indent < this.lists.at(-1).indent) this.lists.pop();
    const tag = /\d/.test(mark) ? "ol" : "ul";
    let level = this.lists.at(-1);
    if (level && indent >= level.indent + 2 && this.lists.length < DEEPEST) level = this.openList(level.item, tag, indent, mark);
    else if (!level || (level.list.localName !== tag && this.lists.length === 1)) {
      this.close();
      level = this.openList(this.root, tag, indent, mark);
    }
    level.item = this.put(level.list, el("li", { dir: "auto" }));
    this.begin(this.put(level.item, el("p", { dir: "auto" })), "item");
    this.gap = false;
    this.more(text, "");
  }

  openList(parent, tag, indent, mark) {
    const start = tag === "ol" ? Number.parseInt(mark, 10) : 1;
    const level = { indent, list: this.put(parent, el(tag, { start: start === 1 ? undefined : String(start) })), item: null };
    this.lists = [...this.lists, level];
    return level;
  }

  openCode(mark, language) {
    this.settle();
    const parent = this.lists.length && !this.gap ? this.lists.at(-1).item : this.root;
    if (parent === this.root) this.close();
    this.leaf = null;
    const pieces = [];
    const name = el("span", { text: language || "text" });
    const head = el("div", { class: "code-head" }, name, copyButton("Copy code", () => pieces.join(""), { quiet: true }));
    const body = el("code");
    const pre = el("pre", { tabindex: "0", dir: "ltr", "aria-label": "Code", role: "group" }, body);
    this.put(parent, el("div", { class: "code" }, head, pre));
    this.code = { mark, body, pieces, node: null };
    this.codePiece();
  }

  codePiece() {
    const node = document.createTextNode("");
    this.put(this.code.body, el("span", {}, node));
    this.code.node = node;
  }

  codeLine(text) {
    const { mark, pieces } = this.code;
    const bare = text.trim();
    if (!this.midline && bare.length >= mark.length && bare === mark[0].repeat(bare.length)) {
      this.code = null;
      this.gap = false;
      return;
    }
    const glue = this.midline || !pieces.length ? "" : "\n";
    pieces.push(glue + text);
    if (this.code.node.data.length + text.length > LEAF) this.codePiece();
    this.code.node.appendData(this.code.node.data ? glue + text : text);
  }
}

/** The whole of a text. */
export function write(root, text) {
  const writer = new Writer(root);
  writer.feed(text);
  writer.end();
}

const STYLES = { "**": "strong", __: "strong", "~~": "del", "*": "em", _: "em" };

/** Nodes of one paragraph: `code`, **bold**, *italics*, ~~struck~~. Each mark is looked for once: linear. */
export function inline(text, depth = 0) {
  const nodes = [];
  const absent = new Set();
  let seen = 0;
  const flush = (to) => {
    if (to > seen) nodes.push(document.createTextNode(text.slice(seen, to)));
  };
  const marks = /[\\`*_~]/g;
  for (let hit = marks.exec(text); hit; hit = marks.exec(text)) {
    const at = hit.index;
    const found = spanAt(text, at, absent);
    if (!found) continue;
    flush(found.escape ? at : at);
    if (found.tag === "code") nodes.push(el("code", { dir: "ltr", text: found.inner }));
    else if (found.escape) nodes.push(document.createTextNode(found.inner));
    else nodes.push(el(found.tag, {}, ...(depth < 3 ? inline(found.inner, depth + 1) : [found.inner])));
    seen = found.to;
    marks.lastIndex = Math.max(found.to, at + 1);
  }
  flush(text.length);
  return nodes;
}

function spanAt(text, at, absent) {
  const sign = text[at];
  if (sign === "\\") {
    return /[\\`*_~#>.!()[\]{}+-]/.test(text[at + 1] ?? "") ? { escape: true, inner: text[at + 1], to: at + 2 } : null;
  }
  let length = 1;
  while (text[at + length] === sign && length < 4) length += 1;
  if (sign === "`") return codeAt(text, at, length, absent);
  const mark = text.slice(at, at + Math.min(length, 2));
  return STYLES[mark] ? styledAt(text, at, mark, absent) : null;
}

function codeAt(text, at, length, absent) {
  const mark = "`".repeat(length);
  if (absent.has(mark)) return null;
  const end = text.indexOf(mark, at + length);
  if (end < 0) absent.add(mark);
  return end > at + length ? { tag: "code", inner: text.slice(at + length, end).trim(), to: end + length } : null;
}

function styledAt(text, at, mark, absent) {
  const from = at + mark.length;
  const word = /[\p{L}\p{N}]/u;
  if (absent.has(mark) || !/\S/.test(text[from] ?? " ")) return null;
  if (mark[0] === "_" && word.test(text[at - 1] ?? " ")) return null;
  let end = text.indexOf(mark, from);
  if (end < 0) absent.add(mark);
  if (end <= from || !/\S/.test(text[end - 1])) return null;
  if (mark.length === 2 && text[end + 2] === mark[0]) end += 1;
  if (mark[0] === "_" && word.test(text[end + mark.length] ?? " ")) return null;
  return { tag: STYLES[mark], inner: text.slice(from, end), to: end + mark.length };
}
