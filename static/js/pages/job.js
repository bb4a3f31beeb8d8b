// One job: where it stands, its curves, its pictures before and after, its files, log and settings.
import { html, useMemo, useState } from "../../vendor/preact-htm.js";
import { api, rows } from "../api.js";
import { Chart, smooth } from "../chart.js";
import { absolute, bytes, duration, int, num, speed } from "../format.js";
import { useNow, useResource, useTitle } from "../hooks.js";
import { Icon } from "../icons.js";
import { baseId, datasetId, elapsed, sentence, stages, steps, stopping } from "../job_words.js";
import { t } from "../i18n.js";
import { useJob } from "../live.js";
import { Compare, src } from "../parts/compare.js";
import { Downloads, fileUrl, HowToUse, mainFile } from "../parts/downloads.js";
import { LogTail } from "../parts/log.js";
import { Ago, Bar, Card, Code, Confirm, Empty, isOver, Modal, Problem, Skeleton, STATES, Status, Tabs, toast } from "../ui.js";

const ALERT_TONES = { info: "idle", warn: "warn", error: "bad" };
const CONNECTION = {
  connecting: { tone: "idle", word: "Connecting" },
  live: { tone: "ok", word: "Live", pulse: true },
  reconnecting: { tone: "warn", word: "Reconnecting" },
  ended: { tone: "idle", word: "Ended" },
};
function Connection({ state }) {
  const c = CONNECTION[state];
  return html`<span class=${`badge-live tone-${c.tone} ${c.pulse ? "pulse" : ""}`} role="status" data-connection=${state} title=${t("The event stream of this job")}><i></i>${t(c.word)}</span>`;
}

function Timeline({ job, progress }) {
  return html`<ol class="timeline" aria-label=${t("Stages")}>${stages(job, progress).map((s) => html`<li class=${s.state} aria-current=${s.state === "now" ? "step" : undefined}>
    <i>${s.state === "done" ? html`<${Icon} name="check" />` : s.state === "broken" ? html`<${Icon} name="x" />` : ""}</i><span>${s.name}</span></li>`)}</ol>`;
}

function CancelDialog({ job, onClose }) {
  const [mode, setMode] = useState("save");
  const [busy, setBusy] = useState(false);
  const [error, setError] = useState(null);
  const started = job.status === "running";
  const go = async () => {
    setBusy(true);
    try {
      await api.cancel(job.id, started ? mode : "discard");
      toast(t("Stopping {name}", { name: job.name }), "stop");
      onClose();
    } catch (e) {
      setError(e);
      setBusy(false);
    }
  };
  const choice = (id, title, about) => html`<label class="choice"><input type="radio" name="mode" value=${id} checked=${mode === id} onChange=${() => setMode(id)} /><span><strong>${title}</strong><span class="small muted">${about}</span></span></label>`;
  return html`<${Modal} title=${t("Stop this job?")} onClose=${onClose}><div class="inner">
    <h2>${t("Stop this job?")}</h2>
    ${started ? html`<div class="stack-s">
      ${choice("save", t("Stop and keep what was learned"), t("Exports the adapter as it is now, at step {n}.", { n: int(steps(job).done) }))}
      ${choice("discard", t("Stop and discard"), t("No result files. The curve, samples and log stay."))}
      ${stopping(job) && choice("force", t("Kill the worker now"), t("For a worker that does not answer. Unsaved work is lost."))}</div>`
      : html`<p class="small muted">${t("It has not trained yet, so there is nothing to keep.")}</p>`}
    ${error && html`<${Problem} error=${error} />`}
    <div class="row"><span class="grow"></span><button type="button" class="btn" onClick=${onClose}>${t("Let it run")}</button>
      <button type="button" class="btn danger" disabled=${busy} onClick=${go}><${Icon} name="stop" />${t("Stop the job")}</button></div>
  </div></${Modal}>`;
}

