// What happened, the last first: machines that came and went, steps, failures; and what was saved of machines in need.

import { el } from "./dom.js";
import { clock, plain } from "./format.js";
import { Table } from "./table.js";

const MOST = 1000;
const BAD = /failed|unhealthy|late/;

function words(event) {
  return plain(
    Object.entries(event.fields ?? {})
      .filter(([, value]) => value !== null && value !== "")
      .map(([key, value]) => `${key}=${typeof value === "object" ? JSON.stringify(value) : value}`)
      .join(" "),
  );
}

export class Events {
  constructor({ ask }) {
    this.ask = ask;
    this.events = new Map();
    this.filter = el("input", {
      type: "search",
      placeholder: "filter: kind, machine, text …",
      "aria-label": "filter events",
      oninput: () => this.#draw(),
    });
    this.table = new Table({
      label: "events",
      empty: "nothing has happened yet",
      key: (row) => row.number,
      columns: [
        { name: "time", label: "Time", text: (row) => clock(row.time, true) },
        { name: "kind", label: "What", make: kind },
        { name: "machine", label: "Machine", text: (row) => plain(row.machine) },
        { name: "fields", label: "More", text: words },
      ],
    });
    this.captures = new Table({
      label: "captures",
      empty: "",
      key: (row) => `${row.machine} ${row.time}`,
      columns: [
        { name: "time", label: "Time", text: (row) => clock(row.time) },
        { name: "machine", label: "Machine", text: (row) => plain(row.machine) },
        { name: "reason", label: "Why", text: (row) => plain(row.reason) },
        { name: "files", label: "Files", text: (row) => row.files.join("\n") },
      ],
    });
    this.saved = el("section", { hidden: true }, el("h3", {}, "Saved of unhealthy machines"), this.captures.node);
    this.node = el("div", {}, el("div", { class: "bar" }, this.filter), this.saved, this.table.node);
  }

  show(status) {
    this.#take(status.events ?? []);
    this.saved.hidden = !status.captures?.length;
    this.captures.show([...(status.captures ?? [])].reverse());
  }

  /** The status has only the last ones: once somebody looks, ask for those before. */
  async shown() {
    const found = await this.ask("events.json?after=0").catch(() => null);
    if (found) this.#take(found.events);
  }

  restart() {
    this.events.clear();
  }

  step() {}

  #take(events) {
    for (const event of events) this.events.set(event.number, event);
    for (const number of [...this.events.keys()].sort((one, two) => one - two).slice(0, -MOST))
      this.events.delete(number);
    this.#draw();
  }

  #draw() {
    const words_ = this.filter.value.toLowerCase().split(/\s+/).filter(Boolean);
    const rows = [...this.events.values()]
      .sort((one, two) => two.number - one.number)
      .filter((event) => {
        const text = `${event.kind} ${event.machine} ${words(event)}`.toLowerCase();
        return words_.every((word) => text.includes(word));
      });
    this.table.show(rows);
  }
}

function kind(cell) {
  return (row) => {
    cell.textContent = row.kind;
    cell.classList.toggle("bad", BAD.test(row.kind) || Boolean(row.fields?.failed) || Boolean(row.fields?.error));
  };
}
