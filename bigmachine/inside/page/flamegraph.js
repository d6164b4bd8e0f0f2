// Draws a tree of frames: the outermost above, each as wide as its share. Colours tell files apart, or what has become more
// (red) and less (blue). Arrows walk, Enter zooms, Escape goes back.

import { el, mark, say } from "./dom.js";
import { shares } from "./flame.js";
import { measured } from "./format.js";

const ROW = 20; // Pixels; the same in page.css.
const NARROWEST = 1.5; // Pixels: what is narrower could be neither seen nor hit.
const MAX_FRAMES = 5000;
const LIBRARY = /\/(lib|lib64)\/python[0-9.]+\/|\/site-packages\/|^<|(^|\/)bigmachine\//;

function hash(text) {
  let value = 0;
  for (const letter of text) value = (Math.imul(value, 31) + letter.codePointAt(0)) >>> 0;
  return value;
}

const signed = (points) => `${points < 0 ? "−" : "+"}${Math.abs(points).toFixed(1)}`;

export class FlameGraph {
  constructor() {
    this.frames = el("div", { class: "flame", role: "tree", "aria-label": "flame graph" });
    this.tip = el("div", { class: "tip", role: "tooltip", hidden: true });
    this.found = el("output", { class: "tally" });
    this.search = el("input", {
      type: "search",
      placeholder: "find a function or file",
      "aria-label": "find a function or file",
      oninput: () => this.#mark(),
    });
    this.node = el("div", { class: "flamegraph" }, this.frames, this.tip);
    this.shown = new Map(); // Frame → element.
    this.frames.addEventListener("click", (event) =>
      this.#at(event, (frame) => this.zoom(frame === this.focus ? (frame.parent ?? frame) : frame)),
    );
    this.frames.addEventListener("keydown", (event) => this.#key(event));
    this.frames.addEventListener("pointermove", (event) => this.#at(event, (frame) => this.#tell(frame, event)));
    this.frames.addEventListener("pointerleave", () => (this.tip.hidden = true));
    this.frames.addEventListener("focusin", (event) => this.#at(event, (frame) => this.#tell(frame)));
    this.frames.addEventListener("focusout", () => (this.tip.hidden = true));
    new ResizeObserver(() => this.root && this.width !== this.frames.clientWidth && this.#draw()).observe(this.frames);
  }

  /** `unit` is of the values; `compared` whether there are two sides. */
  show(root, unit, compared) {
    Object.assign(this, { root, unit, compared, focus: root, current: root });
    this.#draw();
  }

  zoom(frame) {
    const had = this.frames.contains(document.activeElement);
    this.focus = this.current = frame;
    this.#draw();
    if (had) this.shown.get(frame)?.focus({ preventScroll: true });
  }

  /** Escape: true if there was something to go back from. */
  back() {
    if (!this.root || this.focus === this.root) return false;
    this.zoom(this.focus.parent);
    return true;
  }

  #draw() {
    this.width = this.frames.clientWidth;
    this.shown = new Map();
    const above = [];
    for (let frame = this.focus.parent; frame; frame = frame.parent) above.unshift(frame);
    above.forEach((frame, depth) => this.#add(frame, depth, 0, 1, true));
    const whole = shares(this.focus, this.root, this.compared).width || 1;
    const least = NARROWEST / (this.width || 1000);
    let deepest = above.length;
    const waiting = [[this.focus, above.length, 0]];
    for (let next = 0; next < waiting.length && this.shown.size < MAX_FRAMES; next += 1) {
      const [frame, depth, left] = waiting[next];
      const width = shares(frame, this.root, this.compared).width / whole;
      this.#add(frame, depth, left, frame === this.focus ? 1 : width, false);
      deepest = Math.max(deepest, depth);
      let at = left;
      for (const child of this.#children(frame)) {
        const wide = shares(child, this.root, this.compared).width / whole;
        if (wide < least) break;
        waiting.push([child, depth + 1, at]);
        at += wide;
      }
    }
    this.frames.style.height = `${(deepest + 1) * ROW}px`;
    this.frames.replaceChildren(...this.shown.values());
    this.shown.get(this.current)?.setAttribute("tabindex", "0");
    this.#mark();
  }

  /** The widest first. */
  #children(frame) {
    const width = (child) => shares(child, this.root, this.compared).width;
    return (frame.sorted ??= [...frame.children.values()].sort((one, two) => width(two) - width(one)));
  }

  #add(frame, depth, left, width, above) {
    const node = el(
      "div",
      {
        role: "treeitem",
        tabindex: "-1",
        "aria-level": depth + 1,
        "aria-label": this.#words(frame).join(", "),
        class: above ? "above" : null,
      },
      width * (this.width || 1000) > 24 ? this.#text(frame) : "",
    );
    Object.assign(node.style, {
      left: `${100 * left}%`,
      width: `${100 * width}%`,
      top: `${depth * ROW}px`,
      backgroundColor: this.#colour(frame),
    });
    node.frame = frame;
    this.shown.set(frame, node);
  }

  #text(frame) {
    if (!this.compared || frame === this.root) return frame.name;
    const { a, b } = shares(frame, this.root, true);
    return `${frame.name} ${signed(100 * (b - a))}`;
  }

  #colour(frame) {
    if (this.compared) {
      const { a, b } = shares(frame, this.root, true);
      const change = a + b ? (b - a) / (a + b) : 0;
      const strong = Math.round(100 * Math.min(1, Math.abs(change)));
      return Math.abs(change) < 0.02
        ? "hsl(0 0% 88%)"
        : change > 0
          ? `hsl(6 ${40 + strong / 2}% ${90 - 0.26 * strong}%)`
          : `hsl(212 ${40 + strong / 2}% ${90 - 0.24 * strong}%)`;
    }
    if (!frame.file) return "hsl(0 0% 85%)";
    const tint = hash(frame.file);
    const light = 70 + (hash(frame.name) % 10);
    // A hue for each file, a shade for each function. The program's own stands out; what it uses is pale.
    return LIBRARY.test(frame.file)
      ? `hsl(${190 + (tint % 60)} 28% ${light + 6}%)`
      : `hsl(${(350 + (tint % 70)) % 360} 85% ${light}%)`;
  }

