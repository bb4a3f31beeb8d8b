// The log's tail: follows while the reader is at the bottom, keeps still otherwise. Lines are text, never markup.
import { html, useLayoutEffect, useRef, useState } from "../../vendor/preact-htm.js";
import { int } from "../format.js";
import { plural, t } from "../i18n.js";

const SHOWN = 500;
const time = (line) => {
  const at = new Date(line.ts);
  return Number.isNaN(at.getTime()) ? "" : at.toLocaleTimeString("en-GB");
};

// Control sequences of terminals are not text; the rest stays as it was written.
// eslint-disable-next-line no-control-regex
const plain = (text) => String(text ?? "").replace(/\u001b\[[0-9;?]*[A-Za-z]/g, "");

export function LogTail({ logs }) {
  const [follow, setFollow] = useState(true);
  const [words, setWords] = useState("");
  const [warnings, setWarnings] = useState(false);
  const box = useRef(null);
  const all = [...logs.values()].sort((a, b) => a.n - b.n);
  const wanted = words.toLowerCase();
  const found = all.filter((l) => (!warnings || l.level === "warn" || l.level === "error") && (!wanted || l.message.toLowerCase().includes(wanted)));
  const shown = found.slice(-SHOWN);
  const newest = all.at(-1)?.n;
  useLayoutEffect(() => {
    if (follow && box.current) box.current.scrollTop = box.current.scrollHeight;
  }, [newest, follow, words, warnings]);
  const scrolled = (e) => {
    const el = e.currentTarget;
    setFollow(el.scrollHeight - el.scrollTop - el.clientHeight < 24);
  };
  return html`<div class="stack-s">
    <div class="row">
      <input class="input log-find" type="search" placeholder=${t("Find in log")} aria-label=${t("Find in log")} value=${words} onInput=${(e) => setWords(e.currentTarget.value)} />
      <label class="switch"><input type="checkbox" checked=${warnings} onChange=${(e) => setWarnings(e.currentTarget.checked)} />${t("Warnings only")}</label>
      <label class="switch"><input type="checkbox" checked=${follow} onChange=${(e) => setFollow(e.currentTarget.checked)} />${t("Follow")}</label>
      <span class="small muted num">${found.length === all.length ? plural(all.length, "1 line", "{n} lines") : t("{a} of {b} lines", { a: int(found.length), b: int(all.length) })}</span>
    </div>
    <div class="log" ref=${box} onScroll=${scrolled} tabindex="0" role="log" aria-live="off" aria-label=${t("Log")} data-lines=${all.length}>
      ${found.length > shown.length && html`<p class="log-more">${t("{n} earlier lines are not shown; search finds them.", { n: int(found.length - shown.length) })}</p>`}
      ${shown.map((l) => html`<p key=${l.n} class=${`l-${l.level ?? "info"}`}><time>${time(l)}</time><b>${(l.level ?? "info").toUpperCase()}</b><span dir="auto">${plain(l.message)}</span></p>`)}
      ${all.length === 0 && html`<p class="log-more">${t("Nothing logged yet.")}</p>`}
    </div></div>`;
}
