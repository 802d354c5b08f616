// One reader's answers: kept in the browser at once, sent to the server where there is one, saved as CSV or JSON.

const VERSION = document.querySelector('meta[name="viewer-version"]').content;
const COLUMNS = [
  "study_id", "pack_sha256", "reader", "session", "position", "item", "task", "question",
  "answer", "confidence", "ms", "viewer_version", "timestamp",
];
const NUMBER = /^[+-]?(\d+\.?\d*|\.\d+)(e[+-]?\d+)?$/i;

/** A new element. Text is set as text, never as markup; `click` is a listener. */
function el(tag, attributes = {}, ...children) {
  const node = document.createElement(tag);
  for (const [name, value] of Object.entries(attributes)) {
    if (name === "text") node.textContent = value;
    else if (name === "click") node.addEventListener("click", value);
    else if (value !== false && value != null) node.setAttribute(name, value === true ? "" : value);
  }
  node.append(...children);
  return node;
}

/** Milliseconds of reading. It stands still while anything holds it: a pause, a hidden page, pictures still loading. */
class Clock {
  constructor() {
    this.spent = 0;
    this.since = null;
    this.holds = new Set();
  }

  hold(why) {
    this.count();
    this.holds.add(why);
    this.since = null;
  }

  release(why) {
    this.holds.delete(why);
    if (!this.holds.size && this.since === null) this.since = performance.now();
  }

  count() {
    if (this.since === null) return;
    const now = performance.now();
    this.spent += now - this.since;
    this.since = now;
  }

  /** The time since the last lap. */
  lap() {
    this.count();
    const spent = this.spent;
    this.spent = 0;
    return spent;
  }
}

/**
 * The answers of one reader and how far he has come.
 *
 * state.answers: {item: {question: {value, confidence, ms, timestamp, session, nonce, sent}}}
 * state.steps:   {item: "revealed" (its expectation is locked) | "done"}
 * state.waiting: {item: ms looked at it that belong to no answer yet}
 * state.turn:    how often it was saved
 */
class Store {
  constructor(study, reader, storage) {
    this.study = study;
    this.reader = reader;
    this.storage = storage;
    this.order = study.readers[reader].order;
    this.key = `medgen-study/${study.study_id}/${study.pack_sha256}/${reader}`;
    this.clock = new Clock();
    this.kept = storage !== null;
    this.state = this.read();
  }

  read() {
    const empty = { answers: {}, steps: {}, waiting: {} };
    try {
      return { ...empty, ...JSON.parse(this.storage?.getItem(this.key) ?? "{}") };
    } catch {
      return empty;
    }
  }

  save() {
    this.state.turn = (this.state.turn ?? 0) + 1;
    try {
      this.storage.setItem(this.key, JSON.stringify(this.state));
      this.kept = true;
    } catch {
      this.kept = false;
    }
    this.saved?.();
  }

  /** What was saved last is on the disk, as far as this browser can say. */
  async settled() {
    await this.storage?.settled?.();
  }

  /** The session that a position of the order belongs to, from 0. */
  sessionAt(position) {
    let last = 0;
    const sizes = this.study.readers[this.reader].sessions ?? [];
    for (let session = 0; session < sizes.length; session++) {
      last += sizes[session];
      if (position < last) return session;
    }
    return Math.max(0, sizes.length - 1);
  }

  given(item, question) {
    return this.state.answers[item]?.[question] ?? {};
  }

  step(item) {
    return this.state.steps[item] ?? "";
  }

  /** Record what was answered now: {value} or {confidence}. The time since the answer before it is this answer's. */
  answer(item, question, change) {
    const own = (this.state.answers[item] ??= {});
    const before = own[question] ?? { confidence: null, ms: 0 };
    own[question] = {
      ...before,
      ...change,
      ms: before.ms + this.looked(item),
      timestamp: new Date().toISOString(),
      session: String(this.sessionAt(this.order.indexOf(item)) + 1),
      nonce: nonce(),
      sent: false,
    };
    this.save();
  }

  /** Active milliseconds since the last answer of this item, over all visits to it. */
  looked(item) {
    const spent = (this.state.waiting[item] ?? 0) + this.clock.lap();
    delete this.state.waiting[item];
    return spent;
  }

  /** Put the running time aside for this item: it is left, or the browser may close. */
  bank(item) {
    this.state.waiting[item] = this.looked(item);
    this.save();
  }

  /** The item goes on to `step`; the time from the last of these answers until now belongs to that answer. */
  finish(item, step, questions) {
    const entries = questions.map((q) => this.given(item, q.id)).filter((e) => e.timestamp && !e.sent);
    entries.sort((a, b) => (a.timestamp < b.timestamp ? -1 : 1));
    const spent = this.looked(item);
    if (entries.length) entries[entries.length - 1].ms += spent;
    this.state.steps[item] = step;
    this.save();
  }

