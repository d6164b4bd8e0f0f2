// From a profile (inside/flame.py has the form) to a tree of frames. Nothing in here draws.

import { brief } from "./format.js";

const AROUND = new RegExp(
  [
    /(^|\/)bigmachine\/(rpc\/|worker\.py|machine\.py|supervisor\/)/,
    /(^|\/)(threading|contextvars|runpy)\.py$/,
    /(^|\/)(asyncio|concurrent\/futures)\/|^<frozen /,
  ]
    .map((part) => part.source)
    .join("|"),
);
// What stands around the method of a call: it is the same for all of them, and says nothing of the program.

/** A frame. `total` and `self` are [of A, of B]; B is what A is compared with, if anything. */
function frame(name, file = "", first = 0, line = 0, parent = null) {
  return { name, file, first, line, parent, total: [0, 0], self: [0, 0], children: new Map() };
}

export const empty = (name) => frame(name);

/** Add the samples of `taken` to `root`, on `side` 0 or 1.
 *  type: index of the value; where: label → the value it must have; split: a label whose values come first, or "";
 *  callers: from the innermost frame outwards; bare: without what stands around the methods of calls. */
export function grow(root, taken, { type, where = {}, split = "", callers = false, bare = false }, side = 0) {
  const wanted = Object.entries(where).filter(([, value]) => value !== "");
  const passing = taken.labels.map((labels) => wanted.every(([key, value]) => (labels[key] ?? "") === value));
  const around = taken.functions.map(([, file]) => AROUND.test(file));
  const { parent, function: called, line } = taken.nodes;
  for (const [end, label, ...values] of taken.samples) {
    const value = values[type];
    if (!value || !passing[label]) continue;
    let stack = [];
    for (let node = end; node >= 0; node = parent[node]) stack.push(node);
    const labels = taken.labels[label];
    if (bare && labels.method) {
      let outer = stack.length;
      while (outer > 0 && around[called[stack[outer - 1]]]) outer -= 1;
      if (outer > 0) stack = stack.slice(0, outer);
    }
    if (!callers) stack.reverse();
    let at = root;
    at.total[side] += value;
    if (split) at = child(at, `${split} ${brief(labels[split] ?? "–")}`, "", 0, 0, value, side);
    for (const node of stack) at = child(at, ...taken.functions[called[node]], line[node], value, side);
    at.self[side] += value;
  }
  return root;
}

function child(parent, name, file, first, line, value, side) {
  const key = `${name}\n${file}\n${first}`;
  let found = parent.children.get(key);
  if (!found) parent.children.set(key, (found = frame(name, file, first, line, parent)));
  found.total[side] += value;
  return found;
}

/** Shares of the whole, [of A, of B], and the width that they are drawn with: what both have on average, if there are two. */
export function shares(node, root, compared) {
  const [a, b] = [0, 1].map((side) => (root.total[side] ? node.total[side] / root.total[side] : 0));
  return { a, b, width: compared ? (a + b) / 2 : a };
}

/** Of each label, its values with what they are worth, the largest first. */
export function values(taken, type) {
  const found = new Map();
  for (const [, label, ...numbers] of taken.samples) {
    for (const [key, value] of Object.entries(taken.labels[label])) {
      if (!found.has(key)) found.set(key, new Map());
      const worth = found.get(key);
      worth.set(value, (worth.get(value) ?? 0) + numbers[type]);
    }
  }
  return new Map([...found].map(([key, worth]) => [key, [...worth].sort((one, two) => two[1] - one[1])]));
}

/** Functions by what they use themselves, of a tree that is not of callers. A recursion counts once. */
export function hottest(root) {
  const found = new Map();
  const walk = (node, above) => {
    const key = `${node.name}\n${node.file}\n${node.first}`;
    const inner = !above.has(key);
    if (node !== root) {
      const entry = found.get(key) ?? {
        key,
        name: node.name,
        file: node.file,
        line: node.first,
        self: [0, 0],
        total: [0, 0],
      };
      found.set(key, entry);
      for (const side of [0, 1]) {
        entry.self[side] += node.self[side];
        if (inner) entry.total[side] += node.total[side];
      }
      if (inner) above.add(key);
    }
    for (const each of node.children.values()) walk(each, above);
    if (inner) above.delete(key);
  };
  walk(root, new Set());
  return [...found.values()].sort((one, two) => two.self[0] + two.self[1] - one.self[0] - one.self[1]);
}
