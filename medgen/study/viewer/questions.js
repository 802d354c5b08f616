// The questions beside the pictures: one small widget per kind, and the panel that passes the digits to the one whose turn it is.

const CONFIDENCE = { kind: "scale", label: "How sure are you?", min: 1, max: 6, min_label: "guessing", max_label: "certain" };
const LONGEST_TEXT = 10000; // the analysis refuses more than 20 000

/** What a widget is given: the question, what was answered, where an answer goes. */
class Part {
  constructor(panel, question, field) {
    Object.assign(this, { panel, field, id: question.id, of: question });
    this.question = field === "confidence" ? CONFIDENCE : question;
  }

  get entry() {
    return this.panel.store.given(this.panel.item, this.id);
  }

  get value() {
    return this.entry[this.field];
  }

  /** An expectation cannot be changed once what came next was seen; training cannot after its feedback. */
  get locked() {
    const step = this.panel.store.step(this.panel.item);
    return (this.of.before_reveal && step !== "") || (this.panel.training && step === "done");
  }

  get open() {
    return this.of.required && !hasValue(this.value);
  }

  set(value) {
    if (this.locked || this.panel.shut()) return;
    this.panel.store.answer(this.panel.item, this.id, { [this.field]: value });
    this.panel.answered(this);
  }
}

/** Buttons of which one is chosen; each shows the digit that chooses it. */
function buttonRow(part, options, kind) {
  const digits = digitsFor(options);
  const buttons = options.map((option, n) =>
    el(
      "button",
      { type: "button", class: "option", "aria-keyshortcuts": digits[n], "data-value": option.value, click: () => part.set(option.value) },
      ...(digits[n] && digits[n] !== String(option.label) ? [el("kbd", { text: digits[n], "aria-hidden": "true" })] : []),
      el("span", { text: option.label }),
    ),
  );
  const element = el("div", { class: `options ${kind}` }, ...buttons);
  const longest = Math.max(...options.map((option) => String(option.label).length));
  element.style.setProperty("--narrow", longest <= 9 ? Math.min(options.length, 3) : longest <= 24 ? 2 : 1); // columns beside the picture
  element.style.setProperty("--wide", longest <= 24 ? Math.min(options.length, 4) : 2); // and below it
  return {
    element,
    digit: (digit) => digits.includes(digit) && (part.set(options[digits.indexOf(digit)].value), true),
    refresh: () =>
      buttons.forEach((button, n) => {
        button.setAttribute("aria-pressed", String(options[n].value === part.value));
        button.disabled = part.locked;
      }),
    focus: () => buttons[0].focus(),
  };
}

/** A digit for each option: the option itself where all are digits, else 1, 2, … 9, 0. */
function digitsFor(options) {
  const own = options.map((o) => String(o.value));
  return own.every((v) => /^\d$/.test(v)) ? own : options.map((_, n) => (n < 10 ? String((n + 1) % 10) : null));
}

function choice(part) {
  return buttonRow(part, optionsOf(part.question), "choice");
}

function scale(part) {
  const { min = 1, max = 5, min_label: low, max_label: high } = part.question;
  if (max - min > 10) return number(part);
  const steps = [...Array(max - min + 1).keys()].map((n) => ({ value: min + n, label: String(min + n) }));
  const row = buttonRow(part, steps, "scale");
  const ends = el("div", { class: "ends" }, el("span", { text: low ?? "" }), el("span", { text: high ?? "" }));
  return { ...row, element: el("div", {}, row.element, ...(low || high ? [ends] : [])) };
}

function number(part) {
  const { min, max, label, kind } = part.question;
  const input = el("input", { type: "text", inputmode: "decimal", autocomplete: "off", maxlength: 12, "aria-label": label });
  const range = min !== undefined && max !== undefined ? `${min} to ${max}` : "";
  const note = el("p", { class: "note", role: "status", text: range });
  input.addEventListener("input", () => {
    const value = Number(input.value.replace(",", "."));
    const legal = input.value.trim() !== "" && NUMBER.test(input.value.trim().replace(",", ".")) && !(value < min) && !(value > max);
    const good = legal && (kind !== "scale" || Number.isInteger(value));
    note.textContent = good || input.value === "" ? range : `A number${range ? ` from ${range}` : ""}, please`;
    input.classList.toggle("wrong", !good && input.value !== "");
    part.set(good ? value : null);
  });
  return {
    element: el("div", { class: "entry" }, input, note),
    digit: () => (input.focus(), input.select(), "type"), // the key itself then types its digit
    refresh: () => {
      if (document.activeElement !== input) input.value = part.value ?? "";
      input.disabled = part.locked;
    },
    focus: () => input.focus(),
  };
}

