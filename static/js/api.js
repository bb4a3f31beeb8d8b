// The only file that speaks HTTP. Addresses are relative to the page, so the dashboard also works under a sub-path.
// Turns every failure into an ApiError that the error panel can show in full.

/** A failed request: an RFC 9457 problem, or the network's own failure dressed as one. */
export class ApiError extends Error {
  /** @param {{status:number,title:string,detail?:string,code?:string,hint?:string,errors?:Array<{pointer:string,code:string,detail:string}>,request_id?:string,[k:string]:unknown}} problem */
  constructor(problem) {
    super(problem.detail || problem.title);
    this.problem = problem;
    this.status = problem.status;
    /** Errors that belong to one field each. */
    this.fields = problem.errors ?? [];
  }
}

async function failure(response) {
  let problem = {};
  try {
    problem = await response.json();
  } catch {
    // not JSON: a proxy's page; the status line still says something
  }
  return new ApiError({
    ...problem,
    status: response.status,
    title: problem.title ?? `HTTP ${response.status} ${response.statusText}`.trim(),
    request_id: problem.request_id ?? response.headers.get("x-request-id") ?? undefined,
  });
}

/** Heard by the shell, which then asks for a key. A key that is wrong at signing in is that page's own affair. */
const refused = (status, path) => status === 401 && path !== "session" && window.dispatchEvent(new Event("lorad:signin"));

const unreachable = (cause) =>
  new ApiError({
    status: 0,
    code: "network",
    title: "The server cannot be reached",
    detail: "The request got no answer.",
    hint: "Check that lorad is still running; this page tries again by itself.",
    cause: String(cause),
  });

/**
 * Sends a request and returns the parsed answer (`null` when there is none).
 * @param {string} method
 * @param {string} path relative, e.g. `jobs?limit=20`
 */
export async function request(method, path, { json, body, headers = {}, signal } = {}) {
  let response;
  try {
    response = await fetch(path, {
      method,
      signal,
      headers: { accept: "application/json", ...(json !== undefined && { "content-type": "application/json" }), ...headers },
      body: json !== undefined ? JSON.stringify(json) : body,
    });
  } catch (cause) {
    if (cause?.name === "AbortError") throw cause;
    throw unreachable(cause);
  }
  if (!response.ok) {
    refused(response.status, path);
    throw await failure(response);
  }
  if (response.status === 204) return null;
  const type = response.headers.get("content-type") ?? "";
  return type.includes("json") ? response.json() : response.text();
}

const query = (parameters) => {
  const entries = Object.entries(parameters).filter(([, v]) => v !== undefined && v !== null && v !== "");
  return entries.length ? `?${new URLSearchParams(entries.map(([k, v]) => [k, String(v)]))}` : "";
};
const at = (...parts) => parts.map(encodeURIComponent).join("/");

/** A key that makes a POST safe to repeat. */
export const idempotencyKey = () =>
  crypto.randomUUID?.() ?? Array.from(crypto.getRandomValues(new Uint8Array(16)), (b) => b.toString(16).padStart(2, "0")).join("");

export const api = {
  jobs: (parameters, signal) => request("GET", `jobs${query(parameters)}`, { signal }),
  job: (id) => request("GET", at("jobs", id)),
  createJob: (job, key) => request("POST", "jobs", { json: job, headers: { "idempotency-key": key } }),
  dryRun: (job, signal) => request("POST", "jobs?dry_run=true", { json: job, signal }),
  demo: () => request("GET", "demo"),
  cancel: (id, mode) => request("POST", `${at("jobs", id)}/cancel`, { json: { mode } }),
  act: (id, action) => request("POST", `${at("jobs", id)}/${action}`, { json: {} }),
  deleteJob: (id) => request("DELETE", `${at("jobs", id)}?artifacts=delete`),
  metrics: (id, parameters) => request("GET", `${at("jobs", id)}/metrics${query(parameters)}`),
  logs: (id, tail) => request("GET", `${at("jobs", id)}/logs${query({ tail })}`),
  samples: (id) => request("GET", `${at("jobs", id)}/samples`),
  checkpoints: (id) => request("GET", `${at("jobs", id)}/checkpoints`),
  files: (id) => request("GET", `${at("jobs", id)}/files`),
  datasets: () => request("GET", "datasets"),
  dataset: (id) => request("GET", at("datasets", id)),
  items: (id, after, limit = 60) => request("GET", `${at("datasets", id)}/items${query({ after, limit })}`),
  deleteDataset: (id) => request("DELETE", at("datasets", id)),
  models: () => request("GET", "models"),
  registerModel: (model) => request("POST", "models", { json: model }),
  deleteModel: (id) => request("DELETE", at("models", id)),
  families: () => request("GET", "families"),
  schema: (id) => request("GET", `${at("families", id)}/schema`),
  session: () => request("GET", "session"),
  signIn: (key) => request("POST", "session", { json: { key } }),
  signOut: () => request("DELETE", "session"),
  keys: () => request("GET", "api-keys"),
  createKey: (key) => request("POST", "api-keys", { json: key }),
  revokeKey: (id) => request("DELETE", at("api-keys", id)),
  webhooks: () => request("GET", "webhooks"),
  createWebhook: (webhook) => request("POST", "webhooks", { json: webhook }),
  updateWebhook: (id, patch) => request("PATCH", at("webhooks", id), { json: patch }),
  deleteWebhook: (id) => request("DELETE", at("webhooks", id)),
  testWebhook: (id) => request("POST", `${at("webhooks", id)}/test`, { json: {} }),
  deliveries: (id) => request("GET", `${at("webhooks", id)}/deliveries`),
  redeliver: (id, delivery) => request("POST", `${at("webhooks", id, "deliveries", delivery)}/redeliver`, { json: {} }),
  audit: (after, limit) => request("GET", `audit${query({ after, limit })}`),
  system: () => request("GET", "system"),
  version: () => request("GET", "version"),
};

/**
 * Uploads an archive as a dataset, reporting progress (fetch cannot).
 * @param {File} file
 * @param {string} name
 * @param {(fraction: number) => void} onProgress
 * @returns {{done: Promise<object>, abort: () => void}}
 */
export function uploadDataset(file, name, onProgress) {
  const xhr = new XMLHttpRequest();
  const form = new FormData();
  form.append("name", name);
  form.append("file", file, file.name);
  const done = new Promise((resolve, reject) => {
    xhr.upload.onprogress = (e) => e.lengthComputable && onProgress(e.loaded / e.total);
    xhr.onerror = () => reject(unreachable("upload"));
    xhr.onabort = () => reject(Object.assign(new Error("aborted"), { name: "AbortError" }));
    xhr.onload = () => {
      let answer = null;
      try {
        answer = JSON.parse(xhr.responseText);
      } catch {
        // handled below by the status
      }
      refused(xhr.status, "datasets");
      if (xhr.status >= 200 && xhr.status < 300 && answer) resolve(answer);
      else
        reject(
          new ApiError({
            ...(answer ?? {}),
            status: xhr.status,
            title: answer?.title ?? `HTTP ${xhr.status}`,
            request_id: answer?.request_id ?? xhr.getResponseHeader("x-request-id") ?? undefined,
          }),
        );
    };
  });
  xhr.open("POST", "datasets");
  xhr.setRequestHeader("accept", "application/json");
  xhr.send(form);
  return { done, abort: () => xhr.abort() };
}

/** The rows of a list answer, whether enveloped or not. */
export const rows = (answer) => (Array.isArray(answer) ? answer : (answer?.data ?? []));
