// Takes profiles, and shows them: of everything, of one machine, method or thread, and one compared with another.

import { el, keep, offer, say } from "./dom.js";
import { FlameGraph } from "./flamegraph.js";
import { empty, grow, hottest, values } from "./flame.js";
import { brief, clock, measured, percent, plain } from "./format.js";
import { Table } from "./table.js";

const KINDS = [
  ["profile", "CPU"],
  ["heap", "Heap"],
  ["threads", "Threads"],
];
const LABELS = ["machine", "process", "service", "method", "thread", "task"];
const KEPT = 8; // Profiles that can still be looked at, and compared with.
const TOP = 40;
const COMPARED =
  "A is the selection, B what it is compared with, each as shares of its own whole. " +
  "Red: more in B; blue: less; widths are the mean of both.";

export class Profiles {
  /** `base` is what addresses are relative to. */
  constructor(base) {
    this.base = base;
    this.kept = [];
    this.number = 0;
    this.graph = new FlameGraph();
    this.filter = this.graph.search;
    this.form = this.#form();
    this.said = el("p", { role: "status", class: "said" });
    this.bar = el("progress", { hidden: true, max: "1", "aria-label": "profile under way" });
    this.result = this.#result();
    this.node = el("div", {}, this.form, this.bar, this.said, this.result);
  }

  show(status) {
    const running = status.machines.filter((machine) => machine.state === "RUNNING");
    offer(this.machine, [
      ["", "all machines and the driver"],
      ["driver", "the driver"],
      ...running.map((machine) => [machine.id, plain(machine.id)]),
    ]);
    if (this.wanted) {
      this.machine.value = this.wanted;
      this.wanted = null;
    }
    this.#command();
  }

  step() {}

  back() {
    return this.graph.back();
  }

  /** Take one now, of a machine. */
  start(machine, kind) {
    offer(this.machine, [
      ["", "all machines and the driver"],
      [machine.id, machine.id],
    ]);
    this.machine.value = this.wanted = machine.id;
    this.kind.value = kind;
    this.#kinds();
    this.#take();
  }

