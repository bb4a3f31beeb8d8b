// Webhooks on the system page: make, test, look at what was delivered.
import { html, useState } from "../../vendor/preact-htm.js";
import { api, rows } from "../api.js";
import { duration } from "../format.js";
import { useResource } from "../hooks.js";
import { Icon } from "../icons.js";
import { t } from "../i18n.js";
import { Ago, Card, Confirm, Problem, Skeleton, toast } from "../ui.js";
import { Reveal } from "./keys.js";
import { Field } from "./schema_form.js";

const EVENTS = ["job.created", "job.started", "job.paused", "job.interrupted", "job.succeeded", "job.failed", "job.cancelled"];
const USUAL = ["job.succeeded", "job.failed", "job.cancelled"];

function NewWebhook({ onMade, onClose }) {
  const [url, setUrl] = useState("");
  const [events, setEvents] = useState(USUAL);
  const [state, setState] = useState({ busy: false, error: null });
  const at = (field) => state.error?.fields?.find((f) => f.pointer.startsWith(`/${field}`))?.detail;
  const send = async (e) => {
    e.preventDefault();
    setState({ busy: true, error: null });
    try {
      onMade(await api.createWebhook({ url: url.trim(), events }));
    } catch (error) {
      setState({ busy: false, error });
    }
  };
  const toggle = (name) => setEvents((all) => (all.includes(name) ? all.filter((x) => x !== name) : [...all, name]));
  return html`<form class="stack sub-form" onSubmit=${send}>
    <${Field} id="webhook-url" label=${t("Address")} problem=${at("url")}><input class="input mono" id="f-webhook-url" type="url" required placeholder="https://…" autocomplete="off" spellcheck="false" value=${url} onInput=${(e) => setUrl(e.currentTarget.value)} aria-invalid=${at("url") ? "true" : undefined} /></${Field}>
    <fieldset class="stack-s"><legend class="label">${t("Tell it about")}</legend><div class="chips">${EVENTS.map((name) => html`<button type="button" class="chip" aria-pressed=${events.includes(name)} onClick=${() => toggle(name)}>${name.replace("job.", "")}</button>`)}</div>
      ${at("events") && html`<p class="problem-line"><${Icon} name="alert" />${at("events")}</p>`}</fieldset>
    ${state.error && !state.error.fields?.length && html`<${Problem} error=${state.error} />`}
    <div class="row"><button class="btn primary" disabled=${state.busy}><${Icon} name="plus" />${t("Add the webhook")}</button><button type="button" class="btn ghost" onClick=${onClose}>${t("Cancel")}</button></div></form>`;
}

const DELIVERY = { pending: ["idle", "clock", "waiting"], delivered: ["ok", "check", "delivered"], failed: ["bad", "alert", "given up"] };

function Deliveries({ id }) {
  const { data, error, reload } = useResource(() => api.deliveries(id), [id], 4000);
  if (error) return html`<${Problem} error=${error} retry=${reload} />`;
  if (!data) return html`<${Skeleton} />`;
  const list = rows(data);
  if (!list.length) return html`<p class="note">${t("Nothing was sent yet.")}</p>`;
  return html`<ol class="access-list deliveries">${list.map((d) => {
    const [tone, icon, word] = DELIVERY[d.status] ?? DELIVERY.pending;
    const last = d.attempts.at(-1);
    return html`<li class="access-row" key=${d.id} data-delivery=${d.status}><div class="grow stack-0">
      <div class="row"><span class=${`status tone-${tone}`}><${Icon} name=${icon} />${t(word)}</span><code>${d.event}</code><span class="small muted"><${Ago} when=${d.created_at} /></span></div>
      <p class="small muted">${last ? `${last.error ?? t("answered {status} in {time}", { status: last.http_status, time: duration(last.duration_ms / 1000) })} · ${t("{n} tried", { n: d.attempts.length })}` : t("not tried yet")}</p></div>
      ${d.status !== "pending" && html`<button type="button" class="btn tiny" onClick=${async () => (await api.redeliver(id, d.id), reload())}><${Icon} name="retry" />${t("Send again")}</button>`}</li>`;
  })}</ol>`;
}

function Webhook({ w, onChange, onDelete }) {
  const [open, setOpen] = useState(false);
  const [error, setError] = useState(null);
  const act = (what) => async () => {
    try {
      setError(null);
      await what();
      onChange();
    } catch (e) {
      setError(e);
    }
  };
  const test = act(async () => {
    await api.testWebhook(w.id);
    setOpen(true);
  });
  const [tone, word] = !w.enabled ? ["bad", "off"] : w.failing_since ? ["warn", "failing"] : ["ok", "on"];
  return html`<li class="access-row wrap" data-webhook=${w.id}><div class="grow stack-0"><div class="row"><code class="clip">${w.url}</code><span class=${`status tone-${tone}`} title=${w.disabled_reason ?? ""}>${t(word)}</span></div>
      <p class="small muted">${w.events.join(", ")}${w.disabled_reason ? ` · ${w.disabled_reason}` : ""}</p></div>
    <div class="row"><button type="button" class="btn tiny" onClick=${test}><${Icon} name="bolt" />${t("Test")}</button>
      ${!w.enabled && html`<button type="button" class="btn tiny" onClick=${act(() => api.updateWebhook(w.id, { enabled: true }))}>${t("Switch on")}</button>`}
      <button type="button" class="btn tiny" aria-expanded=${open} onClick=${() => setOpen(!open)}><${Icon} name="log" />${t("Deliveries")}</button>
      <button type="button" class="btn ghost square" onClick=${onDelete} aria-label=${t("Delete {name}", { name: w.url })} title=${t("Delete")}><${Icon} name="trash" /></button></div>
    ${error && html`<${Problem} error=${error} />`}${open && html`<div class="full"><${Deliveries} id=${w.id} /></div>`}</li>`;
}

export function WebhooksCard() {
  const { data, error, reload } = useResource(() => api.webhooks(), [], 15_000);
  const [adding, setAdding] = useState(false);
  const [made, setMade] = useState(null);
  const [deleting, setDeleting] = useState(null);
  const list = rows(data);
  return html`<${Card} title=${t("Webhooks")} icon="bolt" tools=${!adding && html`<button type="button" class="btn tiny" onClick=${() => setAdding(true)}><${Icon} name="plus" />${t("New webhook")}</button>`}><div class="stack">
    ${!list.length && !adding && html`<p class="note">${t("Tells another server when a job starts, ends or fails: signed, and tried again until it is taken.")}</p>`}
    ${adding && html`<${NewWebhook} onClose=${() => setAdding(false)} onMade=${(w) => (setMade(w), setAdding(false), reload())} />`}
    ${error && html`<${Problem} error=${error} retry=${reload} />`}
    ${list.length > 0 && html`<ul class="access-list">${list.map((w) => html`<${Webhook} key=${w.id} w=${w} onChange=${reload} onDelete=${() => setDeleting(w)} />`)}</ul>`}</div>
    ${made && html`<${Reveal} title=${t("The secret that signs its messages")} text=${made.secret} onClose=${() => setMade(null)} />`}
    ${deleting && html`<${Confirm} danger title=${t("Delete this webhook?")} action=${t("Delete")} onClose=${() => setDeleting(null)} onConfirm=${async () => {
      await api.deleteWebhook(deleting.id);
      toast(t("The webhook is deleted"), "trash");
      reload();
    }}><p>${t("What waits to be sent to it is dropped with it.")}</p></${Confirm}>`}
  </${Card}>`;
}
