// The form for a new job: pictures, base model, settings and prompts on one page; beside it what the server makes of it.
// Every error of the server stands at its field. The draft survives a reload.
import { html, useEffect, useMemo, useRef, useState } from "../../vendor/preact-htm.js";
import { api, idempotencyKey, rows } from "../api.js";
import { bytes, duration, int, num } from "../format.js";
import { useResource, useTitle } from "../hooks.js";
import { Icon } from "../icons.js";
import { baseId, datasetId } from "../job_words.js";
import { plural, t } from "../i18n.js";
import { Field, properties, SchemaForm, toRequest, toTexts } from "../parts/schema_form.js";
import { Upload, Verdicts } from "../parts/upload.js";
import { Code, Problem, Skeleton, Tabs, toast } from "../ui.js";
import { itemCount, Mosaic } from "./datasets.js";
import { modelFacts } from "./models.js";

const DRAFT = "lorad.draft";
const blank = () => ({ name: "", dataset: "", base: "", texts: {}, prompts: [], sampling: {}, merged: false });

function readDraft() {
  try {
    return { ...blank(), ...JSON.parse(localStorage.getItem(DRAFT) ?? "{}") };
  } catch {
    return blank();
  }
}
function writeDraft(draft) {
  try {
    draft ? localStorage.setItem(DRAFT, JSON.stringify(draft)) : localStorage.removeItem(DRAFT);
  } catch {
    // storage may be blocked: the draft then lives as long as the page
  }
}

const SAMPLING = {
  every_steps: { title: "Every", "x-unit": "steps; 0: only before and after", type: "integer", default: 100 },
  seed: { title: "Seed", type: "integer", default: 0 },
  num_inference_steps: { title: "Denoising steps", type: "integer", default: 25 },
  guidance_scale: { title: "Guidance", type: "number", default: 3 },
  negative_prompt: { title: "Negative prompt", type: "string", default: "" },
};

/** Exactly what will be sent. */
function requestOf(draft, schema) {
  const prompts = draft.prompts.map((p) => p.trim()).filter(Boolean);
  const sampling = { ...toRequest({ properties: SAMPLING }, draft.sampling), ...(prompts.length > 0 && { prompts }) };
  const hyperparameters = toRequest(schema, draft.texts);
  return {
    name: draft.name.trim() || undefined,
    base_model: draft.base || undefined,
    dataset_id: draft.dataset || undefined,
    hyperparameters: Object.keys(hyperparameters).length ? hyperparameters : undefined,
    sampling: Object.keys(sampling).length ? sampling : undefined,
    export: draft.merged ? { merged_pipeline: true } : undefined,
  };
}

const shellQuote = (text) => `'${text.replaceAll("'", "'\\''")}'`;
const curl = (job) => `curl -sS -X POST ${new URL("jobs", document.baseURI)} \\
  -H 'Content-Type: application/json' \\
  -H "Idempotency-Key: $(uuidgen)" \\
  -d ${shellQuote(JSON.stringify(job, null, 2))}`;

/** The server's view of the request: its plan or its errors, a moment after the last change. */
function useDryRun(job, ready) {
  const [state, setState] = useState({ plan: null, error: null, busy: false });
  const body = JSON.stringify(job);
  useEffect(() => {
    if (!ready) return setState({ plan: null, error: null, busy: false });
    const abort = new AbortController();
    setState((s) => ({ ...s, busy: true }));
    const timer = setTimeout(() => {
      api.dryRun(JSON.parse(body), abort.signal).then(
        (plan) => setState({ plan, error: null, busy: false }),
        (error) => error.name === "AbortError" || setState({ plan: null, error, busy: false }),
      );
    }, 350);
    return () => {
      clearTimeout(timer);
      abort.abort();
    };
  }, [body, ready]);
  return state;
}

const Step = ({ n, title, done, children }) => html`<section class=${`card step ${done ? "done" : ""}`} aria-label=${title}>
  <div class="card-head"><span class="step-n" aria-hidden="true">${done ? html`<${Icon} name="check" />` : n}</span><h2>${title}</h2></div><div class="card-body stack">${children}</div></section>`;

