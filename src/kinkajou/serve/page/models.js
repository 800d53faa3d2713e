// Which model answers, or which two.

import { models } from "./api.js";
import { el } from "./elements.js";
import { loadChoice, saveChoice } from "./store.js";

const AGAIN_MS = 3000;

export class Models {
  /** `hooks`: key() -> text, failed(fault), came(). */
  constructor(hooks) {
    this.hooks = hooks;
    this.names = [];
    this.first = document.getElementById("model");
    this.second = document.getElementById("model-b");
    this.switch = document.getElementById("versus");
    this.choice = loadChoice();
    this.waiting = 0;
    for (const select of [this.first, this.second]) select.addEventListener("change", () => this.chosen());
    this.switch.addEventListener("click", () => {
      this.choice.versus = !this.choice.versus;
      this.show();
      this.chosen();
    });
    this.show();
  }

  /** Asks the server; where it cannot be reached, again after a while. */
  async load() {
    clearTimeout(this.waiting);
    try {
      this.names = await models(this.hooks.key());
      this.show();
      this.hooks.came();
    } catch (fault) {
      this.hooks.failed(fault);
      clearTimeout(this.waiting); // of another call meanwhile
      if (fault.kind !== "key") this.waiting = setTimeout(() => this.load(), AGAIN_MS);
    }
  }

  show() {
    const pick = (wanted, other) => (this.names.includes(wanted) ? wanted : (this.names.find((name) => name !== other) ?? this.names[0] ?? ""));
    const one = pick(this.choice.model, "");
    const two = pick(this.choice.other, one);
    fill(this.first, this.names, one);
    fill(this.second, this.names, two);
    this.switch.setAttribute("aria-pressed", String(this.choice.versus));
    document.getElementById("second-model").hidden = !this.choice.versus;
    document.body.classList.toggle("versus", this.choice.versus);
  }

  chosen() {
    if (!this.names.length) return;
    this.choice.model = this.first.value;
    this.choice.other = this.second.value;
    saveChoice(this.choice);
  }

  /** Who answers the next message. */
  get asked() {
    return this.choice.versus ? [this.first.value, this.second.value] : [this.first.value];
  }
}

function fill(select, names, chosen) {
  select.replaceChildren(...(names.length ? names : [""]).map((name) => el("option", { value: name, text: name || "no model" })));
  select.value = chosen;
  select.disabled = !names.length;
  select.title = chosen;
}
