// Dropping an archive: upload with progress, then the server's verdict per file. Used by the form and by the datasets page.
import { html, useRef, useState } from "../../vendor/preact-htm.js";
import { ApiError, uploadDataset } from "../api.js";
import { bytes, int } from "../format.js";
import { Icon } from "../icons.js";
import { plural, t } from "../i18n.js";
import { Bar, Problem } from "../ui.js";

const stem = (file) => file.name.replace(/\.(zip|tar\.gz|tgz|tar)$/i, "");

/** @param {{onDone:(dataset:object)=>void, compact?:boolean}} props */
export function Upload({ onDone, compact }) {
  const [state, setState] = useState({ kind: "idle" });
  const [over, setOver] = useState(false);
  const input = useRef(null);
  const send = async (file) => {
    if (!file) return;
    const upload = uploadDataset(file, stem(file), (share) => setState({ kind: "sending", file, share, abort: upload.abort }));
    setState({ kind: "sending", file, share: 0, abort: upload.abort });
    try {
      const dataset = await upload.done;
      setState({ kind: "idle" });
      onDone(dataset);
    } catch (error) {
      setState(error.name === "AbortError" ? { kind: "idle" } : { kind: "failed", file, error });
    }
    if (input.current) input.current.value = "";
  };
  const drop = (e) => {
    e.preventDefault();
    setOver(false);
    const files = [...(e.dataTransfer?.files ?? [])];
    if (files.length > 1)
      return setState({ kind: "failed", error: new ApiError({ status: 0, title: t("One archive, please"), detail: t("{n} files were dropped.", { n: files.length }), hint: t("Put the pictures and captions into one zip and drop that.") }) });
    send(files[0]);
  };
  const busy = state.kind === "sending";
  return html`<div class="stack-s"><div class=${`drop ${over ? "over" : ""} ${compact ? "compact" : ""}`} onDragOver=${(e) => (e.preventDefault(), setOver(true))} onDragLeave=${() => setOver(false)} onDrop=${drop}>
    ${busy ? html`<div class="stack-s grow"><div class="row small"><${Icon} name="upload" /><strong class="clip">${state.file.name}</strong><span class="muted num">${bytes(state.file.size)}</span><span class="grow"></span>
          <span class="num">${state.share < 1 ? `${Math.round(state.share * 100)} %` : t("checking every file…")}</span><button type="button" class="btn tiny" onClick=${state.abort}>${t("Cancel")}</button></div>
        <${Bar} done=${state.share < 1 ? state.share : 0} total=${state.share < 1 ? 1 : 0} label=${t("Upload")} /></div>`
      : html`<span class="drop-icon"><${Icon} name="upload" /></span><div class="grow"><strong>${t("Drop a zip or tar.gz here")}</strong>
        <p class="small muted">${t("Pictures with captions: dog.png + dog.txt, or a metadata.jsonl or .csv. PNG, JPEG, WebP.")}</p></div>
        <button type="button" class="btn" onClick=${() => input.current.click()}>${t("Choose a file")}</button>`}
    <input ref=${input} type="file" class="sr" tabindex="-1" accept=".zip,.tar.gz,.tgz,.gz,.tar,application/zip,application/gzip" aria-label=${t("Archive with pictures and captions")} onChange=${(e) => send(e.currentTarget.files[0])} />
  </div>
  ${state.kind === "failed" && html`<${Problem} error=${state.error} title=${state.error.problem?.title} />`}</div>`;
}

const TONE = { ok: "ok", warning: "warn", ignored: "idle", refused: "bad" };

/** Counts and per-file verdicts of an upload. */
export function Verdicts({ report }) {
  if (!report) return null;
  const odd = (report.files ?? []).filter((f) => f.verdict !== "ok");
  const good = (report.files ?? []).length - odd.length;
  return html`<div class="stack-s">
    <p class="row small"><span class="status tone-ok"><${Icon} name="check" />${plural(report.n_items, "1 picture", "{n} pictures")}</span>
      ${report.n_uncaptioned > 0 && html`<span class="status tone-warn"><${Icon} name="alert" />${t("{n} without caption", { n: int(report.n_uncaptioned) })}</span>`}
      ${report.n_duplicates > 0 && html`<span class="status tone-warn"><${Icon} name="alert" />${t("{n} duplicates", { n: int(report.n_duplicates) })}</span>`}
      ${report.max_side > 0 && html`<span class="muted num">${report.min_side === report.max_side ? `${report.min_side} px` : `${report.min_side}–${report.max_side} px`}</span>`}
      ${report.max_caption_chars > 0 && html`<span class="muted num">${t("captions up to {n} characters", { n: int(report.max_caption_chars) })}</span>`}</p>
    ${odd.length > 0 && html`<details class="fold"><summary><${Icon} name="chev" />${t("{odd} files to look at, {good} fine", { odd: int(odd.length), good: int(good) })}</summary>
      <ul class="verdicts">${odd.slice(0, 200).map((f) => html`<li><span class=${`status tone-${TONE[f.verdict] ?? "idle"}`}>${f.verdict}</span><code>${f.file}</code><span class="muted">${f.detail ?? f.code}</span></li>`)}</ul></details>`}
  </div>`;
}
