// Signing in: trades an API key for a cookie that scripts cannot read. The key itself is kept nowhere.
import { html, useEffect, useRef, useState } from "../../vendor/preact-htm.js";
import { api } from "../api.js";
import { useTitle } from "../hooks.js";
import { Icon, Mark } from "../icons.js";
import { t } from "../i18n.js";
import { Code, Problem } from "../ui.js";

export function SignInPage({ onDone }) {
  const [key, setKey] = useState("");
  const [state, setState] = useState({ busy: false, error: null });
  const input = useRef(null);
  useTitle(t("Sign in"));
  useEffect(() => input.current.focus(), []);
  const wrong = state.error?.status === 401;
  const send = async (e) => {
    e.preventDefault();
    setState({ busy: true, error: null });
    try {
      await api.signIn(key.trim());
      setKey("");
      onDone();
    } catch (error) {
      setState({ busy: false, error });
      input.current?.select();
    }
  };
  return html`<main class="signin" id="main" tabindex="-1"><section class="card signin-card" aria-label=${t("Sign in")}>
    <p class="brand"><${Mark} />lorad</p>
    <div class="stack-s"><h1>${t("Sign in")}</h1><p class="muted">${t("This server asks for an API key. It stays in this browser as a cookie that no script can read.")}</p></div>
    <form class="stack" onSubmit=${send}>
      <div class="field"><label for="key">${t("API key")}</label>
        <input ref=${input} id="key" class="input mono" type="password" name="key" required autocomplete="current-password" autocapitalize="off" spellcheck="false" placeholder="lorad_…" value=${key} onInput=${(e) => setKey(e.currentTarget.value)} aria-invalid=${wrong ? "true" : undefined} aria-describedby=${wrong ? "key-problem" : undefined} />
        ${wrong && html`<p class="problem" id="key-problem" role="alert"><${Icon} name="alert" />${t("This key opens nothing: it may be mistyped, expired or revoked.")}</p>`}</div>
      ${state.error && !wrong && html`<${Problem} error=${state.error} />`}
      <button class="btn primary big wide" disabled=${state.busy || !key.trim()}><${Icon} name=${state.busy ? "spinner" : "key"} />${t("Sign in")}</button>
    </form>
    <details class="fold"><summary><${Icon} name="chev" />${t("No key yet?")}</summary><div class="fold-body stack-s"><p class="note">${t("Whoever runs the server makes one, on its machine:")}</p>
      <${Code} wrap text="lorad keys create --name me --scope admin" label=${t("Command that makes a key")} /></div></details>
  </section></main>`;
}
