// What a viewer sees while the stream is cut, the server restarts, or the page is reloaded: everything, once.
import assert from "node:assert/strict";
import { after, before, test } from "node:test";
import { Browser, clean, Server, sleep, until } from "./harness.mjs";

let server;
let browser;
before(async () => {
  [server, browser] = await Promise.all([Server.start(), Browser.start()]);
});
after(async () => {
  await browser?.stop();
  await server?.stop();
});

const chart = (page) => page.locator('figure[aria-label="Training loss"]');
const points = async (page) => Number((await chart(page).getAttribute("data-points")) ?? 0);

/** Every step in the page's table, oldest first. */
async function tableSteps(page) {
  const figure = chart(page);
  await figure.locator("summary").click();
  const steps = [];
  for (;;) {
    steps.push(...(await figure.locator("tbody th").allInnerTexts()).map((s) => Number(s.replace(/\D/g, ""))));
    const older = figure.getByRole("button", { name: "Older" });
    if (await older.isDisabled()) break;
    await older.click();
  }
  return steps.reverse();
}

test("a cut stream, a server restart and a reload lose no point and double none", { timeout: 900_000 }, async () => {
  const job = await server.post("jobs", await server.shortDemo({ steps: 100, every: 50, prompts: 1 }));
  const page = await browser.page(server);
  await page.goto(`${server.url}#/jobs/${job.id}`);
  await page.locator('[data-connection="live"]').waitFor();
  await chart(page).waitFor({ timeout: 120_000 });
  await until("ten steps", async () => (await points(page)) >= 10, 120_000);

  // the network goes away, steps go on
  await page.context().setOffline(true);
  await server.down("SIGTERM"); // an open stream survives offline emulation; a restart ends it
  await page.locator('[data-connection="reconnecting"]').waitFor();
  await sleep(1500);
  await server.up();
  await page.context().setOffline(false);
  await page.locator('[data-connection="live"], [data-connection="ended"]').waitFor({ timeout: 60_000 });
  const seen = await points(page);
  await until("steps arrive after the restart", async () => (await points(page)) > seen || (await server.json(`jobs/${job.id}`)).status === "succeeded", 180_000);

  // reload in the middle: history, then the stream
  await page.reload();
  await chart(page).waitFor();
  await until("the reloaded page is not behind", async () => (await points(page)) >= seen);
  await page.locator('[data-connection="live"], [data-connection="ended"]').waitFor();

  // a second viewer sees the same
  const other = await browser.page(server, { theme: "dark" });
  await other.goto(`${server.url}#/jobs/${job.id}`);

  for (const viewer of [page, other]) {
    await viewer.locator('.title [data-status="succeeded"]').waitFor({ timeout: 600_000 });
    await viewer.locator('[data-connection="ended"]').waitFor();
    const stored = (await server.json(`jobs/${job.id}/metrics?max_points=20000`)).x;
    assert.equal(await points(viewer), stored.length, "points on the page = points in the database");
    assert.deepEqual(await tableSteps(viewer), stored, "the same steps, in order, none twice");
    assert.deepEqual(stored, Array.from({ length: 100 }, (_, i) => i + 1));
    const lines = (await server.json(`jobs/${job.id}/logs?tail=1000`)).data.length;
    assert.equal(Number(await viewer.locator(".log").getAttribute("data-lines")), lines, "log lines on the page = log lines in the database");
  }
  clean(page);
  clean(other);
});

test("stopping a job with what it learned leaves files to download", { timeout: 300_000 }, async () => {
  const job = await server.post("jobs", await server.shortDemo({ steps: 2000, every: 0, prompts: 0 }));
  const page = await browser.page(server);
  await page.goto(`${server.url}#/jobs/${job.id}`);
  await chart(page).waitFor({ timeout: 120_000 });
  await until("five steps", async () => (await points(page)) >= 5, 60_000);
  await page.getByRole("button", { name: "Stop", exact: true }).click();
  await page.getByRole("radio", { name: /keep what was learned/ }).check();
  await page.getByRole("button", { name: "Stop the job" }).click();
  await page.locator('.title [data-status="cancelled"]').waitFor({ timeout: 120_000 });
  await page.locator('a[data-kind="diffusers"]').waitFor();
  // and it can be deleted, after a question
  await page.getByRole("button", { name: "Delete this job" }).click();
  await page.getByRole("button", { name: "Delete", exact: true }).click();
  await page.waitForURL(/#\/$/);
  const answer = await fetch(`${server.url}jobs/${job.id}`);
  assert.ok(answer.status === 404 || answer.status === 410, String(answer.status));
  clean(page);
});