function DatasetStep({ draft, set, datasets, problem }) {
  const list = rows(datasets.data);
  const [all, setAll] = useState(false);
  const chosen = list.find((d) => d.id === draft.dataset);
  const shown = all ? list : list.slice(0, 6);
  const picks = chosen && !shown.includes(chosen) ? [chosen, ...shown.slice(0, 5)] : shown;
  const uploaded = (d) => {
    datasets.reload();
    set({ dataset: d.id, fresh: d, name: draft.name || d.name });
  };
  const report = draft.fresh?.id === draft.dataset ? draft.fresh.report : chosen?.report;
  return html`<${Upload} onDone=${uploaded} compact=${list.length > 0} />
    ${datasets.error && html`<${Problem} error=${datasets.error} retry=${datasets.reload} />`}
    ${datasets.loading && html`<${Skeleton} height=${90} />`}
    ${list.length > 0 && html`<fieldset class="picks"><legend class="label">${t("or choose one that is here")}</legend>
      ${picks.map((d) => html`<label class="pick" key=${d.id}><input type="radio" name="dataset" class="sr" value=${d.id} checked=${d.id === draft.dataset} onChange=${() => set({ dataset: d.id })} />
        <${Mosaic} id=${d.id} n=${4} /><span class="pick-text"><strong class="clip">${d.name}</strong><span class="small muted num">${plural(itemCount(d), "1 picture", "{n} pictures")}</span></span></label>`)}
      ${list.length > 6 && !all && html`<button type="button" class="btn" onClick=${() => setAll(true)}>${t("All {n} datasets", { n: list.length })}</button>`}</fieldset>`}
    ${problem && html`<p class="problem-line" role="alert" data-problem="dataset_id"><${Icon} name="alert" />${problem}</p>`}
    ${report && html`<${Verdicts} report=${report} />`}`;
}

function ModelStep({ draft, set, models, problem }) {
  const list = bases(models);
  return html`${models.error && html`<${Problem} error=${models.error} retry=${models.reload} />`}${models.loading && html`<${Skeleton} height=${64} />`}
    <div class="models" role="radiogroup" aria-label=${t("Base model")}>${list.map((m) => html`<label class="choice" key=${m.id}><input type="radio" name="base" value=${m.id} checked=${m.id === draft.base} onChange=${() => set({ base: m.id })} />
      <span class="grow"><strong class="clip">${m.id}</strong><span class="small muted num">${modelFacts(m).join(" · ")}</span></span></label>`)}</div>
    ${problem && html`<p class="problem-line" role="alert" data-problem="base_model"><${Icon} name="alert" />${problem}</p>`}`;
}

function PromptStep({ draft, set, problems }) {
  const prompts = draft.prompts.length ? draft.prompts : [""];
  const change = (list) => set({ prompts: list });
  const [suggestions, setSuggestions] = useState([]);
  useEffect(() => {
    setSuggestions([]);
    if (draft.dataset) api.items(draft.dataset, undefined, 12).then((a) => setSuggestions([...new Set(rows(a).map((i) => i.caption).filter(Boolean))].slice(0, 4)), () => {});
  }, [draft.dataset]);
  const free = suggestions.filter((s) => !prompts.includes(s));
  return html`<p class="note">${t("Each prompt is drawn with the same noise before, during and after training, so that you see what was learned.")}</p>
    <div class="stack-s">${prompts.map((p, i) => html`<div class="prompt-row" key=${i}><input class="input" value=${p} placeholder=${t("e.g. silhouette icon of a cat")} aria-label=${t("Prompt {n}", { n: i + 1 })} aria-invalid=${problems[i] ? "true" : undefined}
        onInput=${(e) => change(prompts.map((x, k) => (k === i ? e.currentTarget.value : x)))} />
        <button type="button" class="btn ghost square" aria-label=${t("Remove prompt {n}", { n: i + 1 })} disabled=${prompts.length === 1 && !p} onClick=${() => change(prompts.filter((_, k) => k !== i))}><${Icon} name="x" /></button></div>
        ${problems[i] && html`<p class="problem-line"><${Icon} name="alert" />${problems[i]}</p>`}`)}
      ${problems.all && html`<p class="problem-line"><${Icon} name="alert" />${problems.all}</p>`}</div>
    <div class="row"><button type="button" class="btn tiny" onClick=${() => change([...prompts, ""])}><${Icon} name="plus" />${t("Add a prompt")}</button>
      ${free.length > 0 && html`<span class="small muted">${t("from the captions:")}</span>${free.map((s) => html`<button type="button" class="chip suggestion" onClick=${() => change([...prompts.filter((x) => x.trim()), s])}><span class="clip" dir="auto">${s}</span></button>`)}`}</div>
    <details class="fold"><summary><${Icon} name="chev" />${t("How they are drawn")}</summary><div class="fold-body grid-fields">${Object.entries(SAMPLING).map(([name, p]) => html`<${Field} key=${name} id=${`sampling-${name}`} label=${t(p.title)} unit=${p["x-unit"]} problem=${problems[name]}>
      <input class="input num" id=${`f-sampling-${name}`} autocomplete="off" aria-invalid=${problems[name] ? "true" : undefined} value=${draft.sampling[name] ?? String(p.default)} onInput=${(e) => set({ sampling: { ...draft.sampling, [name]: e.currentTarget.value } })} /></${Field}>`)}</div></details>`;
}

