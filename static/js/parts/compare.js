// Sample pictures: rows are prompts, columns are steps, the first column is the untrained base ("before").
// A click opens one pair full screen with a wipe slider; arrow keys walk through steps and prompts.
import { html, useEffect, useLayoutEffect, useMemo, useRef, useState } from "../../vendor/preact-htm.js";
import { int } from "../format.js";
import { Icon } from "../icons.js";
import { t } from "../i18n.js";
import { Modal } from "../ui.js";

/** Groups samples into a matrix. @param {Iterable<{step:number,prompt_index:number,prompt:string,url:string}>} samples */
export function matrix(samples) {
  const prompts = new Map();
  const steps = new Set();
  for (const s of samples) {
    steps.add(s.step);
    const row = prompts.get(s.prompt_index) ?? { prompt: s.prompt ?? "", at: new Map() };
    row.at.set(s.step, s);
    prompts.set(s.prompt_index, row);
  }
  return { rows: [...prompts.entries()].sort((a, b) => a[0] - b[0]).map(([, row]) => row), steps: [...steps].sort((a, b) => a - b) };
}

export const src = (sample) => (sample?.url ?? "").replace(/^\//, "");

const columnName = (step, over, isLast) => (step === 0 ? t("Before") : isLast && over ? t("After") : t("Step {n}", { n: int(step) }));

/** The strip. `prompts`: the job's prompts, so that rows stand before their first picture. */
export function Compare({ samples, prompts, over }) {
  const grid = useMemo(() => matrix(samples), [samples.length, samples.at(-1)]);
  const [open, setOpen] = useState(null);
  const scroller = useRef(null);
  const list = grid.rows.length ? grid.rows : (prompts ?? []).map((prompt) => ({ prompt, at: new Map() }));
  const steps = grid.steps.length ? grid.steps : [0];
  // keep the newest column in view while it grows, unless the reader has scrolled back
  useLayoutEffect(() => {
    const el = scroller.current;
    if (el && (el.follow ?? true)) el.scrollLeft = el.scrollWidth;
  }, [steps.length]);
  const scrolled = (e) => {
    const el = e.currentTarget;
    el.follow = el.scrollLeft + el.clientWidth > el.scrollWidth - 40;
  };
  return html`<div class="compare" ref=${scroller} onScroll=${scrolled} tabindex="0" role="region" aria-label=${t("Sample pictures by step")}>
    <table><thead><tr>
      <th scope="col" class="c-before">${t("Before")}<small>${t("base model")}</small></th>
      ${steps.slice(1).map((s, i) => html`<th scope="col" key=${s}>${columnName(s, over, i === steps.length - 2)}${over && i === steps.length - 2 && html`<small>${t("step {n}", { n: int(s) })}</small>`}</th>`)}
      ${!over && html`<th scope="col" class="c-next"></th>`}
    </tr></thead>
    ${list.map((row, r) => html`<tbody key=${r}>
      <tr class="prompt"><th scope="rowgroup" colspan=${steps.length + 1}><span>${row.prompt}</span></th></tr>
      <tr>${steps.map((s, c) => {
        const sample = row.at.get(s);
        return html`<td key=${s} class=${c === 0 ? "c-before" : ""}>${sample
          ? html`<button type="button" class="shot" onClick=${() => setOpen({ r, c: Math.max(c, 1) })} aria-label=${t("{prompt}, {when}. Open full screen.", { prompt: row.prompt, when: columnName(s, over, c === steps.length - 1) })}><img src=${src(sample)} alt="" loading="lazy" width=${sample.width} height=${sample.height} /></button>`
          : html`<div class=${`shot ${over ? "wait" : "sk"}`} aria-hidden="true"></div>`}</td>`;
      })}${!over && html`<td class="c-next"><div class="shot wait" aria-hidden="true"></div></td>`}</tr>
    </tbody>`)}
    </table>
    ${open && html`<${Viewer} grid=${grid} start=${open} over=${over} onClose=${() => setOpen(null)} />`}
  </div>`;
}

const clamp = (x, min, max) => Math.min(max, Math.max(min, x));

function Viewer({ grid, start, over, onClose }) {
  const [{ r, c }, setAt] = useState(start);
  const [wipe, setWipe] = useState(50);
  const stage = useRef(null);
  const last = grid.steps.length - 1;
  const row = grid.rows[r];
  const before = row?.at.get(grid.steps[0]);
  const after = row?.at.get(grid.steps[Math.min(c, last)]) ?? before;
  const step = grid.steps[Math.min(c, last)] ?? 0;
  const go = (dr, dc) => setAt((a) => ({ r: clamp(a.r + dr, 0, grid.rows.length - 1), c: clamp(a.c + dc, Math.min(1, last), last) }));
  useEffect(() => {
    const keys = (e) => {
      const move = { ArrowLeft: [0, -1], ArrowRight: [0, 1], ArrowUp: [-1, 0], ArrowDown: [1, 0] }[e.key];
      if (!move) return;
      e.preventDefault();
      if (e.shiftKey && move[1]) setWipe((w) => clamp(w + move[1] * 5, 0, 100));
      else go(...move);
    };
    addEventListener("keydown", keys);
    return () => removeEventListener("keydown", keys);
  }, []);
  const drag = (e) => {
    if (e.type === "pointerdown") e.currentTarget.setPointerCapture(e.pointerId);
    else if (!e.buttons) return;
    const box = stage.current.getBoundingClientRect();
    setWipe(clamp(((e.clientX - box.left) / box.width) * 100, 0, 100));
  };
  const small = (after?.width ?? 512) <= 128;
  return html`<${Modal} title=${t("Before and after")} onClose=${onClose} className="viewer">
    <div class="viewer-top"><p class="clip" title=${row?.prompt}>${row?.prompt}</p><span class="muted small num nowrap">${t("seed {n}", { n: after?.seed ?? "–" })}</span>
      <button type="button" class="btn ghost square" onClick=${onClose} aria-label=${t("Close")}><${Icon} name="x" /></button></div>
    <div class="viewer-mid">
      <button type="button" class="btn ghost square" disabled=${c <= Math.min(1, last)} onClick=${() => go(0, -1)} aria-label=${t("Earlier step")}><${Icon} name="left" /></button>
      <div class=${`wipe ${small ? "pixels" : ""}`} ref=${stage} onPointerDown=${drag} onPointerMove=${drag}>
        <img src=${src(after)} alt=${t("{prompt} at step {n}", { prompt: row?.prompt, n: step })} draggable="false" />
        <img class="top" src=${src(before)} alt=${t("{prompt} before training", { prompt: row?.prompt })} draggable="false" style=${{ clipPath: `inset(0 ${100 - wipe}% 0 0)` }} />
        <i class="edge" style=${{ left: `${wipe}%` }}></i>
        <span class="side l">${t("Before")}</span><span class="side r">${columnName(step, over, c >= last)}</span>
      </div>
      <button type="button" class="btn ghost square" disabled=${c >= last} onClick=${() => go(0, 1)} aria-label=${t("Later step")}><${Icon} name="chev" /></button>
    </div>
    <div class="viewer-bottom"><label class="row small"><span class="muted">${t("Wipe")}</span><input type="range" min="0" max="100" value=${wipe} onInput=${(e) => setWipe(Number(e.currentTarget.value))} /></label>
      <p class="small muted num">${t("step {n}", { n: int(step) })} · ${t("arrow keys: steps and prompts; shift + arrows: wipe; Esc: close")}</p></div>
  </${Modal}>`;
}
