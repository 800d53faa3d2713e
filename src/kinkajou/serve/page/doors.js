// The key of a server that asks for one, and the theme.

import { el } from "./elements.js";
import { loadKey, loadTheme, saveKey, saveTheme } from "./store.js";

export class Door {
  /** `entered()` follows a new key. */
  constructor(entered) {
    this.dialog = document.getElementById("door");
    this.input = this.dialog.querySelector("input");
    this.forget = document.getElementById("forget-key");
    this.dialog.querySelector("form").addEventListener("submit", (event) => {
      event.preventDefault();
      const key = this.input.value.trim();
      if (!/^[\x21-\x7e]+$/.test(key)) return this.refuse("A key has letters, digits and signs only.");
      saveKey(key);
      this.show();
      this.dialog.close();
      return entered();
    });
    document.getElementById("door-later").addEventListener("click", () => this.dialog.close());
    this.forget.addEventListener("click", () => {
      saveKey("");
      this.show();
      this.ask();
    });
    this.show();
  }

  get key() {
    return loadKey();
  }

  show() {
    this.forget.hidden = !this.key;
  }

  refuse(text) {
    this.dialog.querySelector(".wrong").textContent = text;
    this.input.setAttribute("aria-invalid", String(Boolean(text)));
  }

  /** Asks for the key; one that was given already was wrong. */
  ask() {
    if (this.dialog.open) return;
    this.refuse(this.key ? "The server did not take this key." : "");
    this.input.value = "";
    this.dialog.showModal();
    this.input.focus();
  }
}

const THEMES = { "": ["auto", "as the system"], light: ["sun", "light"], dark: ["moon", "dark"] };

/** The button that goes through system, light, dark. */
export function themeButton(node) {
  const show = (name) => {
    if (name) document.documentElement.dataset.theme = name;
    else delete document.documentElement.dataset.theme;
    node.querySelector("use").setAttribute("href", `#i-${THEMES[name][0]}`);
    node.querySelector("span").textContent = `Theme: ${THEMES[name][1]}`;
  };
  const names = Object.keys(THEMES);
  const now = () => (names.includes(loadTheme()) ? loadTheme() : "");
  let current = now();
  node.append(el("span"));
  node.addEventListener("click", () => {
    current = names[(names.indexOf(current) + 1) % names.length];
    saveTheme(current);
    show(current);
  });
  show(current);
}
