// The machines: one row each, with what matters now. Rows beyond the edge of the window draw no lines.

import { el, keep, mark, say } from "./dom.js";
import { age, bytes, decimal, latency, money, percent, plain, rate } from "./format.js";
import { Spark } from "./spark.js";
import { Table } from "./table.js";

const ORDER = { STARTING: 0, UNSTARTED: 1, RUNNING: 2, STOPPED: 3 };
const MAX_LINES = 3; // Of what a machine does now, in its row; the rest is in its details.

/** What is to be said of a machine, the worst first: [kind, text]. */
export function now(machine) {
  const lines = [];
  if (machine.error) lines.push(["bad", machine.error]);
  if (machine.unhealthy) lines.push(["bad", machine.unhealthy]);
  if (machine.notice) lines.push(["warn", machine.notice.text]);
  if (machine.step) lines.push(["", `${machine.step} …`]);
  if (machine.missing) lines.push(["warn", machine.missing]);
  for (const process of machine.processes ?? []) {
    for (const each of process.doing ?? []) {
      lines.push(["", `${each.method} ${each.seconds === null ? "" : latency(each.seconds)}`.trim()]);
    }
  }
  return lines.map(([kind, text]) => [kind, plain(text)]);
}

/** The texts that the filter looks in. */
function texts(machine) {
  return [
    machine.id,
    machine.address,
    machine.host,
    machine.state,
    ...Object.values(machine.detail ?? {}),
    ...now(machine).map(([, text]) => text),
  ]
    .join("\n")
    .toLowerCase();
}

export class Machines {
  constructor({ open }) {
    this.status = null;
    this.filter = el("input", {
      type: "search",
      placeholder: "filter: id, state, host, method …",
      "aria-label": "filter machines",
      oninput: () => this.#draw(),
    });
    this.tally = el("span", { class: "tally" });
    this.table = new Table({
      label: "machines",
      key: (machine) => machine.id,
      open,
      empty: "no machine has been started yet",
      columns: this.#columns(),
    });
    this.node = el("div", {}, el("div", { class: "bar" }, this.filter, this.tally), this.table.node);
    this.near = new IntersectionObserver(
      (entries) => {
        for (const { target, isIntersecting } of entries) {
          target.near = isIntersecting;
          if (isIntersecting) target.redraw?.();
        }
      },
      { rootMargin: "200px" },
    );
    this.watched = new Set();
  }

  show(status) {
    this.status = status;
    this.#draw();
  }

  step(by) {
    this.table.step(by);
  }