function text(part) {
  const area = el("textarea", { rows: 2, maxlength: LONGEST_TEXT, "aria-label": part.question.label, "aria-keyshortcuts": "C" });
  // toWellFormed: half a character (an emoji cut in two) could be neither saved nor sent.
  area.addEventListener("input", () => part.set(area.value.toWellFormed?.() ?? area.value));
  return {
    element: area,
    digit: () => false,
    refresh: () => {
      if (document.activeElement !== area) area.value = part.value ?? "";
      area.disabled = part.locked;
    },
    focus: () => area.focus(),
  };
}

/** Points on the picture, or "none": an empty list is an answer too. */
function points(part) {
  const stage = part.panel.stage;
  const none = el("button", { type: "button", class: "option", "aria-keyshortcuts": "0", click: () => part.set([]) });
  none.append(el("kbd", { text: "0", "aria-hidden": "true" }), el("span", { text: "None to be seen" }));
  const undo = el("button", { type: "button", class: "option", text: "Take the last one back", click: () => part.set(part.value.slice(0, -1)) });
  const found = el("p", { class: "found", role: "status" });
  stage.onMark = (marks) => part.set(marks);
  return {
    element: el(
      "div",
      { class: "options choice" },
      el("p", { class: "note", text: "Click on what looks wrong; click on a mark to remove it. By keys: M, arrows, Space." }),
      found,
      none,
      undo,
    ),
    digit: (digit) => digit === "0" && (part.set([]), true),
    refresh: () => {
      const count = part.value?.length ?? 0;
      found.textContent = count === 0 ? "" : count === 1 ? "1 mark" : `${count} marks`;
      none.setAttribute("aria-pressed", String(part.value?.length === 0));
      none.disabled = part.locked;
      undo.disabled = part.locked || count === 0;
      stage.setMarks(part.value ?? [], !part.locked);
    },
    focus: () => none.focus(),
  };
}

/** Films put in order, earliest first: by their digits, by clicking, or dragged to a place. */
function order(part) {
  const options = optionsOf(part.question);
  let placed = [...(part.value ?? [])];
  const place = (value, at = placed.length) => {
    if (part.locked || part.panel.shut()) return;
    placed = placed.filter((v) => v !== value);
    if (at !== null) placed.splice(at, 0, value);
    part.set(placed.length === options.length ? [...placed] : null);
  };
  const pick = (value) => place(value, placed.includes(value) ? null : placed.length);
  const slots = options.map((_, n) => el("li", { "data-slot": n }, el("span", { class: "nth", text: ordinal(n, options.length) })));
  const pool = el("div", { class: "pool", "data-slot": "none" });
  const chips = options.map((option, n) => chip(option, n, pick, place));
  const list = el("ol", { class: "slots" }, ...slots);
  return {
    element: el("div", { class: "order" }, el("p", { class: "note", text: "Press the films’ digits from the earliest to the latest, or drag." }), pool, list),
    digit: (digit) => options[Number(digit) - 1] !== undefined && (pick(options[Number(digit) - 1].value), true),
    refresh: () => {
      const focused = chips.find((c) => c === document.activeElement);
      options.forEach((option, n) => {
        const at = placed.indexOf(option.value);
        (at < 0 ? pool : slots[at]).append(chips[n]);
        chips[n].setAttribute("aria-label", at < 0 ? `Film ${option.label}, not placed` : `Film ${option.label}, ${ordinal(at, options.length)}`);
        chips[n].disabled = part.locked;
      });
      focused?.focus();
    },
    focus: () => chips[0].focus(),
  };
}

function ordinal(n, count) {
  if (n === 0) return "earliest";
  return n === count - 1 ? "latest" : `${n + 1}${["st", "nd", "rd"][n] ?? "th"}`;
}

