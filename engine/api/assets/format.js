// Numbers, times and names as people read them.

const whole = new Intl.NumberFormat("en");
const clock = new Intl.DateTimeFormat("en-GB", { hour: "2-digit", minute: "2-digit", second: "2-digit" });
const day = new Intl.DateTimeFormat("en-GB", { weekday: "short", day: "numeric", month: "short" });

/** 1234567 as 1,234,567. */
export const number = (value) => whole.format(value);

/** `1 job`, `2 jobs`. */
export const count = (value, noun) => `${number(value)} ${noun}${value === 1 ? "" : "s"}`;

/** Something a second: whole from ten on. */
export function rate(value) {
  if (value === 0) return "0";
  return value < 10 ? value.toFixed(1) : number(Math.round(value));
}

/** Large numbers in little space, for axes. */
export function short(value) {
  for (const [size, unit] of [[1e9, "G"], [1e6, "M"], [1e3, "k"]]) {
    if (value >= size) return `${trim(value / size)}${unit}`;
  }
  return trim(value);
}

const trim = (value) => String(Number(value.toPrecision(3)));

/** Seconds in the unit that people would use. */
export function duration(seconds) {
  if (!(seconds > 0)) return "0 s";
  if (seconds < 0.001) return `${Math.round(seconds * 1e6)} µs`;
  if (seconds < 1) return `${seconds < 0.1 ? trim(Number((seconds * 1e3).toPrecision(2))) : Math.round(seconds * 1e3)} ms`;
  if (seconds < 10) return `${seconds.toFixed(1)} s`;
  if (seconds < 120) return `${Math.round(seconds)} s`;
  if (seconds < 7200) return `${Math.round(seconds / 60)} min`;
  return seconds < 172_800 ? `${Math.round(seconds / 3600)} h` : `${Math.round(seconds / 86_400)} days`;
}

/** A moment of the day, with its date if it is not today. */
export function moment(ms, nowMs) {
  const time = clock.format(ms);
  return day.format(ms) === day.format(nowMs) ? time : `${day.format(ms)} ${time}`;
}

/** How far away a moment is. */
export function away(ms, nowMs) {
  const seconds = (ms - nowMs) / 1000;
  return seconds > 0 ? `in ${duration(Math.max(1, seconds))}` : `${duration(Math.max(1, -seconds))} ago`;
}

/** The end of an id, which tells neighbours apart. */
export const shortId = (id) => `…${id.slice(-10)}`;

/** A share of a whole. */
export function percent(part, all) {
  if (!all || !part) return "0 %";
  const share = (100 * part) / all;
  return share < 0.1 ? "< 0.1 %" : `${share < 10 ? share.toFixed(1) : Math.round(share)} %`;
}
