// The audit log on the system page: who changed what, page by page.
import { html, useState } from "../../vendor/preact-htm.js";
import { api, rows } from "../api.js";
import { useResource } from "../hooks.js";
import { Icon } from "../icons.js";
import { t } from "../i18n.js";
import { Ago, Card, Problem, Skeleton } from "../ui.js";

const TONES = { done: "ok", refused: "warn", failed: "bad" };

export function AuditCard() {
  // The cursors of the pages before this one.
  const [trail, setTrail] = useState([]);
  const after = trail.at(-1);
  const { data, error, reload } = useResource(() => api.audit(after, 20), [after], after ? 0 : 10_000);
  const list = rows(data);
  return html`<${Card} title=${t("Audit log")} icon="log" tools=${html`<div class="row">
      ${trail.length > 0 && html`<button type="button" class="btn tiny" onClick=${() => setTrail(trail.slice(0, -1))}>${t("Newer")}</button>`}
      ${data?.has_more && html`<button type="button" class="btn tiny" onClick=${() => setTrail([...trail, data.last_id])}>${t("Older")}</button>`}</div>`}>
    ${error && html`<${Problem} error=${error} retry=${reload} />`}${!data && !error && html`<${Skeleton} height=${120} />`}
    ${data && !list.length && html`<p class="note">${t("Nothing was changed yet.")}</p>`}
    ${list.length > 0 && html`<div class="table-wrap"><table class="plain audit"><thead><tr><th>${t("When")}</th><th>${t("Who")}</th><th>${t("What")}</th><th>${t("Outcome")}</th></tr></thead>
      <tbody>${list.map((e) => html`<tr key=${e.id}><td><${Ago} when=${e.at} /></td><td><span class="clip" title=${e.key_id ?? ""}>${e.key_name ?? t("nobody")}</span> <span class="muted">${e.address}</span></td>
        <td><code>${e.method} ${e.path}</code>${e.object && html` <span class="muted">→ <code>${e.object}</code></span>`}</td>
        <td><span class=${`status tone-${TONES[e.outcome] ?? "idle"}`} title=${e.request_id}><${Icon} name=${e.outcome === "done" ? "check" : "alert"} />${t(e.outcome)} ${e.outcome === "done" ? "" : e.status}</span></td></tr>`)}</tbody></table></div>`}
  </${Card}>`;
}
