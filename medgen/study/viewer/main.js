// The way through a study: one case after another, kept as it is answered; pauses; the keyboard.

class App {
  constructor(study, server, storage) {
    this.study = study;
    this.storage = storage;
    this.servedReader = server?.reader;
    this.stage = new Stage({ panes: $("panes"), filters: $("filters"), tools: $("tools"), values: $("values") });
    document.title = study.title;
    $("next").addEventListener("click", () => this.next());
    $("back").addEventListener("click", () => this.back());
    $("pause").addEventListener("click", () => this.pause());
    $("keys").addEventListener("click", () => this.help());
    this.screens = new Screens(this);
    this.listen();
    this.screens.welcome();
  }

  async begin(reader, store) {
    if (!Object.hasOwn(this.study.readers, reader)) return this.alarm(`This pack has no reader ${reader}. Tell the organiser.`);
    this.alarm("");
    this.store = store ?? new Store(this.study, reader, this.storage);
    this.store.clock.hold("screen");
    if (document.hidden) this.store.clock.hold("hidden");
    this.store.saved = () => this.warnUnkept();
    this.store.save();
    if (this.servedReader !== undefined && !(await this.connect())) return undefined;
    if (this.store.frontier() === 0 && !this.store.rows().length) return this.screens.instructions();
    return this.open(this.store.frontier());
  }

  async connect() {
    this.server = new Server((text) => this.alarm(text));
    try {
      this.store.mergeServer(await this.server.mine());
      return await this.deliver();
    } catch (error) {
      this.alarm(error.message);
      return false;
    }
  }

  /** Parts as this reader meets them: runs of one section. */
  parts() {
    const starts = this.store.order.flatMap((item, n) => {
      const [now, before] = [this.study.items[item], this.study.items[this.store.order[n - 1]]];
      return before && before.section === now.section && !this.startsSession(n) ? [] : [n];
    });
    return starts.map((from, n) => ({ from, to: starts[n + 1] ?? this.store.order.length }));
  }

  startsSession(position) {
    return position > 0 && this.store.sessionAt(position) !== this.store.sessionAt(position - 1);
  }

  /** Go to a place in the order, through the break before it if there is one. */
  open(position) {
    if (position >= this.store.order.length) return this.screens.end();
    const fresh = this.store.step(this.store.order[position]) === "" && !this.store.state.answers[this.store.order[position]];
    if (fresh && this.startsSession(position)) return this.screens.session(position);
    return this.openPart(position, fresh);
  }

  openPart(position, fresh) {
    const parts = this.parts();
    const number = parts.findIndex((part) => part.from === position);
    if (!fresh || number < 0) return this.showItem(position);
    return this.screens.part(position, parts, number);
  }

  // ---- one case

  async showItem(position) {
    this.leave();
    this.position = position;
    this.item = this.store.order[position];
    const shown = this.study.items[this.item];
    this.store.clock.hold("loading");
    this.store.clock.release("screen");
    $("screen").hidden = true;
    $("reading").hidden = false;
    $("kind").textContent = TITLES[shown.task] ?? shown.section;
    $("kind").hidden = shown.questions.some((q) => q.label === $("kind").textContent);
    $("tag").textContent = shown.training ? "Training case: it does not count" : this.store.step(this.item) === "done" ? "Answered; a change is kept when you go on" : "";
    $("prompt").textContent = shown.prompt ?? "";
    $("prompt").hidden = !shown.prompt;
    $("back").disabled = position === 0 || this.startsSession(position);
    this.showPlace();
    this.say($("place").textContent + (shown.training ? ", training" : ""));
    $("reading").focus();
    await this.showPictures(shown);
  }

  async showPictures(shown) {
    const item = this.item;
    this.ready = false;
    this.ask();
    try {
      await this.stage.show(picturesOf(shown, this.store.step(item) !== ""));
    } catch (error) {
      this.alarm(`A picture could not be loaded: ${error.message}. Do not answer this case; check that the pack is whole.`, () => {
        this.alarm("");
        this.showPictures(shown);
      });
      return;
    }
    if (item !== this.item) return;
    this.ready = true;
    this.panel.refresh(); // marks can be drawn now
    this.hint();
    this.store.clock.release("loading");
    this.preload(this.position + 1);
  }

  ask() {
    $("hint").textContent = "";
    const training = this.study.items[this.item].training;
    this.panel = new Panel($("questions"), {
      store: this.store,
      item: this.item,
      stage: this.stage,
      training,
      shut: () => this.shut,
      onAnswer: () => this.hint(),
    });
    const feedback = training && this.store.step(this.item) === "done" ? this.study.items[this.item].feedback : null;
    $("feedback").hidden = !feedback;
    $("feedback").textContent = feedback ?? "";
    $("ask").scrollTop = 0;
    this.hint();
  }

