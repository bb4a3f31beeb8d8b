// Line charts on uPlot: one x axis (steps), any lines; a cursor shared between charts; keyboard; a text summary and a table.
// Knows figures, not jobs.
import uPlot from "../vendor/uplot.js";
import { html, useEffect, useId, useLayoutEffect, useMemo, useRef, useState } from "../vendor/preact-htm.js";
import { int, num } from "./format.js";
import { Icon } from "./icons.js";
import { plural, t } from "./i18n.js";
import { useTheme } from "./hooks.js";

/** Debiased exponential moving average; `weight` 0 is the raw line. Gaps (null) stay gaps and do not pull. */
export function smooth(values, weight) {
  if (!weight) return values;
  let mean = 0;
  let n = 0;
  return values.map((y) => {
    if (y === null || y === undefined) return null;
    n += 1;
    mean = weight * mean + (1 - weight) * y;
    return mean / (1 - weight ** n);
  });
}

// A canvas cannot read CSS variables: resolve them through an element's computed colour.
const probe = document.createElement("i");
function color(name) {
  if (!probe.isConnected) document.body.append(probe);
  probe.hidden = true;
  probe.style.color = `var(${name})`;
  return getComputedStyle(probe).color;
}

const AXIS_FONT = "12px system-ui, -apple-system, 'Segoe UI', Roboto, 'Noto Sans', sans-serif";

// Log axes label only what stays readable: 1, 2 and 5 of each decade over short ranges, decades over long ones.
function logLabels(u, splits) {
  const decades = Math.log10(u.scales.y.max / u.scales.y.min);
  return splits.map((v) => {
    if (v === null || v <= 0) return "";
    const lead = Math.round(v / 10 ** Math.floor(Math.log10(v) + 1e-9));
    return decades > 2.5 ? (lead === 1 ? num(v, 2) : "") : [1, 2, 5].includes(lead) ? num(v, 2) : "";
  });
}

function options({ lines, width, height, log, sync, compact, onCursor, range }) {
  const axis = (extra) => ({
    stroke: color("--chart-axis"),
    font: AXIS_FONT,
    grid: { stroke: color("--chart-grid"), width: 1 },
    ticks: { show: false },
    gap: 6,
    ...extra,
  });
  return {
    width,
    height,
    padding: [10, 12, 0, 0],
    legend: { show: false },
    cursor: {
      sync: sync ? { key: sync, scales: ["x", null] } : undefined,
      points: { size: 7 },
      x: true,
      y: false,
      drag: { x: true, y: false, setScale: true },
    },
    scales: { x: { time: false, range }, y: log ? { distr: 3 } : {} },
    axes: [
      axis({ size: 30, space: compact ? 70 : 80, values: (_, v) => v.map((x) => (Number.isInteger(x) ? int(x) : "")) }),
      axis({ size: compact ? 50 : 52, space: compact ? 24 : 40, values: log ? logLabels : (_, v) => v.map((y) => num(y, 3)) }),
    ],
    series: [
      {},
      ...lines.map((l) => ({ label: l.label, stroke: color(l.color), width: l.width ?? 2, dash: l.dash, points: { show: (u) => u.data[0].length < 3, size: 6 }, spanGaps: compact, fill: l.fill ? color(l.fill) : undefined })),
    ],
    hooks: {
      ready: [(u) => u.over.addEventListener("dblclick", () => (u.zoomed = false))],
      setSelect: [(u) => u.select.width > 2 && (u.zoomed = true)],
      setCursor: [(u) => onCursor(u.cursor.idx ?? null)],
    },
  };
}

const trend = (values) => {
  const real = values.filter((v) => v !== null && v !== undefined);
  if (real.length < 8) return t("too few points for a trend");
  const quarter = Math.max(1, Math.floor(real.length / 4));
  const mean = (part) => part.reduce((a, b) => a + b, 0) / part.length;
  const change = mean(real.slice(-quarter)) / mean(real.slice(0, quarter)) - 1;
  return Math.abs(change) < 0.02 ? t("flat") : change < 0 ? t("falling") : t("rising");
};

/**
 * A figure with one or more lines over `x`.
 * @param {{title:string, x:number[], lines:Array<{label:string,values:(number|null)[],color:string,width?:number,summary?:boolean}>,
 *   height?:number, log?:boolean, sync?:string, compact?:boolean, unit?:string, total?:number, version?:number}} props `version` changes when `x` or the values changed in place
 */
