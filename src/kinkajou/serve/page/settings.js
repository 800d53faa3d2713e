// Sampling settings: the drawer at the right. An empty field leaves the choice to the server.

import { el } from "./elements.js";
import { loadSettings, saveSettings } from "./store.js";

// name: [label, hint, least, most, step, whole]
const NUMBERS = {
  temperature: ["Temperature", "0 always takes the likeliest token; higher is more varied", 0, 2, 0.05, false],
  top_p: ["Top p", "Only the likeliest tokens that make up this share", 0.01, 1, 0.05, false],
  top_k: ["Top k", "Only so many of the likeliest tokens; 0: all", 0, 100_000, 1, true],
  max_tokens: ["Longest answer", "In tokens", 1, 1_000_000, 1, true],
  seed: ["Seed", "The same seed gives the same answer", 0, 2 ** 31 - 1, 1, true],
};
const MOST_STOPS = 4;

export class Settings {
  constructor(form, drawer) {
    this.form = form;
    this.drawer = drawer;
    const place = form.querySelector("#numbers");
    for (const [name, row] of Object.entries(NUMBERS)) place.append(numberField(name, ...row));
    this.fill(loadSettings());
    form.addEventListener("input", () => this.changed());
    form.addEventListener("submit", (event) => event.preventDefault());
    form.querySelector("#settings-reset").addEventListener("click", () => {
      this.fill({});
      this.changed();
    });
    this.check();
  }

  field(name) {
    return this.form.elements.namedItem(name);
  }

  fill(values) {
    for (const name of Object.keys(NUMBERS)) this.field(name).value = Number.isFinite(values[name]) ? String(values[name]) : "";
    this.field("system").value = typeof values.system === "string" ? values.system : "";
    this.field("stop").value = Array.isArray(values.stop) ? values.stop.filter((text) => typeof text === "string").join("\n") : "";
  }

  changed() {
    this.check();
    saveSettings(this.values());
  }

  /** Marks the fields that cannot be sent; gives the first one. */
  check() {
    let first = null;
    for (const name of [...Object.keys(NUMBERS), "stop"]) {
      const field = this.field(name);
      const wrong = this.wrongWith(name, field);
      field.setAttribute("aria-invalid", String(Boolean(wrong)));
      this.form.querySelector(`#wrong-${name}`).textContent = wrong;
      if (wrong) first ??= field;
    }
    const set = Object.keys(this.values()).length;
    document.getElementById("settings-count").textContent = set ? String(set) : "";
    document.getElementById("settings-open").setAttribute("aria-label", set ? `Settings, ${set} set` : "Settings");
    return first;
  }

  wrongWith(name, field) {
    if (name === "stop") return this.stops().length > MOST_STOPS ? `At most ${MOST_STOPS} stop texts.` : "";
    const [, , least, most, , whole] = NUMBERS[name];
    if (field.validity.badInput) return "This is not a number.";
    if (field.value === "") return "";
    const value = Number(field.value);
    if (!(value >= least && value <= most)) return `From ${least} to ${most}.`;
    return whole && !Number.isInteger(value) ? "A whole number." : "";
  }

  stops() {
    return this.field("stop").value.split("\n").filter(Boolean);
  }

  /** What was set: names of NUMBERS, system, stop. */
  values() {
    const found = {};
    for (const name of Object.keys(NUMBERS)) {
      const { value } = this.field(name);
      if (value !== "" && Number.isFinite(Number(value))) found[name] = Number(value);
    }
    if (this.field("system").value.trim()) found.system = this.field("system").value;
    if (this.stops().length) found.stop = this.stops();
    return found;
  }

  get open() {
    return !this.drawer.hidden;
  }

  toggle(open = !this.open) {
    const before = this.open;
    this.drawer.hidden = !open;
    document.body.classList.toggle("with-settings", open);
    const opener = document.getElementById("settings-open");
    opener.setAttribute("aria-expanded", String(open));
    if (open && !before) this.drawer.querySelector("textarea, input").focus();
    if (!open && before) opener.focus();
  }
}

function numberField(name, label, hint, least, most, step) {
  const input = el("input", {
    ...{ id: `set-${name}`, name, type: "number", min: String(least), max: String(most), step: String(step) },
    ...{ placeholder: "default", inputmode: step < 1 ? "decimal" : "numeric", autocomplete: "off" },
    "aria-describedby": `hint-${name} wrong-${name}`,
  });
  const words = el("div", {}, el("label", { for: `set-${name}`, text: label }), el("p", { class: "hint", id: `hint-${name}`, text: hint }));
  return el("div", { class: "field" }, words, input, el("p", { class: "wrong", id: `wrong-${name}`, role: "status" }));
}
