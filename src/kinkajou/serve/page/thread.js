// The conversation in the middle of the page.

import { el } from "./elements.js";
import { AnswerView, AskedView } from "./turns.js";

const NEAR = 90; // pixels from the end within which the page follows the text

export class Thread {
  /** `acts`: resend(index, text), again(index, column), keep(index, column). */
  constructor(scroller, list, acts) {
    this.scroller = scroller;
    this.list = list;
    this.acts = acts;
    this.views = new Map(); // answer -> AnswerView
    this.asked = [];
    this.follows = true;
    this.jump = document.getElementById("to-end");
    scroller.addEventListener("scroll", () => this.looked(), { passive: true });
    this.jump.addEventListener("click", () => this.toEnd(true));
    new ResizeObserver(() => this.follow()).observe(list);
  }

  /** Draws a conversation from turn `from` on. */
  show(chat, from = 0) {
    while (this.list.children.length > from) this.list.lastChild.remove();
    this.asked.length = Math.min(this.asked.length, from);
    if (from === 0) this.views.clear();
    const kept = new Set(chat.turns.flatMap((turn) => turn.answers));
    for (const answer of this.views.keys()) if (!kept.has(answer)) this.views.delete(answer);
    chat.turns.slice(from).forEach((turn, i) => this.list.append(this.turn(turn, from + i)));
    document.body.classList.toggle("empty", !chat.turns.length);
  }

  turn(turn, index) {
    const asked = new AskedView(turn.prompt, (text) => this.acts.resend(index, text));
    this.asked[index] = asked;
    const pair = turn.answers.length > 1;
    const answers = el("div", { class: pair ? "answers pair" : "answers" });
    turn.answers.forEach((answer, column) => {
      const view = new AnswerView(answer, {
        again: () => this.acts.again(index, column),
        keep: pair ? () => this.acts.keep(index, column) : null,
      });
      this.views.set(answer, view);
      answers.append(view.node);
    });
    return el("li", { class: pair ? "turn wide" : "turn" }, asked.node, answers);
  }

  editLast() {
    this.asked.at(-1)?.edit();
  }

  looked() {
    const { scrollTop, scrollHeight, clientHeight } = this.scroller;
    this.follows = scrollHeight - scrollTop - clientHeight < NEAR;
    this.jump.hidden = this.follows;
  }

  follow() {
    if (this.list.querySelector(".editing")) return;
    if (this.follows) this.scroller.scrollTop = this.scroller.scrollHeight;
    else this.looked();
  }

  toEnd(smooth = false) {
    this.follows = true;
    this.jump.hidden = true;
    const calm = matchMedia("(prefers-reduced-motion: reduce)").matches;
    this.scroller.scrollTo({ top: this.scroller.scrollHeight, behavior: smooth && !calm ? "smooth" : "instant" });
  }
}