  #draw() {
    if (!this.status) return;
    const words = this.filter.value.toLowerCase().split(/\s+/).filter(Boolean);
    const all = this.status.machines;
    const found = words.length ? all.filter((machine) => words.every((word) => texts(machine).includes(word))) : all;
    this.table.table.classList.toggle(
      "free",
      all.every((machine) => machine.cost === null),
    );
    this.table.show([...found].sort((one, two) => Number(one.state === "STOPPED") - Number(two.state === "STOPPED")));
    say(this.tally, words.length ? `${found.length} of ${all.length}` : "");
    if (all.length && !found.length) say(this.table.note, "no machine is like that");
    const cells = new Set(this.table.body.querySelectorAll("td.lines"));
    for (const cell of this.watched) if (!cells.has(cell)) this.near.unobserve(cell);
    for (const cell of cells) if (!this.watched.has(cell)) this.near.observe(cell);
    this.watched = cells;
  }

  /** A column with the last figure, and a line of those before. */
  #line(label, figure, format, points, most) {
    return {
      name: "lines",
      label,
      figure: true,
      sort: figure,
      make: (cell) => {
        const spark = new Spark(label);
        const text = el("span", { class: "value" });
        cell.append(spark.node, text);
        let machine = null;
        cell.redraw = () => machine && spark.draw(points(machine) ?? [], most);
        return (row) => {
          machine = row;
          say(text, format(figure(row)));
          if (cell.near) cell.redraw();
        };
      },
    };
  }

  #columns() {
    return [
      { name: "state", label: "State", sort: (row) => ORDER[row.state], make: state },
      { name: "machine", label: "Machine", sort: (row) => row.id, make: who },
      { name: "now", label: "Now", sort: (row) => now(row)[0]?.[1] ?? null, make: doing },
      this.#line(
        "Memory",
        (row) => row.vitals?.memory?.percent,
        percent,
        (row) => row.history?.memory,
        100,
      ),
      this.#line(
        "CPU",
        (row) => row.vitals?.cpu,
        percent,
        (row) => row.history?.cpu,
        100,
      ),
      this.#line(
        "Load",
        (row) => row.vitals?.load?.[0],
        decimal,
        (row) => row.history?.load,
        1,
      ),
      this.#line(
        "Calls",
        (row) => row.history?.calls?.at(-1),
        rate,
        (row) => row.history?.calls,
        null,
      ),
      { name: "age", label: "Up", figure: true, sort: (row) => row.uptime, text: (row) => age(row.uptime) },
      { name: "cost", label: "Cost", figure: true, sort: (row) => row.cost, text: (row) => money(row.cost) },
      {
        name: "keepalive",
        label: "Keepalive",
        figure: true,
        sort: (row) => row.keepalive?.replies?.at(-1),
        make: keepalive,
      },
      { name: "detail", label: "System", sort: place, text: place },
    ];
  }
}

function place(machine) {
  return Object.values(machine.detail ?? {}).join(" · ") || machine.host || "–";
}

function state(cell) {
  const badge = el("span", { class: "badge" });
  cell.append(badge);
  return (row) => {
    say(badge, row.state);
    mark(badge, "data-state", row.state === "STOPPED" && row.error ? "FAILED" : row.state);
  };
}

function who(cell) {
  const id = el("b");
  const address = el("span", { class: "address" });
  cell.append(id, address);
  return (row) => {
    say(id, plain(row.id));
    say(address, plain(reached(row)));
  };
}

/** Host and port: the id stands above it, and the whole address in the details. */
function reached(machine) {
  return URL.canParse(machine.address) ? new URL(machine.address).host : "";
}

function keepalive(cell) {
  const next = el("span");
  const reply = el("span", { class: "soft" });
  cell.append(next, reply);
  return (row) => {
    const alive = row.state === "RUNNING" ? row.keepalive : null;
    say(
      next,
      !alive ? "–" : alive.late ? "late" : alive.next === null ? "–" : alive.next > 0 ? `in ${age(alive.next)}` : "now",
    );
    mark(next, "class", alive?.late ? "bad" : null);
    say(reply, alive?.replies?.length ? latency(alive.replies.at(-1)) : "");
  };
}

function doing(cell) {
  return (row) => {
    const lines = now(row);
    const shown = lines.slice(0, MAX_LINES);
    if (lines.length > MAX_LINES) shown.push(["soft", `and ${lines.length - MAX_LINES} more`]);
    keep(
      cell,
      shown.map(([kind, text], index) => ({ kind, text, index })),
      (line) => line.index,
      () => el("span"),
      (node, line) => {
        say(node, line.text);
        mark(node, "class", line.kind || null);
      },
    );
  };
}

/** Memory and disk in words, for the details. */
export function vitals(machine) {
  const { memory, disk, load } = machine.vitals ?? {};
  return [
    memory && [
      "memory",
      `${bytes(memory.used)} of ${bytes(memory.total)} (${percent(memory.percent)}), its processes ${bytes(memory.processes)}`,
    ],
    disk && ["disk", `${bytes(disk.used)} of ${bytes(disk.total)} (${percent(disk.percent)}) at ${disk.path}`],
    load && ["load", load.map(decimal).join(", ")],
  ].filter(Boolean);
}
