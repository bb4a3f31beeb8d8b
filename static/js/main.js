// The dashboard's entry: routes by the address's hash and draws the shell. Each page is one module under pages/.
import { Fragment, html, render, useEffect, useErrorBoundary, useState } from "../vendor/preact-htm.js";
import { api, rows } from "./api.js";
import { Icon, Mark } from "./icons.js";
import { useResource, useTheme } from "./hooks.js";
import { t } from "./i18n.js";
import { Empty, Problem, Toasts } from "./ui.js";
import { DatasetPage, DatasetsPage } from "./pages/datasets.js";
import { JobPage } from "./pages/job.js";
import { JobsPage } from "./pages/jobs.js";
import { ModelsPage } from "./pages/models.js";
import { NewJobPage } from "./pages/new.js";
import { SignInPage } from "./pages/signin.js";
import { SystemPage } from "./pages/system.js";

/** `#/jobs/x?tab=log` -> `{parts: ["jobs", "x"], query}`. */
function parse() {
  const [path, query = ""] = location.hash.replace(/^#\/?/, "").split("?");
  return { parts: path.split("/").filter(Boolean).map(decodeURIComponent), query: new URLSearchParams(query) };
}

function useRoute() {
  const [route, setRoute] = useState(parse);
  useEffect(() => {
    const changed = () => {
      setRoute(parse());
      if (!location.hash.includes("?")) scrollTo(0, 0);
    };
    addEventListener("hashchange", changed);
    return () => removeEventListener("hashchange", changed);
  }, []);
  return route;
}

function page({ parts: [head, id], query }, access) {
  switch (head) {
    case undefined:
      return html`<${JobsPage} query=${query} />`;
    case "jobs":
      return id ? html`<${JobPage} id=${id} key=${id} />` : html`<${JobsPage} query=${query} />`;
    case "new":
      return html`<${NewJobPage} from=${query.get("from")} dataset=${query.get("dataset")} base=${query.get("base")} key=${query.toString()} />`;
    case "datasets":
      return id ? html`<${DatasetPage} id=${id} key=${id} />` : html`<${DatasetsPage} />`;
    case "models":
      return html`<${ModelsPage} />`;
    case "system":
      return html`<${SystemPage} ...${access} />`;
    default:
      return html`<div class="page"><${Empty} icon="search" title=${t("There is no such page")}><p><a href="#/">${t("Go to the jobs")}</a></p></${Empty}></div>`;
  }
}

function Guarded({ route, access }) {
  const [error, reset] = useErrorBoundary((e) => console.error(e));
  useEffect(() => error && reset(), [route]);
  if (error) return html`<div class="page"><${Problem} error=${{ title: t("This page broke"), detail: String(error.message ?? error), hint: t("Reload it; if it happens again, please report it.") }} retry=${() => location.reload()} /></div>`;
  return page(route, access);
}

const NAV = [
  { href: "#/", heads: [undefined, "jobs"], icon: "jobs", label: "Jobs" },
  { href: "#/datasets", heads: ["datasets"], icon: "images", label: "Datasets" },
  { href: "#/models", heads: ["models"], icon: "model", label: "Models" },
  { href: "#/system", heads: ["system"], icon: "system", label: "System" },
];

/** The key that this browser is signed in with, and the way out. */
function Who({ session, onChange }) {
  const key = session?.key;
  if (!key) return null;
  const out = async () => {
    await api.signOut();
    onChange();
  };
  return html`<div class="who"><span class="grow clip" title=${`${key.name}, ${key.scope}`}><strong>${key.name}</strong> <span class="muted">${key.scope}</span></span>
    <button type="button" class="btn ghost tiny square" onClick=${out} aria-label=${t("Sign out")} title=${t("Sign out")}><${Icon} name="out" /></button></div>`;
}

/** The sign-in page while a key is needed, else the dashboard. */
function App() {
  const session = useResource(() => api.session(), []);
  useEffect(() => {
    addEventListener("lorad:signin", session.reload);
    return () => removeEventListener("lorad:signin", session.reload);
  }, []);
  if (session.data?.locked && !session.data.key) return html`<${SignInPage} onDone=${session.reload} />`;
  // A server that does not answer is told by the pages themselves.
  return session.data || session.error ? html`<${Shell} session=${session.data} onSession=${session.reload} />` : null;
}

function Shell({ session, onSession }) {
  const route = useRoute();
  const theme = useTheme();
  const head = route.parts[0];
  const version = useResource(() => api.version(), [], 60_000);
  const busy = useResource(() => api.jobs({ status: "running", limit: 50 }), [], 10_000);
  const running = rows(busy.data).length;
  return html`<${Fragment}>
    <a class="skip" href="#main" onClick=${(e) => (e.preventDefault(), document.getElementById("main").focus())}>${t("Skip to the content")}</a>
    <div class="shell">
      <header class="rail">
        <a class="brand" href="#/" aria-label=${t("lorad, all jobs")}><${Mark} />lorad</a>
        <a class="btn primary wide" href="#/new"><${Icon} name="plus" />${t("New job")}</a>
        <nav class="nav" aria-label=${t("Main")}>
          ${NAV.map((n) => html`<a href=${n.href} aria-current=${n.heads.includes(head) ? "page" : undefined}><${Icon} name=${n.icon} />${t(n.label)}
            ${n.icon === "jobs" && running > 0 && html`<span class="count" title=${t("running now")}>${running}</span>`}</a>`)}
        </nav>
        <div class="rail-foot">
          <${Who} session=${session} onChange=${onSession} />
          <button type="button" class="btn ghost" onClick=${() => window.loradTheme.set(theme === "dark" ? "light" : "dark")} aria-label=${theme === "dark" ? t("Use the light theme") : t("Use the dark theme")}>
            <${Icon} name=${theme === "dark" ? "sun" : "moon"} /><span class="text">${theme === "dark" ? t("Light") : t("Dark")}</span></button>
          <p class="version num">${version.data ? `lorad ${version.data.version ?? ""}` : version.error ? t("server not reachable") : ""}</p>
        </div>
      </header>
      <main class="main" id="main" tabindex="-1"><${Guarded} route=${route} access=${{ session, onSession }} /></main>
    </div>
    <${Toasts} />
  </${Fragment}>`;
}

render(html`<${App} />`, document.getElementById("app"));