export function Chart({ title, x, lines, height = 300, log = false, sync, compact = false, unit = "", total = 0, table = true, version = 0 }) {
  const holder = useRef(null);
  const plot = useRef(null);
  const [cursor, setCursor] = useState(null);
  const theme = useTheme();
  const id = useId();
  const main = lines.find((l) => l.summary) ?? lines[lines.length - 1];
  const data = [x, ...lines.map((l) => l.values)];
  const live = useRef(data);
  live.current = data;
  const limit = useRef(total);
  limit.current = total;

  useLayoutEffect(() => {
    const range = (u, min, max) => {
      const dataMax = live.current[0].at(-1) ?? 1;
      if (min === null || max === null) return [0, Math.max(1, limit.current)];
      // whole run: leave room to the last step, so that the line grows instead of the axis shrinking
      return max >= dataMax && min <= (live.current[0][0] ?? 0) ? [Math.min(min, 1), Math.max(dataMax, 2, Math.min(limit.current || 0, dataMax * 4))] : [min, max];
    };
    const make = () => new uPlot(options({ lines, width: holder.current.clientWidth || 320, height, log, sync, compact, onCursor: setCursor, range }), live.current, holder.current);
    plot.current = make();
    const observer = new ResizeObserver(([entry]) => plot.current?.setSize({ width: Math.max(120, Math.floor(entry.contentRect.width)), height }));
    observer.observe(holder.current);
    return () => {
      observer.disconnect();
      plot.current.destroy();
      plot.current = null;
    };
  }, [theme, log, height, sync, compact, lines.map((l) => l.label + l.color).join()]);

  useEffect(() => {
    const u = plot.current;
    if (!u) return;
    const zoomed = u.zoomed;
    u.setData(data, !zoomed);
    if (zoomed) u.redraw();
  }, [version, total, ...lines.map((l) => l.values)]);

  const move = (e) => {
    const n = x.length;
    if (!n) return;
    const jump = { ArrowLeft: -1, ArrowRight: 1, PageUp: -Math.ceil(n / 20), PageDown: Math.ceil(n / 20) }[e.key];
    let at = cursor ?? n - 1;
    if (jump) at = Math.min(n - 1, Math.max(0, at + jump));
    else if (e.key === "Home") at = 0;
    else if (e.key === "End") at = n - 1;
    else return;
    e.preventDefault();
    const u = plot.current;
    u.setCursor({ left: u.valToPos(x[at], "x"), top: 10 });
  };

  const at = cursor ?? x.length - 1;
  const summary = useMemo(() => {
    const values = main.values.filter((v) => v !== null && v !== undefined);
    if (!values.length) return t("{title}: no points yet.", { title });
    return t("{title}: {points}, last {last} at step {step}, lowest {min}, highest {max}, {trend}.", {
      title,
      points: plural(x.length, "1 point", "{n} points"),
      last: num(values.at(-1)),
      step: int(x.at(-1)),
      min: num(values.reduce((a, b) => Math.min(a, b), Infinity)),
      max: num(values.reduce((a, b) => Math.max(a, b), -Infinity)),
      trend: trend(main.values),
    });
  }, [version, main.values]);

  return html`<figure class=${`chart ${compact ? "compact" : ""}`} role="figure" aria-label=${title} aria-describedby=${`${id}s`} data-points=${x.length}>
    <div class="readout num" aria-hidden="true">
      ${compact && html`<strong>${title}</strong>`}
      ${x.length > 0 && html`<span class="muted">${t("step {n}", { n: int(x[at]) })}</span>`}
      ${lines.map((l) => html`<span class="key"><i style=${{ background: `var(${l.color})` }}></i>${!compact && html`<span class="muted">${l.label}</span>`}<b>${num(l.values[at])}${unit && html`<small>${unit}</small>`}</b></span>`)}
    </div>
    <div class="plot" ref=${holder} tabindex="0" role="application" aria-label=${t("{title}. Arrow keys move along the line.", { title })} aria-describedby=${`${id}s`} onKeyDown=${move}
      style=${{ minHeight: `${height}px` }}></div>
    <p class="sr" id=${`${id}s`}>${summary}</p>
    <p class="sr" aria-live="polite">${cursor !== null && x[at] !== undefined ? `${t("step {n}", { n: x[at] })}: ${num(main.values[at])}` : ""}</p>
    ${table && html`<${DataTable} x=${x} lines=${lines} title=${title} />`}
  </figure>`;
}

const PAGE = 25;
function DataTable({ x, lines, title }) {
  const [open, setOpen] = useState(false);
  const [page, setPage] = useState(0);
  const pages = Math.max(1, Math.ceil(x.length / PAGE));
  const last = Math.min(page, pages - 1);
  const indices = Array.from({ length: Math.min(PAGE, x.length - last * PAGE) }, (_, i) => x.length - 1 - last * PAGE - i);
  return html`<details class="fold chart-table" onToggle=${(e) => setOpen(e.currentTarget.open)}>
    <summary><${Icon} name="chev" />${t("Show the numbers")}</summary>
    ${open && html`<div class="table-wrap"><table class="plain"><caption class="sr">${title}</caption>
      <thead><tr><th scope="col">${t("Step")}</th>${lines.map((l) => html`<th scope="col" class="r">${l.label}</th>`)}</tr></thead>
      <tbody>${indices.map((i) => html`<tr key=${i}><th scope="row">${int(x[i])}</th>${lines.map((l) => html`<td class="r">${num(l.values[i], 6)}</td>`)}</tr>`)}</tbody></table></div>
      <div class="row small"><button type="button" class="btn tiny" disabled=${last === 0} onClick=${() => setPage(last - 1)}>${t("Newer")}</button>
      <span class="muted num">${last + 1} / ${pages}</span><button type="button" class="btn tiny" disabled=${last >= pages - 1} onClick=${() => setPage(last + 1)}>${t("Older")}</button></div>`}
  </details>`;
}

/** A tiny line without axes, for lists. Decorative: the row says the figures in words. */
export function Sparkline({ values, width = 120, height = 32 }) {
  const real = values.filter((v) => v !== null && v !== undefined);
  if (real.length < 2) return html`<svg class="sparkline" width=${width} height=${height} aria-hidden="true"></svg>`;
  const min = Math.min(...real);
  const span = Math.max(...real) - min || 1;
  const points = real.map((v, i) => `${((i / (real.length - 1)) * (width - 4) + 2).toFixed(1)},${(height - 3 - ((v - min) / span) * (height - 6)).toFixed(1)}`);
  return html`<svg class="sparkline" width=${width} height=${height} viewBox=${`0 0 ${width} ${height}`} aria-hidden="true">
    <polygon points=${`2,${height} ${points.join(" ")} ${width - 2},${height}`} /><polyline points=${points.join(" ")} /></svg>`;
}
