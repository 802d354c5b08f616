// The pages between the cases: who reads, instructions, parts and breaks, sessions, the end; the keys and the pause.

const TITLES = {
  real_or_synthetic: "Real or synthetic?",
  two_alternative: "Which of the two is real?",
  likert_realism: "How realistic?",
  text_alignment: "Does the picture show what the text says?",
  progression_order: "In which order were they taken?",
  plausible_course: "Is the course plausible?",
  same_patient: "The same patient?",
  ejection_fraction: "Which ejection fraction?",
  artefact: "Where does something look wrong?",
};

const KEYS = [
  ["Answers", [["1 2 3 …", "choose"], ["Tab", "from question to question"], ["C", "comment; Esc leaves it"], ["M", "cross hair: arrows move it, Space marks, M puts it away"], ["Enter or →", "next case"], ["Backspace or ←", "back, to look or correct"]]],
  ["Picture", [["Shift + arrows", "window ↔ and level ↕"], ["I", "invert"], ["+  −", "zoom"], ["W A S D", "move"], ["R", "window, zoom and place as at first"], ["N", "pixels as they are, or smoothed"], ["T", "dragging: window, or move"]]],
  ["Stacks, films, several pictures", [["↑  ↓  or  ,  .", "slice or frame back, forward"], ["Space", "play, pause"], ["<  >", "slower, faster"], ["V", "one at a time, or side by side"], ["Page ↑ ↓", "the other picture, one at a time"], ["L", "pictures linked, or each on its own"]]],
  ["Mouse and fingers", [["drag", "window and level"], ["right or Shift + drag", "move"], ["wheel, pinch", "zoom; the wheel turns slices"], ["click", "mark, where marks are asked for"]]],
  ["Study", [["P", "pause: the clock stops"], ["?", "these keys"]]],
];

const $ = (id) => document.getElementById(id);
const INSTRUCTIONS = JSON.parse($("instructions").textContent); // per task, from medgen.study.tasks
const paragraphs = (text) => (Array.isArray(text) ? text : String(text ?? "").split(/\n\s*\n/)).map((t) => el("p", { text: t }));
const button = (text, click, attributes = {}) => el("button", { type: "button", text, click, ...attributes });
const plural = (n, one) => `${n} ${one}${n === 1 ? "" : "s"}`;

/** Each shows a page without pictures; what its buttons do, the app does. */
class Screens {
  constructor(app) {
    this.app = app;
    this.dialogs();
  }

  /** A page without pictures; the clock stands still. Enter presses its first main button. */
  show(title, ...children) {
    this.app.leave();
    $("reading").hidden = true;
    $("screen").hidden = false;
    $("screen").replaceChildren(el("div", { class: "sheet" }, el("h1", { text: title, tabindex: "-1" }), ...children));
    ($("screen").querySelector("select, .primary") ?? $("screen").querySelector("h1")).focus();
    $("screen").scrollTop = 0;
    this.app.showPlace();
  }

  welcome() {
    const readers = Object.keys(this.app.study.readers);
    const note = el("p", { class: "note" });
    const go = button("Begin", () => this.app.begin(select.value), { class: "primary" });
    const select = el("select", { id: "reader" }, ...readers.map((r) => el("option", { value: r, text: r })));
    const look = () => {
      const store = new Store(this.app.study, select.value, this.app.storage);
      const done = store.frontier();
      note.textContent = done ? `${done} of ${store.order.length} cases answered in this browser.` : "Nothing answered in this browser yet.";
      go.textContent = done ? "Continue" : "Begin";
    };
    if (this.app.servedReader !== undefined) return this.app.begin(this.app.servedReader);
    select.addEventListener("change", look);
    look();
    this.show(
      this.app.study.title,
      el("label", { for: "reader", text: "You are reader" }),
      select,
      note,
      ...(this.app.storage ? [] : [this.storageWarning()]),
      el("div", { class: "row" }, go, this.importer()),
      el("p", { class: "small", text: `Study ${this.app.study.study_id} · pack ${this.app.study.pack_sha256.slice(0, 12)} · page ${VERSION}` }),
    );
    return undefined;
  }

  storageWarning() {
    return el("p", {
      class: "warning",
      role: "alert",
      text: "This browser keeps nothing on this computer (private window, policy, or full). Save your answers as a file before you close the page; to go on later, open that file here.",
    });
  }

  importer() {
    const input = el("input", { type: "file", accept: ".csv,.json", class: "unseen", tabindex: "-1", "aria-label": "A file of saved answers" });
    input.addEventListener("change", async () => {
      try {
        const { reader, rows } = readFile(await input.files[0].text(), this.app.study);
        const store = new Store(this.app.study, reader, this.app.storage);
        const taken = store.merge(rows);
        this.app.begin(reader, store);
        this.app.say(`${plural(taken, "answer")} of reader ${reader} taken from the file.`);
      } catch (error) {
        this.app.alarm(error.message);
      }
      input.value = "";
    });
    return el("span", {}, button("Open saved answers…", () => input.click()), input);
  }