  complete(item, only = () => true) {
    return this.study.items[item].questions.filter(only).every((q) => isAnswered(q, this.given(item, q.id)));
  }

  /** The first place in the order that is not done; the order's length at the end. */
  frontier() {
    const place = this.order.findIndex((item) => this.step(item) !== "done");
    return place < 0 ? this.order.length : place;
  }

  /** Rows as the responses file has them (values not yet made safe for a spreadsheet), of one item or all. */
  rows(items = this.order) {
    return items.flatMap((item) =>
      this.study.items[item].questions
        .filter((q) => hasValue(this.given(item, q.id).value))
        .map((q) => this.row(item, q, this.given(item, q.id))),
    );
  }

  row(item, question, entry) {
    return {
      study_id: this.study.study_id,
      pack_sha256: this.study.pack_sha256,
      reader: this.reader,
      session: entry.session,
      position: this.order.indexOf(item),
      item,
      task: this.study.items[item].task,
      question: question.id,
      answer: answerText(entry.value),
      confidence: entry.confidence ?? "",
      ms: Math.round(entry.ms),
      viewer_version: VERSION,
      timestamp: entry.timestamp,
      nonce: entry.nonce,
    };
  }

  /** Rows that the server has not acknowledged: of finished items, and of expectations before a reveal. */
  unsent() {
    const final = (item, q) => this.step(item) === "done" || (this.step(item) === "revealed" && q.before_reveal);
    const due = (q, entry) => !entry.sent && (hasValue(entry.value) || (q.kind === "text" && entry.known)); // a comment taken back
    return this.order.flatMap((item) =>
      this.study.items[item].questions
        .filter((q) => final(item, q) && due(q, this.given(item, q.id)))
        .map((q) => this.row(item, q, this.given(item, q.id))),
    );
  }

  markSent(rows) {
    for (const row of rows) {
      const entry = this.given(row.item, row.question);
      if (entry.nonce === row.nonce) entry.sent = entry.known = true;
    }
    this.save();
  }

  /** The server says what it has: whatever it does not name is to be sent again. */
  mergeServer(rows) {
    for (const own of Object.values(this.state.answers)) for (const entry of Object.values(own)) entry.sent = false;
    this.merge(rows, { sent: true });
  }

  /** Take over rows of a file or of the server; of two answers to one question the later stands. Returns how many were new. */
  merge(rows, { sent = false } = {}) {
    let taken = 0;
    for (const row of rows) {
      const question = this.study.items[row.item]?.questions.find((q) => q.id === row.question);
      if (!question || !this.order.includes(row.item)) continue;
      const value = readAnswer(question, String(row.answer));
      const own = (this.state.answers[row.item] ??= {});
      const before = own[row.question];
      const same = before && before.timestamp === row.timestamp;
      if (same && sent) before.sent = before.known = true;
      if (value === undefined || (before && before.timestamp >= row.timestamp)) continue;
      const confidence = row.confidence === "" || row.confidence == null ? null : Number(row.confidence);
      const { timestamp, session } = row;
      own[row.question] = { value, confidence, ms: Number(row.ms), timestamp, session: String(session), nonce: nonce(), sent };
      taken++;
    }
    this.settle();
    return taken;
  }

  /** How far each item has come, from its answers alone. */
  settle() {
    for (const item of this.order) {
      if (this.step(item) === "done" || !this.state.answers[item]) continue;
      const before = this.study.items[item].questions.filter((q) => q.before_reveal);
      if (this.complete(item)) this.state.steps[item] = "done";
      else if (before.length && this.complete(item, (q) => q.before_reveal)) this.state.steps[item] = "revealed";
    }
    this.save();
  }
}

function hasValue(value) {
  return value !== undefined && value !== null && !(typeof value === "string" && value.trim() === "");
}

/** Whether nothing more is needed: an optional question always is, a sure answer needs its confidence. */
function isAnswered(question, entry) {
  if (!question.required) return true;
  return hasValue(entry.value) && (!question.confidence || entry.confidence != null);
}

/** 128 random bits; randomUUID would need HTTPS. */
function nonce() {
  return [...crypto.getRandomValues(new Uint8Array(16))].map((byte) => byte.toString(16).padStart(2, "0")).join("");
}

function answerText(value) {
  return Array.isArray(value) ? JSON.stringify(value) : String(value ?? "");
}

function optionsOf(question) {
  return (question.options ?? []).map((o) => (typeof o === "object" ? o : { value: String(o), label: String(o) }));
}

/** The value that a row's text means to its question; undefined where the question cannot have it. */
function readAnswer(question, text) {
  const { kind, min = -Infinity, max = Infinity } = question;
  if (kind === "text") return text;
  if (kind === "choice") return optionsOf(question).some((o) => String(o.value) === text) ? text : undefined;
  if (kind === "order" || kind === "points") {
    try {
      const list = JSON.parse(text);
      return Array.isArray(list) ? list : undefined;
    } catch {
      return undefined;
    }
  }
  const number = Number(text);
  return NUMBER.test(text) && number >= min && number <= max ? number : undefined;
}

