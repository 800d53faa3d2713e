// The server's OpenAI-compatible API, as this page uses it.

import { Fault, faultFrom, faultOf } from "./faults.js";

const LONGEST_EVENT = 4_000_000; // characters

const at = (path) => new URL(path, document.baseURI);

function headers(key) {
  const said = { "content-type": "application/json" };
  if (key) said.authorization = `Bearer ${key}`;
  return said;
}

/** With a key of its own the page needs none that the browser was told; without, that one opens the server. */
async function ask(path, key, options) {
  const credentials = key ? "omit" : "same-origin";
  try {
    return await fetch(at(path), { cache: "no-store", redirect: "error", credentials, headers: headers(key), ...options });
  } catch (error) {
    if (error.name === "AbortError") throw error;
    throw new Fault("lost");
  }
}

/** Names of the models that answer. */
export async function models(key) {
  const reply = await ask("v1/models", key, {});
  if (!reply.ok) throw await faultOf(reply);
  let body = null;
  try {
    body = await reply.json();
  } catch {
    throw new Fault("broken", "Its list of models is not JSON.");
  }
  const rows = Array.isArray(body?.data) ? body.data : [];
  return rows.map((row) => row?.id).filter((id) => typeof id === "string");
}

/**
 * Streams one answer: `onText(piece)` for each piece. Gives {finish, tokens} (tokens null where the server does not say).
 * Raises Fault, or AbortError where `signal` stopped it.
 */
export async function answer(request, key, signal, onText) {
  const body = JSON.stringify({ ...request, stream: true, stream_options: { include_usage: true } });
  const reply = await ask("v1/chat/completions", key, { method: "POST", body, signal });
  if (!reply.ok) throw await faultOf(reply);
  if (!reply.body) throw new Fault("broken", "Its answer has no body.");
  const got = { finish: "", tokens: null };
  for await (const data of events(reply.body)) {
    if (data === "[DONE]") return got;
    take(parsed(data), got, onText);
  }
  if (!got.finish) throw new Fault("cut");
  return got;
}

function parsed(data) {
  try {
    return JSON.parse(data);
  } catch {
    throw new Fault("broken", "It sent something that is not JSON.");
  }
}

function take(chunk, got, onText) {
  if (chunk?.error) throw faultFrom(Number(chunk.error.status) || 0, chunk.error);
  const choice = chunk?.choices?.[0];
  if (typeof choice?.delta?.content === "string" && choice.delta.content) onText(choice.delta.content);
  if (typeof choice?.finish_reason === "string") got.finish = choice.finish_reason;
  if (Number.isFinite(chunk?.usage?.completion_tokens)) got.tokens = chunk.usage.completion_tokens;
}

/** The data of each server-sent event. */
export async function* events(stream) {
  const reader = stream.pipeThrough(new TextDecoderStream()).getReader();
  let rest = "";
  let data = [];
  try {
    for (;;) {
      const { value, done } = await next(reader);
      if (done) return;
      const lines = (rest + value).split("\n");
      rest = lines.pop();
      if (rest.length > LONGEST_EVENT) throw new Fault("broken", "It sent an event without end.");
      for (const raw of lines) {
        const line = raw.endsWith("\r") ? raw.slice(0, -1) : raw;
        if (line.startsWith("data:")) data.push(line.slice(line[5] === " " ? 6 : 5));
        else if (!line && data.length) {
          yield data.join("\n");
          data = [];
        }
      }
    }
  } finally {
    reader.cancel().catch(() => {});
  }
}

async function next(reader) {
  try {
    return await reader.read();
  } catch (error) {
    if (error.name === "AbortError") throw error;
    throw new Fault("cut");
  }
}
