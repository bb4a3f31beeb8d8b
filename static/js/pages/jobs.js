// The list of jobs: counts by state, running jobs as cards, the rest as rows; and what a newcomer sees first.
import { html, useEffect, useState } from "../../vendor/preact-htm.js";
import { api, idempotencyKey, rows } from "../api.js";
import { Sparkline, smooth } from "../chart.js";
import { duration, int, speed } from "../format.js";
import { useNow, useResource, useTitle } from "../hooks.js";
import { Icon } from "../icons.js";
import { baseId, elapsed, sentence, steps, stopping } from "../job_words.js";
import { plural, t } from "../i18n.js";
import { Ago, Bar, Code, Empty, isOver, Problem, Skeleton, STATES, Status, toast } from "../ui.js";

const GROUPS = [
  { id: "", label: "All", has: () => true },
  { id: "active", label: "Running", has: (s) => ["preparing", "running", "saving"].includes(s) },
  { id: "waiting", label: "Waiting", has: (s) => ["validating", "queued", "paused", "interrupted"].includes(s) },
  { id: "succeeded", label: "Done", has: (s) => s === "succeeded" },
  { id: "failed", label: "Failed", has: (s) => s === "failed" },
  { id: "cancelled", label: "Cancelled", has: (s) => s === "cancelled" },
];

/** Changes one filter in the address, so that Back and a shared link keep it. */
function go(query, changes) {
  const next = new URLSearchParams(query);
  for (const [k, v] of Object.entries(changes)) v ? next.set(k, v) : next.delete(k);
  const text = next.toString();
  location.hash = text ? `#/?${text}` : "#/";
}

// Curves and newest pictures of listed jobs. A finished job's never change, so they are fetched once.
const previews = new Map();
const MAX_FETCHES = 4;
let fetching = 0;
const waiting = [];
/** Runs `load` when fewer than MAX_FETCHES run, so that a long list does not flood the server. */
async function inTurn(load) {
  if (fetching >= MAX_FETCHES) await new Promise((go) => waiting.push(go));
  fetching += 1;
  try {
    return await load();
  } finally {
    fetching -= 1;
    waiting.shift()?.();
  }
}
function usePreview(job) {
  const over = isOver(job.status);
  const known = previews.get(job.id);
  const [, redraw] = useState(0);
  const stamp = over ? "over" : `${job.status}/${Math.floor((job.progress?.step ?? 0) / 20)}`;
  useEffect(() => {
    if (previews.get(job.id)?.stamp === stamp || job.status === "queued") return;
    let gone = false;
    inTurn(() => (gone ? Promise.reject(new Error("left")) : Promise.all([api.metrics(job.id, { keys: "loss", max_points: 80 }), api.samples(job.id)]))).then(
      ([metrics, samples]) => {
        const loss = metrics?.series?.loss;
        const pictures = rows(samples).filter((s) => (s.prompt_index ?? 0) === 0).sort((a, b) => a.step - b.step);
        previews.set(job.id, { stamp, loss: smooth((Array.isArray(loss) ? loss : loss?.last) ?? [], 0.8), picture: pictures.at(-1) });
        if (!gone) redraw((n) => n + 1);
      },
      () => gone || previews.set(job.id, { stamp, loss: [] }),
    );
    return () => (gone = true);
  }, [job.id, stamp]);
  return known ?? { loss: [] };
}

/** The newest sample of a job, or its state's icon. */
function Face({ job, preview }) {
  const url = preview.picture?.url;
  return url ? html`<img class="face" src=${url.replace(/^\//, "")} alt="" loading="lazy" />` : html`<span class="face none"><${Icon} name=${STATES[job.status]?.icon ?? "spark"} /></span>`;
}

