// How one turn looks: what was asked, and the answer or two answers to it.

import { heard } from "./answers.js";
import { button, composing, copyButton, el, icon, plain } from "./elements.js";
import { Writer } from "./markdown.js";

const UNHEARD = "Without an answer, this message is not sent along with later ones.";

/** One answer; its text may still be coming. `acts`: again(), keep() or null. */
export class AnswerView {
  constructor(answer, acts) {
    this.answer = answer;
    this.acts = acts;
    this.body = el("div", { class: "prose" });
    this.foot = el("div", { class: "foot" });
    this.fault = el("div", { class: "fault", hidden: true });
    const who = el("h2", { class: "who" }, el("span", { class: "dot", "aria-hidden": "true" }), el("span", { text: answer.model || "model" }));
    this.node = el("article", { class: "answer", "aria-label": `Answer of ${answer.model || "the model"}` }, who, this.body, this.fault, this.foot);
    this.writer = new Writer(this.body);
    this.drawn = 0;
    this.frame = 0;
    this.counting = 0;
    this.draw();
    if (answer.state === "writing") this.begin();
    else this.finish();
  }

  begin() {
    this.node.setAttribute("aria-busy", "true");
    this.node.classList.add("writing");
    this.node.classList.toggle("waiting", !this.answer.text);
    this.foot.replaceChildren();
  }

  /** Draws what has come since, at most once a frame; `after` follows. */
  more(after) {
    this.frame ||= requestAnimationFrame(() => {
      this.frame = 0;
      this.draw();
      after();
    });
  }

  draw() {
    const { text } = this.answer;
    if (text.length === this.drawn) return;
    this.node.classList.remove("waiting");
    this.writer.feed(text.slice(this.drawn));
    this.drawn = text.length;
  }

  /** `retry_s`: seconds for which the server asked to be left alone. */
  finish(retry_s = 0) {
    cancelAnimationFrame(this.frame);
    this.draw();
    this.writer.end();
    this.node.removeAttribute("aria-busy");
    this.node.classList.remove("writing", "waiting");
    this.showFault(retry_s);
    const { answer, acts } = this;
    const tools = el("div", { class: "tools", role: "group", "aria-label": "What to do with this answer" });
    if (acts.keep) tools.append(button("check", "Keep this one", acts.keep, { kind: "keep" }));
    if (answer.text) tools.append(copyButton("Copy answer", () => answer.text, { quiet: true }));
    if (!this.fault.querySelector("button")) tools.append(button("again", "Answer again", acts.again, { quiet: true }));
    const unheard = heard(answer) ? "" : el("p", { class: "hint unheard", text: UNHEARD });
    this.foot.replaceChildren(tools, el("p", { class: "stats", text: stats(answer) }), unheard);
  }

  showFault(retry_s) {
    const { fault, state, finish } = this.answer;
    clearInterval(this.counting);
    const [kind, title, detail] = fault
      ? [fault.kind, fault.title, fault.detail]
      : state === "cut"
        ? ["cut", "This answer was cut off", "The page was closed while it was being written, or another tab is still writing it."]
        : state === "done" && finish === "length"
          ? ["note", "The answer ends here because it reached the longest length allowed", ""]
          : ["", "", ""];
    this.fault.hidden = !kind;
    this.fault.replaceChildren();
    this.fault.dataset.kind = kind;
    if (!kind) return;
    const words = el("div", {}, el("strong", { text: title }), detail ? el("p", { text: detail }) : "");
    this.fault.replaceChildren(icon(kind === "note" ? "note" : "alert"), words);
    if (kind !== "note" && kind !== "long") this.fault.append(this.retry(retry_s));
  }

  retry(retry_s) {
    const node = el("button", { type: "button", class: "button strong", on: { click: this.acts.again } });
    const until = performance.now() + retry_s * 1000;
    const tick = () => {
      const left = Math.ceil((until - performance.now()) / 1000);
      node.disabled = left > 0;
      node.textContent = left > 0 ? `Try again in ${left} s` : "Try again";
      if (left <= 0 || !this.node.isConnected) clearInterval(this.counting);
    };
    tick();
    if (retry_s) this.counting = setInterval(tick, 250);
    return node;
  }
}

function stats({ tokens, first_s, rate, state }) {
  const said = [];
  if (state === "stopped") said.push("Stopped");
  if (tokens !== null) said.push(`${tokens} token${tokens === 1 ? "" : "s"}`);
  if (rate !== null) said.push(`${rate < 10 ? rate.toFixed(1) : Math.round(rate)} tokens/s`);
  if (first_s !== null) said.push(`first after ${first_s < 1 ? `${Math.round(first_s * 1000)} ms` : `${first_s.toFixed(1)} s`}`);
  return said.join(" · ");
}

/** What the user said. `acts`: resend(text), which replaces it and all that follows; closed(), after an edit that was given up. */
export class AskedView {
  constructor(prompt, acts) {
    this.prompt = prompt;
    this.acts = acts;
    this.area = null; // while it is edited
    this.node = el("article", { class: "asked", "aria-label": "You" });
    this.show();
  }

  show() {
    const bubble = el("div", { class: "bubble" });
    plain(bubble, this.prompt);
    const tools = el("div", { class: "tools", role: "group", "aria-label": "What to do with your message" });
    tools.append(copyButton("Copy message", () => this.prompt, { quiet: true }), button("edit", "Edit message", () => this.edit(), { quiet: true }));
    this.area = null;
    this.node.classList.remove("editing");
    this.node.replaceChildren(el("h2", { class: "unseen", text: "You" }), bubble, tools);
  }

  edit() {
    if (this.area) return this.area.focus();
    const area = el("textarea", { "aria-label": "Edit your message", rows: "1", dir: "auto" });
    area.value = this.prompt;
    const cancel = () => {
      this.show();
      this.node.querySelector(".tools button:last-child").focus();
      this.acts.closed();
    };
    const send = () => area.value.trim() && this.acts.resend(area.value);
    area.addEventListener("keydown", (event) => {
      if (composing(event)) return;
      if (event.key === "Enter" && !event.shiftKey) {
        event.preventDefault();
        send();
      } else if (event.key === "Escape") {
        event.preventDefault();
        event.stopPropagation();
        cancel();
      }
    });
    const hint = el("p", { class: "hint", text: "What follows this message is replaced." });
    const ends = el("div", { class: "ends" }, hint, button("cross", "Cancel", cancel), button("send", "Send", send, { kind: "strong" }));
    this.area = area;
    this.node.classList.add("editing");
    this.node.replaceChildren(el("h2", { class: "unseen", text: "You" }), area, ends);
    area.focus();
    area.setSelectionRange(area.value.length, area.value.length);
    return this.node.scrollIntoView({ block: "nearest" });
  }
}
