// One picture: an image, the slices of a stack or a film, on its canvas with window and level, zoom, place and marks.
//
// Pages opened from disk may show their pictures but not read their pixels, so window and level are an SVG transfer function on the 8-bit
// values (exact, and the same in every browser) over a canvas that draws the picture at the screen's own resolution.

const SVG = "http://www.w3.org/2000/svg";
const GREY = { centre: 127.5, width: 255, inverted: false };
const HOME = { zoom: 1, x: 0.5, y: 0.5 };
const STRIP = 2.8; // wider than this it is a strip (an ECG) and goes below the others

const clamp = (value, low, high) => Math.min(high, Math.max(low, value));

/** What an item shows, one entry per picture on the screen: a sequence is several, a stack or a film is one with many frames. */
function picturesOf(item, revealed) {
  return item.media.flatMap((medium, index) => {
    if (medium.reveal && !revealed) return [];
    const { width, height, fps = 25, text = "", label = "", reveal = false } = medium;
    const base = { media: index, first: 0, width, height, fps, text, label, reveal, files: [medium.file] };
    if (medium.kind === "sequence") {
      return medium.frames.map((f, n) => ({ ...base, first: n, files: [f.file], label: f.label ?? label, text: n ? "" : text }));
    }
    if (medium.kind === "stack") return [{ ...base, files: medium.frames.map((f) => f.file), labels: medium.frames.map((f) => f.label) }];
    return [medium.kind === "video" ? { ...base, film: medium.file } : base];
  });
}

/** A picture, or the slices of a stack. */
class Slides {
  constructor(files) {
    this.files = files;
    this.count = files.length;
    this.frame = 0;
  }

  async load() {
    this.images = await Promise.all(
      this.files.map(async (file) => {
        const image = new Image();
        image.src = file;
        await image.decode().catch(() => Promise.reject(new Error(file)));
        return image;
      }),
    );
  }

  get image() {
    return this.images?.[this.frame];
  }

  show(frame) {
    this.frame = clamp(frame, 0, this.count - 1);
  }

  close() {}
}

/** A film, stepped frame by frame through its time stamps. */
class Film {
  constructor(file, fps, changed) {
    this.file = file;
    this.fps = fps;
    this.changed = changed;
    this.count = 1;
    this.frame = 0;
    this.video = el("video", { class: "film", loop: true, playsinline: true, preload: "auto", tabindex: "-1", "aria-hidden": "true" });
    this.video.muted = true;
  }

  load() {
    return new Promise((resolve, reject) => {
      this.video.addEventListener("error", () => reject(new Error(this.file)), { once: true });
      this.video.addEventListener("loadeddata", () => {
        this.count = Math.max(1, Math.round(this.video.duration * this.fps));
        this.video.addEventListener("seeked", () => this.seeked());
        this.watch();
        resolve();
      });
      this.video.src = this.file;
    });
  }

  get image() {
    return this.video.readyState >= 2 ? this.video : undefined;
  }

  watch() {
    if (this.closed) return;
    const shown = (_, { mediaTime }) => {
      this.watch(); // first: a frame that arrives while this one is drawn would go unseen
      if (!this.video.paused) this.at(Math.round(mediaTime * this.fps));
      else if (!this.closed) this.changed(); // "seeked" may come before the frame itself: the one before would stay on the canvas
    };
    if (this.video.requestVideoFrameCallback) this.video.requestVideoFrameCallback(shown);
    else requestAnimationFrame(() => shown(0, { mediaTime: this.video.currentTime - 0.5 / this.fps }));
  }

  at(frame) {
    if (this.closed) return;
    this.frame = clamp(frame, 0, this.count - 1);
    this.changed();
  }

  /** Steps faster than the decoder are joined: only the last one wanted is sought next. */
  show(frame) {
    this.video.pause();
    this.wanted = (frame + this.count) % this.count;
    this.frame = this.wanted;
    if (!this.video.seeking) this.seek();
  }

  seek() {
    this.sought = this.wanted;
    this.video.currentTime = (this.wanted + 0.5) / this.fps; // the middle of the frame: rounding cannot show its neighbour
  }

