// The last lines of output, as they come. What is shown is bounded; nothing is asked for while nobody looks.

import { el, mark, offer, say } from "./dom.js";
import { clock, plain } from "./format.js";

const EVERY = 1000; // Milliseconds between questions.
const FIRST = 1000; // Lines to begin with.
const MOST = 5000; // Lines that are kept; the oldest go first.
const HUES = 12;

export class Logs {
  constructor({ ask }) {
    this.ask = ask;
    this.after = null; // The number of the last line; null: begin with the last ones.
    this.colours = new Map();
    this.machine = el("select", { "aria-label": "machine", onchange: () => this.#again() });
    this.filter = el("input", {
      type: "search",
      placeholder: "lines with …",
      "aria-label": "lines with",
      oninput: () => this.#filter(),
    });
    this.follow = el("input", { type: "checkbox", checked: true, onchange: () => this.#down() });
    this.pause = el("button", { type: "button", "aria-pressed": "false", onclick: () => this.#pause() }, "Pause");
    this.tally = el("span", { class: "tally" });
    this.lines = el("ol", {
      class: "log",
      role: "log",
      "aria-live": "off",
      "aria-label": "lines of output",
      tabindex: "0",
    });
    this.lines.addEventListener("scroll", () => {
      const up = this.lines.scrollTop + this.lines.clientHeight < this.lines.scrollHeight - 30;
      if (this.follow.checked && up && performance.now() - (this.scrolled ?? 0) > 100) this.follow.checked = false;
    });
    this.node = el(
      "div",
      { class: "logs" },
      el(
        "div",
        { class: "bar" },
        this.machine,
        this.filter,
        el("label", {}, this.follow, " follow"),
        this.pause,
        this.tally,
      ),
      this.lines,
    );
    offer(this.machine, [["", "all machines"]]);
  }

  show(status) {
    offer(this.machine, [["", "all machines"], ...status.machines.map((machine) => [machine.id, plain(machine.id)])]);
    if (this.wanted !== undefined) {
      const wanted = this.wanted;
      delete this.wanted;
      this.pick(wanted);
    }
  }

  /** Only those of one machine. */
  pick(id) {
    if (this.machine.value === id) return;
    this.machine.value = id;
    if (this.machine.value !== id)
      this.wanted = id; // The status that has it is still to come.
    else this.#again();
  }

  shown() {
    this.looking = true;
    this.#down();
    this.#poll();
  }

  hidden() {
    this.looking = false;
    clearTimeout(this.timer);
  }

  /** Another session: nothing of the one before. */
  restart() {
    this.#again();
  }

  step() {}

  #again() {
    this.after = null;
    this.lines.replaceChildren();
    say(this.tally, "");
    if (this.looking) this.#poll();
  }

  #pause() {
    this.paused = !this.paused;
    mark(this.pause, "aria-pressed", String(this.paused));
    say(this.pause, this.paused ? "Go on" : "Pause");
    this.turn = null; // What is on its way comes too late.
    if (!this.paused && this.looking) this.#poll();
  }

  async #poll() {
    clearTimeout(this.timer);
    if (!this.looking || this.paused) return;
    const turn = (this.turn = {});
    const machine = this.machine.value;
    const query = new URLSearchParams(this.after === null ? { n: FIRST } : { after: this.after, limit: FIRST });
    if (machine) query.set("machine", machine);
    const found = document.hidden ? null : await this.ask(`logs.json?${query}`).catch(() => null);
    if (this.turn !== turn) return; // It was asked for something else meanwhile.
    if (found) this.#add(found);
    if (this.looking) this.timer = setTimeout(() => this.#poll(), found?.behind ? 0 : EVERY);
  }

  #add({ lines, lost, under_way: underWay = [] }) {
    for (const node of this.lines.querySelectorAll(".underway")) node.remove();
    if (lost) this.lines.append(el("li", { class: "soft" }, `… ${lost} lines were gone before they could be shown`));
    this.lines.append(...lines.map((line) => this.#line(line)));
    while (this.lines.childElementCount > MOST) this.lines.firstChild.remove();
    if (lines.length) this.after = lines.at(-1).number;
    else this.after ??= 0;
    for (const line of underWay) {
      // A progress bar, say: as it stands now.
      const node = this.#line(line);
      node.classList.add("underway");
      this.lines.append(node);
    }
    if (lines.length || underWay.length) this.#down();
    this.#tally();
  }

  #line(line) {
    const text = plain(line.text);
    const who = line.machine
      ? `${line.machine}${line.process && line.process !== "0" ? ` ${line.process}` : ""}`
      : line.process;
    const node = el(
      "li",
      { class: line.stream === "stderr" ? "stderr" : null },
      el("time", {}, clock(line.time)),
      " ",
      el("span", { class: `who hue${this.#colour(line.machine)}` }, plain(who)),
      " ",
      el("span", { class: "text" }, text),
    );
    node.words = `${who} ${text}`.toLowerCase();
    node.hidden = !node.words.includes(this.filter.value.toLowerCase());
    return node;
  }

  #colour(machine) {
    if (!this.colours.has(machine)) this.colours.set(machine, this.colours.size % HUES);
    return this.colours.get(machine);
  }

  #filter() {
    const wanted = this.filter.value.toLowerCase();
    for (const node of this.lines.children) node.hidden = !(node.words ?? "").includes(wanted);
    this.#tally();
    this.#down();
  }

  #tally() {
    const all = this.lines.childElementCount;
    const shown = this.filter.value ? [...this.lines.children].filter((node) => !node.hidden).length : all;
    say(this.tally, this.filter.value ? `${shown} of ${all} lines` : "");
  }

  #down() {
    if (!this.follow.checked) return;
    this.scrolled = performance.now();
    this.lines.scrollTop = this.lines.scrollHeight;
  }
}
