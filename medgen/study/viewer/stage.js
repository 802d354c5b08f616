// All pictures of a case together: how they are laid out, what moves them together, and the marks on them.

const SPEEDS = [0.1, 0.25, 0.5, 0.75, 1, 1.5, 2];

const CAPTION = 30; // px under a picture

/** Columns for `count` pictures of this shape: as large as can be, and in one row where that costs little (courses read left to right). */
function bestColumns(count, aspect, width, height) {
  const size = (columns) => Math.min(width / columns, (height / Math.ceil(count / columns) - CAPTION) * aspect);
  const all = [...Array(count).keys()].map((n) => n + 1);
  const largest = Math.max(...all.map(size));
  const rows = Math.ceil(count / all.reverse().find((columns) => size(columns) >= 0.88 * largest));
  return Math.ceil(count / rows); // four are two and two, not three and one
}

/** All pictures of an item with their tools. */
class Stage {
  constructor({ panes, filters, tools, values }) {
    Object.assign(this, { root: panes, filters, values });
    this.panes = [];
    this.marks = [];
    this.smooth = true;
    this.linked = true;
    this.speed = SPEEDS.indexOf(1);
    this.toolbar = new Toolbar(tools, this);
    new ResizeObserver(() => this.layout()).observe(this.root);
    listenToPointers(this);
  }

  /** Show these pictures; resolves when all can be seen, rejects with the file that cannot. */
  async show(pictures) {
    this.clear();
    this.panes = pictures.map((picture, n) => new Pane(picture, n, this));
    this.filters.replaceChildren(...this.panes.map((pane) => pane.filter));
    this.root.replaceChildren(...this.panes.map((pane) => pane.element));
    for (const pane of this.panes) pane.element.addEventListener("focus", () => this.activate(pane));
    const panes = this.panes;
    this.active = panes[0];
    this.layout();
    await Promise.all(panes.map((pane) => pane.source.load()));
    if (panes !== this.panes) return;
    this.toolbar.build();
    this.layout();
    if (this.films().length && !matchMedia("(prefers-reduced-motion: reduce)").matches) this.play(true);
  }

  clear() {
    this.panes.forEach((pane) => pane.source.close());
    this.panes = [];
    this.root.replaceChildren();
    Object.assign(this, { linked: true, flipping: false, cross: null, marks: [], canMark: false, tool: "window", playing: false, active: undefined });
    this.toolbar.build();
  }

  films() {
    return this.panes.filter((pane) => pane.picture.film).map((pane) => pane.source);
  }

  activate(pane) {
    this.active = pane;
    this.panes.forEach((p) => p.element.classList.toggle("active", p === pane && !this.linked && this.panes.length > 1));
    this.toolbar.refresh();
  }

  /** The panes that a change of view or window applies to. */
  targets() {
    return this.linked ? this.panes : [this.active].filter(Boolean);
  }

  /** Pictures that are no strips (an ECG below a film); a strip alone counts as one. */
  large() {
    const large = this.panes.filter((pane) => !pane.isStrip);
    return large.length ? large : this.panes;
  }

  layout() {
    const large = this.large();
    if (!large.length) return;
    const strips = this.panes.filter((pane) => !large.includes(pane));
    large.forEach((pane) => (pane.element.hidden = this.flipping && pane !== this.active));
    const { clientWidth: width, clientHeight: height } = this.root;
    const heights = strips.map(({ picture }) => Math.min(0.25 * height, (width * picture.height) / picture.width + CAPTION));
    const { picture } = large[0];
    const count = this.flipping ? 1 : large.length;
    const room = heights.reduce((rest, strip) => rest - strip, height);
    const columns = bestColumns(count, picture.width / picture.height, width, room);
    this.root.style.gridTemplateColumns = `repeat(${columns}, minmax(0, 1fr))`;
    const rows = [`repeat(${Math.ceil(count / columns)}, minmax(0, 1fr))`, ...heights.map((strip) => `${strip}px`)];
    this.root.style.gridTemplateRows = rows.join(" ");
    this.panes.forEach((pane) => !pane.element.hidden && pane.resize());
    this.toolbar.refresh();
  }

  draw() {
    this.panes.forEach((pane) => pane.draw());
    this.toolbar.refresh();
  }

  change(action) {
    this.targets().forEach(action);
    this.draw();
  }

  zoomBy(factor, x, y) {
    const from = this.paneAt(x, y) ?? this.active;
    if (!from) return;
    from.zoomBy(factor, x, y);
    this.follow(from);
  }

  panBy(dx, dy) {
    if (!this.active) return;
    this.active.panBy(dx, dy);
    this.follow(this.active);
  }

  /** Linked panes look where this one looks. */
  follow(from) {
    if (this.linked) this.panes.forEach((pane) => (pane.view = { ...from.view }));
    this.draw();
  }

  windowBy(wider, brighter) {
    this.change(({ grey }) => {
      grey.width = clamp(grey.width + wider, 2, 510);
      grey.centre = clamp(grey.centre - brighter, -64, 319);
    });
  }

