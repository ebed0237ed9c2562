// Figures as people read them.

const BYTES = ["B", "KiB", "MiB", "GiB", "TiB", "PiB"];

/** A number of three significant digits at most, with thousands apart. */
export function number(value, digits = 3) {
  if (!value) return "0";
  const whole = Math.abs(value) >= 10 ** (digits - 1);
  return value.toLocaleString("en", whole ? { maximumFractionDigits: 0 } : { maximumSignificantDigits: digits });
}

/** [figure, unit] of an amount of bytes. */
export function bytes(value) {
  const power = value < 1 ? 0 : Math.min(BYTES.length - 1, Math.floor(Math.log2(value) / 10));
  return [number(value / 1024 ** power), BYTES[power]];
}

/** [figure, unit] of many things. */
export function amount(value) {
  if (value >= 1e9) return [number(value / 1e9), "G"];
  if (value >= 1e6) return [number(value / 1e6), "M"];
  return value >= 1e4 ? [number(value / 1e3), "k"] : [number(value), ""];
}

/** [figure, unit] of a time in seconds. */
export function seconds(value) {
  if (value == null) return ["–", ""];
  return value < 1 ? [number(value * 1e3), "ms"] : [number(value), "s"];
}

export const percent = (share) => (share == null ? "–" : `${Math.round(share * 100)}`);
export const joined = ([figure, unit], behind = "") => figure + (unit ? ` ${unit}` : "") + behind;

/** How long ago, in one unit. */
export function ago(s) {
  if (s < 90) return `${Math.max(0, Math.round(s))} s`;
  return s < 5400 ? `${Math.round(s / 60)} min` : s < 129600 ? `${Math.round(s / 3600)} h` : `${Math.round(s / 86400)} d`;
}

export const clock = (t, withSeconds = false) =>
  new Date(t * 1e3).toLocaleTimeString("en-GB", { hour: "2-digit", minute: "2-digit", ...(withSeconds && { second: "2-digit" }) });

/** The median of values that each stand for `weights` of them. */
export function median(values, weights) {
  const order = values.map((value, i) => [value, weights[i]]).sort((a, b) => a[0] - b[0]);
  let rest = order.reduce((sum, [, weight]) => sum + weight, 0) / 2;
  for (const [value, weight] of order) if ((rest -= weight) <= 0) return value;
  return null;
}
