// One machine: how it came up, what its processes do, its calls, and what is wrong with it.

import { el, keep, mark, say } from "./dom.js";
import { age, bytes, clock, count, latency, money, percent, plain } from "./format.js";
import { vitals } from "./machines.js";
import { methodsTable } from "./methods.js";
import { Table } from "./table.js";

export class Detail {
  /** `ask(path)` gets JSON; `logs(machine)` and `profile(machine, kind)` go there; `close()` is what the button does. */
  constructor({ ask, logs, profile, close }) {
    this.ask = ask;
    this.id = null;
    this.title = el("h2", { tabindex: "-1" });
    this.state = el("span", { class: "badge" });
    this.warnings = el("div", { class: "warnings" });
    this.facts = el("dl");
    this.steps = el("ol", { class: "boot", "aria-label": "boot, step by step" });
    this.bootTitle = el("h3", {}, "Boot");
    this.processes = processesTable();
    this.methods = methodsTable("methods of this machine", "none of its methods has been called yet");
    const profiles = el(
      "div",
      { class: "bar" },
      el("button", { type: "button", onclick: () => logs(this.machine) }, "Logs of it"),
      ...[
        ["profile", "CPU profile"],
        ["heap", "Heap profile"],
        ["threads", "Stacks"],
      ].map(([kind, text]) =>
        el("button", { type: "button", class: "whenup", onclick: () => profile(this.machine, kind) }, text),
      ),
    );
    this.profiles = profiles;
    this.node = el(
      "aside",
      { class: "sheet", "aria-label": "machine", hidden: true },
      el(
        "header",
        {},
        this.title,
        this.state,
        el("button", { type: "button", class: "close", "aria-label": "close", onclick: close }, "×"),
      ),
      this.warnings,
      this.facts,
      profiles,
      this.bootTitle,
      this.steps,
      el("h3", {}, "Processes"),
      this.processes.node,
      el("h3", {}, "Methods"),
      this.methods.node,
    );
  }

  open(id, status) {
    if (id !== this.id) {
      this.methods.show([]);
      for (const button of this.profiles.children) button.disabled = true; // Until the machine is known.
    }
    this.id = id;
    this.node.hidden = false;
    this.show(status);
    this.title.focus();
  }

  close() {
    this.id = null;
    this.node.hidden = true;
  }