  #form() {
    const changed = () => this.#kinds();
    this.kind = el(
      "select",
      { name: "kind", onchange: changed },
      KINDS.map(([value, label]) => el("option", { value }, label)),
    );
    this.seconds = el("input", {
      name: "seconds",
      type: "number",
      min: "0.1",
      max: "3600",
      step: "any",
      value: "10",
      required: true,
      oninput: changed,
    });
    this.machine = el(
      "select",
      { name: "machine", onchange: changed },
      el("option", { value: "" }, "all machines and the driver"),
    );
    this.gc = el("input", { name: "gc", type: "checkbox", onchange: changed });
    this.secondsLabel = el("label", {}, "seconds ", this.seconds);
    this.gcLabel = el("label", { hidden: true }, this.gc, " collect garbage first");
    this.button = el("button", { class: "main" }, "Take");
    this.stop = el("button", { type: "button", hidden: true, onclick: () => this.abort?.abort() }, "Cancel");
    this.command = el("code");
    const form = el(
      "form",
      { class: "take" },
      el(
        "div",
        { class: "bar" },
        el("label", {}, "profile ", this.kind),
        this.secondsLabel,
        this.gcLabel,
        el("label", {}, "of ", this.machine),
        this.button,
        this.stop,
      ),
      el("p", { class: "soft" }, "or in a terminal: ", this.command),
    );
    form.addEventListener("submit", (event) => {
      event.preventDefault();
      this.#take();
    });
    return form;
  }

  #result() {
    const again = () => this.#draw();
    const picker = (label) => el("select", { "aria-label": label, onchange: again });
    this.title = el("h2");
    this.missing = el("p", { class: "missing bad", hidden: true });
    this.comments = el("ul");
    this.about = el("details", { class: "soft" }, el("summary", {}, "what must be known to read it"), this.comments);
    this.which = el("select", { "aria-label": "profile shown", onchange: () => this.#pick(Number(this.which.value)) });
    this.type = picker("value");
    this.split = picker("split by");
    this.compare = picker("compare with");
    this.callers = el("input", { type: "checkbox", onchange: again });
    this.bare = el("input", { type: "checkbox", checked: true, onchange: again });
    this.where = Object.fromEntries(LABELS.map((label) => [label, picker(`only ${label}`)]));
    this.download = el("a", { class: "download" }, "Download .pb.gz");
    this.legend = el("p", { class: "legend soft" });
    this.top = this.#topTable();
    return el(
      "section",
      { class: "result", hidden: true, "aria-label": "profile" },
      el("div", { class: "bar" }, this.title, this.which, this.download),
      this.missing,
      this.about,
      el(
        "div",
        { class: "bar" },
        this.type,
        ...Object.values(this.where),
        this.split,
        this.compare,
        el("label", {}, this.callers, " callers first"),
        el("label", {}, this.bare, " without what is around calls"),
      ),
      el(
        "div",
        { class: "bar" },
        this.graph.search,
        this.graph.found,
        el("button", { type: "button", onclick: () => this.graph.zoom(this.graph.root) }, "Whole"),
      ),
      this.legend,
      this.graph.node,
      el("h3", {}, "Functions that use most"),
      this.top.node,
    );
  }

  #topTable() {
    return new Table({
      label: "functions that use most",
      empty: "",
      key: (row) => row.key,
      columns: [
        {
          name: "self",
          label: "Itself",
          figure: true,
          sort: (row) => row.self[0],
          text: (row) => this.#figure(row.self),
        },
        {
          name: "total",
          label: "With what it calls",
          figure: true,
          sort: (row) => row.total[0],
          text: (row) => this.#figure(row.total),
        },
        { name: "function", label: "Function", sort: (row) => row.name, text: (row) => row.name },
        {
          name: "file",
          label: "File",
          sort: (row) => row.file,
          text: (row) => (row.file ? `${row.file}:${row.line}` : ""),
        },
      ],
    });
  }

  #kinds() {
    this.secondsLabel.hidden = this.kind.value !== "profile";
    this.seconds.disabled = this.kind.value !== "profile"; // Else a bad one would hold up the others.
    this.gcLabel.hidden = this.kind.value !== "heap";
    this.#command();
  }

  #query() {
    const query = new URLSearchParams();
    if (this.kind.value === "profile") query.set("seconds", this.seconds.value);
    if (this.kind.value === "heap" && this.gc.checked) query.set("gc", "1");
    if (this.machine.value) query.set("machine", this.machine.value);
    return query;
  }

  #command() {
    const address = new URL(`pprof/${this.kind.value}`, this.base);
    address.search = this.#query();
    say(this.command, `go tool pprof -http=: '${address.href.replaceAll("'", "%27")}'`);
  }

  async #take() {
    this.abort?.abort();
    const abort = (this.abort = new AbortController());
    const query = this.#query();
    query.set("kind", this.kind.value);
    const seconds = this.kind.value === "profile" ? Number(this.seconds.value) : 0;
    const done = this.#wait(seconds);
    try {
      const answer = await fetch(new URL(`flame.json?${query}`, this.base), {
        signal: abort.signal,
        cache: "no-store",
      });
      if (!answer.ok) throw new Error((await answer.text()).trim() || `the driver has answered ${answer.status}`);
      this.#add(await answer.json());
      say(this.said, "");
    } catch (error) {
      say(
        this.said,
        abort.signal.aborted
          ? "cancelled"
          : error instanceof TypeError
            ? "the driver does not answer"
            : plain(error.message),
      );
    } finally {
      if (this.abort === abort) done();
    }
  }

  /** Show that something is under way; returns what ends that. */
  #wait(seconds) {
    const begun = performance.now();
    this.stop.hidden = this.bar.hidden = false;
    this.bar.removeAttribute("value");
    const tick = () => {
      const passed = (performance.now() - begun) / 1000;
      if (passed < seconds) this.bar.value = passed / seconds;
      else this.bar.removeAttribute("value");
      say(this.said, passed < seconds ? `${Math.ceil(seconds - passed)} s to go` : "waiting for all processes");
    };
    tick();
    clearInterval(this.ticking);
    const ticking = (this.ticking = setInterval(tick, 250));
    return () => {
      clearInterval(ticking);
      this.stop.hidden = this.bar.hidden = true;
    };
  }

  #add(taken) {
    this.number += 1;
    const name = KINDS.find(([kind]) => kind === taken.kind)?.[1] ?? taken.kind;
    this.kept.unshift({ number: this.number, taken, name: `#${this.number} ${name}, ${clock(taken.started)}` });
    this.kept.length = Math.min(this.kept.length, KEPT);
    offer(
      this.which,
      this.kept.map((each) => [String(each.number), each.name]),
    );
    this.which.value = String(this.number);
    this.#pick(this.number);
  }

  #pick(number) {
    this.current = this.kept.find((each) => each.number === number);
    const { taken } = this.current;
    this.result.hidden = false;
    say(
      this.title,
      `${this.current.name}, ${taken.processes.length} ${taken.processes.length === 1 ? "process" : "processes"}`,
    );
    this.missing.hidden = !taken.missing.length;
    say(
      this.missing,
      `missing: ${taken.missing.map(([machine, process, reason]) => plain(`${machine} ${process} (${reason})`)).join("; ")}`,
    );
    keep(
      this.comments,
      taken.comments.map((text, index) => ({ text, index })),
      (each) => each.index,
      () => el("li"),
      (node, each) => say(node, plain(each.text)),
    );
    this.about.hidden = !taken.comments.length;
    if (this.address) URL.revokeObjectURL(this.address);
    this.address = URL.createObjectURL(
      new Blob([Uint8Array.from(atob(taken.pprof), (letter) => letter.charCodeAt(0))], { type: "application/gzip" }),
    );
    this.download.href = this.address;
    this.download.download = `${taken.kind}-${clock(taken.started).replaceAll(":", "")}.pb.gz`;
    offer(
      this.type,
      taken.types.map(([name, unit]) => [name, unit === "count" ? name : `${name} (${unit})`]),
    );
    if (this.kindShown !== taken.kind) this.type.value = taken.default;
    this.kindShown = taken.kind;
    const found = values(taken, this.#type());
    for (const label of LABELS) {
      const there = found.get(label) ?? [];
      this.where[label].hidden = there.length < 2;
      offer(this.where[label], [
        ["", `every ${label}`],
        ...there.slice(0, 500).map(([value]) => [value, brief(value)]),
      ]);
    }
    offer(this.split, [
      ["", "not split"],
      ...LABELS.filter((label) => found.has(label)).map((label) => [label, `split by ${label}`]),
    ]);
    this.#comparable(taken.kind);
    this.#draw();
  }

  /** What this profile can be compared with: others of its kind, or machines of it or of them. */
  #comparable(kind) {
    const choices = this.kept
      .filter((each) => each.taken.kind === kind)
      .flatMap((each) => {
        const machines = values(each.taken, 0).get("machine") ?? [];
        return [
          [`${each.number} `, each.name],
          ...machines.map(([machine]) => [`${each.number} ${machine}`, `#${each.number} ${brief(machine)}`]),
        ];
      });
    offer(this.compare, [["", "compare with …"], ...choices]);
  }

  #type() {
    return Math.max(
      0,
      this.current.taken.types.findIndex(([name]) => name === this.type.value),
    );
  }

  #draw() {
    const { taken } = this.current;
    const type = this.#type();
    const where = Object.fromEntries(LABELS.map((label) => [label, this.where[label].value]));
    const how = { type, where, split: this.split.value, callers: this.callers.checked, bare: this.bare.checked };
    const root = grow(empty("all"), taken, how);
    const flat = grow(empty("all"), taken, { ...how, split: "", callers: false });
    const compared = this.compare.value !== "";
    if (compared) {
      const at = this.compare.value.indexOf(" ");
      const other = this.kept.find((each) => each.number === Number(this.compare.value.slice(0, at)));
      const machine = this.compare.value.slice(at + 1);
      for (const tree of [root, flat]) {
        const same = tree === root ? how : { ...how, split: "", callers: false };
        grow(tree, other.taken, { ...same, where: { ...where, machine } }, 1);
      }
    }
    this.unit = taken.types[type]?.[1];
    this.whole = root.total;
    this.compared = compared;
    say(this.legend, compared ? COMPARED : root.total[0] ? "" : "there is nothing in this selection");
    this.graph.show(root, this.unit, compared);
    this.top.show(hottest(flat).slice(0, TOP));
  }

  #figure(sides) {
    const share = (side) => percent(this.whole[side] ? (100 * sides[side]) / this.whole[side] : 0);
    return this.compared ? `${share(0)} → ${share(1)}` : `${measured(sides[0], this.unit)} (${share(0)})`;
  }
}
