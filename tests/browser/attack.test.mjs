// What a hostile page can do to a server that runs beside the browser: nothing. The page comes from another port of the same
// address (same site, other origin), from another site, and from a name that leads to the server itself (DNS rebinding).
import assert from "node:assert/strict";
import { createServer } from "node:http";
import { after, before, test } from "node:test";
import { Browser, clean, Server, until } from "./harness.mjs";
import { png, zip } from "./pictures.mjs";

let server;
let browser;
let evil;
let job;
let asked = [];

/** Everything that a page can try without asking anybody: forms, fetches, streams, pictures, frames. */
const PAGE = (target, id) => `<!doctype html><title>evil</title><body><script>
const target = ${JSON.stringify(target)}, id = ${JSON.stringify(id)};
const seen = (window.seen = {});
const forms = [["cancel", "text/plain"], ["clone", "application/x-www-form-urlencoded"], ["retry", "multipart/form-data"]];
for (const [action, type] of forms) {
  const frame = document.createElement("iframe");
  frame.name = action;
  const form = document.createElement("form");
  Object.assign(form, { method: "post", enctype: type, action: target + "jobs/" + id + "/" + action, target: action });
  const field = document.createElement("input");
  Object.assign(field, { name: '{"mode":"force","x":"', value: '"}' });
  form.append(field);
  document.body.append(frame, form);
  form.submit();
}
const tries = {
  simple: () => fetch(target + "jobs/" + id + "/cancel", { method: "POST", mode: "no-cors", body: "{}" }),
  json: () => fetch(target + "api-keys", { method: "POST", headers: { "content-type": "application/json" }, body: '{"name":"evil","scope":"admin"}' }),
  remove: () => fetch(target + "jobs/" + id, { method: "DELETE" }),
  read: () => fetch(target + "jobs").then((r) => r.text()),
  beacon: () => Promise.resolve(navigator.sendBeacon(target + "jobs/" + id + "/cancel", "{}")),
};
(async () => {
  for (const [name, act] of Object.entries(tries)) {
    try {
      const got = await act();
      seen[name] = typeof got === "string" ? "READ " + got : String(got.type ?? got);
    } catch (e) {
      seen[name] = "error";
    }
  }
  seen.stream = await new Promise((done) => {
    const source = new EventSource(target + "jobs/" + id + "/events");
    source.onmessage = source.onopen = () => done("OPENED");
    source.onerror = () => (source.close(), done("error"));
  });
  seen.picture = await new Promise((done) => {
    const img = new Image();
    img.onload = () => done("SHOWN");
    img.onerror = () => done("error");
    img.src = target + "favicon.svg";
  });
  const frame = document.createElement("iframe");
  frame.src = target;
  await new Promise((done) => ((frame.onload = done), document.body.append(frame)));
  try {
    seen.frame = frame.contentDocument ? "READ" : "error";
  } catch {
    seen.frame = "error";
  }
  seen.done = true;
})();
</script>`;

before(async () => {
  evil = createServer((request, response) => {
    asked.push(request.url);
    const target = new URL(request.url, "http://x").searchParams.get("target");
    response.writeHead(200, { "content-type": "text/html" }).end(target ? PAGE(target, job.id) : "");
  });
  await new Promise((done) => evil.listen(0, "127.0.0.1", done));
  server = await Server.start();
  // The names lead to this machine, as a rebinding resolver would have it.
  browser = await Browser.start(["--host-resolver-rules=MAP *.example 127.0.0.1"]);
  job = await server.post("jobs", await server.shortDemo({ steps: 5000, every: 0, prompts: 1 }));
  await until("the job runs", async () => (await server.json(`jobs/${job.id}`)).status === "running", 120_000);
});
after(async () => {
  await browser?.stop();
  await server?.stop();
  evil?.close();
});

const state = async () => {
  const jobs = (await server.json("jobs")).data.map((j) => [j.id, j.status, j.desired]);
  return { jobs, keys: (await server.json("api-keys")).data.length, session: await server.json("session") };
};