  seeked() {
    if (this.wanted !== undefined && this.wanted !== this.sought) this.seek();
    else if (!this.closed) this.changed();
  }

  close() {
    this.closed = true;
    this.video.pause();
    this.video.removeAttribute("src");
    this.video.load();
  }
}

/** An SVG filter that maps each channel by slope · v + intercept, clipped to 0…1. */
function windowFilter(id, slope, intercept) {
  const svg = (name, attributes, ...children) => {
    const node = document.createElementNS(SVG, name);
    for (const [attribute, value] of Object.entries(attributes)) node.setAttribute(attribute, value);
    node.append(...children);
    return node;
  };
  const transfer = ["R", "G", "B"].map((channel) => svg(`feFunc${channel}`, { type: "linear", slope, intercept }));
  const whole = { x: 0, y: 0, width: 1, height: 1 };
  // sRGB: the default would window in linear light
  return svg("filter", { id, "color-interpolation-filters": "sRGB", ...whole }, svg("feComponentTransfer", {}, ...transfer));
}

/** One picture on the screen: its canvas, the canvas of its marks, its caption. */
class Pane {
  constructor(picture, number, stage) {
    Object.assign(this, { picture, number, stage });
    this.view = { ...HOME };
    this.grey = { ...GREY };
    this.source = picture.film ? new Film(picture.film, picture.fps, () => stage.frameChanged(this)) : new Slides(picture.files);
    this.canvas = el("canvas", { class: "pixels" });
    this.marks = el("canvas", { class: "marks" });
    this.caption = el("figcaption");
    this.area = el("div", { class: "area" }, this.canvas, this.marks);
    const name = picture.label || `Picture ${number + 1}`;
    this.element = el("figure", { class: "pane", tabindex: "0", "aria-label": name, "data-pane": number }, this.area, this.caption);
    if (picture.reveal) this.element.classList.add("revealed");
    this.isStrip = picture.width / picture.height >= STRIP;
    this.element.classList.toggle("strip", this.isStrip);
    if (picture.film) this.area.append(this.source.video);
    this.filter = windowFilter(`window-${number}`, 1, 0);
    this.describe();
  }

  describe() {
    const { label, labels, text } = this.picture;
    const many = this.source.count > 1 && this.stage.panes.length > 1 ? `${this.source.frame + 1} / ${this.source.count}` : "";
    const parts = [label, labels?.[this.source.frame], many].filter(Boolean);
    this.caption.replaceChildren(el("span", { class: "label", text: parts.join("  ·  ") }));
    if (text) this.caption.append(el("p", { class: "report", text }));
    this.caption.hidden = !parts.length && !text;
  }

  resize() {
    const ratio = window.devicePixelRatio || 1;
    const { clientWidth, clientHeight } = this.area;
    for (const canvas of [this.canvas, this.marks]) {
      canvas.width = Math.round(clientWidth * ratio);
      canvas.height = Math.round(clientHeight * ratio);
    }
    this.ratio = ratio;
    this.draw();
  }

  /** Where the picture lies on the canvas: device pixels per picture pixel, and its upper left corner. */
  placement() {
    const { width, height } = this.picture;
    let scale = Math.min(this.canvas.width / width, this.canvas.height / height) * this.view.zoom;
    if (!this.stage.smooth && scale > 1) scale = Math.floor(scale); // equal blocks: no pixel looks larger than another
    return {
      scale,
      left: Math.round(this.canvas.width / 2 - this.view.x * width * scale),
      top: Math.round(this.canvas.height / 2 - this.view.y * height * scale),
    };
  }

  draw() {
    const context = this.canvas.getContext("2d", { willReadFrequently: true }); // else WebKit draws it where the filter does not reach
    context.clearRect(0, 0, this.canvas.width, this.canvas.height);
    const image = this.source.image;
    if (image) {
      const { scale, left, top } = this.placement();
      context.imageSmoothingEnabled = this.stage.smooth;
      context.imageSmoothingQuality = "high";
      context.drawImage(image, left, top, this.picture.width * scale, this.picture.height * scale);
    }
    this.applyWindow();
    this.drawMarks();
    this.placeCaption();
  }

