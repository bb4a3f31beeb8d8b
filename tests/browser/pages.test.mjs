// Every page: nothing leaves the origin, nothing breaks the content policy, it fits a phone, and hostile text stays text.
import assert from "node:assert/strict";
import { after, before, test } from "node:test";
import { Browser, clean, fits, Server, shot, until } from "./harness.mjs";
import { captioned } from "./pictures.mjs";

const EVIL = '<img src=x onerror="window.owned=1">';
const CAPTION = `${EVIL} \u202Egnp.exe ${"w".repeat(300)}`;

let server;
let browser;
let dataset;
let job;
before(async () => {
  [server, browser] = await Promise.all([Server.start(), Browser.start()]);
  dataset = await server.dataset(captioned([CAPTION, "a green dot", "a blue dot", "a pink dot"]), `set ${EVIL}`);
  job = await server.post("jobs", {
    name: `job ${EVIL} ${"long-name-without-a-break".repeat(4)}`,
    base_model: "demo-icons",
    dataset_id: dataset.id,
    hyperparameters: { max_train_steps: 3, batch_size: 2 },
    sampling: { prompts: [`${EVIL} dot`], every_steps: 0, num_inference_steps: 4 },
  });
  await until("the job ends", async () => ["succeeded", "failed"].includes((await server.json(`jobs/${job.id}`)).status), 240_000);
});
after(async () => {
  await browser?.stop();
  await server?.stop();
});

const pages = () => [
  ["jobs", "#/", ".job-row"],
  ["job", `#/jobs/${job.id}`, '[data-connection="ended"]'],
  ["new", "#/new", "[data-field='learning_rate']"],
  ["clone", `#/new?from=${job.id}`, "[data-field='learning_rate']"],
  ["datasets", "#/datasets", ".tile"],
  ["dataset", `#/datasets/${dataset.id}`, ".gallery img"],
  ["models", "#/models", ".model"],
  ["system", "#/system", ".gauge"],
  ["unknown-job", "#/jobs/job_nothing", ".empty"],
  ["unknown-page", "#/nothing", ".empty"],
];

for (const [theme, width] of [
  ["light", 1280],
  ["dark", 1280],
  ["light", 360],
  ["dark", 360],
]) {
  test(`every page is whole in ${theme} at ${width} px: one origin, no policy violation, no sideways scroll, no markup from users`, { timeout: 180_000 }, async () => {
    const page = await browser.page(server, { theme, width, height: width < 500 ? 740 : 900 });
    for (const [name, hash, mark] of pages()) {
      await page.goto(`${server.url}${hash}`);
      await page.locator(mark).first().waitFor();
      await page.waitForTimeout(300);
      await fits(page, `${name} ${theme} ${width}`);
      assert.equal(await page.evaluate(() => window.owned), undefined, `${name}: user text ran`);
      assert.equal(await page.locator('img[src="x"]').count(), 0, `${name}: user text became an element`);
      assert.ok((await page.title()).endsWith("lorad"), name);
      const unnamed = await page.evaluate(() => [...document.querySelectorAll("button, a[href], input, select")].filter((el) => el.checkVisibility() && !(el.innerText?.trim() || el.getAttribute("aria-label") || el.labels?.length || el.title)).map((el) => el.outerHTML.slice(0, 120)));
      assert.deepEqual(unnamed, [], `${name}: controls without a name`);
      await shot(page, `${name}-${theme}-${width}`);
    }
    assert.equal(await page.evaluate(() => matchMedia("(prefers-color-scheme: dark)").matches), theme === "dark");
    clean(page);
  });
}

test("hostile names, captions, prompts and log lines are shown as they are", { timeout: 60_000 }, async () => {
  const page = await browser.page(server);
  await page.route(`**/jobs/${job.id}/logs*`, async (route) => {
    const answer = await route.fetch();
    const body = await answer.json();
    const last = body.data.at(-1)?.n ?? 0;
    body.data.push({ n: last + 0.5, ts: new Date().toISOString(), level: "warn", message: `\u001b[31mred\u001b[0m ${EVIL} ${"x".repeat(10_000)}` });
    await route.fulfill({ response: answer, json: body });
  });
  await page.goto(`${server.url}#/jobs/${job.id}`);
  await page.locator("h1", { hasText: EVIL }).waitFor();
  await page.locator(".log span", { hasText: `red ${EVIL}` }).waitFor();
  await page.locator(".compare .prompt", { hasText: EVIL }).waitFor();
  await fits(page, "job with a 10 kB log line");
  await page.goto(`${server.url}#/datasets/${dataset.id}`);
  await page.locator("figcaption", { hasText: EVIL }).waitFor();
  assert.equal(await page.evaluate(() => window.owned), undefined);
  clean(page);
});

test("the keyboard alone reaches the main things, and the chart speaks", { timeout: 60_000 }, async () => {
  const page = await browser.page(server);
  await page.goto(`${server.url}#/`);
  await page.locator(".job-row").waitFor();
  await page.keyboard.press("Tab");
  assert.match(await page.evaluate(() => document.activeElement.innerText), /Skip to the content/);
  await page.keyboard.press("Enter");
  assert.equal(await page.evaluate(() => document.activeElement.id), "main");
  const focused = () => page.evaluate(() => document.activeElement.className);
  await until("Tab reaches the job", async () => {
    await page.keyboard.press("Tab");
    return (await focused()).includes("job-row");
  }, 15_000, 10);
  assert.notEqual(await page.evaluate(() => getComputedStyle(document.activeElement).outlineStyle), "none", "the focus is visible");
  await page.keyboard.press("Enter");
  const plot = page.locator('figure[aria-label="Training loss"] .plot');
  await plot.waitFor();
  await plot.focus();
  await page.keyboard.press("Home");
  const spoken = page.locator('figure[aria-label="Training loss"] p[aria-live]');
  await until("the first point is said", async () => /^step 1:/.test(await spoken.innerText()));
  await page.keyboard.press("ArrowRight");
  await until("the next point is said", async () => /^step 2:/.test(await spoken.innerText()));
  const summary = await page.locator('figure[aria-label="Training loss"] p.sr').first().innerText();
  assert.match(summary, /3 points, last .* at step 3/);
  clean(page);
});

test("the theme button overrides the system and survives a reload", { timeout: 60_000 }, async () => {
  const page = await browser.page(server, { theme: "light" });
  await page.goto(server.url);
  const ground = () => page.evaluate(() => getComputedStyle(document.body).backgroundColor);
  const light = await ground();
  await page.getByRole("button", { name: "Use the dark theme" }).click();
  await until("it is dark", async () => (await ground()) !== light);
  await page.reload();
  await page.getByRole("button", { name: "Use the light theme" }).waitFor();
  assert.notEqual(await ground(), light);
  clean(page);
});

test("a server that is gone is said, and the page comes back by itself", { timeout: 90_000 }, async () => {
  const page = await browser.page(server);
  await page.goto(`${server.url}#/system`);
  await page.locator(".gauge").first().waitFor();
  await server.down();
  await page.getByRole("alert").getByText("The server cannot be reached").waitFor();
  await server.up();
  await page.getByRole("alert").waitFor({ state: "detached" });
  clean(page);
});
