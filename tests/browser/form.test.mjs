// The form: an upload, the server's errors at their fields, the plan that moves, and one job for two clicks.
import assert from "node:assert/strict";
import { after, before, test } from "node:test";
import { Browser, clean, jobId, Server, shot, until } from "./harness.mjs";
import { captioned, png, zip } from "./pictures.mjs";

let server;
let browser;
before(async () => {
  [server, browser] = await Promise.all([Server.start(), Browser.start()]);
});
after(async () => {
  await browser?.stop();
  await server?.stop();
});

const upload = (page, name, buffer) => page.locator('input[type="file"]').setInputFiles({ name, mimeType: "application/zip", buffer });
const field = (page, name) => page.locator(`[data-field="${name}"]`);

async function openAdvanced(page) {
  const fold = page.locator("details.fold", { hasText: "Advanced" });
  if (!(await fold.evaluate((el) => el.open))) await fold.locator("summary").first().click();
}

test("a zip is uploaded, its captions become prompts, errors land on their fields, and two clicks make one job", { timeout: 120_000 }, async () => {
  const page = await browser.page(server);
  await page.goto(`${server.url}#/new`);
  await upload(page, "six colours.zip", captioned(["a red dot", "a green dot", "a blue dot", "a pink dot", "a grey dot", "a teal dot"]));
  await page.locator(".status", { hasText: "6 pictures" }).first().waitFor();
  assert.equal(await page.locator("#f-name").inputValue(), "six colours");
  await page.locator('[data-plan="steps"]').waitFor();

  // the plan follows the fields
  await field(page, "max_train_steps").locator("input").fill("37");
  await page.locator('[data-plan="steps"]', { hasText: "37" }).waitFor();

  // several errors at once, each at its field, with the server's own words
  await field(page, "learning_rate").locator("input").fill("-1");
  await field(page, "lora_rank").locator("input").fill("0");
  await field(page, "batch_size").locator("input").fill("many");
  for (const name of ["learning_rate", "lora_rank", "batch_size"]) {
    await field(page, name).locator(".problem").waitFor();
    assert.equal(await field(page, name).locator("input").getAttribute("aria-invalid"), "true");
  }
  await page.locator('[data-faults="3"]').waitFor();
  assert.ok(await page.getByRole("button", { name: "Start training" }).isDisabled());
  await shot(page, "new-errors-light");
  for (const name of ["learning_rate", "lora_rank", "batch_size"]) await field(page, name).getByRole("button", { name: "Reset" }).click();
  await page.locator("[data-faults]").waitFor({ state: "detached" });

  // a prompt from the captions; exactly what will be sent
  await page.getByRole("button", { name: "a red dot" }).click();
  await page.getByRole("tab", { name: "JSON" }).click();
  const sent = JSON.parse(await page.locator("aside .code pre").innerText());
  assert.equal(sent.hyperparameters.max_train_steps, 37);
  assert.deepEqual(sent.sampling.prompts, ["a red dot"]);
  assert.deepEqual(Object.keys(sent.hyperparameters), ["max_train_steps"], "only what differs from the defaults");

  // the draft survives a reload
  await page.reload();
  await until("the name is back", async () => (await page.locator("#f-name").inputValue()) === "six colours");
  await until("the steps are back", async () => (await field(page, "max_train_steps").locator("input").inputValue()) === "37");
  await shot(page, "new-light");

  const start = page.getByRole("button", { name: "Start training" });
  await until("the form is ready", () => start.isEnabled());
  await start.dblclick();
  await page.waitForURL(/#\/jobs\/job_/);
  const jobs = (await server.json("jobs")).data;
  assert.equal(jobs.length, 1, "one job");
  assert.equal(jobs[0].id, jobId(page));
  assert.equal(jobs[0].name, "six colours");
  assert.equal(jobs[0].total_steps, 37);

  // a clone brings the settings back
  await page.getByRole("link", { name: "Clone" }).click();
  await until("the clone has the steps", async () => (await field(page, "max_train_steps").locator("input").inputValue()) === "37");
  clean(page);
});

test("a bad archive is refused with the file's name, and the next one works", { timeout: 60_000 }, async () => {
  const page = await browser.page(server);
  await page.goto(`${server.url}#/datasets`);
  await upload(page, "bad.zip", zip({ "good.png": png(), "good.txt": "a dot", "broken.png": Buffer.from("no picture"), "broken.txt": "x" }));
  const alert = page.getByRole("alert");
  await alert.getByText("broken.png").first().waitFor();
  assert.match(await alert.innerText(), /request \S+/, "the request id is shown");
  await upload(page, "evil.zip", zip({ "../../etc/x.png": png() }));
  await alert.getByText("../../etc/x.png").first().waitFor();
  await upload(page, "good.zip", captioned(["a dot", "another dot"]));
  await page.waitForURL(/#\/datasets\/ds_/);
  await page.locator(".gallery img").nth(1).waitFor();
  await page.locator("figcaption", { hasText: "another dot" }).waitFor();
  clean(page);
});

test("every advanced setting of the family has a labelled field", { timeout: 60_000 }, async () => {
  const page = await browser.page(server);
  await page.goto(`${server.url}#/new`);
  const family = (await server.json("families")).data[0].id;
  const names = Object.keys((await server.json(`families/${family}/schema`)).properties);
  await field(page, names[0]).waitFor();
  await openAdvanced(page);
  for (const name of names) {
    assert.equal(await field(page, name).count(), 1, name);
    assert.equal(await page.locator(`label[for="f-${name}"]`).count(), 1, `${name} has a label`);
  }
  const wide = await page.locator("[data-field]").evaluateAll((all) => all.filter((el) => el.scrollWidth > el.clientWidth + 1).map((el) => el.dataset.field));
  assert.deepEqual(wide, [], "fields wider than their place");
  await shot(page, "new-advanced-light");
  clean(page);
});
