// Base models that can be trained on.
import { html, useEffect, useState } from "../../vendor/preact-htm.js";
import { api, rows } from "../api.js";
import { bytes, int } from "../format.js";
import { useResource, useTitle } from "../hooks.js";
import { Icon } from "../icons.js";
import { t } from "../i18n.js";
import { Field } from "../parts/schema_form.js";
import { Card, Confirm, Empty, Problem, Skeleton, toast } from "../ui.js";

/** Facts of a base model as words, whatever its family says in `details`. */
export const modelFacts = (m) => {
  return [m.resolution && `${m.resolution} px`, m.bytes && bytes(m.bytes), m.prediction_type, m.family].filter(Boolean);
};

function Register({ onDone }) {
  const [path, setPath] = useState("");
  const [id, setId] = useState("");
  const [state, setState] = useState({ busy: false, error: null });
  const at = (field) => state.error?.fields?.find((f) => f.pointer === `/${field}`)?.detail;
  const send = async (e) => {
    e.preventDefault();
    setState({ busy: true, error: null });
    try {
      const model = await api.registerModel({ id: id.trim(), path: path.trim() });
      setState({ busy: false, error: null });
      setPath("");
      setId("");
      toast(t("Registered {name}", { name: model.id }), "model");
      onDone();
    } catch (error) {
      setState({ busy: false, error });
    }
  };
  const loose = state.error && !at("path") && !at("id");
  return html`<form class="stack" onSubmit=${send}><div class="grid-fields">
      <${Field} id="model-id" label=${t("Name")} help=${t("How jobs will call it: letters, digits, dashes.")} problem=${at("id")}><input class="input" id="f-model-id" required autocomplete="off" spellcheck="false" value=${id} onInput=${(e) => setId(e.currentTarget.value)} aria-invalid=${at("id") ? "true" : undefined} /></${Field}>
      <${Field} id="model-path" label=${t("Folder on the server")} help=${t("A diffusers folder (with model_index.json) under an allowed root.")} problem=${at("path")}><input class="input mono" id="f-model-path" required autocomplete="off" spellcheck="false" value=${path} onInput=${(e) => setPath(e.currentTarget.value)} aria-invalid=${at("path") ? "true" : undefined} /></${Field}></div>
    ${loose && html`<${Problem} error=${state.error} />`}
    <div><button class="btn" disabled=${state.busy}><${Icon} name="plus" />${t("Register")}</button></div></form>`;
}

function Pull({ onDone }) {
  const [hubId, setHubId] = useState("");
  const [state, setState] = useState({ busy: false, error: null });
  const at = state.error?.fields?.find((f) => ["/hub_id", "/id"].includes(f.pointer))?.detail;
  const send = async (e) => {
    e.preventDefault();
    setState({ busy: true, error: null });
    try {
      const model = await api.registerModel({ hub_id: hubId.trim() });
      setState({ busy: false, error: null });
      setHubId("");
      toast(t("Downloading {name}", { name: model.id }), "model");
      onDone();
    } catch (error) {
      setState({ busy: false, error });
    }
  };
  return html`<form class="stack" onSubmit=${send}>
    <${Field} id="hub-id" label=${t("Model on the hub")} help=${t("owner/name, or owner/name@revision. Only what training needs is downloaded, and checked.")} problem=${at}><input class="input mono" id="f-hub-id" required autocomplete="off" spellcheck="false" placeholder="owner/name" value=${hubId} onInput=${(e) => setHubId(e.currentTarget.value)} aria-invalid=${at ? "true" : undefined} /></${Field}>
    ${state.error && !at && html`<${Problem} error=${state.error} />`}
    <div><button class="btn" disabled=${state.busy}><${Icon} name="download" />${t("Download")}</button></div></form>`;
}

