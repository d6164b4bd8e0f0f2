// A small line of the last figures: what it was is in its label, for those who do not see it.

import { el, mark } from "./dom.js";

const WIDTH = 90;
const HEIGHT = 20;

const short = (value) => value.toFixed(1);

export class Spark {
  constructor(name) {
    this.name = name;
    this.area = el("path", { class: "area" });
    this.line = el("path", { class: "line" });
    this.node = el(
      "svg",
      {
        class: "spark",
        viewBox: `0 0 ${WIDTH} ${HEIGHT}`,
        preserveAspectRatio: "none",
        role: "img",
        "aria-label": name,
      },
      this.area,
      this.line,
    );
  }

  /** `points`, oldest first; `most` is what the upper edge stands for (null: the largest of them). */
  draw(points, most = 100) {
    const seen = points.join();
    if (seen === this.seen) return;
    this.seen = seen;
    const top = Math.max(most ?? 0, ...points.map((point) => point ?? 0)) || 1;
    const step = WIDTH / Math.max(1, points.length - 1);
    let line = "";
    let area = "";
    points.forEach((point, index) => {
      if (point === null) return; // Not known then: a gap.
      const x = (index * step).toFixed(1);
      const at = `${x} ${(HEIGHT - 1 - (point / top) * (HEIGHT - 2)).toFixed(1)}`;
      const first = index === 0 || points[index - 1] === null;
      line += `${first ? "M" : "L"}${at}`;
      area += first ? `M${x} ${HEIGHT}L${at}` : `L${at}`;
      if (index === points.length - 1 || points[index + 1] === null) area += `L${x} ${HEIGHT}Z`;
    });
    mark(this.line, "d", line);
    mark(this.area, "d", area);
    const present = points.filter((point) => point !== null);
    mark(
      this.node,
      "aria-label",
      present.length
        ? `${this.name}: ${short(present.at(-1))}, between ${short(Math.min(...present))} and ${short(Math.max(...present))}`
        : this.name,
    );
  }
}
