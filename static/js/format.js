// Numbers, sizes and times for people. Pure functions; units follow the value.
import { t } from "./i18n.js";

const LOCALE = "en";
const finite = (x) => typeof x === "number" && Number.isFinite(x);

/** Whole number with separators. */
export const int = (x) => (finite(x) ? Math.round(x).toLocaleString(LOCALE) : "–");

/** About four significant digits; exponents for the very small and very large. */
export function num(x, digits = 4) {
  if (!finite(x)) return "–";
  if (x === 0) return "0";
  const size = Math.abs(x);
  if (size < 1e-3 || size >= 1e6) return x.toExponential(Math.max(0, digits - 2)).replace(/\.?0+e/, "e").replace("e+", "e");
  return Number(x.toPrecision(digits)).toString();
}

/** Bytes with a binary unit as people write them: KB, MB, GB. */
export function bytes(x) {
  if (!finite(x)) return "–";
  const units = ["B", "KB", "MB", "GB", "TB"];
  let i = 0;
  while (x >= 1024 && i < units.length - 1) {
    x /= 1024;
    i += 1;
  }
  return `${x < 10 && i > 0 ? x.toFixed(1) : Math.round(x)} ${units[i]}`;
}

/** Seconds as "8 s", "3 min 20 s", "2 h 05 min". */
export function duration(s) {
  if (!finite(s) || s < 0) return "–";
  if (s < 1) return t("under a second");
  if (s < 60) return `${Math.round(s)} s`;
  const whole = Math.round(s);
  const min = Math.floor(whole / 60);
  if (whole < 3600) return whole % 60 && min < 10 ? `${min} min ${whole % 60} s` : `${min} min`;
  if (whole < 86400 * 2) return `${Math.floor(whole / 3600)} h ${String(Math.floor((whole % 3600) / 60)).padStart(2, "0")} min`;
  return `${Math.floor(whole / 86400)} d ${Math.floor((whole % 86400) / 3600)} h`;
}

/** Milliseconds since the epoch from an RFC 3339 string or a number. */
export const millis = (x) => (x == null ? NaN : typeof x === "number" ? x : Date.parse(x));

/** "just now", "4 min ago", then a date. */
export function ago(when, now = Date.now()) {
  const at = millis(when);
  if (!Number.isFinite(at)) return "–";
  const s = (now - at) / 1000;
  if (s < 45) return t("just now");
  if (s < 3600) return t("{n} min ago", { n: Math.max(1, Math.round(s / 60)) });
  if (s < 86400) return t("{n} h ago", { n: Math.round(s / 3600) });
  return new Date(at).toLocaleDateString(LOCALE, { day: "numeric", month: "short", year: s > 86400 * 300 ? "numeric" : undefined });
}

/** Absolute local time for `title` attributes. */
export const absolute = (when) => {
  const at = millis(when);
  return Number.isFinite(at) ? new Date(at).toLocaleString(LOCALE, { dateStyle: "medium", timeStyle: "medium" }) : "";
};

/** "14:20", or with the day when it is not today. */
export function clock(at) {
  const date = new Date(at);
  const time = date.toLocaleTimeString("en-GB", { hour: "2-digit", minute: "2-digit" });
  const today = new Date().toDateString() === date.toDateString();
  return today ? time : `${date.toLocaleDateString(LOCALE, { weekday: "short" })} ${time}`;
}

/** Steps per second, or seconds per step when slower than one. */
export function speed(it_s) {
  if (!finite(it_s) || it_s <= 0) return "";
  return it_s >= 1 ? `${it_s < 10 ? it_s.toFixed(1) : Math.round(it_s)} it/s` : `${num(1 / it_s, 2)} s/it`;
}