  /** The caption stands right under its picture, wherever that ends. */
  placeCaption() {
    const { scale, top } = this.placement();
    const gap = (this.canvas.height - top - this.picture.height * scale) / this.ratio;
    this.caption.style.transform = `translateY(${-Math.max(0, Math.floor(gap))}px)`;
  }

  /** out = (v − (centre − width / 2)) / width on 8-bit values, clipped; turned round if inverted. */
  applyWindow() {
    const { centre, width, inverted } = this.grey;
    const slope = (inverted ? -255 : 255) / width;
    const low = -(centre - width / 2) / width;
    const id = `window-${this.number}-${width}-${centre}-${inverted}`;
    if (this.filter.id === id) return;
    const filter = windowFilter(id, slope, inverted ? 1 - low : low); // a new one: WebKit goes on painting one that is changed as it was
    this.filter.replaceWith(filter);
    this.filter = filter;
    const plain = !inverted && centre === GREY.centre && width === GREY.width;
    this.canvas.style.filter = plain ? "none" : `url("#${id}")`;
  }

  /** Rings in amber with a dark rim, to be seen on black and on white; fainter where they belong to another frame. */
  drawMarks() {
    const context = this.marks.getContext("2d");
    context.clearRect(0, 0, this.marks.width, this.marks.height);
    for (const mark of this.stage.marks.filter((m) => this.owns(m))) {
      context.globalAlpha = mark.frame === this.frameNumber() ? 1 : 0.3;
      const [x, y] = this.toCanvas(mark.x, mark.y);
      this.stroke(context, (c) => c.arc(x, y, 11 * this.ratio, 0, 2 * Math.PI));
    }
    context.globalAlpha = 1;
    const cross = this.stage.cross;
    if (cross?.pane !== this) return;
    const [x, y] = this.toCanvas(cross.x, cross.y);
    const [gap, arm] = [5 * this.ratio, 26 * this.ratio];
    for (const [dx, dy] of [[1, 0], [-1, 0], [0, 1], [0, -1]]) {
      this.stroke(context, (c) => (c.moveTo(x + gap * dx, y + gap * dy), c.lineTo(x + arm * dx, y + arm * dy)));
    }
  }

  stroke(context, path) {
    for (const [colour, width] of [["#000", 5], ["#ffb938", 2.5]]) {
      context.beginPath();
      path(context);
      context.strokeStyle = colour;
      context.lineWidth = width * this.ratio;
      context.stroke();
    }
  }

  /** A mark is of this pane's medium; in a sequence also of its visit. */
  owns(mark) {
    return mark.media === this.picture.media && (this.source.count > 1 || mark.frame === this.picture.first);
  }

  frameNumber() {
    return this.picture.first + this.source.frame;
  }

  toCanvas(x, y) {
    const { scale, left, top } = this.placement();
    return [left + x * scale, top + y * scale];
  }

  /** Pixels of the picture under a point of the window. */
  toPicture(clientX, clientY) {
    const box = this.area.getBoundingClientRect();
    const { scale, left, top } = this.placement();
    return [((clientX - box.left) * this.ratio - left) / scale, ((clientY - box.top) * this.ratio - top) / scale];
  }

  zoomBy(factor, clientX, clientY) {
    const { width, height } = this.picture;
    const [x, y] = clientX === undefined ? [this.view.x * width, this.view.y * height] : this.toPicture(clientX, clientY);
    const zoom = clamp(this.view.zoom * factor, 1, 24);
    const share = 1 - this.view.zoom / zoom; // the point under the pointer stays where it is
    this.look({ zoom, x: this.view.x + (x / width - this.view.x) * share, y: this.view.y + (y / height - this.view.y) * share });
  }

  panBy(dx, dy) {
    const { scale } = this.placement();
    const { width, height } = this.picture;
    const move = (d, size) => (d * this.ratio) / (scale * size);
    this.look({ ...this.view, x: this.view.x - move(dx, width), y: this.view.y - move(dy, height) });
  }

  look({ zoom, x, y }) {
    this.view = zoom === 1 ? { ...HOME } : { zoom, x: clamp(x, 0, 1), y: clamp(y, 0, 1) };
  }
}
