// Where the next message is written.

import { composing } from "./elements.js";

export class Composer {
  /** `acts`: send(text) -> whether it went, stop(), editLast(). */
  constructor(form, acts) {
    this.form = form;
    this.acts = acts;
    this.input = document.getElementById("input");
    this.sendButton = document.getElementById("send");
    this.stopButton = document.getElementById("stop");
    this.writing = false;
    this.filled = "";
    form.addEventListener("submit", (event) => {
      event.preventDefault();
      this.send();
    });
    this.stopButton.addEventListener("click", () => acts.stop());
    this.input.addEventListener("input", () => this.show());
    this.input.addEventListener("keydown", (event) => this.pressed(event));
    this.show();
  }

  pressed(event) {
    if (composing(event)) return;
    if (event.key === "Enter" && !event.shiftKey) {
      event.preventDefault();
      this.send();
    } else if (event.key === "ArrowUp" && !this.input.value && !this.writing) {
      event.preventDefault();
      this.acts.editLast();
    }
  }

  send() {
    const text = this.input.value;
    if (!text.trim() || this.writing || !this.acts.send(text)) return;
    this.input.value = "";
    this.show();
  }

  /** Puts a text in; what somebody typed stays before it. */
  fill(text) {
    const { value } = this.input;
    this.input.value = value.trim() && value !== this.filled ? `${value}\n${text}` : text;
    this.filled = text;
    this.show();
    this.input.focus();
  }

  /** `writing`: an answer to this conversation is coming. */
  set busy(writing) {
    const focused = document.activeElement;
    this.writing = writing;
    this.show();
    if (focused === this.stopButton || focused === this.sendButton) this.input.focus();
  }

  show() {
    this.sendButton.hidden = this.writing;
    this.stopButton.hidden = !this.writing;
    this.sendButton.disabled = !this.input.value.trim();
  }
}
