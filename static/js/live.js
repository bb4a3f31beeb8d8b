// One job, live: history over HTTP, then the event stream from the history's cursor, merged so that nothing is missing or
// doubled whatever the overlap (rows are keyed by step, samples by step and prompt, log lines by number).
// Knows no markup; `pages/job.js` draws it.
import { useEffect, useRef, useState } from "../vendor/preact-htm.js";
import { api, rows } from "./api.js";
import { isOver } from "./ui.js";

const MAX_LOG_LINES = 5000;
const HIDDEN_MS = 60_000; // a hidden tab gives its connection back after this
const MAX_POINTS = 20_000;

/** Columns of metric rows, sorted by step; a repeated step (a resumed attempt) replaces the earlier row. */
export class Points {
  constructor() {
    this.columns = new Map([["step", []]]);
    /** Grows with every change, for those who keep what they derived. */
    this.version = 0;
  }
  get step() {
    return this.columns.get("step");
  }
  get length() {
    return this.step.length;
  }
  column(name) {
    let column = this.columns.get(name);
    if (!column) this.columns.set(name, (column = new Array(this.length).fill(null)));
    return column;
  }
  /** Adds one row, `{step, loss, …}`. */
  put(row) {
    if (!Number.isFinite(row.step)) return;
    const steps = this.step;
    let at = steps.length;
    while (at > 0 && steps[at - 1] >= row.step) at -= 1;
    const replace = steps[at] === row.step;
    this.version += 1;
    for (const name of Object.keys(row)) this.column(name);
    for (const [name, column] of this.columns) column.splice(at, replace ? 1 : 0, row[name] ?? null);
  }
  /** Adds rows given as columns (`cols`, `rows`), the form of the stream. */
  putRows(cols, list) {
    for (const values of list) this.put(Object.fromEntries(cols.map((name, i) => [name, values[i]])));
  }
}

/** Columns of the metrics answer, `{x, series: {loss: {last, min, max}}}`, as rows. */
function* historyRows(answer) {
  const series = Object.entries(answer?.series ?? {}).map(([name, s]) => [name, Array.isArray(s) ? s : s.last]);
  for (const [i, step] of (answer?.x ?? []).entries()) {
    yield Object.fromEntries([["step", step], ...series.map(([name, values]) => [name, values?.[i] ?? null])]);
  }
}

class JobStore {
  constructor(id, changed) {
    this.id = id;
    this.changed = changed;
    this.job = null;
    this.progress = null;
    this.points = new Points();
    this.samples = new Map();
    this.logs = new Map();
    this.checkpoints = new Map();
    this.alerts = new Map();
    this.files = [];
    this.error = null;
    this.loaded = false;
    this.connection = "connecting"; // connecting | live | reconnecting | ended
    this.cursor = null;
    this.retryMs = 1000;
    this.closed = false;
  }

  touch() {
    if (this.pending) return;
    this.pending = setTimeout(() => {
      this.pending = null;
      if (!this.closed) this.changed((n) => n + 1);
    }, 100);
  }

  async start() {
    try {
      // The cursor comes first and the rest is read after it: what is stored in between comes twice rather than never.
      const metrics = await api.metrics(this.id, { max_points: MAX_POINTS });
      const [job, samples, logs, checkpoints] = await Promise.all([api.job(this.id), api.samples(this.id), api.logs(this.id, 1000), api.checkpoints(this.id)]);
      if (this.closed) return;
      this.error = null;
      this.setJob(job);
      for (const row of historyRows(metrics)) this.points.put(row);
      for (const sample of rows(samples)) this.putSample(sample);
      this.putLogs(rows(logs));
      for (const checkpoint of rows(checkpoints)) this.checkpoints.set(checkpoint.step, checkpoint);
      if (isOver(job.status)) await this.loadFiles();
      this.cursor = metrics.cursor;
      this.loaded = true;
      this.connect();
    } catch (error) {
      if (this.closed) return;
      this.error = error;
      if (error.status === 0 || error.status >= 500) this.later(() => this.start());
    }
    this.touch();
  }

