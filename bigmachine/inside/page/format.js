// Figures, as people read them. What is not known is a dash.

const NONE = "–";
const known = (value) => typeof value === "number" && Number.isFinite(value);

export function bytes(value) {
  if (!known(value)) return NONE;
  const units = ["B", "KiB", "MiB", "GiB", "TiB", "PiB"];
  let unit = 0;
  let left = Math.abs(value);
  while (left >= 1024 && unit < units.length - 1) {
    left /= 1024;
    unit += 1;
  }
  return `${value < 0 ? "−" : ""}${left.toFixed(left < 10 && unit > 0 ? 1 : 0)} ${units[unit]}`;
}

export const percent = (value) => (known(value) ? `${value.toFixed(value > 0 && value < 9.95 ? 1 : 0)} %` : NONE);

export const count = (value) => (known(value) ? Math.round(value).toLocaleString("en") : NONE);

export const decimal = (value) => (known(value) ? value.toFixed(value < 100 ? 2 : 0) : NONE);

export function rate(value) {
  if (!known(value)) return NONE;
  return `${value === 0 || value >= 10 ? count(value) : value.toFixed(1)}/s`;
}

/** How long something has lasted: to the second, then more roughly. */
export function age(seconds) {
  if (!known(seconds)) return NONE;
  const whole = Math.max(0, Math.floor(seconds));
  if (whole < 60) return `${whole} s`;
  if (whole < 3600) return `${Math.floor(whole / 60)} min ${String(whole % 60).padStart(2, "0")} s`;
  if (whole < 86400)
    return `${Math.floor(whole / 3600)} h ${String(Math.floor((whole % 3600) / 60)).padStart(2, "0")} min`;
  return `${Math.floor(whole / 86400)} d ${Math.floor((whole % 86400) / 3600)} h`;
}

/** How long a call took: three figures of whatever unit fits. */
export function latency(seconds) {
  if (!known(seconds)) return NONE;
  if (seconds >= 100) return age(seconds);
  for (const [factor, unit] of [
    [1, "s"],
    [1e3, "ms"],
    [1e6, "µs"],
  ]) {
    const value = seconds * factor;
    if (value >= 1 || unit === "µs")
      return `${value.toPrecision(value >= 100 ? 3 : value >= 10 ? 3 : 2).replace(/\.0+$/, "")} ${unit}`;
  }
  return NONE;
}

export const money = (value) => (known(value) ? `$${value.toFixed(value < 1 ? 4 : 2)}` : NONE);

export function clock(epoch, fraction = false) {
  if (!known(epoch)) return NONE;
  const when = new Date(epoch * 1000);
  const text = [when.getHours(), when.getMinutes(), when.getSeconds()]
    .map((part) => String(part).padStart(2, "0"))
    .join(":");
  return fraction ? `${text}.${String(when.getMilliseconds()).padStart(3, "0")}` : text;
}

/** A value of a profile, in its own unit. */
export function measured(value, unit) {
  if (unit === "nanoseconds") return latency(value / 1e9);
  return unit === "bytes" ? bytes(value) : count(value);
}

/** A machine by its id, which its address ends with, where the whole of that is too long. */
export const brief = (address) => plain(/:\/\/.*\/([^/]+)\/$/.exec(address)?.[1] ?? address);

/** Without colours, and whatever else a terminal would not show. */
export const plain = (text) => text.replace(/\x1b\[[0-9;:?]*[ -/]*[@-~]/g, "").replace(/[\x00-\x08\x0b-\x1f\x7f]/g, "");
