// The hand on the pictures: their row of tools, the mouse, the pen and fingers, the keys.

/** A row of buttons that shows only what these pictures can use. */
class Toolbar {
  constructor(root, stage) {
    Object.assign(this, { root, stage });
  }

  build() {
    const { stage } = this;
    const button = (text, keys, click, extra = {}) =>
      el("button", { type: "button", text, title: `${extra.title ?? text} (${keys})`, "aria-keyshortcuts": keys, ...extra, click });
    const group = (name, ...children) => el("div", { class: "group", role: "group", "aria-label": name }, ...children);
    this.play = this.counter = null;
    const many = stage.large().length > 1;
    const count = Math.max(1, ...stage.panes.map((pane) => pane.source.count));
    this.window = button("Window", "T", () => this.choose("window"), { title: "Dragging changes window and level" });
    this.pan = button("Pan", "T", () => this.choose("pan"), { title: "Dragging moves the picture" });
    this.invert = button("Invert", "I", () => stage.invert());
    this.pixels = button("Pixels", "N", () => stage.toggleSmooth(), { title: "Show pixels as they are, without smoothing" });
    this.flipping = button("One at a time", "V", () => stage.toggleFlipping(), { title: "One picture at a time, or side by side" });
    this.linked = button("Linked", "L", () => stage.toggleLinked(), { title: "All pictures follow zoom and window" });
    this.root.replaceChildren(
      group("Dragging", this.window, this.pan),
      group(
        "Zoom",
        button("−", "-", () => stage.zoomBy(1 / 1.25), { "aria-label": "Zoom out" }),
        button("+", "+", () => stage.zoomBy(1.25), { "aria-label": "Zoom in" }),
        button("Reset", "R", () => stage.reset(), { title: "Window, zoom and place as at first" }),
      ),
      group("Display", this.invert, this.pixels, ...(many ? [this.flipping, this.linked] : [])),
      ...(count > 1 ? [this.frames(count, button, group)] : []),
    );
    this.refresh();
  }

  frames(count, button, group) {
    const { stage } = this;
    const film = stage.films().length > 0;
    this.slider = el("input", { type: "range", min: 0, max: count - 1, step: 1, "aria-label": film ? "Frame" : "Slice" });
    this.slider.addEventListener("input", () => stage.goTo(Number(this.slider.value)));
    this.play = button("Play", "Space", () => stage.play());
    this.rate = el("output", { class: "rate", "aria-label": "Speed" });
    this.counter = el("output", { class: "counter", "aria-label": film ? "Frame" : "Slice" });
    const back = button("‹", ",", () => stage.step(-1), { "aria-label": film ? "Frame back" : "Slice back" });
    const on = button("›", ".", () => stage.step(1), { "aria-label": film ? "Frame forward" : "Slice forward" });
    const slower = button("Slower", "<", () => stage.faster(-1));
    const faster = button("Faster", ">", () => stage.faster(1));
    if (!film) return group("Slices", back, this.slider, on, this.counter);
    return group("Cine", this.play, back, this.slider, on, this.counter, slower, this.rate, faster);
  }

  choose(tool) {
    this.stage.tool = tool;
    this.refresh();
  }

  refresh() {
    const { stage } = this;
    if (!this.window || !stage.active) return;
    const press = (button, on) => button.setAttribute("aria-pressed", String(Boolean(on)));
    const { grey, view } = stage.active;
    press(this.window, stage.tool === "window");
    press(this.pan, stage.tool === "pan");
    press(this.invert, grey.inverted);
    press(this.pixels, !stage.smooth);
    press(this.flipping, stage.flipping);
    press(this.linked, stage.linked);
    const { centre, width } = GREY;
    stage.values.hidden = grey.width === width && grey.centre === centre && view.zoom === 1;
    stage.values.textContent = `W ${Math.round(grey.width)}  L ${Math.round(grey.centre)}  ×${view.zoom.toFixed(1)}`;
    if (this.play) {
      this.play.textContent = stage.playing ? "Pause" : "Play";
      this.rate.textContent = `${SPEEDS[stage.speed]}×`;
    }
    this.refreshFrames();
  }

  refreshFrames() {
    const leader = this.stage.leader();
    if (!leader || !this.counter) return;
    const { frame, count } = leader.source;
    this.slider.value = frame;
    this.counter.textContent = `${frame + 1} / ${count}`;
  }
}