function Plan({ state, ready, missing }) {
  const plan = state.plan?.plan ?? {};
  const warnings = plan.warnings ?? [];
  if (!ready) return html`<div class="plan-empty"><p class="small muted">${t("Still to do:")}</p><ul class="todo">${missing.map((m) => html`<li>${m}</li>`)}</ul></div>`;
  if (!state.plan) return state.error ? null : html`<div class="plan-figures"><div class="sk"></div><div class="sk"></div></div>`;
  return html`<div class=${`stack-s ${state.busy ? "stale" : ""}`}><dl class="plan-figures">
      <div><dt>${t("Steps")}</dt><dd data-plan="steps">${int(plan.total_steps)}</dd></div>
      ${plan.duration_s > 0 && html`<div><dt>${t("Time")}</dt><dd data-plan="duration" title=${plan.measured ? t("From finished jobs on this server") : t("From a short measurement of this machine")}>${t("about {d}", { d: duration(plan.duration_s) })}</dd></div>`}
      <div><dt>${t("Memory")}</dt><dd data-plan="memory">${bytes(plan.memory_bytes)}</dd></div>
      <div><dt>${t("Passes over the data")}</dt><dd>${plan.batches_per_epoch > 0 ? num(plan.total_steps / plan.batches_per_epoch, 3) : "–"}</dd></div>
      ${plan.trainable_params > 0 && html`<div><dt>${t("Trained parameters")}</dt><dd>${int(plan.trainable_params)}</dd></div>`}</dl>
    ${warnings.map((w) => html`<p class="problem-line warn"><${Icon} name="alert" /><span>${w}</span></p>`)}</div>`;
}

const bases = (models) => rows(models.data).filter((m) => m.kind === "base" && !m.download);

const FIELD_ROOTS = ["hyperparameters", "sampling"];

