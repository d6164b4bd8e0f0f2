// Elements, made and changed. Texts are only ever set as text: nothing that a machine says becomes markup.

/** An element: `props` are attributes, or `onclick` and the like; children are elements, texts, or null for none. */
export function el(name, props = {}, ...children) {
  const node =
    name === "svg" || name === "path"
      ? document.createElementNS("http://www.w3.org/2000/svg", name)
      : document.createElement(name);
  for (const [key, value] of Object.entries(props)) {
    if (key.startsWith("on")) node.addEventListener(key.slice(2), value);
    else if (value !== null && value !== undefined && value !== false)
      node.setAttribute(key, value === true ? "" : value);
  }
  node.append(...children.flat().filter((child) => child !== null && child !== undefined));
  return node;
}

/** Set a text, if it is another: a browser lays out again what is set to what it was. */
export function say(node, text) {
  if (node.said !== text) node.textContent = node.said = text;
}

/** Set an attribute, or remove it (null), if that changes anything. */
export function mark(node, name, value) {
  if (value === null || value === false) {
    if (node.hasAttribute(name)) node.removeAttribute(name);
  } else if (node.getAttribute(name) !== String(value)) node.setAttribute(name, value);
}

/** Make the children of `parent` be those of `items`, in their order, and keep the elements of those that were there.
 *  `key(item)` is unique, `make(item)` makes an element, `change(node, item)` brings one up to date. */
export function keep(parent, items, key, make, change) {
  const before = parent.kept ?? new Map();
  const now = new Map();
  let at = parent.firstChild;
  for (const item of items) {
    const id = key(item);
    const node = before.get(id) ?? make(item);
    now.set(id, node);
    before.delete(id);
    change(node, item);
    if (node === at) at = at.nextSibling;
    else parent.insertBefore(node, at);
  }
  for (const node of before.values()) node.remove();
  parent.kept = now;
}

/** A picker's options: `choices` are [value, label]. What was picked stays picked while it is there. */
export function offer(select, choices) {
  const wanted = JSON.stringify(choices);
  if (select.offered === wanted) return;
  select.offered = wanted;
  const picked = select.value;
  select.replaceChildren(...choices.map(([value, label]) => el("option", { value }, label)));
  if (choices.some(([value]) => value === picked)) select.value = picked;
}
