// The conversation in the middle of the page.

import { arrange, el } from "./elements.js";
import { AnswerView, AskedView } from "./turns.js";

const NEAR = 90; // pixels from the end within which the page follows the text

export class Thread {
  /** `acts`: resend(index, text), again(index, column), keep(index, column), closed(). */
  constructor(scroller, list, acts) {
    this.scroller = scroller;
    this.list = list;
    this.acts = acts;
    this.views = new Map(); // answer -> AnswerView
    this.asked = [];
    this.shown = ""; // id of the conversation
    this.follows = true;
    this.jump = document.getElementById("to-end");
    scroller.addEventListener("scroll", () => this.looked(), { passive: true });
    this.jump.addEventListener("click", () => this.toEnd(true));
    new ResizeObserver(() => this.follow()).observe(list);
  }

  /** Draws a conversation from turn `from` on. A message that is being edited stays as it is; only its answers are drawn. */
  show(chat, from = 0) {
    const open = chat.id === this.shown ? this.asked.map((asked, index) => (this.edits(index, chat) ? asked : null)) : [];
    this.shown = chat.id;
    this.asked.length = Math.min(this.asked.length, from);
    if (from === 0) this.views.clear();
    const kept = new Set(chat.turns.flatMap((turn) => turn.answers));
    for (const answer of this.views.keys()) if (!kept.has(answer)) this.views.delete(answer);
    const turns = chat.turns.slice(from).map((turn, i) => this.turn(turn, from + i, open[from + i]));
    arrange(this.list, [...[...this.list.children].slice(0, from), ...turns]);
    document.body.classList.toggle("empty", !chat.turns.length);
  }

  /** Whether the message of turn `index`, as it is in `chat`, is being edited. */
  edits(index, chat) {
    return Boolean(this.asked[index]?.area) && chat.turns[index]?.prompt === this.asked[index].prompt;
  }

  /** Whether a message is being edited that `chat` has not. */
  loses(chat) {
    return this.asked.some((asked, index) => asked.area && !this.edits(index, chat));
  }

  /** Turns from `index` on are no longer those that are shown. */
  cut(index) {
    this.asked.length = Math.min(this.asked.length, index);
  }

  turn(turn, index, open) {
    const asked = open ?? new AskedView(turn.prompt, { resend: (text) => this.acts.resend(index, text), closed: () => this.acts.closed() });
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
    const node = open ? this.list.children[index] : el("li", {}, asked.node, "");
    node.className = pair ? "turn wide" : "turn";
    node.lastChild.replaceWith(answers);
    return node;
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
