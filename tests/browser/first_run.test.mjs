// From an empty data directory to a downloaded adapter, as a newcomer does it: with the mouse alone.
import assert from "node:assert/strict";
import { createHash } from "node:crypto";
import { readFile } from "node:fs/promises";
import { after, before, test } from "node:test";
import { Browser, clean, jobId, Server, shorten, shot, until } from "./harness.mjs";

let server;
let browser;
before(async () => {
  [server, browser] = await Promise.all([Server.start(), Browser.start()]);
});
after(async () => {
  await browser?.stop();
  await server?.stop();
});

test("the demo goes from the empty page to a download whose hash is the one shown", { timeout: 420_000 }, async () => {
  const page = await browser.page(server);
  // the real request, made shorter on its way to the page; nothing else is touched
  await page.route("**/demo", async (route) => {
    const answer = await route.fetch();
    await route.fulfill({ response: answer, json: shorten(await answer.json(), { steps: 40, every: 20, prompts: 3 }) });
  });
  await page.goto(server.url);
  await page.getByRole("button", { name: "Run the demo" }).waitFor();
  await shot(page, "empty-light");
  await page.getByRole("button", { name: "Run the demo" }).click();
  await page.waitForURL(/#\/jobs\/job_/);
  const id = jobId(page);

  await page.locator('[data-connection="live"]').waitFor();
  // the loss moves without a reload
  const chart = page.locator('figure[aria-label="Training loss"]');
  await chart.waitFor({ timeout: 120_000 });
  const points = async () => Number(await chart.getAttribute("data-points"));
  const first = await points();
  await until("the curve grows by itself", async () => (await points()) > first, 120_000);
  await page.locator(".sentence", { hasText: /step \d+ of 40/ }).waitFor();
  await shot(page, "job-running-light");

  // the strip starts with the untrained base and fills
  await page.locator("td.c-before button.shot img").first().waitFor({ timeout: 60_000 });

  await page.locator('.title [data-status="succeeded"]').waitFor({ timeout: 300_000 });
  await page.locator('[data-connection="ended"]').waitFor();
  assert.equal(await points(), 40, "every step is in the curve");
  const heads = await page.locator(".compare thead th").allInnerTexts();
  assert.deepEqual(heads.map((h) => h.split("\n")[0]), ["Before", "Step 20", "After"]);
  assert.equal(await page.locator("button.shot img").count(), 9, "3 prompts at 3 steps");
  for (const img of await page.locator("button.shot img").all()) {
    await img.scrollIntoViewIfNeeded();
    await until("the sample is a picture", () => img.evaluate((el) => el.complete && el.naturalWidth === 64));
  }
  await shot(page, "job-done-light");

  // full screen: the wipe and the arrow keys
  await page.locator("button.shot").last().click();
  const viewer = page.locator("dialog.viewer");
  await viewer.waitFor();
  await viewer.locator(".side.r", { hasText: "After" }).waitFor();
  await page.keyboard.press("ArrowLeft");
  await viewer.locator(".side.r", { hasText: "Step 20" }).waitFor();
  await viewer.locator('input[type="range"]').fill("25");
  assert.match(await viewer.locator("img.top").evaluate((el) => el.style.clipPath), /75%/);
  await shot(page, "viewer");
  await page.keyboard.press("Escape");
  await viewer.waitFor({ state: "detached" });

  // each file is what its hash says
  const files = (await server.json(`jobs/${id}/files`)).data;
  assert.ok(files.length >= 4, JSON.stringify(files));
  for (const kind of ["diffusers", "kohya", "peft", "receipt"]) {
    const link = page.locator(`a[data-kind="${kind}"]`);
    const [download] = await Promise.all([page.waitForEvent("download"), link.click()]);
    const hash = createHash("sha256").update(await readFile(await download.path())).digest("hex");
    const shown = await page.locator(".files li", { has: link }).locator("[data-sha256]").getAttribute("data-sha256");
    assert.equal(hash, shown, kind);
    assert.equal(download.suggestedFilename(), files.find((f) => f.kind === kind).name);
  }
  for (const program of ["ComfyUI / A1111", "PEFT", "curl", "diffusers"]) {
    await page.getByRole("tab", { name: program }).click();
    assert.ok((await page.locator(".code pre").first().innerText()).length > 40, program);
  }

  // the list now shows it as done
  await page.getByRole("link", { name: "Jobs", exact: true }).first().click();
  await page.locator('.job-row [data-status="succeeded"]').waitFor();
  await shot(page, "jobs-light");
  clean(page);
});