function Actions({ job }) {
  const [dialog, setDialog] = useState("");
  const over = isOver(job.status);
  const [problem, setProblem] = useState(null);
  const can = (action) => (job.allowed ?? []).includes(action);
  const act = async (action) => {
    setProblem(null);
    try {
      const answer = await api.act(job.id, action);
      if (action === "retry") location.hash = `#/jobs/${encodeURIComponent(answer.id)}`;
    } catch (e) {
      setProblem(e);
    }
  };
  return html`<div class="row actions">
    ${can("retry") && html`<button type="button" class="btn" onClick=${() => act("retry")}><${Icon} name="retry" />${t("Try again")}</button>`}
    ${can("resume") && html`<button type="button" class="btn primary" onClick=${() => act("resume")}><${Icon} name="play" />${t("Resume")}</button>`}
    ${can("pause") && !stopping(job) && html`<button type="button" class="btn" disabled=${job.desired === "pause"} onClick=${() => act("pause")}><${Icon} name="pause" />${job.desired === "pause" ? t("Pausing…") : t("Pause")}</button>`}
    <a class="btn" href=${`#/new?from=${encodeURIComponent(job.id)}`}><${Icon} name="copy" />${t("Clone")}</a>
    ${!over && html`<button type="button" class="btn" onClick=${() => setDialog("cancel")}><${Icon} name="stop" />${stopping(job) ? t("Stopping…") : t("Stop")}</button>`}
    ${over && html`<button type="button" class="btn ghost square" aria-label=${t("Delete this job")} title=${t("Delete this job")} onClick=${() => setDialog("delete")}><${Icon} name="trash" /></button>`}
    ${problem && html`<${Problem} error=${problem} />`}
    ${dialog === "cancel" && html`<${CancelDialog} job=${job} onClose=${() => setDialog("")} />`}
    ${dialog === "delete" && html`<${Confirm} danger title=${t("Delete this job?")} action=${t("Delete")} onClose=${() => setDialog("")} onConfirm=${async () => {
      await api.deleteJob(job.id);
      toast(t("Deleted {name}", { name: job.name }), "trash");
      location.hash = "#/";
    }}><p>${t("Its curve, samples, log and result files are removed. The dataset and the base model stay.")}</p></${Confirm}>`}
  </div>`;
}

/** The moment it was for: the picture before, the picture after, the file. */
function Finished({ job, samples, files }) {
  const pairs = useMemo(() => {
    const last = Math.max(0, ...samples.map((s) => s.step));
    const at = (step, i) => samples.find((s) => s.step === step && s.prompt_index === i);
    const prompts = [...new Set(samples.map((s) => s.prompt_index))].sort((a, b) => a - b);
    return last ? prompts.slice(0, 3).map((i) => [at(0, i), at(last, i)]).filter(([a, b]) => a && b) : [];
  }, [samples.length]);
  const file = mainFile(files);
  return html`<section class="card finished" aria-label=${t("Result")}>
    ${pairs.length > 0 && html`<div class="pairs" aria-hidden="true">${pairs.map(([a, b]) => html`<div class="pair"><img src=${src(a)} alt="" /><${Icon} name="chev" /><img src=${src(b)} alt="" /></div>`)}</div>`}
    <div class="stack-s grow"><h2><${Icon} name="check" />${t("Your adapter is ready")}</h2><p class="small muted">${t("Every file was read back and compared before it was published.")}</p></div>
    <div class="row"><a class="btn" href="#compare" onClick=${(e) => (e.preventDefault(), document.getElementById("compare")?.scrollIntoView({ behavior: "smooth" }))}>${t("Compare")}</a>
    ${file && html`<a class="btn primary big" href=${fileUrl(job.id, file)} download=${file.name}><${Icon} name="download" />${t("Download adapter")} <span class="num">${bytes(file.bytes)}</span></a>`}</div>
  </section>`;
}

const SMALL = ["lr", "grad_norm", "samples_per_s"];
const COLORS = ["--chart-2", "--chart-3", "--chart-4"];
// Figures of every step that are not curves of their own.
const NOT_DRAWN = new Set(["step", "t", "t_ms", "attempt", "epoch", "loss", "step_ms"]);
const isHeldOut = (key) => key.startsWith("validation_loss") || key === "base_validation_loss";
const TITLES = { lr: "Learning rate", grad_norm: "Gradient norm", samples_per_s: "Samples per second" };

/** The small charts: the usual three, then whatever else the family measures, under its own titles. */
function smallCharts(points, family) {
  const extra = [...points.columns.keys()].filter((k) => !SMALL.includes(k) && !NOT_DRAWN.has(k) && !isHeldOut(k));
  return [...SMALL, ...extra]
    .filter((key) => points.columns.has(key) && points.column(key).some((v) => typeof v === "number"))
    .map((key, i) => {
      const said = family?.metrics?.find((m) => m.name === key);
      return { key, title: TITLES[key] ? t(TITLES[key]) : (said?.title ?? key), unit: TITLES[key] ? "" : (said?.unit ?? ""), color: COLORS[i % COLORS.length] };
    });
}

/** Loss on items that were never trained on, beside the base model's: only some steps have it, so it has an x of its own. */
function HeldOut({ job, points, total }) {
  const { x, values, base } = useMemo(() => {
    const all = points.column("validation_loss");
    const at = [...points.step.keys()].filter((i) => typeof all[i] === "number");
    const pick = (column) => at.map((i) => column[i] ?? null);
    return { x: pick(points.step), values: pick(all), base: pick(points.column("base_validation_loss")) };
  }, [points.version]);
  if (!x.length) return null;
  const best = x[values.indexOf(Math.min(...values))];
  return html`<div class="held-out"><h3>${t("Loss on held-out items")}</h3>
    <p class="small muted">${t("Never trained on, always at the same noise: when this line rises while the one above falls, the run is overfitting. Best so far: step {n}.", { n: int(best) })}</p>
    <${Chart} title=${t("Loss on held-out items")} x=${x} height=${170} total=${total} version=${points.version} lines=${[
      { label: t("adapter"), values, color: "--chart-3", width: 2.5, summary: true },
      { label: t("base model"), values: base, color: "--chart-axis", width: 1.5, dash: [6, 4] },
    ]} /></div>`;
}

function Curves({ job, points, progress }) {
  const [weight, setWeight] = useState(0.9);
  const [log, setLog] = useState(false);
  const x = points.step;
  const loss = points.column("loss");
  const smoothed = useMemo(() => smooth(loss, weight), [points.version, weight]);
  const { total } = steps(job, progress);
  const sync = `job-${job.id}`;
  const lines = weight
    ? [{ label: t("each step"), values: loss, color: "--chart-1-faint", width: 1.25 }, { label: t("smoothed"), values: smoothed, color: "--chart-1", width: 2.5, summary: true }]
    : [{ label: t("each step"), values: loss, color: "--chart-1", width: 1.5, summary: true }];
  const tools = html`<label class="row small smooth"><span class="muted">${t("Smoothing")}</span><span class="muted small">${t("raw")}</span>
      <input type="range" min="0" max="0.99" step="0.01" value=${weight} onInput=${(e) => setWeight(Number(e.currentTarget.value))} aria-label=${t("Smoothing of the loss curve")} /><span class="muted small">${t("smooth")}</span></label>
    <label class="switch"><input type="checkbox" checked=${log} onChange=${(e) => setLog(e.currentTarget.checked)} />${t("Log scale")}</label>`;
  const families = useResource(() => api.families(), []);
  const small = smallCharts(points, rows(families.data).find((f) => f.id === job.family));
  return html`<${Card} title=${t("Training loss")} icon="chart" tools=${tools}>
    ${x.length === 0 ? html`<${Empty} icon="chart" title=${isOver(job.status) ? t("No training step was made") : t("Waiting for the first step")}>
        <p class="small">${isOver(job.status) ? "" : t("The loss appears here, live, as soon as training starts.")}</p></${Empty}>`
      : html`<${Chart} title=${t("Training loss")} x=${x} lines=${lines} log=${log} height=${280} sync=${sync} total=${total} version=${points.version} />`}
    <p class="note"><${Icon} name="info" /> ${t("Diffusion loss is noisy by nature: each step draws random noise levels, and some are easy. Watch the smooth line, and trust the pictures more than the number.")}${x.length > 1 ? ` ${t("Drag to zoom, double-click to reset.")}` : ""}</p>
    <${HeldOut} job=${job} points=${points} total=${total} />
    ${small.length > 0 && x.length > 0 && html`<div class="small-charts">${small.map((s) => html`<${Chart} key=${s.key} compact title=${s.title} x=${x} lines=${[{ label: s.title, values: points.column(s.key), color: s.color, width: 1.75, summary: true }]} height=${120} sync=${sync} total=${total} version=${points.version} unit=${s.unit ? ` ${s.unit}` : ""} table=${false} />`)}</div>`}
  </${Card}>`;
}

function Facts({ job, progress, points, now }) {
  const h = job.hyperparameters ?? {};
  const { done, total } = steps(job, progress);
  const list = [
    [t("Base model"), html`<a href="#/models">${baseId(job)}</a>`],
    datasetId(job) && [t("Dataset"), html`<a href=${`#/datasets/${encodeURIComponent(datasetId(job))}`}>${job.dataset.name}</a>`],
    job.queue?.waits_for === "memory" && [t("Waits for"), t("free memory: {b} are needed", { b: bytes(job.plan?.memory_bytes) })],
    [t("Steps"), `${int(done)} / ${total ? int(total) : "?"}`],
    Number.isFinite(progress?.epoch) && [t("Epoch"), num(progress.epoch, 3)],
    progress?.it_s && !isOver(job.status) && [t("Speed"), speed(progress.it_s)],
    progress?.eta_s >= 0 && job.status === "running" && [t("Time left"), duration(progress.eta_s)],
    job.plan?.duration_s > 0 && !job.finished_at && [t("Expected to take"), duration(job.plan.duration_s)],
    [t("Running for"), Number.isFinite(elapsed(job, now)) ? duration(elapsed(job, now)) : "–"],
    points.length > 0 && [t("Last loss"), num(points.column("loss").at(-1))],
    h.lora_rank !== undefined && [t("Rank"), h.lora_alpha !== undefined && h.lora_alpha !== null ? `${h.lora_rank} (α ${h.lora_alpha})` : h.lora_rank],
    h.learning_rate !== undefined && [t("Learning rate"), num(h.learning_rate)],
    h.batch_size !== undefined && [t("Batch size"), int(h.batch_size)],
    job.plan?.trainable_params && [t("Trained parameters"), int(job.plan.trainable_params)],
    job.device && [t("Device"), job.device],
    job.attempt > 1 && [t("Attempt"), int(job.attempt)],
    [t("Created"), html`<${Ago} when=${job.created_at} now=${now} />`],
  ].filter(Boolean);
  return html`<${Card} title=${t("Facts")} icon="info"><dl class="facts">${list.map(([k, v]) => html`<dt>${k}</dt><dd>${v}</dd>`)}</dl></${Card}>`;
}

function Settings({ job }) {
  const [tab, setTab] = useState("table");
  const config = { name: job.name, base_model: baseId(job), dataset_id: datasetId(job) || undefined, hyperparameters: job.hyperparameters, sampling: job.sampling, export: job.export };
  const flat = Object.entries(job.hyperparameters ?? {});
  return html`<${Card} title=${t("Settings of this run")} icon="sliders" tools=${html`<${Tabs} label=${t("Form")} value=${tab} onChange=${setTab} tabs=${[{ id: "table", label: t("Table") }, { id: "json", label: "JSON" }]} />`}>
    ${tab === "json" ? html`<${Code} text=${JSON.stringify(config, null, 2)} label="JSON" />`
      : html`<dl class="settings">${flat.map(([k, v]) => html`<div key=${k}><dt>${k}</dt><dd class="mono">${v === null ? "–" : typeof v === "string" ? v : JSON.stringify(v)}</dd></div>`)}</dl>`}
  </${Card}>`;
}

export function JobPage({ id }) {
  const store = useJob(id);
  const now = useNow(1000);
  const { job, progress, points, error } = store;
  const { done, total } = job ? steps(job, progress) : { done: 0, total: 0 };
  useTitle(job ? (isOver(job.status) || !total ? `${t(STATES[job.status]?.word ?? job.status)} · ${job.name}` : `${int(done)}/${int(total)} · ${job.name}`) : t("Job"));
  const samples = [...store.samples.values()];

  if (!job) {
    if (error?.status === 404) return html`<div class="page"><${Empty} icon="search" title=${t("There is no such job")}><p>${t("It may have been deleted.")}</p><a class="btn" href="#/">${t("All jobs")}</a></${Empty}></div>`;
    if (error) return html`<div class="page"><${Problem} error=${error} retry=${() => store.start()} /></div>`;
    return html`<div class="page"><${Skeleton} height=${90} /><${Skeleton} height=${340} /><${Skeleton} height=${200} /></div>`;
  }
  const over = isOver(job.status);
  const files = store.files;
  const state = STATES[job.status] ?? { tone: "idle" };
  const waiting = !over && (job.status === "preparing" || (job.status === "running" && progress?.phase && progress.phase !== "training"));
  const alerts = [...store.alerts.values()];
  const prompts = job.sampling?.prompts ?? [];
  return html`<div class="page job-page">
    <div><nav class="crumbs" aria-label=${t("Where you are")}><a href="#/">${t("Jobs")}</a><span>/</span><span class="mono">${job.id}</span></nav>
      <div class="page-head"><div class="grow title"><h1 class="job-name" dir="auto">${job.name}</h1><${Status} status=${job.status} stopping=${stopping(job)} /></div><${Actions} job=${job} /></div></div>

    <section class="card state" aria-label=${t("State")}><div class="state-top">
        <p class="sentence" aria-live="polite" title=${absolute(job.started_at)}>${sentence(job, progress, now)}</p><${Connection} state=${store.connection} /></div>
      ${!over && html`<${Bar} done=${waiting && !done ? (progress?.done ?? 0) : done} total=${waiting && !done ? (progress?.total ?? 0) : total} tone=${state.tone} label=${t("Progress")} />`}
      <${Timeline} job=${job} progress=${progress} /></section>

    ${job.status === "failed" && job.error && html`<${Problem} error=${job.error} />`}
    ${alerts.map((a) => html`<div class=${`alert tone-${ALERT_TONES[a.severity] ?? "warn"}`} role="status" key=${a.code + a.step + a.detail}><${Icon} name=${a.severity === "info" ? "info" : "alert"} /><div class="body"><h3>${a.detail}</h3><p class="req">${t("step {n}", { n: int(a.step) })} · ${a.code}</p></div></div>`)}
    ${files.length > 0 && (job.status === "succeeded" || job.status === "cancelled") && html`<${Finished} job=${job} samples=${samples} files=${files} />`}

    <div class="with-side"><div class="stack">
        <${Curves} job=${job} points=${points} progress=${progress} />
      </div><${Facts} job=${job} progress=${progress} points=${points} now=${now} /></div>

    <${Card} title=${t("Before and after")} icon="images" id="compare" flush=${samples.length > 0 || prompts.length > 0}>
      ${samples.length || prompts.length ? html`<${Compare} samples=${samples} prompts=${prompts} over=${over} />`
        : html`<${Empty} icon="images" title=${t("This job draws no samples")}><p class="small">${t("Give sampling prompts to see the model learn.")}</p></${Empty}>`}
    </${Card}>

    ${files.length > 0 && html`<${Card} title=${t("Files")} icon="download"><div class="stack"><${Downloads} jobId=${job.id} files=${files} /><${HowToUse} jobId=${job.id} files=${files} base=${baseId(job)} prompt=${prompts[0] ?? "…"} /></div></${Card}>`}
    <${Card} title=${t("Log")} icon="log"><${LogTail} logs=${store.logs} /></${Card}>
    <${Settings} job=${job} />
  </div>`;
}