  show(status) {
    if (this.id === null || !status) return;
    const machine = status.machines.find((each) => each.id === this.id);
    say(this.title, plain(this.id));
    if (!machine) {
      this.#warn([["bad", "there is no such machine in this session"]]);
      return;
    }
    this.machine = machine;
    say(this.state, machine.state);
    mark(this.state, "data-state", machine.state === "STOPPED" && machine.error ? "FAILED" : machine.state);
    for (const button of this.profiles.children)
      button.disabled = button.className === "whenup" && machine.state !== "RUNNING";
    this.#warn(
      [
        machine.error && ["bad", machine.error_details ?? machine.error],
        machine.unhealthy && ["bad", machine.unhealthy],
        machine.notice && ["warn", deadline(machine.notice, status.now)],
        machine.missing && ["warn", machine.missing],
        ...(status.captures ?? [])
          .filter((each) => each.machine === machine.id || each.machine === machine.address)
          .map((each) => ["warn", `saved at ${clock(each.time)}, ${each.reason}: ${each.files.join(", ")}`]),
      ].filter(Boolean),
    );
    this.#facts(machine);
    this.#boot(machine, status.now);
    this.processes.show(machine.processes ?? []);
    this.#calls(machine.id);
  }

  async #calls(id) {
    const found = await this.ask(`machines/${encodeURIComponent(id)}.json`).catch(() => null);
    if (found?.methods && this.id === id) this.methods.show(found.methods);
  }

  #warn(lines) {
    keep(
      this.warnings,
      lines.map(([kind, text], index) => ({ kind, text: plain(text), index })),
      (line) => line.index,
      () => el("pre"),
      (node, line) => {
        say(node, line.text);
        mark(node, "class", line.kind);
      },
    );
  }

  #facts(machine) {
    const facts = [
      ["address", machine.address],
      ["host", machine.host],
      ...Object.entries(machine.detail ?? {}),
      ["up", machine.uptime === null ? null : age(machine.uptime)],
      ["cost", machine.cost === null ? null : `${money(machine.cost)}, ${money(machine.hourly)} an hour`],
      ["parallel processes", machine.maxprocs],
      ...vitals(machine),
      ["cpu", machine.vitals?.cpu === null || !machine.vitals ? null : percent(machine.vitals.cpu)],
      [
        "keepalive",
        machine.keepalive?.replies?.length ? `answered in ${machine.keepalive.replies.map(latency).join(", ")}` : null,
      ],
      ["lines of output", count(machine.lines)],
    ]
      .filter(([, value]) => value !== null && value !== undefined && value !== "")
      .map(([name, value]) => ({ name, value: plain(String(value)) }));
    keep(
      this.facts,
      facts,
      (fact) => fact.name,
      (fact) => el("div", {}, el("dt", {}, fact.name), el("dd")),
      (node, fact) => say(node.lastChild, fact.value),
    );
  }

  #boot(machine, time) {
    const steps = (machine.boot ?? []).map((step) => ({ ...step }));
    const ended = steps.length ? steps.at(-1).began + steps.at(-1).seconds : machine.began;
    if (machine.step)
      steps.push({ name: machine.step, began: ended, seconds: Math.max(0, time - ended), underway: true });
    const start = steps[0]?.began ?? 0;
    const whole = Math.max(1e-9, ...steps.map((step) => step.began + step.seconds - start));
    say(this.bootTitle, steps.length ? `Boot: ${latency(whole)}${machine.step ? " so far" : ""}` : "Boot");
    keep(
      this.steps,
      steps.map((step, index) => ({ ...step, index })),
      (step) => `${step.index} ${step.name}`,
      (step) =>
        el(
          "li",
          {},
          el("span", { class: "name" }, step.name),
          el("span", { class: "track" }, el("i")),
          el("span", { class: "figure" }),
        ),
      (node, step) => {
        const bar = node.children[1].firstChild;
        bar.style.marginLeft = `${(100 * (step.began - start)) / whole}%`;
        bar.style.width = `${Math.max(0.5, (100 * step.seconds) / whole)}%`;
        mark(node, "class", step.failed ? "failed" : step.underway ? "underway" : null);
        say(node.children[2], `${latency(step.seconds)}${step.failed ? ", failed" : step.underway ? " …" : ""}`);
      },
    );
  }
}

function deadline(notice, time) {
  return notice.deadline === null
    ? notice.text
    : `${notice.text} (${notice.deadline > time ? `in ${age(notice.deadline - time)}` : "now"})`;
}

function processesTable() {
  return new Table({
    label: "processes",
    empty: "none that has told of itself",
    key: (row) => row.process,
    columns: [
      { name: "process", label: "Process", text: (row) => row.process },
      { name: "pid", label: "Pid", figure: true, text: (row) => (row.pid === null ? "–" : String(row.pid)) },
      { name: "rss", label: "Memory", figure: true, sort: (row) => row.rss, text: (row) => bytes(row.rss) },
      { name: "cpu", label: "CPU time", figure: true, sort: (row) => row.cpu, text: (row) => latency(row.cpu) },
      { name: "threads", label: "Threads", figure: true, text: (row) => count(row.threads) },
      { name: "now", label: "Now", make: doing },
    ],
  });
}

function doing(cell) {
  return (row) =>
    keep(
      cell,
      (row.doing ?? []).map((each, index) => ({ ...each, index })),
      (each) => each.index,
      () => el("span"),
      (node, each) =>
        say(
          node,
          [each.method, each.seconds === null ? "" : `for ${latency(each.seconds)}`, each.where && `at ${each.where}`]
            .filter(Boolean)
            .join(" "),
        ),
    );
}
