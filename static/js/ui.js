// Parts that every page shares: status, progress, errors, empty states, dialogs, code, toasts. Know no API.
import { html, useEffect, useRef, useState } from "../vendor/preact-htm.js";
import { Icon } from "./icons.js";
import { absolute, ago } from "./format.js";
import { t } from "./i18n.js";

/** How each job state looks: tone, icon and word; never the colour alone. */
export const STATES = {
  validating: { tone: "idle", icon: "clock", word: "Validating" },
  queued: { tone: "idle", icon: "clock", word: "Queued" },
  preparing: { tone: "run", icon: "spinner", word: "Preparing", live: true },
  running: { tone: "run", icon: "spinner", word: "Running", live: true },
  saving: { tone: "run", icon: "save", word: "Saving" },
  paused: { tone: "warn", icon: "pause", word: "Paused" },
  interrupted: { tone: "warn", icon: "retry", word: "Interrupted" },
  succeeded: { tone: "ok", icon: "check", word: "Done" },
  failed: { tone: "bad", icon: "alert", word: "Failed" },
  cancelled: { tone: "idle", icon: "stop", word: "Cancelled" },
};
export const isOver = (status) => status === "succeeded" || status === "failed" || status === "cancelled";

export function Status({ status, stopping }) {
  const s = STATES[status] ?? { tone: "idle", icon: "info", word: status };
  return html`<span class=${`status tone-${stopping ? "warn" : s.tone} ${s.live ? "live" : ""}`} data-status=${status}>
    <${Icon} name=${s.icon} />${stopping ? t("Stopping") : t(s.word)}</span>`;
}

/** A progress bar with its value in words for screen readers. */
export function Bar({ done, total, label, tone = "run", slim }) {
  const known = total > 0;
  const share = known ? Math.min(1, done / total) : 0;
  return html`<div class=${`bar tone-${tone} ${slim ? "slim" : ""} ${known ? "" : "indeterminate"}`} role="progressbar" aria-label=${label}
    aria-valuemin="0" aria-valuemax=${known ? total : undefined} aria-valuenow=${known ? done : undefined}><i style=${{ width: `${share * 100}%` }}></i></div>`;
}

export const Ago = ({ when, now }) => html`<time title=${absolute(when)} datetime=${typeof when === "string" ? when : undefined} class="nowrap">${ago(when, now)}</time>`;

export function CopyButton({ text, label = t("Copy"), tiny = true }) {
  const [done, setDone] = useState(false);
  const copy = async () => {
    try {
      await navigator.clipboard.writeText(text);
    } catch {
      // plain-http origins have no clipboard API
      const area = document.createElement("textarea");
      area.value = text;
      document.body.append(area);
      area.select();
      document.execCommand("copy");
      area.remove();
    }
    setDone(true);
    setTimeout(() => setDone(false), 1600);
  };
  return html`<button type="button" class=${`btn ghost copy ${tiny ? "tiny" : ""}`} onClick=${copy} aria-label=${label}>
    <${Icon} name=${done ? "check" : "copy"} /><span aria-live="polite">${done ? t("Copied") : ""}</span></button>`;
}

export const Code = ({ text, wrap, label }) =>
  html`<div class=${`code ${wrap ? "wrap" : ""}`}><pre tabindex="0" aria-label=${label ?? t("Code")}><code>${text}</code></pre><${CopyButton} text=${text} /></div>`;

/** What happened, why, what next, and the request id for the log. Takes an ApiError or a bare problem. */
export function Problem({ error, retry, title }) {
  const problem = error?.problem ?? error ?? {};
  const loose = (problem.errors ?? []).slice(0, 12);
  return html`<div class="alert tone-bad" role="alert">
    <${Icon} name="alert" />
    <div class="body">
      <h3>${title ?? problem.title ?? t("Something went wrong")}</h3>
      ${(problem.detail ?? error?.message) && html`<p>${problem.detail ?? error.message}</p>`}
      ${loose.length > 0 && html`<ul class="stack-s small">${loose.map((e) => html`<li><code>${e.pointer}</code> ${e.detail}</li>`)}</ul>`}
      ${problem.hint && html`<p><strong>${t("What to do:")}</strong> ${problem.hint}</p>`}
      ${(problem.code || problem.request_id) && html`<p class="req">${[problem.code, problem.request_id && `request ${problem.request_id}`].filter(Boolean).join(" · ")}</p>`}
    </div>
    ${retry && html`<button type="button" class="btn tiny" onClick=${retry}><${Icon} name="retry" />${t("Try again")}</button>`}
  </div>`;
}