/** Drag, click, wheel and pinch on the pictures. */
function listenToPointers(stage) {
  const held = new Map(); // pointer id → where it is
  let start = null;
  let moved = false;
  let turned = 0;

  stage.root.addEventListener("pointerdown", (event) => {
    const pane = stage.paneAt(event.clientX, event.clientY);
    if (!pane) return;
    pane.element.setPointerCapture(event.pointerId);
    held.set(event.pointerId, { x: event.clientX, y: event.clientY });
    if (held.size === 1) moved = false;
    stage.activate(pane);
    start = { pane, x: event.clientX, y: event.clientY, other: event.button !== 0 || event.shiftKey };
  });

  stage.root.addEventListener("pointermove", (event) => {
    const last = held.get(event.pointerId);
    if (!last) return;
    const now = { x: event.clientX, y: event.clientY };
    if (Math.hypot(now.x - start.x, now.y - start.y) > 4) moved = true;
    if (held.size === 2) pinch(stage, held, event.pointerId, now);
    else if (moved && held.size === 1) {
      if ((stage.tool === "window") !== start.other) stage.windowBy(now.x - last.x, last.y - now.y);
      else stage.panBy(now.x - last.x, now.y - last.y);
    }
    held.set(event.pointerId, now);
  });

  const up = (event) => {
    if (!held.delete(event.pointerId)) return;
    if (held.size) moved = true; // what remains of a pinch is not a tap
    else if (!moved && event.type === "pointerup" && event.button === 0) {
      stage.mark(start.pane, ...start.pane.toPicture(event.clientX, event.clientY));
    }
  };
  stage.root.addEventListener("pointerup", up);
  stage.root.addEventListener("pointercancel", up);
  stage.root.addEventListener("contextmenu", (event) => event.preventDefault()); // the right button moves the picture

  stage.root.addEventListener(
    "wheel",
    (event) => {
      event.preventDefault();
      const delta = event.deltaY * (event.deltaMode === 1 ? 30 : 1);
      if (event.ctrlKey || !(stage.leader() || stage.flipping)) return stage.zoomBy(Math.exp(-delta / 600), event.clientX, event.clientY);
      turned += delta;
      if (Math.abs(turned) < 50) return; // one notch of a wheel is one slice, and so are some millimetres on a touch pad
      stage.step(Math.sign(turned));
      turned = 0;
    },
    { passive: false },
  );
}

function pinch(stage, held, id, now) {
  const [, other] = [...held].find(([key]) => key !== id);
  const last = held.get(id);
  const distance = (p) => Math.hypot(p.x - other.x, p.y - other.y);
  stage.zoomBy(distance(now) / Math.max(1, distance(last)), (now.x + other.x) / 2, (now.y + other.y) / 2);
  stage.panBy((now.x - last.x) / 2, (now.y - last.y) / 2);
}

const PICTURE_KEYS = {
  ArrowUp: (stage) => stage.step(-1),
  ArrowDown: (stage) => stage.step(1),
  ",": (stage) => stage.step(-1),
  ".": (stage) => stage.step(1),
  PageUp: (stage) => stage.flip(-1),
  PageDown: (stage) => stage.flip(1),
  " ": (stage) => stage.play(),
  "<": (stage) => stage.faster(-1),
  ">": (stage) => stage.faster(1),
  "+": (stage) => stage.zoomBy(1.25),
  "=": (stage) => stage.zoomBy(1.25),
  "-": (stage) => stage.zoomBy(1 / 1.25),
  w: (stage) => stage.panBy(0, 60),
  a: (stage) => stage.panBy(60, 0),
  s: (stage) => stage.panBy(0, -60),
  d: (stage) => stage.panBy(-60, 0),
  t: (stage) => stage.toolbar.choose(stage.tool === "window" ? "pan" : "window"),
  i: (stage) => stage.invert(),
  n: (stage) => stage.toggleSmooth(),
  r: (stage) => stage.reset(),
  v: (stage) => stage.toggleFlipping(),
  l: (stage) => stage.toggleLinked(),
  m: (stage) => stage.toggleCross(),
};
const WINDOW_KEYS = { ArrowLeft: [-10, 0], ArrowRight: [10, 0], ArrowUp: [0, 5], ArrowDown: [0, -5] };

/** Keys of the pictures; true if it was one. */
function pictureKey(stage, event) {
  if (stage.cross && stage.crossKey(event)) return true;
  if (event.shiftKey && WINDOW_KEYS[event.key]) {
    stage.windowBy(...WINDOW_KEYS[event.key]);
    return true;
  }
  const action = PICTURE_KEYS[event.key.length === 1 ? event.key.toLowerCase() : event.key];
  action?.(stage);
  return Boolean(action);
}