  /** Nobody answers what he has not seen; and a key meant for the next case must not change one that is being saved. */
  get shut() {
    return !this.ready || Boolean(this.busy);
  }

  /** What the Next button will do, and what it still waits for. */
  hint() {
    $("questions").inert = this.shut;
    const missing = this.panel.missing();
    const item = this.study.items[this.item];
    const reveals = item.questions.some((q) => q.before_reveal) && this.store.step(this.item) === "";
    const learns = item.training && item.feedback && this.store.step(this.item) !== "done";
    $("nextlabel").textContent = reveals ? "Show what came next" : learns ? "Show feedback" : "Next case";
    $("next").setAttribute("aria-disabled", String(missing.length > 0 || this.shut));
    if (!missing.length) $("hint").textContent = "";
  }

  async next() {
    if (this.shut || $("reading").hidden) return;
    const missing = this.panel.missing();
    if (missing.length) {
      $("hint").textContent = `Still open: ${missing.join(" ")}`;
      return this.say($("hint").textContent);
    }
    const item = this.study.items[this.item];
    const step = this.store.step(this.item);
    const reveals = item.questions.some((q) => q.before_reveal) && step === "";
    const learns = item.training && item.feedback && step !== "done";
    const changed = this.store.unsent().some((row) => row.item === this.item);
    if (step !== "done" || changed) this.store.finish(this.item, reveals ? "revealed" : "done", this.panel.questions);
    if (!(await this.deliver())) return;
    this.say("Saved");
    if (reveals) {
      this.store.clock.hold("loading");
      await this.showPictures(item);
    } else if (learns) {
      this.ask();
      this.say(item.feedback);
    } else this.open(this.position + 1);
  }

  /** What is final is kept: on the disk, and by the server where there is one. False where it refuses; the next case then stays shut. */
  async deliver() {
    const rows = this.store.unsent();
    if (!rows.length) return true;
    this.busy = true;
    if (this.item) this.hint();
    this.store.clock.hold("saving");
    if (this.server) $("saved").textContent = "Saving…";
    try {
      await this.server?.send(rows);
      this.store.markSent(rows);
      await this.store.settled();
      return true;
    } catch (error) {
      this.alarm(`${error.message} Your answers are kept in this browser; pause to save them as a file.`);
      $("saved").textContent = "Not saved";
      return false;
    } finally {
      this.busy = false;
      this.store.clock.release("saving");
      if (this.item) this.hint();
    }
  }

  back() {
    if ($("reading").hidden || $("back").disabled || this.busy) return;
    this.showItem(this.position - 1);
  }

  /** The case leaves the screen: its time is put aside, nothing of it stays. */
  leave() {
    if (!this.item) return;
    this.store.bank(this.item);
    this.store.clock.hold("screen");
    this.item = null;
    this.alarm("");
    this.stage.clear();
  }

  preload(position) {
    const next = this.study.items[this.store.order[position]];
    const pictures = next ? picturesOf(next, false).filter((picture) => !picture.film) : [];
    this.ahead = pictures.flatMap((picture) => picture.files).slice(0, 40).map((file) => Object.assign(new Image(), { src: file }));
  }

  // ---- what the reader is told

  showPlace() {
    const shown = Boolean(this.item);
    for (const id of ["progress", "pause", "keys"]) $(id).hidden = !this.store || (!shown && id !== "keys");
    if (!shown) return;
    const count = this.store.order.length;
    const sessions = this.study.readers[this.store.reader].sessions?.length ?? 1;
    $("bar").max = count;
    $("bar").value = this.store.frontier();
    $("place").textContent = `Case ${this.position + 1} of ${count}` + (sessions > 1 ? ` · session ${this.store.sessionAt(this.position) + 1} of ${sessions}` : "");
  }

  say(text) {
    $("live").textContent = text;
    $("saved").textContent = text === "Saved" ? "Saved" : $("saved").textContent;
  }

  alarm(text, retry) {
    $("alarm").hidden = !text;
    $("alarm").replaceChildren(el("span", { text }), ...(retry ? [button("Try again", retry)] : []));
  }

  warnUnkept() {
    if (!this.store.kept) $("unkept").textContent = "Not kept by this browser: pause and save your answers as a file before you close it.";
    $("unkept").hidden = this.store.kept;
  }

