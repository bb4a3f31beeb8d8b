// Datasets: the list, and one with its pictures and captions.
import { html, useEffect, useState } from "../../vendor/preact-htm.js";
import { api, rows } from "../api.js";
import { bytes, int } from "../format.js";
import { useNow, useResource, useTitle } from "../hooks.js";
import { Icon } from "../icons.js";
import { plural, t } from "../i18n.js";
import { Upload, Verdicts } from "../parts/upload.js";
import { Ago, Card, Confirm, Empty, Problem, Skeleton, toast } from "../ui.js";

export const thumb = (datasetId, item) => `datasets/${encodeURIComponent(datasetId)}/items/${item.n}/thumbnail`;
export const itemCount = (d) => d.n_items ?? 0;

const mosaics = new Map();
/** The first pictures of a dataset. */
export function Mosaic({ id, n = 4 }) {
  const [items, setItems] = useState(mosaics.get(id) ?? null);
  useEffect(() => {
    if (mosaics.has(id)) return setItems(mosaics.get(id));
    let gone = false;
    api.items(id, undefined, 8).then(
      (answer) => {
        mosaics.set(id, rows(answer));
        if (!gone) setItems(rows(answer));
      },
      () => gone || setItems([]),
    );
    return () => (gone = true);
  }, [id]);
  return html`<div class="mosaic" aria-hidden="true">${Array.from({ length: n }, (_, i) => (items?.[i] ? html`<img src=${thumb(id, items[i])} alt="" loading="lazy" />` : html`<span class=${items ? "" : "sk"}></span>`))}</div>`;
}

export function DatasetsPage() {
  const { data, error, loading, reload } = useResource(() => api.datasets(), []);
  const now = useNow(30_000);
  useTitle(t("Datasets"));
  const list = rows(data);
  const uploaded = (dataset) => {
    toast(t("Uploaded {name}", { name: dataset.name }), "images");
    location.hash = `#/datasets/${encodeURIComponent(dataset.id)}`;
  };
  return html`<div class="page">
    <div class="page-head"><div class="grow"><h1>${t("Datasets")}</h1><p class="sub">${t("Captioned pictures to learn from. Each upload is checked file by file.")}</p></div></div>
    <${Upload} onDone=${uploaded} />
    ${error && html`<${Problem} error=${error} retry=${reload} />`}
    ${loading && html`<${Skeleton} n=${2} height=${120} />`}
    ${!loading && !error && list.length === 0 && html`<${Empty} icon="images" title=${t("No datasets yet")}><p>${t("Drop an archive above, or run the demo, which brings its own.")}</p></${Empty}>`}
    <ul class="tiles">${list.map((d) => html`<li key=${d.id}><a class="card tile" href=${`#/datasets/${encodeURIComponent(d.id)}`}><${Mosaic} id=${d.id} n=${4} />
      <div class="tile-text"><strong class="clip">${d.name}</strong><p class="small muted row num">${d.builtin && html`<span class="tag">${t("bundled")}</span>`}<span>${plural(itemCount(d), "1 picture", "{n} pictures")}</span>${d.bytes ? html`<span>${bytes(d.bytes)}</span>` : ""}<span class="grow"></span><${Ago} when=${d.created_at} now=${now} /></p></div></a></li>`)}</ul>
  </div>`;
}

const PAGE = 60;
function Items({ id, total }) {
  const [state, setState] = useState({ items: [], more: true, error: null, busy: false });
  const load = async () => {
    setState((s) => ({ ...s, busy: true, error: null }));
    try {
      const after = state.items.at(-1)?.n;
      const answer = await api.items(id, after, PAGE);
      const next = rows(answer);
      setState((s) => ({ items: [...s.items, ...next], more: answer.has_more ?? next.length === PAGE, error: null, busy: false }));
    } catch (error) {
      setState((s) => ({ ...s, error, busy: false }));
    }
  };
  useEffect(() => void load(), [id]);
  return html`<div class="stack"><ul class="gallery">${state.items.map((item) => html`<li key=${item.n}><figure><img src=${thumb(id, item)} alt=${item.caption} loading="lazy" />
      <figcaption><span dir="auto">${item.caption || html`<em class="muted">${t("no caption")}</em>`}</span><small class="muted num">${item.width}×${item.height} · <span class="clip">${item.source}</span></small></figcaption></figure></li>`)}</ul>
    ${state.error && html`<${Problem} error=${state.error} retry=${load} />`}
    ${state.busy && html`<${Skeleton} height=${120} />`}
    ${state.more && !state.busy && state.items.length > 0 && html`<button type="button" class="btn" onClick=${load}>${t("Show more ({n} of {total})", { n: int(state.items.length), total: int(total) })}</button>`}</div>`;
}

export function DatasetPage({ id }) {
  const { data: d, error, reload } = useResource(() => api.dataset(id), [id]);
  const [asking, setAsking] = useState(false);
  useTitle(d?.name ?? t("Dataset"));
  if (error?.status === 404) return html`<div class="page"><${Empty} icon="search" title=${t("There is no such dataset")}><a class="btn" href="#/datasets">${t("All datasets")}</a></${Empty}></div>`;
  if (error && !d) return html`<div class="page"><${Problem} error=${error} retry=${reload} /></div>`;
  if (!d) return html`<div class="page"><${Skeleton} height=${60} /><${Skeleton} height=${300} /></div>`;
  return html`<div class="page">
    <div><nav class="crumbs" aria-label=${t("Where you are")}><a href="#/datasets">${t("Datasets")}</a><span>/</span><span class="mono">${d.id}</span></nav>
      <div class="page-head"><div class="grow"><h1 dir="auto">${d.name}</h1></div>
      ${d.builtin ? html`<span class="tag">${t("bundled")}</span>` : html`<button type="button" class="btn ghost square" aria-label=${t("Delete this dataset")} title=${t("Delete this dataset")} onClick=${() => setAsking(true)}><${Icon} name="trash" /></button>`}
      <a class="btn primary" href=${`#/new?dataset=${encodeURIComponent(d.id)}`}><${Icon} name="play" />${t("Train on it")}</a></div></div>
    <${Card} title=${t("What was found")} icon="check"><${Verdicts} report=${d.report} /></${Card}>
    <${Card} title=${t("Pictures and captions")} icon="images"><${Items} id=${d.id} total=${itemCount(d)} /></${Card}>
    ${asking && html`<${Confirm} danger title=${t("Delete this dataset?")} action=${t("Delete")} onClose=${() => setAsking(false)} onConfirm=${async () => {
      await api.deleteDataset(d.id);
      toast(t("Deleted {name}", { name: d.name }), "trash");
      location.hash = "#/datasets";
    }}><p>${t("Its pictures and captions are removed from this server. A dataset that a job uses cannot be deleted.")}</p></${Confirm}>`}
  </div>`;
}
