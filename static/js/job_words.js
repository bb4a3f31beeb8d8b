// A job in words and figures: one place that reads the fields of the job object. Pure.
import { clock, duration, int, millis, num, speed } from "./format.js";
import { plural, t } from "./i18n.js";
import { isOver } from "./ui.js";

/** Steps done and in all, from the live progress or the job. */
export function steps(job, progress = job.progress) {
  const done = Math.max(job.step ?? 0, progress?.step ?? 0);
  const total = job.total_steps ?? job.plan?.total_steps ?? 0;
  return { done: job.status === "succeeded" ? Math.max(done, total) : done, total };
}

/** Seconds it has run, or ran. */
export function elapsed(job, now = Date.now()) {
  const start = millis(job.started_at);
  if (!Number.isFinite(start)) return NaN;
  const end = millis(job.finished_at);
  return ((Number.isFinite(end) ? end : now) - start) / 1000;
}

const PHASES = {
  loading: () => t("loading the base model"),
  caching: (p) => (p.total ? t("encoding pictures and captions, {done} of {total}", { done: p.done ?? 0, total: p.total }) : t("encoding pictures and captions")),
  checking_gradients: () => t("checking that gradients point the right way"),
  sampling: (p) => (p.total ? t("drawing sample pictures, {done} of {total}", { done: p.done ?? 0, total: p.total }) : t("drawing sample pictures")),
  training: () => t("training"),
  exporting: () => t("writing and re-reading the result files"),
};
const phase = (p) => PHASES[p?.phase]?.(p) ?? "";

/** Whether the user asked it to stop and it has not stopped yet. */
export const stopping = (job) => !isOver(job.status) && /cancel/.test(String(job.desired ?? ""));

/** The one sentence that says where the job stands. */
export function sentence(job, progress = job.progress, now = Date.now()) {
  const { done, total } = steps(job, progress);
  const p = progress ?? {};
  if (stopping(job)) return t("Stopping at the next step boundary…");
  switch (job.status) {
    case "validating":
      return t("Checking the request.");
    case "queued": {
      const at = job.queue?.position;
      return at > 1 ? t("Queued: number {n} in line.", { n: at }) : t("Queued: it starts as soon as a device is free.");
    }
    case "preparing":
      return phase(p) ? t("Preparing: {what}.", { what: phase(p) }) : t("Preparing.");
    case "running": {
      if (p.phase && p.phase !== "training") return done ? t("Running: step {done} of {total}; {what}.", { done: int(done), total: int(total), what: phase(p) }) : t("Preparing: {what}.", { what: phase(p) });
      const parts = [t("Running: step {done} of {total}", { done: int(done), total: total ? int(total) : "?" })];
      if (p.it_s) parts.push(speed(p.it_s));
      if (p.eta_s >= 0 && Number.isFinite(p.eta_s)) parts.push(p.eta_s < 90 ? t("done in {d}", { d: duration(Math.max(1, p.eta_s)) }) : t("done about {time}", { time: clock(now + p.eta_s * 1000) }));
      return `${parts.join(", ")}.`;
    }
    case "saving":
      return t("Saving: {what}.", { what: phase({ phase: "exporting" }) });
    case "paused":
      return t("Paused at step {done} of {total}.", { done: int(done), total: int(total) });
    case "interrupted":
      return t("Interrupted: its worker was lost. It goes on by itself from the newest checkpoint.");
    case "succeeded": {
      const loss = job.summary?.final_loss;
      return t("Done: {steps} in {time}{loss}.", { steps: plural(total || done, "1 step", "{n} steps"), time: duration(elapsed(job)), loss: Number.isFinite(loss) ? t(", final loss {x}", { x: num(loss, 3) }) : "" });
    }
    case "failed":
      return done ? t("Failed at step {done} of {total}: {why}", { done: int(done), total: int(total), why: job.error?.title ?? "" }) : t("Failed: {why}", { why: job.error?.title ?? t("no reason was given") });
    case "cancelled":
      return t("Cancelled at step {done} of {total}.", { done: int(done), total: int(total) });
    default:
      return job.status;
  }
}

/** The way of a job, for the timeline: each stage is "done", "now", "next" or "broken". */
export function stages(job, progress = job.progress) {
  const names = [t("Queued"), t("Prepare"), t("Train"), t("Save"), t("Done")];
  const training = steps(job, progress).done > 0 || progress?.phase === "training";
  const at = { validating: 0, queued: 0, preparing: 1, running: training ? 2 : 1, paused: 2, interrupted: 2, saving: 3, succeeded: 5 }[job.status] ?? (training ? 2 : job.started_at ? 1 : 0);
  const broken = job.status === "failed" || job.status === "cancelled";
  return names.map((name, i) => ({ name, state: i < at ? "done" : i > at ? "next" : broken ? "broken" : "now" }));
}

/** Ids of the dataset and the base model. */
export const datasetId = (job) => job.dataset?.id ?? "";
export const baseId = (job) => job.base_model;