/** A film's tile: pressed to be placed or taken back, dragged to a slot by mouse or finger. */
function chip(option, n, pick, place) {
  const tile = el("button", { type: "button", class: "chip", "aria-keyshortcuts": n + 1, "data-value": option.value });
  tile.append(el("kbd", { text: n + 1, "aria-hidden": "true" }), el("span", { text: option.label }));
  let from = null;
  let dragged = false;
  tile.addEventListener("pointerdown", (event) => {
    from = { x: event.clientX, y: event.clientY };
    dragged = false;
    tile.setPointerCapture(event.pointerId);
  });
  tile.addEventListener("pointermove", (event) => {
    if (!from) return;
    const [dx, dy] = [event.clientX - from.x, event.clientY - from.y];
    dragged ||= Math.hypot(dx, dy) > 6;
    if (dragged) tile.style.transform = `translate(${dx}px, ${dy}px)`;
  });
  const drop = (event) => {
    if (from && dragged && event.type === "pointerup") {
      tile.style.visibility = "hidden"; // to see what lies under it
      const target = document.elementFromPoint(event.clientX, event.clientY)?.closest("[data-slot]");
      tile.style.visibility = "";
      if (target) place(option.value, target.dataset.slot === "none" ? null : Number(target.dataset.slot));
    }
    tile.style.transform = "";
    from = null;
  };
  tile.addEventListener("pointerup", drop);
  tile.addEventListener("pointercancel", drop);
  tile.addEventListener("click", () => {
    if (!dragged) pick(option.value);
    dragged = false;
  });
  return tile;
}

const WIDGETS = { scale, choice, number, text, points, order };

/** The questions of one item that may be answered now. Digits go to the active one, which moves on as they are answered. */
class Panel {
  constructor(root, { store, item, stage, training, shut, onAnswer }) {
    Object.assign(this, { root, store, item, stage, training, shut, onAnswer });
    const revealed = store.step(item) !== "";
    const asked = store.study.items[item].questions;
    this.questions = asked.some((q) => q.before_reveal) && !revealed ? asked.filter((q) => q.before_reveal) : asked;
    this.parts = this.questions.flatMap((q) => [
      new Part(this, q, "value"),
      ...(q.confidence ? [new Part(this, q, "confidence")] : []),
    ]);
    this.blocks = this.parts.map((part) => this.block(part));
    root.replaceChildren(...this.blocks.map((block) => block.element));
    this.turnTo(this.nextOpen(-1) ?? this.parts.findIndex((part) => !part.locked && part.question.kind !== "text"));
    this.refresh();
  }

  block(part) {
    const widget = WIDGETS[part.question.kind](part);
    const title = el("h3", { text: part.question.label || part.id });
    if (!part.of.required && !/optional/i.test(part.question.label)) title.append(el("span", { class: "optional", text: "optional" }));
    if (part.of.before_reveal && part.locked) title.append(el("span", { class: "optional", text: "recorded, before what came next was shown" }));
    const number = this.parts.indexOf(part);
    const element = el("section", { class: `question ${part.question.kind}`, role: "group", "aria-label": part.question.label || part.id });
    element.append(title, widget.element);
    element.addEventListener("focusin", () => this.turnTo(number));
    return { part, widget, element };
  }

  nextOpen(after) {
    const places = [...this.parts.keys()];
    return [...places.slice(after + 1), ...places.slice(0, after + 1)].find((n) => this.parts[n].open && !this.parts[n].locked);
  }

  turnTo(number) {
    this.active = number;
    this.blocks.forEach((block, n) => block.element.classList.toggle("active", n === number));
  }

  answered(part) {
    this.refresh();
    const number = this.parts.indexOf(part);
    if (!part.open && !["text", "number"].includes(part.question.kind)) {
      const next = this.nextOpen(number);
      const inside = this.blocks[number].element.contains(document.activeElement);
      this.turnTo(next ?? number);
      if (next !== undefined && next !== number) {
        this.blocks[next].element.scrollIntoView({ block: "nearest" });
        if (inside) this.blocks[next].widget.focus();
      }
    }
    this.onAnswer();
  }

  refresh() {
    this.blocks.forEach((block) => block.widget.refresh());
  }

  digit(digit) {
    return this.blocks[this.active]?.widget.digit(digit);
  }

  comment() {
    this.blocks.find((block) => block.part.question.kind === "text")?.widget.focus();
  }

  /** Labels of what is still to be answered. */
  missing() {
    return this.parts.filter((part) => part.open).map((part) => part.question.label || part.id);
  }
}
