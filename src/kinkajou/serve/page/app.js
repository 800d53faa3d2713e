// The page: what is open, what is being written, and what the buttons do.

import { messagesOf, newAnswer, Runs } from "./answers.js";
import { Composer } from "./composer.js";
import { Door, themeButton } from "./doors.js";
import { button, composing, el, icon, notice, say } from "./elements.js";
import { Models } from "./models.js";
import { Settings } from "./settings.js";
import { Sidebar } from "./sidebar.js";
import { allChats, dropChat, isChatName, newChat, saveChat, titleIn } from "./store.js";
import { Thread } from "./thread.js";

const SAVE_MS = 2000;
const STALE = new Set(["lost", "cut", "refused"]); // faults after which the server may be gone or have other models
const STARTS = ["What is a kinkajou?", "Explain rainbows to a child", "A short poem about the night forest", "Plan a quiet weekend"];

const byId = (id) => document.getElementById(id);
const chats = new Map(allChats().map((chat) => [chat.id, chat]));
let current = newChat();
let full = false;
let takeBackOffer = () => {};

const door = new Door(entered);
const settings = new Settings(byId("settings-form"), byId("settings"));
const runs = new Runs({ key: () => door.key, more, ended });
const thread = new Thread(byId("scroller"), byId("turns"), { resend, again, keep, closed: caughtUp });
const composer = new Composer(byId("composer"), { send, stop: () => runs.stop(current), editLast: () => thread.editLast() });
const sidebar = new Sidebar(byId("chats"), { open, drop, rename });
const models = new Models({ key: () => door.key, failed, came });

function refresh() {
  const writing = runs.of(current).length > 0;
  if (composer.writing !== writing) composer.busy = writing;
  sidebar.show([...chats.values()].sort((a, b) => b.updated - a.updated), current.id, runs.chats());
  byId("title").textContent = current.title || "New chat";
  document.title = current.title ? `${current.title} – Kinkajou` : "Kinkajou";
}

function keepOnDisk(chat) {
  if (!chats.has(chat.id)) return;
  const kept = saveChat(chat);
  if (!kept && !full) notice("This browser's storage is full or closed: what you say now is lost with this tab. Deleting old conversations makes room.");
  full = !kept;
}

function focusInput() {
  if (!matchMedia("(pointer: coarse)").matches) byId("input").focus({ preventScroll: true });
}

// Conversations

function show(chat) {
  current = chat;
  thread.show(chat);
  thread.toEnd();
  refresh();
}

function open(id, push = true) {
  const chat = chats.get(id) ?? newChat();
  const hash = chats.has(id) ? `#${id}` : "";
  if (push && location.hash !== hash) history.pushState(null, "", hash || location.pathname + location.search);
  show(chat);
  if (push) focusInput();
}

function drop(id) {
  const chat = chats.get(id);
  runs.stop(chat);
  chats.delete(id);
  dropChat(id);
  if (id === current.id) open("");
  else refresh();
  const back = () => {
    chats.set(id, chat);
    keepOnDisk(chat);
    open(id);
  };
  notice("Conversation deleted", { label: "Undo", act: back });
  byId("new-chat").focus();
}

function rename(id, title) {
  const chat = chats.get(id);
  if (!chat || title === chat.title) return; // another tab may have deleted it
  for (const one of new Set([chat, id === current.id ? current : chat])) Object.assign(one, { title: title.slice(0, 120), named: true });
  keepOnDisk(chat);
  refresh();
}

// What is said

/** Puts a turn at `index` in the place of all that follows, and asks for its answers. */
function ask(index, prompt) {
  runs.stop(current);
  takeBackOffer();
  const before = copyOf(current);
  const turn = { prompt, answers: models.asked.map(newAnswer) };
  current.turns.splice(index, Infinity, turn);
  if (!current.named && index === 0) current.title = prompt.trim().replace(/\s+/g, " ").slice(0, 60);
  const kept = chats.get(current.id);
  if (!kept) history.replaceState(null, "", `#${current.id}`);
  else if (kept.named) Object.assign(current, { title: kept.title, named: true }); // the rest of it waited for this edit
  chats.set(current.id, current);
  turn.answers.forEach((_, column) => begin(index, column));
  thread.cut(index);
  redraw(index);
  if (before.turns.length > index + 1) offerBack(current.id, before);
}

const copyOf = ({ title, turns }) => ({ title, turns: turns.map((turn) => ({ ...turn, answers: [...turn.answers] })) });

/** Later turns were replaced by one new answer. */
function offerBack(id, { title, turns }) {
  const back = () => {
    const chat = chats.get(id);
    if (!chat) return;
    runs.stop(chat);
    Object.assign(chat, { turns, title: chat.named ? chat.title : title, updated: Date.now() });
    keepOnDisk(chat);
    open(id);
  };
  takeBackOffer = notice("The messages that followed were removed", { label: "Undo", act: back });
}

function begin(index, column) {
  const { system, ...sampling } = settings.values();
  const answer = current.turns[index].answers[column];
  runs.start(current, answer, { messages: messagesOf(current, index, column, system), ...sampling });
}

function redraw(from) {
  current.updated = Date.now();
  keepOnDisk(current);
  thread.show(current, from);
  thread.toEnd();
  refresh();
  focusInput();
}

/** Why nothing can be sent now; says so. */
function hindered() {
  const wrong = settings.check();
  if (wrong) {
    settings.toggle(true);
    wrong.focus();
    return true;
  }
  if (models.names.length) return false;
  models.load();
  notice("There is no model to ask yet. Your message stays here.");
  return true;
}