  invert() {
    this.change(({ grey }) => (grey.inverted = !grey.inverted));
  }

  fit() {
    this.change((pane) => (pane.view = { ...HOME }));
  }

  reset() {
    this.change((pane) => Object.assign(pane, { view: { ...HOME }, grey: { ...GREY } }));
  }

  toggleSmooth() {
    this.smooth = !this.smooth;
    this.draw();
  }

  toggleLinked() {
    this.linked = !this.linked;
    if (this.linked && this.active) {
      const { view, grey } = this.active;
      this.panes.forEach((pane) => Object.assign(pane, { view: { ...view }, grey: { ...grey } }));
    }
    this.activate(this.active);
    this.draw();
  }

  /** Side by side, or one picture at a time in the same place. */
  toggleFlipping() {
    if (this.large().length < 2) return;
    this.flipping = !this.flipping;
    if (!this.large().includes(this.active)) this.activate(this.large()[0]);
    this.layout();
  }

  flip(by) {
    if (!this.flipping) return;
    const flat = this.large();
    this.activate(flat[(flat.indexOf(this.active) + by + flat.length) % flat.length]);
    if (this.cross) this.cross.pane = this.active;
    this.layout();
  }

  /** The next frame or slice; where pictures have one frame each, the next picture. */
  step(by) {
    const lead = this.leader();
    if (!lead) return this.flip(by);
    const moving = this.linked ? this.panes.filter((pane) => pane.source.count > 1) : [lead];
    const frame = lead.source.frame + by;
    this.playing = false;
    moving.forEach((pane) => pane.source.show(frame));
    moving.forEach((pane) => this.frameChanged(pane));
    this.toolbar.refresh();
  }

  goTo(frame) {
    const lead = this.leader();
    if (lead) this.step(frame - lead.source.frame);
  }

  /** The stack or film that others step with. */
  leader() {
    const moving = this.panes.filter((pane) => pane.source.count > 1);
    return moving.includes(this.active) ? this.active : moving[0];
  }

  frameChanged(pane) {
    pane.describe();
    pane.draw();
    this.toolbar.refreshFrames();
  }

  play(on = !this.playing) {
    const films = this.films();
    if (!films.length) return;
    this.playing = on;
    for (const film of films) {
      film.wanted = undefined;
      film.video.playbackRate = SPEEDS[this.speed];
      if (on) film.video.play().catch(() => film.closed || this.play(false));
    }
    if (!on) films.forEach((film) => film.show(films[0].frame)); // the clock ran on past the number that is shown; a pair stops on one frame
    this.toolbar.refresh();
  }

  faster(by) {
    this.speed = clamp(this.speed + by, 0, SPEEDS.length - 1);
    this.films().forEach((film) => (film.video.playbackRate = SPEEDS[this.speed]));
    this.toolbar.refresh();
  }

  paneAt(x, y) {
    const element = x === undefined ? null : document.elementFromPoint(x, y)?.closest(".pane");
    return element ? this.panes[Number(element.dataset.pane)] : undefined;
  }

  // ---- marks

  setMarks(marks, canMark) {
    this.marks = marks;
    this.canMark = canMark;
    if (!canMark) this.cross = null;
    this.root.classList.toggle("marking", canMark);
    this.draw();
  }

  /** Put a mark here, or take away the one that is here. */
  mark(pane, x, y) {
    const { width, height, media } = pane.picture;
    if (!this.canMark || x < 0 || y < 0 || x > width || y > height) return;
    const near = (14 * pane.ratio) / pane.placement().scale;
    const frame = pane.frameNumber();
    const same = (m) => m.media === media && m.frame === frame && Math.hypot(m.x - x, m.y - y) <= near;
    const round = (v) => Math.round(v * 10) / 10;
    const rest = this.marks.filter((m) => !same(m));
    this.onMark(rest.length < this.marks.length ? rest : [...rest, { media, frame, x: round(x), y: round(y) }]);
  }

  toggleCross() {
    if (!this.canMark || !this.active) return;
    const { width, height } = this.active.picture;
    const { x, y } = this.active.view;
    this.cross = this.cross ? null : { pane: this.active, x: x * width, y: y * height };
    this.play(false);
    this.draw();
  }

  /** Keys while the cross hair is out; true if one of them. */
  crossKey(event) {
    const moves = { ArrowLeft: [-1, 0], ArrowRight: [1, 0], ArrowUp: [0, -1], ArrowDown: [0, 1] };
    const { pane } = this.cross;
    const { width, height } = pane.picture;
    if (moves[event.key]) {
      const step = event.shiftKey ? 1 : Math.max(1, Math.max(width, height) / 40 / pane.view.zoom);
      this.cross.x = clamp(this.cross.x + moves[event.key][0] * step, 0, width);
      this.cross.y = clamp(this.cross.y + moves[event.key][1] * step, 0, height);
      this.draw();
    } else if (event.key === " " || event.key === "Enter") this.mark(pane, this.cross.x, this.cross.y);
    else if (event.key === "Escape" || event.key.toLowerCase() === "m") this.toggleCross();
    else return false;
    return true;
  }
}