  instructions() {
    const keys = "Everything can be done by keys: the digits answer, Enter goes on, Backspace goes back, ? shows all keys.";
    const kept = this.app.server
      ? "Each answer is with the organiser as soon as the next case opens."
      : "Your answers stay on this computer. Close the page whenever you like, it goes on where you stopped; at the end save the answers as a file and send it to the organiser.";
    this.show(
      "Instructions",
      ...paragraphs(this.app.study.instructions),
      el("p", { text: keys }),
      el("p", { text: kept }),
      el("div", { class: "row" }, button("Start", () => this.app.open(0), { class: "primary" }), button("All keys", () => this.app.help())),
    );
  }

  /** Before a part: its task, and a moment for a break. */
  part(position, parts, number) {
    const { from, to } = parts[number];
    const items = this.app.store.order.slice(from, to).map((item) => this.app.study.items[item]);
    const training = items.filter((item) => item.training).length;
    const { task, section } = items[0];
    const counts = plural(to - from, "case") + (training ? `, ${training} of them for training` : "");
    this.show(
      TITLES[task] ?? section,
      el("p", { class: "small", text: `Part ${number + 1} of ${parts.length} · ${counts}` }),
      el("p", { text: INSTRUCTIONS[task] ?? "" }),
      ...(training ? [el("p", { text: "Training cases come first; each is followed by feedback and does not count." })] : []),
      ...(number ? [el("p", { text: "A good moment for a break: the clock stands still until you go on." })] : []),
      el("div", { class: "row" }, button("Go on", () => this.app.showItem(position), { class: "primary" })),
    );
  }

  session(position) {
    const session = this.app.store.sessionAt(position);
    const days = this.app.study.washout_days ?? 0;
    const last = this.app.store.rows().map((row) => row.timestamp).sort().pop();
    const from = new Date(Date.parse(last) + days * 86400000);
    const early = Date.now() < from;
    const when = from.toLocaleDateString(undefined, { dateStyle: "long" });
    const wait = `Between sessions there are ${plural(days, "day")} for the cases to be forgotten. Please begin session ${session + 1} on ${when} or later.`;
    const go = button(early ? `Begin session ${session + 1} now all the same` : `Begin session ${session + 1}`, () => this.app.openPart(position, true));
    if (!early) go.className = "primary";
    this.show(
      `Session ${session} is complete`,
      el("p", { text: early ? `Thank you. ${wait}` : `Session ${session + 1} may begin.` }),
      ...(early && !this.app.server ? [el("p", { text: "Save your answers now, to be safe." })] : []),
      el("div", { class: "row" }, ...this.savers(early), go),
    );
  }

  end() {
    const open = this.app.store.order.length;
    const text = this.app.server
      ? "All answers are with the organiser. You may close the page."
      : "Save the answers as a file and send it to the organiser. They also stay in this browser.";
    this.show(
      "Thank you",
      el("p", { text: `All ${plural(open, "case")} are answered. ${text}` }),
      el("div", { class: "row" }, ...this.savers(!this.app.server), button("Look at the last case", () => this.app.showItem(open - 1))),
    );
    this.app.say("All cases are answered.");
  }

  savers(primary = false) {
    const name = `${this.app.study.study_id}_${this.app.store.reader}_responses`.replace(/[^\w.-]+/g, "_");
    const saved = (type, text, ending) => {
      download(`${name}.${ending}`, type, text);
      this.app.exported = this.app.store.rows().length;
      this.app.say(`Saved as ${name}.${ending}`);
    };
    return [
      button("Save answers (CSV)", () => saved("text/csv", toCsv(this.app.store.rows()), "csv"), { class: primary ? "primary" : "" }),
      button("Save answers (JSON)", () => saved("application/json", toJson(this.app.store), "json")),
    ];
  }

  dialogs() {
    const rows = (keys) => keys.flatMap(([key, what]) => [el("dt", {}, el("kbd", { text: key })), el("dd", { text: what })]);
    $("helpkeys").replaceChildren(...KEYS.map(([title, keys]) => el("section", {}, el("h3", { text: title }), el("dl", {}, ...rows(keys)))));
    for (const id of ["help", "paused"]) {
      $(id).addEventListener("close", () => {
        this.app.store?.clock.release(id);
        $("reading").focus();
      });
      $(id).addEventListener("keydown", (event) => {
        if ((id === "help" && event.key === "?") || (id === "paused" && event.key.toLowerCase() === "p")) $(id).close();
        event.stopPropagation();
      });
    }
    $("helpclose").addEventListener("click", () => $("help").close());
    $("resume").addEventListener("click", () => $("paused").close());
  }
}
