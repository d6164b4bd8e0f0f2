// The page: asks for the status as often as there is a new one while somebody looks, and shows it in five views.
//
// What is asked for is relative to the page, so that it works under any prefix. A view has `node`, `show(status)`,
// `step(by)`, and, where they matter to it, `filter`, `shown()`, `hidden()`, `restart()` and `back()`.

import { Detail } from "./detail.js";
import { el, keep, mark, say } from "./dom.js";
import { Events } from "./events.js";
import { age, clock, count, money, plain } from "./format.js";
import { Logs } from "./logs.js";
import { Machines } from "./machines.js";
import { Methods } from "./methods.js";
import { Profiles } from "./profiles.js";

const EVERY = 2; // Seconds between questions, until the status has said how often it is made.
const PATIENCE = 10000; // Milliseconds for an answer.
const BASE = new URL(".", document.baseURI);
const STATES = ["UNSTARTED", "STARTING", "RUNNING", "STOPPED"];

const $ = (id) => document.getElementById(id);

/** JSON from the driver. Raises where it does not answer, or refuses. */
async function ask(path) {
  const answer = await fetch(new URL(path, BASE), { cache: "no-store", signal: AbortSignal.timeout(PATIENCE) });
  if (!answer.ok) throw new Error(`${path}: ${answer.status}`);
  return answer.json();
}

class Page {
  constructor() {
    this.status = null;
    this.answered = performance.now();
    const open = (machine) => go("machines", machine.id);
    this.machines = new Machines({ open });
    this.logs = new Logs({ ask });
    this.profiles = new Profiles(BASE);
    this.views = {
      machines: this.machines,
      methods: new Methods(),
      logs: this.logs,
      events: new Events({ ask }),
      profiles: this.profiles,
    };
    this.detail = new Detail({
      ask,
      logs: (machine) => {
        go("logs");
        this.logs.pick(machine.id);
      },
      profile: (machine, kind) => {
        go("profiles");
        this.profiles.start(machine, kind);
      },
      close: () => go("machines"),
    });
    this.machines.node.append(this.detail.node);
    this.tabs = Object.keys(this.views).map((name, index) =>
      el(
        "button",
        {
          type: "button",
          role: "tab",
          id: `tab-${name}`,
          "aria-controls": `view-${name}`,
          "aria-keyshortcuts": index + 1,
          onclick: () => go(name),
        },
        name[0].toUpperCase() + name.slice(1),
      ),
    );
    $("tabs").append(
      ...this.tabs,
      el("button", { type: "button", class: "help", "aria-label": "keys", onclick: () => $("help").showModal() }, "?"),
    );
    for (const [name, view] of Object.entries(this.views)) {
      mark(view.node, "role", "tabpanel");
      mark(view.node, "id", `view-${name}`);
      mark(view.node, "aria-labelledby", `tab-${name}`);
      $("views").append(view.node);
    }
  }

  // -- The status ----------------------------------------------------------------------------------------------------

  async poll() {
    clearTimeout(this.timer);
    if (document.hidden) return; // `visibilitychange` goes on.
    try {
      const headers = this.etag ? { "If-None-Match": this.etag } : {};
      const answer = await fetch(new URL("status.json", BASE), {
        headers,
        cache: "no-store",
        signal: AbortSignal.timeout(PATIENCE),
      });
      if (answer.status !== 304) {
        if (!answer.ok) throw new Error(String(answer.status));
        const status = await answer.json();
        this.etag = answer.headers.get("ETag");
        this.take(status);
      }
      this.answered = performance.now();
      this.failing = false;
    } catch {
      this.failing = true;
    }
    this.pulse();
    this.timer = setTimeout(() => this.poll(), 1000 * (this.status?.poll ?? EVERY));
  }

  take(status) {
    if (this.status && this.status.session.name !== status.session.name) {
      for (const view of Object.values(this.views)) view.restart?.(); // Another program, at the same address.
      this.views[this.view].shown?.();
    }
    this.status = status;
    performance.mark("tick");
    this.head();
    this.views[this.view].show(status);
    this.detail.show(status);
    this.took = performance.measure("tick", "tick").duration;
    performance.clearMeasures("tick");
    performance.clearMarks("tick");
    document.body.dataset.tick = this.took.toFixed(1);
  }