/** Whether another tab's changes wait for the end of an edit; says so. */
function behind() {
  const waits = chats.has(current.id) && chats.get(current.id) !== current;
  if (waits) notice("Another tab changed this conversation. First send or cancel your edit.");
  return waits;
}

function send(prompt) {
  if (hindered() || behind()) return false;
  if (current.turns.at(-1)?.answers.length > models.asked.length) {
    notice("First keep one of the two answers.");
    document.querySelector(".turn:last-child .keep")?.focus();
    return false;
  }
  ask(current.turns.length, prompt);
  return true;
}

function resend(index, prompt) {
  if (!hindered()) ask(index, prompt);
}

function again(index, column) {
  if (hindered() || behind()) return;
  takeBackOffer();
  const before = copyOf(current);
  const { answers } = current.turns[index];
  const { model } = answers[column];
  runs.drop(answers[column]);
  const same = answers.length > 1 && models.names.includes(model);
  answers[column] = newAnswer(same ? model : (models.asked[column] ?? models.asked[0]));
  if (index < current.turns.length - 1) runs.stop(current);
  current.turns.length = index + 1;
  begin(index, column);
  redraw(index);
  if (before.turns.length > index + 1) offerBack(current.id, before);
}

/** Goes on from one of two answers; so it is with the pairs before. */
function keep(index, column) {
  if (behind()) return;
  for (const turn of current.turns.slice(0, index + 1)) {
    if (turn.answers.length < 2) continue;
    runs.drop(turn.answers[1 - column]);
    turn.answers = [turn.answers[column]];
  }
  redraw(0);
}

// What comes from the server

function more(answer) {
  thread.views.get(answer)?.more(() => thread.follow());
}

function ended(chat, answer, fault) {
  chat.updated = Date.now();
  keepOnDisk(chat);
  thread.views.get(answer)?.finish(fault?.retry_s);
  refresh();
  if (STALE.has(fault?.kind)) models.load();
  if (chat !== current) return;
  if (answer.fault) say(`${answer.fault.title}. ${answer.fault.detail}`);
  else say(answer.state === "stopped" ? "Stopped" : `${answer.model} says: ${answer.text}`);
  if (fault?.kind === "key") door.ask();
}

function failed(fault) {
  const retry = fault.kind === "key" ? button("key", "Enter the key", () => door.ask()) : "";
  const next = fault.kind === "key" ? "" : " Trying again …";
  const words = `${fault.message}.${next}`;
  const place = byId("status");
  if (place.dataset.words !== words) place.replaceChildren(icon("alert"), el("span", { text: words }), retry);
  place.dataset.words = words;
  place.hidden = false;
  if (fault.kind === "key") door.ask();
}

function came() {
  byId("status").hidden = true;
  byId("status").dataset.words = "";
}

async function entered() {
  await models.load();
  const index = current.turns.length - 1;
  current.turns.at(-1)?.answers.forEach((answer, column) => {
    if (answer.fault?.kind === "key" && models.names.length) again(index, column);
  });
  focusInput();
}

/** Shows what another tab made of the open conversation, but never over a message that is being edited here. */
function caughtUp() {
  const now = chats.get(current.id) ?? current;
  const lost = now !== current && thread.loses(now);
  if (now !== current && !lost) {
    const from = now.turns.findIndex((turn, i) => JSON.stringify(turn) !== JSON.stringify(current.turns[i]));
    current = now;
    takeBackOffer();
    thread.show(now, from < 0 ? now.turns.length : from);
    thread.follow();
  }
  refresh();
  return !lost;
}

// Keys, the address, other tabs

document.addEventListener("keydown", (event) => {
  if (event.defaultPrevented || composing(event) || event.ctrlKey || event.metaKey || event.altKey || byId("door").open) return;
  if (event.key === "/" && !event.target.closest("input, textarea, select")) {
    event.preventDefault();
    byId("input").focus();
  } else if (event.key === "Escape") {
    if (sidebar.open) sidebar.toggle(false);
    else if (settings.open && (byId("settings").contains(event.target) || !composer.writing)) settings.toggle(false);
    else runs.stop(current);
  }
});
addEventListener("popstate", () => open(location.hash.slice(1), false));
addEventListener("storage", (event) => {
  if (!isChatName(event.key)) return;
  const busy = runs.chats();
  const was = chats.get(current.id);
  const seen = new Map(allChats().map((chat) => [chat.id, chat]));
  for (const [id, chat] of chats) if (!busy.has(chat) && !seen.has(id)) chats.delete(id);
  for (const [id, chat] of seen) if (!busy.has(chats.get(id))) chats.set(id, chat);
  for (const chat of busy) Object.assign(chat, titleIn(event, chat.id)); // the rest of it is this tab's
  if (!caughtUp() && was === current) notice("Another tab changed this conversation. You see it when your edit ends.");
});
addEventListener("pagehide", () => runs.chats().forEach(keepOnDisk));
setInterval(() => runs.chats().forEach(keepOnDisk), SAVE_MS);

byId("new-chat").addEventListener("click", () => {
  sidebar.toggle(false);
  open("");
});
byId("settings-open").addEventListener("click", () => settings.toggle());
byId("settings-close").addEventListener("click", () => settings.toggle(false));
themeButton(byId("theme"));
for (const text of STARTS) byId("starts").append(el("button", { type: "button", class: "button start", text, on: { click: () => composer.fill(text) } }));

open(location.hash.slice(1), false);
models.load();
focusInput();