for (const [what, host] of [
  ["another port of the same address", "127.0.0.1"],
  ["another site", "evil.example"],
]) {
  test(`a page from ${what} changes nothing, reads nothing and opens no stream`, { timeout: 120_000 }, async () => {
    const before = await state();
    const page = await (await browser.chromium.newContext()).newPage();
    await page.goto(`http://${host}:${evil.address().port}/?target=${encodeURIComponent(server.url)}`);
    await page.waitForFunction(() => window.seen?.done, null, { timeout: 60_000 });
    const seen = await page.evaluate(() => window.seen);
    for (const [name, outcome] of Object.entries(seen)) assert.ok(!/READ|OPENED|SHOWN/.test(String(outcome)), `${name}: ${outcome}`);
    assert.equal(seen.json, "error", "no preflight is answered");
    assert.deepEqual(await state(), before);
    assert.match(await (await fetch(`${server.url}metrics`)).text(), /^lorad_sse_streams 0$/m);
    await page.context().close();
  });
}

test("a name that leads to the server is refused before anything else", { timeout: 60_000 }, async () => {
  const page = await (await browser.chromium.newContext()).newPage();
  const answer = await page.goto(`http://rebound.example:${server.port}/`);
  assert.equal(answer.status(), 403);
  assert.equal((await answer.json()).code, "host.not_allowed");
  await page.context().close();
});

// Each would say so if it ran: a dialog, a global, a request, or a violation of the policy.
const PAYLOADS = [
  '<script>window.owned=1</script>',
  '<img src=x onerror="window.owned=1">',
  '"><svg onload=window.owned=1>',
  "javascript:window.owned=1",
  "'-window.owned=1-'",
  '<a href="javascript:window.owned=1">x</a>',
  "</title></script><script>alert(1)</script>",
  "{{constructor.constructor('window.owned=1')()}}",
  "<iframe srcdoc='<script>parent.owned=1</script>'>",
];

test("what users write is shown as text everywhere and runs nowhere", { timeout: 240_000 }, async () => {
  const text = PAYLOADS.join(" ").slice(0, 190);
  const pictures = Object.fromEntries(PAYLOADS.flatMap((payload, i) => {
    const stem = `p${i} ${payload.replace(/[/\\"<>|:*?]/g, "").slice(0, 60)}`;
    return [[`${stem}.png`, png(64)], [`${stem}.txt`, payload]];
  }));
  const dataset = await server.dataset(zip(pictures), text);
  const job = await server.post("jobs", {
    name: text,
    notes: text,
    tags: PAYLOADS.map((payload) => payload.slice(0, 60)),
    base_model: "demo-icons",
    dataset_id: dataset.id,
    priority: 1000,
    hyperparameters: { max_train_steps: 2, batch_size: 1 },
    sampling: { prompts: PAYLOADS, every_steps: 0, num_inference_steps: 2 },
  });
  const page = await browser.page(server);
  const dialogs = [];
  page.on("dialog", (dialog) => (dialogs.push(dialog.message()), dialog.dismiss()));
  await page.route(`**/jobs/${job.id}/logs*`, async (route) => {
    const answer = await route.fetch();
    const body = await answer.json();
    body.data.push(...PAYLOADS.map((message, i) => ({ n: 1e6 + i, ts: new Date().toISOString(), level: "warn", message })));
    await route.fulfill({ response: answer, json: body });
  });
  for (const [hash, mark] of [
    ["#/", ".job-row, .job-card"],
    [`#/jobs/${job.id}`, ".log span"],
    [`#/new?from=${job.id}`, "[data-field='learning_rate']"],
    ["#/datasets", ".tile"],
    [`#/datasets/${dataset.id}`, ".gallery img"],
    ["#/system", ".gauge"],
  ]) {
    await page.goto(`${server.url}${hash}`);
    await page.locator(mark).first().waitFor();
    await page.waitForTimeout(300);
    assert.equal(await page.evaluate(() => window.owned), undefined, `${hash}: user text ran`);
    assert.equal(await page.locator('img[src="x"], iframe, a[href^="javascript:"]').count(), 0, `${hash}: user text became an element`);
  }
  await page.goto(`${server.url}#/datasets/${dataset.id}`);
  for (const payload of PAYLOADS) await page.locator("figcaption", { hasText: payload }).first().waitFor();
  // A file opened by itself: an attachment, and nothing in it may run.
  const report = await fetch(`${server.url}datasets/${dataset.id}/items/0/thumbnail`);
  assert.equal(report.headers.get("x-content-type-options"), "nosniff");
  assert.deepEqual(dialogs, []);
  clean(page); // counts violations of the content policy
});