// ---- files

/** A cell that no spreadsheet takes for a formula, quoted as RFC 4180 says. The same rule as medgen.study.responses.safe_cell. */
function csvCell(value) {
  let text = String(value ?? "");
  if (/^[=+\-@\t\r]/.test(text) && !NUMBER.test(text)) text = `'${text}`;
  return /[",\r\n]/.test(text) ? `"${text.replaceAll('"', '""')}"` : text;
}

function toCsv(rows) {
  return [COLUMNS, ...rows.map((row) => COLUMNS.map((c) => row[c]))].map((cells) => cells.map(csvCell).join(",") + "\r\n").join("");
}

function toJson(store) {
  const answers = store.rows().map((row) => Object.fromEntries(COLUMNS.map((c) => [c, row[c]])));
  const { study_id, pack_sha256 } = store.study;
  return JSON.stringify({ study_id, pack_sha256, reader: store.reader, viewer_version: VERSION, answers }, null, 1);
}

/** Cells of a CSV text: quotes, doubled quotes and line ends inside quotes. */
function parseCsv(text) {
  const lines = [[]];
  for (const [, quoted, plain, end] of text.matchAll(/(?:"((?:[^"]|"")*)"|([^",\r\n]*))(,|\r?\n|$)/g)) {
    lines[lines.length - 1].push(quoted === undefined ? plain : quoted.replaceAll('""', '"'));
    if (end === "") break;
    if (end !== ",") lines.push([]);
  }
  const [header, ...rest] = lines.filter((cells) => cells.length > 1);
  const plain = (cell) => (/^'[=+\-@\t\r]/.test(cell) ? cell.slice(1) : cell);
  return (rest ?? []).map((cells) => Object.fromEntries((header ?? []).map((name, i) => [name.replace("\ufeff", ""), plain(cells[i] ?? "")])));
}

/** The rows of a responses file that belong to this study; throws with what is wrong with it. */
function readFile(text, study) {
  let rows;
  try {
    rows = text.trimStart().startsWith("{") ? JSON.parse(text).answers : parseCsv(text);
  } catch {
    rows = null;
  }
  if (!Array.isArray(rows) || !rows.length || !rows[0] || !("question" in rows[0])) {
    throw new Error("This is not a file of answers: choose the .csv or .json that this page saved.");
  }
  const { study_id, pack_sha256, reader } = rows[0];
  if (rows.some((r) => r.study_id !== study.study_id || r.pack_sha256 !== study.pack_sha256)) {
    throw new Error(`These answers are of another study or another pack (${study_id}), not of ${study.study_id}.`);
  }
  if (!Object.hasOwn(study.readers, reader) || rows.some((r) => r.reader !== reader)) {
    throw new Error(`These answers are not those of one reader of this study (${reader}).`);
  }
  return { reader, rows };
}

function download(name, type, text) {
  const link = el("a", { href: URL.createObjectURL(new Blob([text], { type })), download: name });
  document.body.append(link);
  link.click();
  link.remove();
  setTimeout(() => URL.revokeObjectURL(link.href), 60000);
}

// ---- server

const pause = (ms) => new Promise((resolve) => setTimeout(resolve, ms));

/** Talks to `medgen study serve` until it has acknowledged; `say` hears what is wrong meanwhile ("" when it is well again). */
class Server {
  constructor(say) {
    this.say = say;
  }

  async mine() {
    return (await (await this.ask("/api/mine")).json()).answers;
  }

  /** Many rows go in several messages; only an import or a server that lost its data makes many. */
  async send(rows) {
    for (let first = 0; first < rows.length; first += 500) {
      await this.ask("/api/answers", {
        method: "POST",
        headers: { "Content-Type": "application/json" },
        body: JSON.stringify({ answers: rows.slice(first, first + 500) }),
      });
    }
  }

  /** Tries until answered: no connection and the server's own trouble pass, a refusal (4xx) is thrown. */
  async ask(address, options = {}) {
    for (let wait = 1; ; wait = Math.min(2 * wait, 15)) {
      const reply = await fetch(address, { credentials: "same-origin", ...options }).catch(() => null);
      if (reply?.ok) {
        this.say("");
        return reply;
      }
      if (reply && reply.status < 500 && reply.status !== 408 && reply.status !== 429) {
        const { error } = await reply.json().catch(() => ({ error: "" }));
        throw new Error(`The server refused this (${reply.status}): ${error}.`);
      }
      const why = reply ? `The server is in trouble (${reply.status}).` : "The server cannot be reached.";
      this.say(`${why} Nothing is lost; trying again in ${wait} s.`);
      await pause(wait * 1000);
    }
  }
}