function Running({ job, now }) {
  const preview = usePreview(job);
  const { done, total } = steps(job);
  const p = job.progress ?? {};
  return html`<a class="card job-card" href=${`#/jobs/${encodeURIComponent(job.id)}`}>
    <${Face} job=${job} preview=${preview} />
    <div class="stack-s grow">
      <div class="row"><strong class="clip name">${job.name}</strong><${Status} status=${job.status} stopping=${stopping(job)} /></div>
      <p class="small muted">${sentence(job, p, now)}</p>
      <${Bar} done=${done} total=${total} label=${t("Progress of {name}", { name: job.name })} />
      <p class="row small muted num">${total ? html`<span>${int(done)} / ${int(total)}</span>` : ""}${p.it_s ? html`<span>${speed(p.it_s)}</span>` : ""}<span class="grow"></span>${p.eta_s > 0 ? html`<span>${t("{d} left", { d: duration(p.eta_s) })}</span>` : ""}</p>
    </div>
    <${Sparkline} values=${preview.loss} width=${150} height=${64} />
  </a>`;
}

function Row({ job, now }) {
  const preview = usePreview(job);
  const { done, total } = steps(job);
  const s = STATES[job.status] ?? {};
  const took = elapsed(job, now);
  const why = job.status === "failed" ? (job.error?.title ?? "") : "";
  return html`<li><a class="job-row" href=${`#/jobs/${encodeURIComponent(job.id)}`}>
    <${Face} job=${job} preview=${preview} />
    <span class="who"><strong class="clip name">${job.name}</strong>
      <span class="small muted clip">${why || [baseId(job), job.dataset?.name, job.status === "queued" && sentence(job)].filter(Boolean).join(" · ")}</span></span>
    <span class="c-status"><${Status} status=${job.status} stopping=${stopping(job)} /></span>
    <span class="c-spark"><${Sparkline} values=${preview.loss} /></span>
    <span class="c-steps num small">${total ? html`<span>${job.status === "succeeded" ? plural(total, "1 step", "{n} steps") : `${int(done)} / ${int(total)}`}</span>` : html`<span class="muted">–</span>`}
      ${!isOver(job.status) && total > 0 && html`<${Bar} slim done=${done} total=${total} tone=${s.tone} label=${t("Progress of {name}", { name: job.name })} />`}</span>
    <span class="c-time small muted num">${Number.isFinite(took) ? duration(took) : ""}</span>
    <span class="c-age small muted"><${Ago} when=${job.created_at} now=${now} /></span>
    <${Icon} name="chev" />
  </a></li>`;
}

/** Starts the bundled demo and opens its page. */
function DemoButton({ big }) {
  const [busy, setBusy] = useState(false);
  const [error, setError] = useState(null);
  const key = useState(idempotencyKey)[0];
  const run = async () => {
    setBusy(true);
    setError(null);
    try {
      const job = await api.createJob(await api.demo(), key);
      toast(t("The demo job is in the queue"), "spark");
      location.hash = `#/jobs/${encodeURIComponent(job.id)}`;
    } catch (e) {
      setError(e);
      setBusy(false);
    }
  };
  return html`<div class="stack-s"><button type="button" class=${`btn ${big ? "primary big" : ""}`} disabled=${busy} onClick=${run}><${Icon} name=${busy ? "spinner" : "play"} />${busy ? t("Starting…") : t("Run the demo")}</button>
    ${error && html`<${Problem} error=${error} />`}</div>`;
}

const curl = () => `curl -sS -X POST ${new URL("jobs", document.baseURI)} \\
  -F 'job={"name":"my-first","base_model":"demo-icons"};type=application/json' \\
  -F dataset=@my-pictures.zip`;

function FirstRun() {
  return html`<section class="hero card">
    <div class="hero-text stack">
      <h1>${t("Teach a model your style")}</h1>
      <p class="lead">${t("lorad trains small LoRA adapters on this machine. Give it captioned pictures, watch it learn, download a file that works in diffusers, ComfyUI and PEFT.")}</p>
      <div class="row hero-actions"><${DemoButton} big /><a class="btn big" href="#/new"><${Icon} name="plus" />${t("New job")}</a></div>
      <p class="small muted">${t("The demo takes a minute or two. It needs no GPU and downloads nothing: the model and 48 pictures are bundled.")}</p>
    </div>
    <${LowRank} />
    <div class="hero-code"><h2>${t("Or from a terminal")}</h2><${Code} text=${curl()} label=${t("The same as a curl command")} /></div>
  </section>`;
}

