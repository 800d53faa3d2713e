// The page: what is open, what is being written, and what the buttons do.

import { messagesOf, newAnswer, Runs } from "./answers.js";
import { Composer } from "./composer.js";
import { Door, themeButton } from "./doors.js";
import { button, el, icon, notice, say } from "./elements.js";
import { Models } from "./models.js";
import { Settings } from "./settings.js";
import { Sidebar } from "./sidebar.js";
import { allChats, dropChat, isChatName, newChat, saveChat } from "./store.js";
import { Thread } from "./thread.js";

const SAVE_MS = 2000;
const STARTS = ["What is a kinkajou?", "Explain rainbows to a child", "A short poem about the night forest", "Plan a quiet weekend"];

const byId = (id) => document.getElementById(id);
const chats = new Map(allChats().map((chat) => [chat.id, chat]));
let current = newChat();
let full = false;

const door = new Door(entered);
const settings = new Settings(byId("settings-form"), byId("settings"));
const runs = new Runs({ key: () => door.key, more, ended });
const thread = new Thread(byId("scroller"), byId("turns"), { resend, again, keep });
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
  if (chat === current) open("");
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
  if (title !== chat.title) Object.assign(chat, { title: title.slice(0, 120), named: true });
  keepOnDisk(chat);
  refresh();
}

// What is said

/** Puts a turn at `index` in the place of all that follows, and asks for its answers. */
function ask(index, prompt) {
  runs.stop(current);
  const turn = { prompt, answers: models.asked.map(newAnswer) };
  current.turns.splice(index, Infinity, turn);
  if (!current.named && index === 0) current.title = prompt.trim().replace(/\s+/g, " ").slice(0, 60);
  if (!chats.has(current.id)) {
    chats.set(current.id, current);
    history.replaceState(null, "", `#${current.id}`);
  }
  turn.answers.forEach((_, column) => begin(index, column));
  redraw(index - 1);
}

function begin(index, column) {
  const { system, ...sampling } = settings.values();
  const answer = current.turns[index].answers[column];
  runs.start(current, answer, { messages: messagesOf(current, index, column, system), ...sampling });
}

function redraw(from) {
  current.updated = Date.now();
  keepOnDisk(current);
  thread.show(current, Math.max(0, from));
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

function send(prompt) {
  if (hindered()) return false;
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
  if (hindered()) return;
  const { answers } = current.turns[index];
  const { model } = answers[column];
  runs.drop(answers[column]);
  const same = answers.length > 1 && models.names.includes(model);
  answers[column] = newAnswer(same ? model : (models.asked[column] ?? models.asked[0]));
  if (index < current.turns.length - 1) runs.stop(current);
  current.turns.length = index + 1;
  begin(index, column);
  redraw(index);
}

/** Goes on from one of two answers; so it is with the pairs before. */
function keep(index, column) {
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

// Keys, the address, other tabs

document.addEventListener("keydown", (event) => {
  if (event.defaultPrevented || event.ctrlKey || event.metaKey || event.altKey || byId("door").open) return;
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
  const seen = new Map(allChats().map((chat) => [chat.id, chat]));
  for (const [id, chat] of chats) if (!busy.has(chat) && !seen.has(id)) chats.delete(id);
  for (const [id, chat] of seen) if (!busy.has(chats.get(id))) chats.set(id, chat);
  const now = chats.get(current.id);
  if (now && now !== current && JSON.stringify(now) !== JSON.stringify(current)) show(now);
  else {
    if (now) chats.set(current.id, current);
    refresh();
  }
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
