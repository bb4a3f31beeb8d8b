// Starts the real server on a free port with an empty data directory, and a real Chromium; keeps what pages did wrong:
// requests that left the origin, violations of the content security policy, uncaught errors.
import assert from "node:assert/strict";
import { spawn } from "node:child_process";
import { existsSync, mkdirSync, mkdtempSync, rmSync } from "node:fs";
import { createServer } from "node:net";
import { tmpdir } from "node:os";
import path from "node:path";
import { fileURLToPath } from "node:url";

const HERE = path.dirname(fileURLToPath(import.meta.url));
export const ROOT = path.resolve(HERE, "../..");
export const BIN = path.resolve(process.env.LORAD_BIN ?? path.join(ROOT, "target/release/lorad"));
const CHROMIUM = process.env.LORAD_CHROMIUM ?? "/usr/bin/chromium";

/** Where screenshots go: LORAD_SHOTS, or a folder under the system's temporary one. */
export const SHOTS = process.env.LORAD_SHOTS ?? path.join(tmpdir(), "lorad-screenshots");

if (!existsSync(CHROMIUM)) throw new Error(`Chromium is missing at ${CHROMIUM}. Install it (Debian: apt-get install chromium) or name one with LORAD_CHROMIUM.`);
if (!existsSync(BIN)) throw new Error(`The server is missing at ${BIN}. Build it (cargo build --release) or name one with LORAD_BIN.`);
const { chromium } = await import("playwright-core").catch(() => {
  throw new Error("playwright-core is missing. Run `npm ci` in tests/browser.");
});

export const sleep = (ms) => new Promise((done) => setTimeout(done, ms));

/** Waits until `check` returns something truthy; says `what` when it does not in time. */
export async function until(what, check, ms = 60_000, everyMs = 100) {
  const end = Date.now() + ms;
  let last;
  for (;;) {
    try {
      const value = await check();
      if (value) return value;
      last = undefined;
    } catch (error) {
      last = error;
    }
    if (Date.now() > end) throw new Error(`not in ${ms / 1000} s: ${what}${last ? ` (${last.message})` : ""}`);
    await sleep(everyMs);
  }
}

const freePort = () =>
  new Promise((done, fail) => {
    const probe = createServer();
    probe.on("error", fail);
    probe.listen(0, "127.0.0.1", () => {
      const { port } = probe.address();
      probe.close(() => done(port));
    });
  });

/** A lorad server of its own. */
export class Server {
  /** @param {Record<string, string>} env settings, `LORAD_…` */
  static async start(env = {}) {
    const server = new Server();
    server.env = { ...process.env, ...env };
    server.dir = mkdtempSync(path.join(tmpdir(), "lorad-browser-"));
    server.port = await freePort();
    server.url = `http://127.0.0.1:${server.port}/`;
    await server.up();
    return server;
  }
  async up() {
    this.output = "";
    this.child = spawn(BIN, ["serve", "--bind", `127.0.0.1:${this.port}`, "--data-dir", this.dir], { env: this.env, stdio: ["ignore", "pipe", "pipe"] });
    const child = this.child;
    for (const stream of [child.stdout, child.stderr]) stream.on("data", (d) => (this.output = (this.output + d).slice(-20_000)));
    child.ended = new Promise((done) => child.on("exit", done));
    await until("the server is ready", async () => {
      if (child.exitCode !== null) throw new Error(`it exited with ${child.exitCode}: ${this.output}`);
      return (await fetch(`${this.url}readyz`)).ok;
    }, 30_000);
  }
  /** Ends the server; `SIGKILL` is a crash. */
  async down(signal = "SIGTERM") {
    const { child } = this; // not `this.child` below: a later up() brings another one
    if (child.exitCode === null && child.signalCode === null) child.kill(signal);
    const late = setTimeout(() => child.kill("SIGKILL"), 20_000);
    await child.ended;
    clearTimeout(late);
  }
  async stop() {
    for (const job of (await this.json("jobs").catch(() => ({ data: [] }))).data) {
      if (!["succeeded", "failed", "cancelled"].includes(job.status)) await this.post(`jobs/${job.id}/cancel`, { mode: "force" }).catch(() => {});
    }
    await this.down();
    rmSync(this.dir, { recursive: true, force: true, maxRetries: 5 });
  }
  /** What the tests' own requests carry; set `key` once the server is locked. */
  get headers() {
    return this.key ? { authorization: `Bearer ${this.key}` } : {};
  }
  async json(address) {
    const response = await fetch(this.url + address, { headers: this.headers });
    assert.ok(response.ok, `GET ${address}: ${response.status} ${response.ok ? "" : await response.text()}`);
    return response.json();
  }
  async post(address, body) {
    const response = await fetch(this.url + address, { method: "POST", headers: { ...this.headers, "content-type": "application/json" }, body: JSON.stringify(body) });
    const text = await response.text();
    assert.ok(response.ok, `POST ${address}: ${response.status} ${text}`);
    return text ? JSON.parse(text) : null;
  }
  /** Uploads a zip as a dataset. */
  async dataset(bytes, name) {
    const form = new FormData();
    form.append("name", name);
    form.append("file", new Blob([bytes], { type: "application/zip" }), `${name}.zip`);
    const response = await fetch(`${this.url}datasets`, { method: "POST", headers: this.headers, body: form });
    const text = await response.text();
    assert.equal(response.status, 201, text);
    return JSON.parse(text);
  }
  /** The demo's request with fewer steps and pictures. */
  async shortDemo({ steps = 40, every = 20, prompts = 2 } = {}) {
    return shorten(await this.json("demo"), { steps, every, prompts });
  }
}

