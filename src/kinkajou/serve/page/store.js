// What the browser keeps: conversations, settings and theme for good, the key for this tab.
// Anything may be found there (an older page, another program, a user's hand), so all of it is checked when read.

import { isKind } from "./faults.js";

const CHAT = "kinkajou.chat.";
const SETTINGS = "kinkajou.settings";
const STATES = new Set(["done", "stopped", "cut"]);

function read(storage, name) {
  try {
    return storage.getItem(name);
  } catch {
    return null;
  }
}

/** Whether it was kept. */
function write(storage, name, text) {
  try {
    if (text === null) storage.removeItem(name);
    else storage.setItem(name, text);
    return true;
  } catch {
    return false;
  }
}

function json(text) {
  try {
    return JSON.parse(text);
  } catch {
    return null;
  }
}

export function newId() {
  return [...crypto.getRandomValues(new Uint8Array(8))].map((byte) => byte.toString(16).padStart(2, "0")).join("");
}

export const isId = (id) => /^[0-9a-f]{16}$/.test(id);

export function newChat() {
  return { id: newId(), title: "", named: false, updated: Date.now(), turns: [] };
}

const line = (value, most) => (typeof value === "string" ? value.slice(0, most) : "");
const count = (value) => (Number.isFinite(value) && value >= 0 ? value : null);

function soundAnswer(raw) {
  if (typeof raw?.text !== "string") return null;
  const fault = isKind(raw.fault?.kind) ? { kind: raw.fault.kind, title: line(raw.fault.title, 200), detail: line(raw.fault.detail, 600) } : null;
  return {
    model: line(raw.model, 300),
    text: raw.text,
    // What was being written when the page went away was cut off.
    state: STATES.has(raw.state) ? raw.state : "cut",
    finish: line(raw.finish, 40),
    fault,
    tokens: count(raw.tokens),
    first_s: count(raw.first_s),
    rate: count(raw.rate),
  };
}

function soundTurn(raw) {
  if (typeof raw?.prompt !== "string" || !Array.isArray(raw.answers)) return null;
  const answers = raw.answers.slice(0, 2).map(soundAnswer);
  if (!answers.length || answers.includes(null)) return null;
  return { prompt: raw.prompt, answers };
}

/** A conversation as it should be, or null. */
export function soundChat(raw) {
  if (typeof raw?.id !== "string" || !isId(raw.id) || !Array.isArray(raw.turns)) return null;
  const turns = raw.turns.map(soundTurn);
  if (turns.includes(null)) return null;
  return { id: raw.id, title: line(raw.title, 120), named: raw.named === true, updated: count(raw.updated) ?? 0, turns };
}

export function loadChat(id) {
  const chat = isId(id) ? soundChat(json(read(localStorage, CHAT + id))) : null;
  return chat?.id === id ? chat : null;
}

/** All conversations, newest first. */
export function allChats() {
  const found = [];
  try {
    for (let i = 0; i < localStorage.length; i += 1) {
      const name = localStorage.key(i);
      const chat = name.startsWith(CHAT) ? loadChat(name.slice(CHAT.length)) : null;
      if (chat) found.push(chat);
    }
  } catch {
    return [];
  }
  return found.sort((a, b) => b.updated - a.updated);
}

export const saveChat = (chat) => write(localStorage, CHAT + chat.id, JSON.stringify(chat));
export const dropChat = (id) => write(localStorage, CHAT + id, null);
/** The name that another tab gave the conversation `id`: {title, named}, or {}. */
export function titleIn(event, id) {
  const chat = event.key === CHAT + id ? soundChat(json(event.newValue)) : null;
  return chat?.named ? { title: chat.title, named: true } : {};
}

export const isChatName = (name) => name === null || name.startsWith(CHAT);

export const loadSettings = () => json(read(localStorage, SETTINGS)) ?? {};
export const saveSettings = (values) => write(localStorage, SETTINGS, JSON.stringify(values));

export function loadChoice() {
  const raw = json(read(localStorage, "kinkajou.models"));
  return { model: line(raw?.model, 300), other: line(raw?.other, 300), versus: raw?.versus === true };
}
export const saveChoice = (choice) => write(localStorage, "kinkajou.models", JSON.stringify(choice));

export const loadTheme = () => read(localStorage, "kinkajou.theme") ?? "";
export const saveTheme = (name) => write(localStorage, "kinkajou.theme", name || null);

let held = "";
export const loadKey = () => read(sessionStorage, "kinkajou.key") ?? held;
export function saveKey(key) {
  held = key;
  write(sessionStorage, "kinkajou.key", key || null);
}
