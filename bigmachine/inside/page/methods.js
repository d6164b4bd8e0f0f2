// Calls per method, at both ends: as those who serve them see them, and as the driver does that makes them.

import { el, mark, say } from "./dom.js";
import { count, latency, rate } from "./format.js";
import { Table } from "./table.js";

function end(which, label) {
  const of = (row) => row[which] ?? {};
  const figure = (name, text, format) => ({
    name,
    label: `${text}, ${label}`,
    figure: true,
    sort: (row) => of(row)[name],
    text: (row) => format(of(row)[name]),
  });
  return [
    figure("count", "Calls", count),
    figure("rate", "Rate", rate),
    { ...figure("errors", "Errors", count), make: errors(of) },
    figure("p50", "p50", latency),
    figure("p99", "p99", latency),
    figure("max", "Max", latency),
  ];
}

function errors(of) {
  return (cell) => (row) => {
    say(cell, count(of(row).errors));
    cell.classList.toggle("bad", of(row).errors > 0);
  };
}

export function methodsTable(label, empty) {
  const table = new Table({
    label,
    empty,
    key: (row) => row.method,
    columns: [
      { name: "method", label: "Method", sort: (row) => row.method, text: (row) => row.method },
      ...end("served", "served"),
      ...end("called", "called"),
    ],
  });
  // Which end the figures are of stands above them once, for the eye; every column's own label says it, too.
  const group = (text) => el("th", { colspan: "6", scope: "colgroup", role: "columnheader" }, text);
  table.table.tHead.prepend(
    el(
      "tr",
      { role: "row", class: "groups" },
      el("td", { role: "cell" }),
      group("served, on the machines"),
      group("called, by the driver"),
    ),
  );
  for (const head of table.heads.slice(1)) {
    const button = head.firstChild;
    mark(button, "aria-label", button.textContent);
    button.textContent = button.textContent.split(",")[0];
  }
  return table;
}

export class Methods {
  constructor() {
    this.filter = el("input", {
      type: "search",
      placeholder: "filter methods",
      "aria-label": "filter methods",
      oninput: () => this.#draw(),
    });
    this.table = methodsTable("methods", "no method has been called yet");
    this.node = el("div", {}, el("div", { class: "bar" }, this.filter), this.table.node);
    this.methods = [];
  }

  show(status) {
    this.methods = status.methods;
    this.#draw();
  }

  step() {}

  #draw() {
    const wanted = this.filter.value.toLowerCase();
    this.table.show(this.methods.filter((row) => row.method.toLowerCase().includes(wanted)));
  }
}