// W + B·A: the picture of what an adapter is.
function LowRank() {
  const cells = (n) => Array.from({ length: n }, (_, i) => html`<i key=${i} style=${{ opacity: String(0.35 + 0.65 * Math.abs(Math.sin(i * 12.9898 + n) * 43758.5453 % 1)) }}></i>`);
  return html`<figure class="lowrank" aria-hidden="true">
    <div class="m w">${cells(64)}</div><span>+</span><div class="m b">${cells(16)}</div><span>·</span><div class="m a">${cells(16)}</div>
    <figcaption><span>${t("base model, frozen")}</span><span></span><span>${t("your adapter")}</span></figcaption>
  </figure>`;
}

export function JobsPage({ query }) {
  const group = query.get("status") ?? "";
  const words = (query.get("q") ?? "").toLowerCase();
  const { data, error, loading, reload } = useResource(() => api.jobs({ limit: 200 }), [], 2000);
  const now = useNow(5000);
  useTitle(t("Jobs"));

  const all = rows(data);
  if (error && !data) return html`<div class="page"><${Problem} error=${error} retry=${reload} /></div>`;
  if (loading && !data) return html`<div class="page"><h1>${t("Jobs")}</h1><${Skeleton} n=${4} height=${68} /></div>`;
  if (all.length === 0) return html`<div class="page"><${FirstRun} /></div>`;

  const found = all.filter((j) => !words || `${j.name} ${j.id} ${baseId(j)} ${(j.tags ?? []).join(" ")}`.toLowerCase().includes(words));
  const chosen = GROUPS.find((g) => g.id === group) ?? GROUPS[0];
  const list = found.filter((j) => chosen.has(j.status));
  const active = list.filter((j) => GROUPS[1].has(j.status));
  const rest = list.filter((j) => !GROUPS[1].has(j.status));
  return html`<div class="page">
    <div class="page-head"><div class="grow"><h1>${t("Jobs")}</h1></div>
      <${DemoAgain} all=${all} />
      <label class="search-box"><span class="sr">${t("Search jobs")}</span><${Icon} name="search" /><input class="input search" type="search" placeholder=${t("Search")} value=${query.get("q") ?? ""} onInput=${(e) => go(query, { q: e.currentTarget.value })} /></label>
    </div>
    ${error && html`<${Problem} error=${error} retry=${reload} />`}
    <div class="chips" role="group" aria-label=${t("Filter by state")}>
      ${GROUPS.map((g) => [g, found.filter((j) => g.has(j.status)).length]).filter(([g, n]) => n > 0 || g.id === "" || g.id === group).map(([g, n]) => html`<button type="button" class="chip" aria-pressed=${g.id === chosen.id} onClick=${() => go(query, { status: g.id })}>${t(g.label)} <b>${int(n)}</b></button>`)}
    </div>
    ${active.length > 0 && html`<div class="stack">${active.map((job) => html`<${Running} key=${job.id} job=${job} now=${now} />`)}</div>`}
    ${rest.length > 0 && html`<ul class="card job-list">${rest.map((job) => html`<${Row} key=${job.id} job=${job} now=${now} />`)}</ul>`}
    ${list.length === 0 && html`<${Empty} icon="search" title=${t("No job matches")}><button type="button" class="btn" onClick=${() => (location.hash = "#/")}>${t("Show all jobs")}</button></${Empty}>`}
  </div>`;
}

const DemoAgain = ({ all }) => (all.some((j) => !isOver(j.status)) ? null : html`<${DemoButton} />`);
