// A table that keeps its rows while their figures change, can be sorted, and is walked through with arrows or j and k.

import { el, keep, mark, say } from "./dom.js";

export const MAX_ROWS = 1000; // More is beyond what anybody reads; the filter finds the others.

const classes = (column) => (column.figure ? `${column.name} figure` : column.name);

export class Table {
  /** `columns` are {name, label, text(row) or make(td) → change(row), sort(row)?, figure?, wide?}; `key(row)` is unique;
   *  `open(row)` is called for a row that is chosen. The first click on a column of figures shows the largest first. */
  constructor({ label, columns, key, open = null, empty = "" }) {
    Object.assign(this, { columns, key, open, rows: [], order: null, falling: false });
    this.heads = columns.map((column) =>
      el(
        "th",
        { role: "columnheader", scope: "col", class: classes(column) },
        column.sort ? el("button", { type: "button", onclick: () => this.sort(column) }, column.label) : column.label,
      ),
    );
    this.body = el("tbody", { role: "rowgroup" });
    this.note = el("p", { class: "empty" }, empty);
    this.empty = empty;
    this.table = el(
      "table",
      { role: "table", "aria-label": label },
      el("thead", { role: "rowgroup" }, el("tr", { role: "row" }, this.heads)),
      this.body,
    );
    this.node = el("div", { class: "table" }, this.table, this.note);
    if (open) this.body.addEventListener("keydown", (event) => this.#key(event));
  }

  show(rows) {
    this.rows = rows;
    const sorted = this.#sorted(rows);
    const shown = sorted.slice(0, MAX_ROWS);
    keep(
      this.body,
      shown,
      this.key,
      (row) => this.#make(row),
      (node, row) => this.#change(node, row),
    );
    const left = sorted.length - shown.length;
    say(this.note, left ? `and ${left} more: the filter finds them` : rows.length ? "" : this.empty);
    this.table.hidden = !rows.length;
    if (this.open && !this.body.querySelector('tr[tabindex="0"]')) this.body.firstChild?.setAttribute("tabindex", "0");
  }

  sort(column) {
    if (this.order !== column) Object.assign(this, { order: column, falling: Boolean(column.figure) });
    else if (this.falling === Boolean(column.figure)) this.falling = !this.falling;
    else this.order = null; // A third click: as it was.
    this.columns.forEach((each, index) => {
      mark(this.heads[index], "aria-sort", each === this.order ? (this.falling ? "descending" : "ascending") : null);
    });
    this.show(this.rows);
  }

  /** Move to the next row (1), or the one before (-1). */
  step(by) {
    const rows = [...this.body.children];
    const at = rows.indexOf(document.activeElement?.closest("tr"));
    const row = rows[at < 0 ? 0 : Math.min(rows.length - 1, Math.max(0, at + by))];
    if (row) this.focus(row);
  }

  focus(row) {
    for (const other of this.body.querySelectorAll('tr[tabindex="0"]')) other.setAttribute("tabindex", "-1");
    row.setAttribute("tabindex", "0");
    row.focus();
  }

  #sorted(rows) {
    if (!this.order) return rows;
    const value = this.order.sort;
    const sign = this.falling ? -1 : 1;
    const missing = (each) => each === null || each === undefined;
    return [...rows].sort((one, two) => {
      const [a, b] = [value(one), value(two)];
      if (missing(a) || missing(b)) return Number(missing(a)) - Number(missing(b)); // Last, whichever way.
      return sign * (a < b ? -1 : a > b ? 1 : 0);
    });
  }

  #make(row) {
    const node = el("tr", { role: "row", tabindex: this.open ? "-1" : null, class: this.open ? "opens" : null });
    node.cells_ = this.columns.map((column) => {
      const cell = el("td", { role: "cell", "data-label": column.label, class: classes(column) });
      node.append(cell);
      return column.make ? column.make(cell, row) : (now) => say(cell, column.text(now));
    });
    if (this.open) {
      node.addEventListener("click", () => {
        if (getSelection().isCollapsed) this.open(node.row); // Who selects a text does not mean to open.
      });
    }
    return node;
  }

  #change(node, row) {
    if (node.row === row) return;
    node.row = row;
    for (const change of node.cells_) change(row);
  }

  #key(event) {
    const row = event.target.closest("tr");
    if (event.key === "Enter" && row === event.target) this.open(row.row);
    else if (event.key === "ArrowDown") this.step(1);
    else if (event.key === "ArrowUp") this.step(-1);
    else if (event.key === "Home") this.focus(this.body.firstChild);
    else if (event.key === "End") this.focus(this.body.lastChild);
    else return;
    event.preventDefault();
  }
}