  /** What is known of a frame, line by line. */
  #words(frame) {
    const { a, b } = shares(frame, this.root, this.compared);
    const share = (value) => `${(100 * value).toFixed(1)} %`;
    const of = (side) => `${measured(frame.total[side], this.unit)}, itself ${measured(frame.self[side], this.unit)}`;
    const where = frame.file ? [`${frame.file}:${frame.line || frame.first}`] : [];
    if (!this.compared) return [frame.name, ...where, `${share(a)}: ${of(0)}`];
    return [
      frame.name,
      ...where,
      `A ${share(a)}: ${of(0)}`,
      `B ${share(b)}: ${of(1)}`,
      `${signed(100 * (b - a))} points in B`,
    ];
  }

  #at(event, act) {
    const frame = event.target.closest("[role=treeitem]")?.frame;
    if (frame) act(frame);
  }

  /** Beside the pointer, or below the frame that has the focus; always within the window. */
  #tell(frame, event = null) {
    this.tip.replaceChildren(...this.#words(frame).map((line) => el("span", {}, line)));
    this.tip.hidden = false;
    const box = this.shown.get(frame).getBoundingClientRect();
    const [x, y] = event ? [event.clientX + 12, event.clientY + 16] : [Math.max(0, box.left), box.bottom + 4];
    const { offsetWidth: width, offsetHeight: height } = this.tip;
    this.tip.style.left = `${Math.max(4, Math.min(x, document.documentElement.clientWidth - width - 8))}px`;
    this.tip.style.top = `${y + height > innerHeight ? Math.max(4, y - height - 28) : y}px`;
  }

  #mark() {
    const wanted = this.search.value.toLowerCase();
    const matches = (frame) => `${frame.name}\n${frame.file}`.toLowerCase().includes(wanted);
    for (const [frame, node] of this.shown) mark(node, "data-found", wanted ? (matches(frame) ? "yes" : "no") : null);
    if (!wanted || !this.root) return say(this.found, "");
    let hit = 0;
    const walk = (frame) => {
      if (frame !== this.root && matches(frame)) hit += shares(frame, this.root, this.compared).width;
      else frame.children.forEach(walk);
    };
    walk(this.root);
    return say(this.found, `${(100 * hit).toFixed(1)} % is in what was found`);
  }

  #key(event) {
    const frame = event.target.frame;
    if (!frame) return;
    const siblings = frame.parent ? this.#children(frame.parent) : [frame];
    const beside = (by) => siblings[siblings.indexOf(frame) + by];
    const next = {
      ArrowDown: () => this.#children(frame)[0],
      ArrowUp: () => frame.parent,
      ArrowRight: () => beside(1),
      ArrowLeft: () => beside(-1),
      Home: () => this.root,
    }[event.key];
    if (next) {
      const node = this.shown.get(next());
      if (node) {
        this.shown.get(this.current)?.setAttribute("tabindex", "-1");
        this.current = node.frame;
        node.setAttribute("tabindex", "0");
        node.focus();
      }
    } else if (event.key === "Enter" || event.key === " ") this.zoom(frame);
    else return;
    event.preventDefault();
    event.stopPropagation();
  }
}