  help() {
    this.store?.clock.hold("help");
    $("help").showModal();
  }

  pause() {
    if ($("reading").hidden) return;
    this.store.clock.hold("paused");
    this.store.bank(this.item);
    this.stage.play(false);
    $("pausedplace").textContent = `${plural(this.store.frontier(), "case")} of ${this.store.order.length} done. The clock stands still.`;
    $("pausedsave").replaceChildren(...this.screens.savers());
    $("paused").showModal();
    $("resume").focus();
  }

  // ---- what happens to the page

  listen() {
    document.addEventListener("keydown", (event) => this.key(event));
    document.addEventListener("visibilitychange", () => {
      if (!this.store) return;
      if (document.hidden) this.store.clock.hold("hidden");
      else this.store.clock.release("hidden");
      this.bank();
    });
    window.addEventListener("pagehide", () => this.bank());
    setInterval(() => this.bank(), 5000); // a killed browser loses no more of the time
    window.addEventListener("storage", (event) => this.store && event.key === this.store.key && this.elsewhere());
    window.addEventListener("beforeunload", (event) => {
      const rows = this.store?.kept === false ? this.store.rows().length : 0;
      if (rows > (this.exported ?? 0)) event.preventDefault();
    });
    // A mouse that pressed a button gives the keys back to the pictures: Space then plays, and does not press it again.
    $("reading").addEventListener("click", (event) => {
      if (event.detail > 0 && event.target.closest("button")) $("reading").focus();
    });
  }

  bank() {
    if (this.item && !this.busy) this.store.bank(this.item);
  }

  /** Another window goes on with the same reader: two of them would overwrite each other. */
  elsewhere() {
    this.store.storage = { setItem() {} };
    this.screens.show(
      "Open in another window",
      el("p", { text: "This study goes on in another window of this browser. Close this one, or go on here." }),
      el("div", { class: "row" }, button("Go on here", () => window.location.reload())),
    );
    this.store = null;
  }

  key(event) {
    if (event.ctrlKey && event.key === "Enter") return this.next();
    if (event.ctrlKey || event.metaKey || event.altKey || event.defaultPrevented) return undefined;
    const typing = event.target.closest?.("textarea, input[type=text]");
    if (event.key === "?" && !typing) return this.taken(event, () => this.help());
    if ($("reading").hidden) return this.screenKey(event);
    if (typing) return this.typingKey(event, typing);
    if (event.target.type === "range" && event.key.startsWith("Arrow")) return undefined;
    return this.readingKey(event);
  }

  taken(event, action) {
    event.preventDefault();
    action();
  }

  screenKey(event) {
    const idle = !event.target.closest?.("button, select, input");
    const primary = $("screen").querySelector(".primary");
    if (event.key === "Enter" && !event.repeat && primary && (idle || event.target.tagName === "SELECT")) this.taken(event, () => primary.click());
  }

  /** In a field keys are text; Escape leaves it, Enter goes on from a number. */
  typingKey(event, field) {
    if (event.key === "Escape") return this.taken(event, () => $("reading").focus());
    if (event.key === "Enter" && field.tagName === "INPUT" && !event.repeat) return this.taken(event, () => this.next());
    return undefined;
  }

  readingKey(event) {
    const onButton = event.target.closest?.("button");
    const inAnswers = event.target.closest?.("#questions");
    if (this.stage.cross && pictureKey(this.stage, event)) return event.preventDefault();
    if (event.key === "Escape") return this.taken(event, () => $("reading").focus());
    if (onButton && event.key === " ") return undefined;
    if (onButton && event.key === "Enter" && !(inAnswers && !this.panel.missing().length)) return undefined;
    if (!this.ready) return undefined;
    if (/^\d$/.test(event.key)) {
      const used = event.repeat || this.busy || this.panel.digit(event.key);
      if (used !== "type") event.preventDefault();
      return undefined;
    }
    const actions = {
      Enter: () => this.next(),
      ArrowRight: () => this.next(),
      Backspace: () => this.back(),
      ArrowLeft: () => this.back(),
      c: () => this.panel.comment(),
      p: () => this.pause(),
    };
    const action = event.shiftKey ? undefined : actions[event.key.length === 1 ? event.key.toLowerCase() : event.key];
    if (action) return this.taken(event, () => event.repeat || action());
    if (pictureKey(this.stage, event)) event.preventDefault();
    return undefined;
  }
}

openStorage().then((storage) => new App(JSON.parse($("study").textContent), JSON.parse($("server")?.textContent ?? "null"), storage));