/** The same request with fewer steps, samples and prompts. */
export function shorten(job, { steps, every, prompts }) {
  const { num_epochs: _, ...hyperparameters } = job.hyperparameters ?? {};
  return {
    ...job,
    hyperparameters: { ...hyperparameters, max_train_steps: steps },
    sampling: { ...job.sampling, every_steps: every, num_inference_steps: 6, prompts: (job.sampling?.prompts ?? []).slice(0, prompts) },
  };
}

/** A browser whose pages are watched. */
export class Browser {
  /** @param {string[]} more flags of Chromium */
  static async start(more = []) {
    const browser = new Browser();
    browser.chromium = await chromium.launch({
      executablePath: CHROMIUM,
      args: ["--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-background-networking", "--disable-component-update", "--disable-sync", ...more],
    });
    return browser;
  }
  /** A page in a fresh profile. `page.faults` collects what must not happen. */
  async page(server, { width = 1280, height = 900, theme = "light" } = {}) {
    const context = await this.chromium.newContext({ viewport: { width, height }, colorScheme: theme, acceptDownloads: true });
    await context.addInitScript(() => addEventListener("securitypolicyviolation", (e) => console.error(`CSP: ${e.violatedDirective} ${e.blockedURI} ${e.sourceFile ?? ""}`)));
    const page = await context.newPage();
    page.faults = [];
    page.on("request", (r) => {
      if (!r.url().startsWith(server.url) && !/^(data|blob|about):/.test(r.url())) page.faults.push(`request left the origin: ${r.url()}`);
    });
    page.on("pageerror", (e) => page.faults.push(`uncaught: ${e.stack ?? e}`));
    page.on("console", (m) => {
      const text = m.text();
      if (/^CSP:|Content Security Policy/i.test(text)) page.faults.push(text);
    });
    page.setDefaultTimeout(20_000);
    page.close2 = () => context.close();
    return page;
  }
  stop() {
    return this.chromium.close();
  }
}

/** Fails if the page did anything that it must not do. */
export const clean = (page) => assert.deepEqual(page.faults, []);

/** Fails if the page can be scrolled sideways. */
export async function fits(page, what) {
  const [content, window] = await page.evaluate(() => [document.documentElement.scrollWidth, innerWidth]);
  assert.ok(content <= window, `${what}: ${content} px of content in a ${window} px window`);
}

export async function shot(page, name) {
  mkdirSync(SHOTS, { recursive: true });
  await page.screenshot({ path: path.join(SHOTS, `${name}.png`), fullPage: true });
}

/** The job of the page that is open. */
export const jobId = (page) => decodeURIComponent(new URL(page.url()).hash.split("/")[2]);
