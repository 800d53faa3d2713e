// The list of conversations.

import { button, el } from "./elements.js";

export class Sidebar {
  /** `acts`: open(id), drop(id), rename(id, title). */
  constructor(list, acts) {
    this.list = list;
    this.acts = acts;
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
    this.list.replaceChildren(...chats.map((chat) => this.row(chat, chat.id === current, writing.has(chat))));
    document.getElementById("no-chats").hidden = chats.length > 0;
  }

  row(chat, current, writing) {
    const title = chat.title || "New chat";
    const open = el("button", {
      ...{ type: "button", class: "chat", dir: "auto", title },
      "aria-current": current ? "page" : undefined,
      on: { click: () => (this.acts.open(chat.id), this.toggle(false)) },
    });
    open.append(el("span", { text: title }), writing ? el("span", { class: "dot writing", title: "Being written" }) : "");
    const row = el("li", { class: current ? "row current" : "row" }, open);
    row.append(button("edit", `Rename ${title}`, () => this.rename(row, chat), { quiet: true }));
    row.append(button("bin", `Delete ${title}`, () => this.acts.drop(chat.id), { quiet: true }));
    return row;
  }

  rename(row, chat) {
    const input = el("input", { class: "name", value: chat.title, maxlength: "120", "aria-label": "New name" });
    let done = false;
    const end = (keep) => {
      if (done) return;
      done = true;
      this.acts.rename(chat.id, keep && input.value.trim() ? input.value.trim() : chat.title);
    };
    input.addEventListener("keydown", (event) => {
      if (event.key !== "Enter" && event.key !== "Escape") return;
      event.preventDefault();
      event.stopPropagation();
      end(event.key === "Enter");
      this.list.querySelector("[aria-current]")?.focus();
    });
    input.addEventListener("blur", () => end(true));
    row.replaceChildren(input);
    input.focus();
    input.select();
  }
}