export const Empty = ({ icon, title, children }) => html`<div class="empty"><${Icon} name=${icon} /><h2>${title}</h2>${children}</div>`;

export const Skeleton = ({ height = 60, n = 1 }) =>
  html`<div class="stack" role="status" aria-label=${t("Loading")}>${Array.from({ length: n }, () => html`<div class="sk" style=${{ height: `${height}px` }}></div>`)}</div>`;

export function Card({ title, icon, tools, children, flush, id, ...rest }) {
  return html`<section class="card" id=${id} aria-label=${title} ...${rest}>
    ${title && html`<div class="card-head">${icon && html`<span class="muted"><${Icon} name=${icon} /></span>`}<h2>${title}</h2>${tools && html`<div class="tools">${tools}</div>`}</div>`}
    <div class=${`card-body ${flush ? "flush" : ""}`}>${children}</div></section>`;
}

/** A tab row that follows the ARIA pattern: arrow keys move. `tabs`: [{id, label}]. */
export function Tabs({ tabs, value, onChange, label }) {
  const keys = (e) => {
    const step = { ArrowRight: 1, ArrowLeft: -1 }[e.key];
    if (!step) return;
    e.preventDefault();
    const next = tabs[(tabs.findIndex((x) => x.id === value) + step + tabs.length) % tabs.length];
    onChange(next.id);
    e.currentTarget.querySelector(`[data-tab="${next.id}"]`)?.focus();
  };
  return html`<div class="tabs" role="tablist" aria-label=${label} onKeyDown=${keys}>
    ${tabs.map((x) => html`<button type="button" role="tab" data-tab=${x.id} aria-selected=${x.id === value} tabindex=${x.id === value ? 0 : -1} onClick=${() => onChange(x.id)}>${x.label}</button>`)}
  </div>`;
}

/** A native modal dialog: focus stays inside, Escape closes. */
export function Modal({ title, onClose, children, className = "modal" }) {
  const ref = useRef(null);
  useEffect(() => {
    const back = document.activeElement;
    ref.current.showModal();
    return () => back instanceof HTMLElement && back.focus();
  }, []);
  return html`<dialog ref=${ref} class=${className} aria-label=${title} onClose=${onClose} onClick=${(e) => e.target === ref.current && onClose()}>${children}</dialog>`;
}

/** A question before something that cannot be undone. */
export function Confirm({ title, children, action, onConfirm, onClose, danger }) {
  const [busy, setBusy] = useState(false);
  const [error, setError] = useState(null);
  const go = async () => {
    setBusy(true);
    try {
      await onConfirm();
      onClose();
    } catch (e) {
      setError(e);
      setBusy(false);
    }
  };
  return html`<${Modal} title=${title} onClose=${onClose}><div class="inner">
    <h2>${title}</h2><div class="stack-s small">${children}</div>
    ${error && html`<${Problem} error=${error} />`}
    <div class="row"><span class="grow"></span>
      <button type="button" class="btn" onClick=${onClose}>${t("Keep it")}</button>
      <button type="button" class=${`btn ${danger ? "danger" : "primary"}`} disabled=${busy} onClick=${go}>${action}</button></div>
  </div></${Modal}>`;
}

let pushToast = () => {};
/** Says something briefly at the edge of the page. */
export const toast = (text, icon = "check") => pushToast({ text, icon, key: Math.random() });
export function Toasts() {
  const [list, setList] = useState([]);
  pushToast = (item) => {
    setList((l) => [...l, item]);
    setTimeout(() => setList((l) => l.filter((x) => x !== item)), 5000);
  };
  return html`<div class="toasts" role="status" aria-live="polite">${list.map((x) => html`<div class="toast" key=${x.key}><${Icon} name=${x.icon} />${x.text}</div>`)}</div>`;
}