  setJob(job) {
    this.job = job;
    for (const alert of job.alerts ?? []) this.putAlert(alert);
    if (job.progress) this.progress = { ...this.progress, ...job.progress };
  }
  async loadFiles() {
    this.files = rows(await api.files(this.id));
  }
  putAlert(alert) {
    this.alerts.set(`${alert.code}/${alert.step}/${alert.detail}`, alert);
  }
  putSample(sample) {
    this.samples.set(`${sample.step}/${sample.prompt_index}`, sample);
  }
  putLogs(lines) {
    for (const line of lines) this.logs.set(line.n, line);
    if (this.logs.size > MAX_LOG_LINES) for (const n of [...this.logs.keys()].slice(0, this.logs.size - MAX_LOG_LINES)) this.logs.delete(n);
  }

  later(action) {
    clearTimeout(this.timer);
    this.timer = setTimeout(action, this.retryMs);
    this.retryMs = Math.min(15_000, this.retryMs * 1.6);
  }

  connect() {
    if (this.closed) return;
    this.source?.close();
    const after = this.cursor ? `?after=${encodeURIComponent(this.cursor)}` : "";
    const source = (this.source = new EventSource(`jobs/${encodeURIComponent(this.id)}/events${after}`));
    const on = (name, handle) =>
      source.addEventListener(name, (event) => {
        if (event.lastEventId) this.cursor = event.lastEventId;
        let data = null;
        try {
          data = JSON.parse(event.data);
        } catch {
          return; // not ours
        }
        handle(data);
        this.touch();
      });
    source.onopen = () => {
      this.connection = "live";
      this.retryMs = 1000;
      this.touch();
    };
    source.onerror = () => {
      if (this.source !== source) return;
      if (this.connection !== "ended") this.connection = "reconnecting";
      // CLOSED: the browser gave up (204 after the end, or an error page); find out which.
      if (source.readyState === EventSource.CLOSED) this.later(() => this.recover());
      this.touch();
    };
    on("snapshot", (job) => this.setJob(job));
    on("status", (change) => this.status(change));
    on("progress", (progress) => (this.progress = { ...this.progress, ...progress }));
    on("metrics", ({ cols, rows: list }) => this.points.putRows(cols, list));
    on("log", (line) => this.putLogs([line]));
    on("sample", (sample) => this.putSample(sample));
    on("checkpoint", (checkpoint) => this.checkpoints.set(checkpoint.step, checkpoint));
    on("alert", (alert) => this.putAlert(alert));
    on("resync", () => {
      source.close();
      this.cursor = null;
      this.later(() => this.start());
    });
    on("bye", ({ reason }) => {
      if (reason === "complete") this.end(); // else the server goes away, and the browser reconnects
    });
  }

  async status(change) {
    if (!this.job) return;
    const before = this.job.status;
    this.job = { ...this.job, status: change.to ?? this.job.status };
    try {
      this.setJob(await api.job(this.id)); // error, summary, allowed actions
      if (isOver(this.job.status) && !isOver(before)) await this.loadFiles();
    } catch {
      // the next event or reconnect brings it
    }
    this.touch();
  }

  end() {
    this.connection = "ended";
    this.source?.close();
    this.touch();
  }

  async recover() {
    try {
      const was = this.job?.status;
      this.setJob(await api.job(this.id));
      if (isOver(this.job.status) && isOver(was)) return this.end();
      this.connect(); // also when it ended meanwhile: the stream brings what was missed, then says so
    } catch (error) {
      if (error.status === 404) this.error = error;
      else this.later(() => this.recover());
    }
    this.touch();
  }

  hide() {
    this.hideTimer = setTimeout(() => {
      if (this.connection !== "ended") this.source?.close();
      this.parked = this.connection !== "ended";
    }, HIDDEN_MS);
  }
  show() {
    clearTimeout(this.hideTimer);
    if (this.parked) {
      this.parked = false;
      this.connection = "reconnecting";
      this.recover();
    }
  }

  close() {
    this.closed = true;
    this.source?.close();
    for (const timer of [this.timer, this.hideTimer, this.pending]) clearTimeout(timer);
  }
}

/** The live store of job `id`; the component redraws when it changes. */
export function useJob(id) {
  const [, changed] = useState(0);
  const ref = useRef(/** @type {JobStore|null} */ (null));
  if (ref.current?.id !== id) {
    ref.current?.close();
    ref.current = new JobStore(id, changed);
  }
  useEffect(() => {
    const store = ref.current;
    store.start();
    const visibility = () => (document.hidden ? store.hide() : store.show());
    document.addEventListener("visibilitychange", visibility);
    return () => {
      document.removeEventListener("visibilitychange", visibility);
      store.close();
    };
  }, [id]);
  return ref.current;
}