/** A model on its way from a hub. */
function Downloading({ m, onGone }) {
  const { hub_id: hubId, done_bytes: done, total_bytes: total, error } = m.download ?? {};
  const retry = async () => {
    await api.registerModel({ hub_id: hubId, id: m.id });
    onGone();
  };
  return html`<section class="card model" aria-label=${m.id}><div class="model-head"><span class="face none"><${Icon} name="model" /></span>
      <div class="grow"><strong class="clip">${m.id}</strong><p class="small muted row num"><span>${hubId}</span>${m.status === "downloading" && html`<span role="status">${t("{a} of {b}", { a: bytes(done), b: bytes(total) })}</span>`}</p></div>
      ${m.status === "failed" && html`<button type="button" class="btn" onClick=${retry}>${t("Try again")}</button>`}
      <button type="button" class="btn ghost square" aria-label=${t("Cancel the download of {name}", { name: m.id })} title=${t("Cancel")} onClick=${async () => {
        await api.deleteModel(m.id);
        onGone();
      }}><${Icon} name="x" /></button></div>
    ${error && html`<${Problem} error=${error} />`}</section>`;
}

function Model({ m, onGone }) {
  const [asking, setAsking] = useState(false);
  const details = Object.entries(m.details ?? {}).filter(([, v]) => typeof v !== "object");
  return html`<section class="card model" aria-label=${m.id}><div class="model-head"><span class="face none"><${Icon} name="model" /></span>
      <div class="grow"><strong class="clip">${m.id}</strong><p class="small muted row num">${modelFacts(m).map((x) => html`<span>${x}</span>`)}</p></div>
      ${m.builtin ? html`<span class="tag">${t("bundled")}</span>` : html`<button type="button" class="btn ghost square" aria-label=${t("Unregister {name}", { name: m.id })} title=${t("Unregister")} onClick=${() => setAsking(true)}><${Icon} name="trash" /></button>`}
      <a class="btn" href=${`#/new?base=${encodeURIComponent(m.id)}`}><${Icon} name="play" />${t("Train on it")}</a></div>
    ${details.length > 0 && html`<details class="fold"><summary><${Icon} name="chev" />${t("Details")}</summary><dl class="settings">${details.map(([k, v]) => html`<div><dt>${k.replace(/_/g, " ")}</dt><dd class="num">${typeof v === "number" ? int(v) : String(v)}</dd></div>`)}</dl></details>`}
    ${m.licence ? html`<p class="note">${t("Licence: {x}", { x: m.licence })}</p>` : ""}
    ${asking && html`<${Confirm} danger title=${t("Unregister this model?")} action=${t("Unregister")} onClose=${() => setAsking(false)} onConfirm=${async () => {
      await api.deleteModel(m.id);
      onGone();
    }}><p>${t("Its files stay where they are; new jobs cannot use it.")}</p></${Confirm}>`}
  </section>`;
}

export function ModelsPage() {
  const { data, error, loading, reload } = useResource(() => api.models(), []);
  useTitle(t("Models"));
  const list = rows(data);
  const waiting = list.some((m) => m.status === "downloading");
  useEffect(() => {
    const timer = waiting && setInterval(reload, 1000);
    return () => clearInterval(timer);
  }, [waiting]);
  return html`<div class="page">
    <div class="page-head"><div class="grow"><h1>${t("Models")}</h1><p class="sub">${t("Base models on this server. Training never changes them.")}</p></div></div>
    ${error && html`<${Problem} error=${error} retry=${reload} />`}
    ${loading && html`<${Skeleton} n=${2} height=${96} />`}
    ${!loading && !error && list.length === 0 && html`<${Empty} icon="model" title=${t("No models")} />`}
    <div class="stack">${list.map((m) => html`<${m.download ? Downloading : Model} key=${m.id} m=${m} onGone=${reload} />`)}</div>
    <${Card} title=${t("Download a model")} icon="download"><${Pull} onDone=${reload} /></${Card}>
    <${Card} title=${t("Register a model")} icon="plus"><${Register} onDone=${reload} /></${Card}>
  </div>`;
}