export function NewJobPage({ from, dataset, base }) {
  const [draft, setDraft] = useState(() => ({ ...readDraft(), ...(dataset && { dataset }), ...(base && { base }), fresh: null }));
  const set = (changes) => setDraft((d) => ({ ...d, ...changes }));
  const datasets = useResource(() => api.datasets(), []);
  const models = useResource(() => api.models(), []);
  const families = useResource(() => api.families(), []);
  const [view, setView] = useState("plan");
  const [sending, setSending] = useState(false);
  const [refused, setRefused] = useState(null);
  const key = useRef({ body: "", value: "" });
  useTitle(t("New job"));

  useEffect(() => writeDraft({ ...draft, fresh: undefined }), [draft]);
  useEffect(() => {
    if (!from) return;
    api.job(from).then(
      (job) => set({ name: `${job.name}-2`.slice(0, 120), dataset: datasetId(job), base: baseId(job), texts: toTexts(job.hyperparameters), prompts: job.sampling?.prompts ?? [], sampling: toTexts(Object.fromEntries(Object.keys(SAMPLING).map((k) => [k, job.sampling?.[k]]).filter(([, v]) => v !== undefined))), merged: Boolean(job.export?.merged_pipeline) }),
      setRefused,
    );
  }, [from]);
  useEffect(() => {
    const list = bases(models);
    if (list.length && !list.some((m) => m.id === draft.base)) set({ base: list[0].id });
  }, [models.data]);
  useEffect(() => {
    if (datasets.data && draft.dataset && draft.fresh?.id !== draft.dataset && !rows(datasets.data).some((d) => d.id === draft.dataset)) set({ dataset: "" });
  }, [datasets.data]);

  const model = bases(models).find((m) => m.id === draft.base);
  const familyId = model?.family ?? rows(families.data)[0]?.id;
  const fetched = useResource(() => (familyId ? api.schema(familyId) : Promise.resolve(null)), [familyId]);
  const schema = fetched.data;

  const job = useMemo(() => requestOf(draft, schema), [draft, schema]);
  const missing = [!draft.dataset && t("pictures to learn from"), !draft.base && t("a base model"), !draft.name.trim() && t("a name")].filter(Boolean);
  const ready = missing.length === 0 && Boolean(schema);
  const dry = useDryRun(job, ready);
  const body = JSON.stringify(job);
  useEffect(() => setRefused(null), [body]);

  // errors: by field where there is one, else in the panel
  const error = refused ?? dry.error;
  const names = new Set(properties(schema).map((p) => p.name));
  const at = { hyperparameters: {}, sampling: {}, top: {} };
  const loose = [];
  for (const e of error?.fields ?? []) {
    const [head, name, index] = e.pointer.split("/").slice(1);
    if (head === "hyperparameters" && names.has(name)) at.hyperparameters[name] = e.detail;
    else if (head === "sampling" && name === "prompts") at.sampling[index ?? "all"] = e.detail;
    else if (head === "sampling" && name in SAMPLING) at.sampling[name] = e.detail;
    else if (!FIELD_ROOTS.includes(head) && ["name", "base_model", "dataset_id"].includes(head)) at.top[head] = e.detail;
    else loose.push(e);
  }
  const faults = error?.fields?.length ?? 0;

  const busy = useRef(false);
  const submit = async (e) => {
    e.preventDefault();
    if (busy.current || !ready) return;
    busy.current = true;
    setSending(true);
    if (key.current.body !== body) key.current = { body, value: idempotencyKey() };
    try {
      const made = await api.createJob(job, key.current.value);
      writeDraft({ ...draft, name: "", fresh: undefined });
      toast(t("{name} is in the queue", { name: made.name }));
      location.hash = `#/jobs/${encodeURIComponent(made.id)}`;
    } catch (problem) {
      busy.current = false;
      setSending(false);
      setRefused(problem);
      requestAnimationFrame(() => document.querySelector('[aria-invalid="true"], .problem-line[role="alert"]')?.scrollIntoView({ block: "center", behavior: "smooth" }));
    }
  };

  return html`<form class="page new-page" onSubmit=${submit} noValidate>
    <div class="page-head"><div class="grow"><h1>${from ? t("Clone a job") : t("New job")}</h1><p class="sub">${t("Three choices; everything else has a sensible default.")}</p></div></div>
    <div class="with-side wide-side"><div class="stack">
      <${Step} n="1" title=${t("Pictures")} done=${Boolean(draft.dataset)}><${DatasetStep} draft=${draft} set=${set} datasets=${datasets} problem=${at.top.dataset_id} /></${Step}>
      <${Step} n="2" title=${t("Base model")} done=${Boolean(draft.base)}><${ModelStep} draft=${draft} set=${set} models=${models} problem=${at.top.base_model} /></${Step}>
      <${Step} n="3" title=${t("Name and settings")} done=${Boolean(draft.name.trim()) && faults === 0}>
        <${Field} id="name" label=${t("Name of the job")} problem=${at.top.name} help=${t("Result files are named after it.")}><input class="input" id="f-name" maxlength="200" autocomplete="off" placeholder=${t("e.g. my-style")} value=${draft.name} aria-invalid=${at.top.name ? "true" : undefined} onInput=${(e) => set({ name: e.currentTarget.value })} /></${Field}>
        ${schema ? html`<${SchemaForm} schema=${schema} texts=${draft.texts} problems=${at.hyperparameters} onText=${(name, text) => setDraft((d) => ({ ...d, texts: Object.fromEntries(Object.entries({ ...d.texts, [name]: text }).filter(([, v]) => v !== undefined)) }))} />`
          : fetched.error ? html`<${Problem} error=${fetched.error} retry=${fetched.reload} />` : html`<${Skeleton} n=${2} height=${64} />`}
        <label class="switch"><input type="checkbox" checked=${draft.merged} onChange=${(e) => set({ merged: e.currentTarget.checked })} />${t("Also write the whole model with the adapter merged in")}</label>
      </${Step}>
      <${Step} n="4" title=${t("Sample prompts")} done=${draft.prompts.some((p) => p.trim())}><${PromptStep} draft=${draft} set=${set} problems=${at.sampling} /></${Step}>
    </div>
    <aside class="side-sticky stack"><section class="card" aria-label=${t("Before you start")}><div class="card-body stack">
        <${Tabs} label=${t("Preview")} value=${view} onChange=${setView} tabs=${[{ id: "plan", label: t("Plan") }, { id: "curl", label: "curl" }, { id: "json", label: "JSON" }]} />
        ${view === "plan" && html`<${Plan} state=${dry} ready=${ready} missing=${missing} />`}
        ${view === "curl" && html`<${Code} text=${curl(job)} label="curl" />`}
        ${view === "json" && html`<${Code} text=${JSON.stringify(job, null, 2)} label="JSON" />`}
        ${faults > 0 && html`<p class="problem-line" role="status" data-faults=${faults}><${Icon} name="alert" />${plural(faults, "1 field needs a look", "{n} fields need a look")}</p>`}
        ${error && (faults === 0 || loose.length > 0) && html`<${Problem} error=${faults ? { ...error.problem, errors: loose } : error} />`}
        <button class="btn primary big wide" type="submit" disabled=${!ready || sending || (dry.error?.status === 422 && !refused)}><${Icon} name=${sending ? "spinner" : "play"} />${sending ? t("Submitting…") : t("Start training")}</button>
      </div></section></aside></div>
  </form>`;
}
