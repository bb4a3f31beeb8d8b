// The machine: devices, memory, disk, versions and limits.
import { html } from "../../vendor/preact-htm.js";
import { api } from "../api.js";
import { bytes, duration, int } from "../format.js";
import { useResource, useTitle } from "../hooks.js";
import { t } from "../i18n.js";
import { AuditCard } from "../parts/audit.js";
import { KeysCard } from "../parts/keys.js";
import { WebhooksCard } from "../parts/webhooks.js";
import { Bar, Card, Problem, Skeleton, Status } from "../ui.js";

function Gauge({ label, total, free }) {
  if (!total) return html`<p class="note">${t("{label}: not known on this machine.", { label })}</p>`;
  const used = total - free;
  const share = used / total;
  return html`<div class="gauge"><div class="row small"><strong>${label}</strong><span class="grow"></span><span class="num muted">${t("{free} free of {total}", { free: bytes(free), total: bytes(total) })}</span></div>
    <${Bar} done=${used} total=${total} tone=${share > 0.95 ? "bad" : share > 0.85 ? "warn" : "run"} label=${t("{label}, used", { label })} /></div>`;
}

const Facts = ({ list }) => html`<dl class="facts">${list.map(([k, v]) => html`<dt>${k}</dt><dd>${v}</dd>`)}</dl>`;
const word = (name) => name.replace(/_bytes$/, "").replace(/_/g, " ").replace(/^./, (c) => c.toUpperCase());

export function SystemPage({ session, onSession }) {
  const { data: s, error, reload } = useResource(() => api.system(), [], 3000);
  const { data: v, error: versionError } = useResource(() => api.version(), []);
  useTitle(t("System"));
  if (error && !s) return html`<div class="page"><h1>${t("System")}</h1><${Problem} error=${error} retry=${reload} /></div>`;
  if (!s) return html`<div class="page"><h1>${t("System")}</h1><${Skeleton} n=${3} height=${110} /></div>`;
  // An open server asks nobody, so anybody may; a locked one lets admin keys manage.
  const manages = session && (!session.locked || session.key?.scope === "admin");
  const jobs = Object.entries(s.jobs ?? {}).filter(([, n]) => n > 0);
  return html`<div class="page"><div class="page-head"><div class="grow"><h1>${t("System")}</h1><p class="sub">${t("What this server runs on. Nothing is sent anywhere.")}</p></div></div>
    ${error && html`<${Problem} error=${error} retry=${reload} />`}
    <div class="two">
      <${Card} title=${t("Memory and disk")} icon="memory"><div class="stack">
        <${Gauge} label=${t("Memory")} total=${s.memory_total_bytes} free=${s.memory_available_bytes} />
        <${Gauge} label=${t("Disk of the data directory")} total=${s.disk_total_bytes} free=${s.disk_available_bytes} />
        <${Facts} list=${[[t("Result files"), bytes(s.artifact_bytes)]]} /></div></${Card}>
      <${Card} title=${t("Devices")} icon="system"><div class="stack"><div class="row">${(s.devices ?? []).map((d) => html`<span class="device mono">${d}</span>`)}</div>
        <p class="note">${t("One job trains on each device at a time; the others wait in line.")}</p>
        <${Facts} list=${[[t("CPU cores"), int(s.cpus)], [t("Running for"), duration(s.uptime_s)]]} /></div></${Card}>
      <${Card} title=${t("Jobs")} icon="jobs">${jobs.length ? html`<${Facts} list=${jobs.map(([status, n]) => [html`<${Status} status=${status} />`, int(n)])} />` : html`<p class="note">${t("None yet.")}</p>`}</${Card}>
      <${Card} title=${t("Version and limits")} icon="info"><div class="stack">${v ? html`<${Facts} list=${[[t("Version"), v.version], [t("Worker protocol"), v.protocol], [t("Trains"), v.trains ? t("yes") : t("no, this build only serves")], ...Object.entries(v.limits ?? {}).map(([k, x]) => [word(k), k.endsWith("_bytes") ? bytes(x) : int(x)])]} />` : versionError ? html`<${Problem} error=${versionError} />` : html`<${Skeleton} />`}
        <p class="note">${t("The API is described at")} <a href="openapi.json">openapi.json</a>.</p></div></${Card}>
    </div>
    ${manages && html`<div class="two"><${KeysCard} session=${session} onSession=${onSession} /><${WebhooksCard} /></div><${AuditCard} />`}
  </div>`;
}
