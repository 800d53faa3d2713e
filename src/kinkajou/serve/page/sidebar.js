// The list of conversations.

import { arrange, button, composing, el } from "./elements.js";

export class Sidebar {
  /** `acts`: open(id), drop(id), rename(id, title). */
  constructor(list, acts) {
    this.list = list;
    this.acts = acts;
    this.rows = new Map(); // id -> Row
    this.node = document.getElementById("sidebar");
    this.opener = document.getElementById("sidebar-open");
    this.narrow = matchMedia("(max-width: 860px)");
    this.narrow.addEventListener("change", () => this.toggle(false));
    this.opener.addEventListener("click", () => this.toggle(true));
    for (const id of ["sidebar-close", "veil"]) document.getElementById(id).addEventListener("click", () => this.toggle(false));
    this.toggle(false);
  }

  get open() {
    return this.narrow.matches && document.body.classList.contains("with-sidebar");
  }

  /** On a narrow page the list comes over the conversation; on a wide one it is always there. */
  toggle(open) {
    const was = this.open;
    document.body.classList.toggle("with-sidebar", open && this.narrow.matches);
    this.node.inert = this.narrow.matches && !open;
    document.getElementById("main").inert = this.open;
    this.opener.setAttribute("aria-expanded", String(this.open));
    if (this.open) document.getElementById("sidebar-close").focus();
    else if (was) this.opener.focus();
  }

  show(chats, current, writing) {
    const rows = new Map(chats.map((chat) => [chat.id, this.rows.get(chat.id) ?? this.row(chat.id)]));
    this.rows = rows;
    for (const chat of chats) rows.get(chat.id).show(chat.title, chat.id === current, writing.has(chat));
    arrange(this.list, [...rows.values()].map((row) => row.node));
    document.getElementById("no-chats").hidden = chats.length > 0;
  }

  row(id) {
    return new Row({
      open: () => (this.acts.open(id), this.toggle(false)),
      drop: () => this.acts.drop(id),
      rename: (title) => this.acts.rename(id, title),
    });
  }
}

/** One conversation. Its nodes stay the same, so that neither focus nor a name that is being typed is lost. */
class Row {
  constructor(acts) {
    this.acts = acts;
    this.title = "";
    this.label = el("span");
    this.dot = el("span", { class: "dot writing", title: "Being written" });
    this.chat = el("button", { type: "button", class: "chat", dir: "auto", on: { click: acts.open } }, this.label, this.dot);
    this.edit = button("edit", "Rename", () => this.rename(), { quiet: true });
    this.bin = button("bin", "Delete", acts.drop, { quiet: true });
    this.node = el("li", { class: "row" }, this.chat, this.edit, this.bin);
  }

  show(title, current, writing) {
    this.title = title;
    const name = title || "New chat";
    this.node.classList.toggle("current", current);
    if (current) this.chat.setAttribute("aria-current", "page");
    else this.chat.removeAttribute("aria-current");
    this.dot.hidden = !writing;
    if (this.chat.title === name) return;
    this.label.textContent = this.chat.title = name;
    for (const [node, what] of [[this.edit, "Rename"], [this.bin, "Delete"]]) {
      node.title = `${what} ${name}`;
      node.setAttribute("aria-label", node.title);
    }
  }

  rename() {
    const input = el("input", { class: "name", value: this.title, maxlength: "120", "aria-label": "New name" });
    let done = false;
    const end = (keep) => {
      if (done) return;
      done = true;
      this.node.replaceChildren(this.chat, this.edit, this.bin);
      const title = input.value.trim();
      if (keep && title) this.acts.rename(title);
    };
    input.addEventListener("keydown", (event) => {
      if (composing(event) || (event.key !== "Enter" && event.key !== "Escape")) return;
      event.preventDefault();
      event.stopPropagation();
      end(event.key === "Enter");
      this.chat.focus();
    });
    input.addEventListener("blur", () => end(true));
    this.node.replaceChildren(input);
    input.focus();
    input.select();
  }
}
