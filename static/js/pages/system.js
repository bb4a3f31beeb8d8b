// The machine: devices, memory, disk, versions. Shows what the server reports, with gauges where there is a total.
import { html } from "../../vendor/preact-htm.js";
import { api } from "../api.js";
import { bytes, duration, int } from "../format.js";
import { useResource, useTitle } from "../hooks.js";
import { t } from "../i18n.js";
import { Bar, Card, Problem, Skeleton } from "../ui.js";

function Gauge({ label, used, total, what }) {
  const share = total ? used / total : 0;
  return html`<div class="gauge"><div class="row small"><strong>${label}</strong><span class="grow"></span><span class="num muted">${t("{used} of {total}", { used: bytes(used), total: bytes(total) })}</span></div>
    <${Bar} done=${used} total=${total} tone=${share > 0.92 ? "bad" : share > 0.8 ? "warn" : "run"} label=${label} />${what && html`<p class="note">${what}</p>`}</div>`;
}

// A total with a used or free twin, in any of the spellings a gauge may have.
const pair = (x, stem) => {
  const group = x?.[stem] ?? {};
  const total = group.total_bytes ?? x?.[`${stem}_total_bytes`];
  const free = group.available_bytes ?? group.free_bytes ?? x?.[`${stem}_available_bytes`] ?? x?.[`${stem}_free_bytes`];
  const used = group.used_bytes ?? x?.[`${stem}_used_bytes`] ?? (total !== undefined && free !== undefined ? total - free : undefined);
  return total > 0 && used !== undefined ? { used, total } : null;
};

const word = (k) => k.replace(/_(bytes|s)$/, "").replace(/_/g, " ");
const value = (k, v) => (v === null || v === undefined ? "–" : k.endsWith("_bytes") ? bytes(v) : k.endsWith("_s") && typeof v === "number" ? duration(v) : typeof v === "number" ? int(v) : typeof v === "boolean" ? (v ? t("yes") : t("no")) : Array.isArray(v) ? v.join(", ") : String(v));

function Figures({ of, skip = [] }) {
  const list = Object.entries(of ?? {}).filter(([k, v]) => !skip.includes(k) && (v === null || typeof v !== "object" || (Array.isArray(v) && v.every((x) => typeof x !== "object"))));
  return html`<dl class="facts">${list.map(([k, v]) => html`<dt>${word(k)}</dt><dd>${value(k, v)}</dd>`)}</dl>`;
}

export function SystemPage() {
  const { data: s, error, reload } = useResource(() => api.system(), [], 3000);
  const version = useResource(() => api.version(), []);
  useTitle(t("System"));
  if (error && !s) return html`<div class="page"><h1>${t("System")}</h1><${Problem} error=${error} retry=${reload} /></div>`;
  if (!s) return html`<div class="page"><h1>${t("System")}</h1><${Skeleton} n=${3} height=${110} /></div>`;
  const memory = pair(s, "memory");
  const disk = pair(s, "disk");
  return html`<div class="page"><div class="page-head"><div class="grow"><h1>${t("System")}</h1><p class="sub">${t("What this server runs on. Nothing is sent anywhere.")}</p></div></div>
    <div class="two">
      <${Card} title=${t("Memory and disk")} icon="memory"><div class="stack">
        ${memory && html`<${Gauge} label=${t("Memory")} ...${memory} />`}${disk && html`<${Gauge} label=${t("Disk of the data directory")} ...${disk} />`}
        ${!memory && !disk && html`<p class="note">${t("The server reports no totals on this machine.")}</p>`}
        <${Figures} of=${s} skip=${["devices"]} /></div></${Card}>
      <${Card} title=${t("Devices")} icon="system"><div class="stack">${(s.devices ?? []).map((d) => {
        const m = typeof d === "object" ? pair(d, "memory") : null;
        return html`<div class="stack-s device"><strong>${typeof d === "string" ? d : (d.name ?? d.id)}</strong>${m && html`<${Gauge} label=${t("Memory")} ...${m} />`}${typeof d === "object" && html`<${Figures} of=${d} skip=${["name"]} />`}</div>`;
      })}${(s.devices ?? []).length === 0 && html`<p class="note">${t("No device is listed.")}</p>`}</div></${Card}>
    </div>
    <${Card} title=${t("Version")} icon="info">${version.data ? html`<${Figures} of=${version.data} />` : version.error ? html`<${Problem} error=${version.error} />` : html`<${Skeleton} />`}
      <p class="note">${t("The API is described at")} <a href="openapi.json">openapi.json</a>.</p></${Card}>
    ${s.queue && html`<${Card} title=${t("Queue")} icon="jobs"><${Figures} of=${s.queue} /></${Card}>`}
  </div>`;
}
