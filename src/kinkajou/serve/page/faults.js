// What can go wrong between this page and the server, in words for people.

const TITLES = {
  key: "This server asks for a key",
  barred: "The server does not know this page's address",
  busy: "The server is busy",
  closed: "The server takes no requests now",
  long: "This conversation is too long for the model",
  refused: "The server refused this request",
  broken: "The server failed at this answer",
  late: "The answer took too long",
  lost: "The server cannot be reached",
  cut: "The connection broke off",
};

const ADVICE = {
  key: "Enter the key, then try again.",
  barred: `Start it with --allow-origins ${location.origin}, or let the proxy before it keep the Host header.`,
  closed: "It is starting or being shut down.",
  long: "Start a new chat, shorten an earlier message, or ask for fewer tokens in the settings.",
  lost: "Is it running? Your message is kept here.",
  cut: "What had come until then is kept.",
};

const LONGEST_WAIT_S = 3600; // a server may ask for more, but a person is not held off for days

export class Fault extends Error {
  /** `kind` is a key of TITLES; `detail` the server's own words; `retry_s` seconds until it may be asked again. */
  constructor(kind, detail = "", retry_s = 0) {
    super(TITLES[kind]);
    this.kind = kind;
    this.detail = detail;
    this.retry_s = retry_s;
  }
}

/** What is kept of a fault beside an answer. */
export function told(fault) {
  const said = [ADVICE[fault.kind], fault.detail && sentence(fault.detail)].filter(Boolean).join(" ");
  return { kind: fault.kind, title: TITLES[fault.kind], detail: said.slice(0, 600) };
}

const sentence = (text) => text[0].toUpperCase() + text.slice(1) + (/[.!?]$/.test(text) ? "" : ".");

export function isKind(kind) {
  return Object.hasOwn(TITLES, kind);
}

/** The fault of a reply that is not 200. */
export async function faultOf(reply) {
  let error = {};
  try {
    const body = JSON.parse((await reply.text()).slice(0, 100_000));
    error = body.error ?? body;
  } catch {
    // No JSON: the status alone says what it is.
  }
  return faultFrom(reply.status, error, Number(reply.headers.get("retry-after")) || 0);
}

/** The fault of an OpenAI-style error object. */
export function faultFrom(status, error, retry_s = 0) {
  const detail = typeof error?.message === "string" ? error.message : typeof error === "string" ? error : "";
  const code = String(error?.code ?? error?.type ?? "");
  const wait_s = Math.min(retry_s, LONGEST_WAIT_S);
  if (status === 401) return new Fault("key");
  if (code === "unknown_origin" || code === "cross_site") return new Fault("barred", detail);
  if (status === 429) return new Fault("busy", detail, Math.max(wait_s, 1));
  if (/context|too_long|length_exceeded/.test(code) || /context (length|window)|\bthe context \d/.test(detail)) return new Fault("long", detail);
  if (status === 408 || status === 504 || /deadline|timeout/.test(code)) return new Fault("late", detail);
  if (status === 503 || code === "stopping") return new Fault("closed", detail, wait_s);
  if (status >= 400 && status < 500) return new Fault("refused", detail || `Status ${status}.`);
  return new Fault("broken", detail || (status ? `Status ${status}.` : ""));
}
