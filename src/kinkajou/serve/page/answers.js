// Answers that are being written: one stream each, also of conversations that are not looked at.

import { answer as stream } from "./api.js";
import { Fault, told } from "./faults.js";

export const newAnswer = (model) => ({ model, text: "", state: "writing", finish: "", fault: null, tokens: null, first_s: null, rate: null });

/** Whether a model has said something here. Where not, the message is not sent again: templates whose roles alternate refuse two in a row. */
export const heard = (answer) => Boolean(answer.text) || answer.state === "done";

/** What a model has heard and said in `column` before turn `index`, then that turn's prompt. */
export function messagesOf(chat, index, column, system) {
  const said = system ? [{ role: "system", content: system }] : [];
  for (const turn of chat.turns.slice(0, index)) {
    const answer = turn.answers[Math.min(column, turn.answers.length - 1)];
    if (heard(answer)) said.push({ role: "user", content: turn.prompt }, { role: "assistant", content: answer.text });
  }
  return [...said, { role: "user", content: chat.turns[index].prompt }];
}

export class Runs {
  /** `hooks`: key() -> text, more(answer), ended(chat, answer, fault). */
  constructor(hooks) {
    this.hooks = hooks;
    this.live = new Map(); // answer -> {chat, controller}
  }

  of(chat) {
    return [...this.live].filter(([, run]) => run.chat === chat).map(([answer]) => answer);
  }

  chats() {
    return new Set([...this.live.values()].map((run) => run.chat));
  }

  stop(chat) {
    for (const answer of this.of(chat)) this.live.get(answer).controller.abort();
  }

  /** Stops an answer that nobody wants any more. */
  drop(answer) {
    this.live.get(answer)?.controller.abort();
  }

  async start(chat, answer, request) {
    const controller = new AbortController();
    this.live.set(answer, { chat, controller });
    const clock = new Clock();
    let fault = null;
    try {
      const got = await stream({ ...request, model: answer.model }, this.hooks.key(), controller.signal, (piece) => {
        clock.hit();
        answer.text += piece;
        this.hooks.more(answer);
      });
      answer.state = "done";
      answer.finish = got.finish;
      clock.tokens = got.tokens ?? clock.pieces;
    } catch (error) {
      if (controller.signal.aborted) answer.state = "stopped";
      else {
        fault = error instanceof Fault ? error : new Fault("broken", "This page failed while reading the answer.");
        answer.state = "cut";
        answer.fault = told(fault);
        if (fault !== error) console.error(error);
      }
      clock.tokens = clock.pieces || null;
    }
    this.live.delete(answer);
    Object.assign(answer, clock.figures());
    this.hooks.ended(chat, answer, fault);
  }
}

/** Time to the first piece, and tokens a second after it. */
class Clock {
  constructor() {
    this.began = performance.now();
    this.first = null;
    this.last = null;
    this.pieces = 0;
    this.tokens = null;
  }

  hit() {
    this.last = performance.now();
    this.first ??= this.last;
    this.pieces += 1;
  }

  figures() {
    const seconds = (this.last - this.first) / 1000;
    const rate = this.tokens > 1 && seconds > 0 ? (this.tokens - 1) / seconds : null;
    return { tokens: this.tokens, first_s: this.first === null ? null : (this.first - this.began) / 1000, rate };
  }
}