  head() {
    const { session, counts } = this.status;
    const name = plain(session.program || "bigmachine");
    say($("program"), name);
    const running = counts.RUNNING ?? 0;
    document.title = `${name}: ${running} running`;
    say(
      $("session"),
      [
        session.system,
        session.name,
        session.hourly === null ? null : `${money(session.hourly)} an hour`,
        session.cost === null ? null : `${money(session.cost)} so far`,
        `since ${clock(session.began)}`,
      ]
        .filter(Boolean)
        .join(" · "),
    );
    const shown = STATES.filter((state) => counts[state]);
    keep(
      $("counts"),
      shown,
      (state) => state,
      (state) =>
        el("button", {
          type: "button",
          class: "badge",
          "data-state": state,
          title: "show these",
          onclick: () => this.only(state),
        }),
      (node, state) => say(node, `${count(counts[state])} ${state.toLowerCase()}`),
    );
  }

  only(state) {
    go("machines");
    const { filter } = this.machines;
    filter.value = filter.value === state ? "" : state;
    filter.dispatchEvent(new Event("input"));
  }

  /** What the page is worth by now: once a second. */
  pulse() {
    const gone = (performance.now() - this.answered) / 1000;
    const lost = $("lost");
    const ended = this.status?.session.ended;
    const silent = this.failing && !document.hidden;
    const seen = this.status ? `; what you see is of ${clock(this.status.now)}` : "";
    if (lost.hidden === silent || ended)
      say(
        lost,
        ended
          ? "the session has ended"
          : `connection lost: the driver does not answer. It has ended, or is stopped${seen}`,
      );
    lost.hidden = !silent && !ended;
    mark(document.body, "data-lost", silent ? "yes" : null);
    say($("live"), silent ? `lost ${age(gone)} ago` : this.status ? "live" : "");
  }

  // -- Views ---------------------------------------------------------------------------------------------------------

  /** What the address says: ``#logs``, ``#machines/m-7f3a9c``. */
  route() {
    let hash = location.hash.slice(1);
    try {
      hash = decodeURIComponent(hash);
    } catch {} // Typed by hand: it means nothing, and leads to the machines.
    const [name, id] = hash.split("/");
    const view = Object.hasOwn(this.views, name) ? name : "machines";
    if (view !== this.view) {
      if (this.view) this.views[this.view].hidden?.();
      this.view = view;
      for (const [each, { node }] of Object.entries(this.views)) {
        node.hidden = each !== view;
        const tab = $(`tab-${each}`);
        mark(tab, "aria-selected", String(each === view));
        mark(tab, "tabindex", each === view ? "0" : "-1");
      }
      if (this.status) this.views[view].show(this.status);
      this.views[view].shown?.();
    }
    if (id) this.detail.open(id, this.status);
    else if (this.detail.id !== null) {
      const row = [...this.machines.table.body.children].find((each) => each.row?.id === this.detail.id);
      this.detail.close();
      if (view === "machines" && row) this.machines.table.focus(row);
    }
  }

  key(event) {
    if (event.ctrlKey || event.metaKey || event.altKey || $("help").open) return;
    const view = this.views[this.view];
    const writing = event.target.matches("input:not([type=checkbox]), select, textarea");
    if (event.key === "Escape") {
      if (writing && event.target.value && event.target.type === "search") {
        event.target.value = "";
        event.target.dispatchEvent(new Event("input"));
      } else if (writing) event.target.blur();
      else if (this.detail.id !== null) go("machines");
      else view.back?.();
      return;
    }
    if (writing) return;
    const names = Object.keys(this.views);
    if (event.key === "/" && view.filter) view.filter.focus();
    else if (event.key === "?") $("help").showModal();
    else if (names[Number(event.key) - 1]) go(names[Number(event.key) - 1]);
    else if (event.key === "j" || (event.key === "ArrowDown" && event.target === document.body)) view.step(1);
    else if (event.key === "k" || (event.key === "ArrowUp" && event.target === document.body)) view.step(-1);
    else if (event.target.role === "tab" && ["ArrowLeft", "ArrowRight"].includes(event.key)) {
      const by = event.key === "ArrowRight" ? 1 : -1;
      const next = this.tabs[(this.tabs.indexOf(event.target) + by + this.tabs.length) % this.tabs.length];
      next.click();
      next.focus();
    } else return;
    event.preventDefault();
  }
}

function go(view, id = "") {
  location.hash = id ? `${view}/${encodeURIComponent(id)}` : view;
}

const page = new Page();
addEventListener("hashchange", () => page.route());
addEventListener("keydown", (event) => page.key(event));
document.addEventListener("visibilitychange", () => page.poll());
setInterval(() => page.pulse(), 1000);
page.route();
page.poll();
