// API keys on the system page: make, show once, revoke.
import { html, useState } from "../../vendor/preact-htm.js";
import { api, rows } from "../api.js";
import { absolute } from "../format.js";
import { useResource } from "../hooks.js";
import { Icon } from "../icons.js";
import { t } from "../i18n.js";
import { Ago, Card, Code, Confirm, Modal, Problem, Skeleton, toast } from "../ui.js";
import { Field } from "./schema_form.js";

const SCOPES = [
  { id: "read", about: "look at everything" },
  { id: "submit", about: "also upload, submit, steer, delete" },
  { id: "admin", about: "also models, keys, webhooks" },
];
const DAYS = [
  { id: "", label: "never" },
  { id: "30", label: "in 30 days" },
  { id: "90", label: "in 90 days" },
  { id: "365", label: "in a year" },
];

/** A secret that is shown once: nothing closes it but the button. */
export const Reveal = ({ title, text, children, onClose }) => html`<${Modal} title=${title} onClose=${onClose}><div class="inner">
  <h2>${title}</h2><p class="small">${t("It is shown only now; the server keeps no copy that could be shown again.")}</p>
  <${Code} wrap text=${text} label=${title} />${children}
  <div class="row"><span class="grow"></span><button type="button" class="btn primary" onClick=${onClose}>${t("I have it")}</button></div></div></${Modal}>`;

function NewKey({ first, onMade, onClose }) {
  const [name, setName] = useState("");
  const [scope, setScope] = useState(first ? "admin" : "submit");
  const [days, setDays] = useState("");
  const [state, setState] = useState({ busy: false, error: null });
  const at = (field) => state.error?.fields?.find((f) => f.pointer === `/${field}`)?.detail;
  const send = async (e) => {
    e.preventDefault();
    setState({ busy: true, error: null });
    try {
      const ends = days ? { expires_at: new Date(Date.now() + Number(days) * 86_400_000).toISOString() } : {};
      await onMade(await api.createKey({ name: name.trim(), scope, ...ends }));
    } catch (error) {
      setState({ busy: false, error });
    }
  };
  return html`<form class="stack sub-form" onSubmit=${send}><div class="grid-fields">
      <${Field} id="key-name" label=${t("Name")} help=${t("Whose, or what for.")} problem=${at("name")}><input class="input" id="f-key-name" required maxlength="100" autocomplete="off" value=${name} onInput=${(e) => setName(e.currentTarget.value)} /></${Field}>
      <${Field} id="key-scope" label=${t("May")} problem=${at("scope")} help=${first && t("The first key locks this server, so it must be able to make others.")}><select class="input" id="f-key-scope" disabled=${first} value=${scope} onChange=${(e) => setScope(e.currentTarget.value)}>
        ${SCOPES.map((s) => html`<option value=${s.id} selected=${s.id === scope}>${s.id}: ${t(s.about)}</option>`)}</select></${Field}>
      <${Field} id="key-days" label=${t("Ends")} problem=${at("expires_at")}><select class="input" id="f-key-days" value=${days} onChange=${(e) => setDays(e.currentTarget.value)}>${DAYS.map((d) => html`<option value=${d.id} selected=${d.id === days}>${t(d.label)}</option>`)}</select></${Field}></div>
    ${state.error && !state.error.fields?.length && html`<${Problem} error=${state.error} />`}
    <div class="row"><button class="btn primary" disabled=${state.busy}><${Icon} name="key" />${t("Make the key")}</button><button type="button" class="btn ghost" onClick=${onClose}>${t("Cancel")}</button></div></form>`;
}

const TONES = { valid: "ok", expired: "warn", revoked: "idle" };

function Key({ k, own, onRevoke }) {
  return html`<li class="access-row" data-key=${k.id}><div class="grow stack-0"><div class="row"><strong class="clip">${k.name}</strong><span class="tag">${k.scope}</span>${own && html`<span class="tag">${t("this browser")}</span>`}
      ${k.status !== "valid" && html`<span class=${`status tone-${TONES[k.status]}`}>${t(k.status)}</span>`}</div>
    <p class="small muted row"><code>${k.prefix}…</code><span>${k.last_used_at ? html`${t("used")} <${Ago} when=${k.last_used_at} />` : t("never used")}</span>
      ${k.expires_at && k.status === "valid" && html`<span title=${absolute(k.expires_at)}>${t("ends {date}", { date: k.expires_at.slice(0, 10) })}</span>`}</p></div>
    ${k.status !== "revoked" && html`<button type="button" class="btn ghost square" onClick=${onRevoke} aria-label=${t("Revoke {name}", { name: k.name })} title=${t("Revoke")}><${Icon} name="trash" /></button>`}</li>`;
}

export function KeysCard({ session, onSession }) {
  const { data, error, reload } = useResource(() => api.keys(), []);
  const [adding, setAdding] = useState(false);
  const [made, setMade] = useState(null);
  const [revoking, setRevoking] = useState(null);
  const list = rows(data);
  const first = !session?.locked;
  const onMade = async (key) => {
    // The first key locks the server: this browser signs in with it before anything else is refused.
    if (first) await api.signIn(key.key);
    setMade(key);
    setAdding(false);
    reload();
  };
  return html`<${Card} title=${t("API keys")} icon="key" tools=${!adding && html`<button type="button" class="btn tiny" onClick=${() => setAdding(true)}><${Icon} name="plus" />${t("New key")}</button>`}><div class="stack">
    ${first && html`<p class="note">${t("No key yet: whoever reaches this server may do everything. The first key locks it.")}</p>`}
    ${adding && html`<${NewKey} first=${first} onMade=${onMade} onClose=${() => setAdding(false)} />`}
    ${error && html`<${Problem} error=${error} retry=${reload} />`}${!data && !error && html`<${Skeleton} />`}
    ${list.length > 0 && html`<ul class="access-list">${list.map((k) => html`<${Key} key=${k.id} k=${k} own=${k.id === session?.key?.id} onRevoke=${() => setRevoking(k)} />`)}</ul>`}</div>
    ${made && html`<${Reveal} title=${t("The key of {name}", { name: made.name })} text=${made.key} onClose=${() => (setMade(null), first && onSession())} />`}
    ${revoking && html`<${Confirm} danger title=${t("Revoke this key?")} action=${t("Revoke")} onClose=${() => setRevoking(null)} onConfirm=${async () => {
      await api.revokeKey(revoking.id);
      toast(t("{name} opens nothing any more", { name: revoking.name }), "key");
      reload();
    }}><p>${t("{name}: whoever uses it is refused at once. This cannot be undone.", { name: revoking.name })}</p></${Confirm}>`}
  </${Card}>`;
}
