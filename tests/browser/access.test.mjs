// A locked server in a browser: signing in and out, a session that ends in the middle, and where the key is kept.
import assert from "node:assert/strict";
import { execFileSync } from "node:child_process";
import { createServer } from "node:http";
import { after, before, test } from "node:test";
import { BIN, Browser, clean, fits, Server, shot, until } from "./harness.mjs";

let server;
let browser;
let key;
const lorad = (...args) => execFileSync(BIN, ["keys", ...args, "--data-dir", server.dir], { encoding: "utf8", stdio: ["ignore", "pipe", "ignore"] }).trim();
before(async () => {
  [server, browser] = await Promise.all([Server.start(), Browser.start()]);
  key = lorad("create", "--name", "Ada <b>Lovelace</b>", "--scope", "admin");
  server.key = key;
});
after(async () => {
  await browser?.stop();
  await server?.stop();
});

const signIn = async (page, text) => {
  await page.getByLabel("API key").fill(text);
  await page.getByRole("button", { name: "Sign in" }).click();
};

for (const [theme, width] of [
  ["light", 1280],
  ["dark", 360],
]) {
  test(`the sign-in page is whole in ${theme} at ${width} px, refuses a wrong key and opens with the right one`, { timeout: 60_000 }, async () => {
    const page = await browser.page(server, { theme, width, height: 740 });
    await page.goto(`${server.url}#/system`);
    await page.getByRole("heading", { name: "Sign in" }).waitFor();
    assert.equal(await page.evaluate(() => document.activeElement.id), "key", "the key can be typed at once");
    await fits(page, "sign-in");
    await shot(page, `signin-${theme}-${width}`);
    await signIn(page, "lorad_nonsense");
    await page.getByRole("alert").getByText("opens nothing").waitFor();
    await shot(page, `signin-wrong-${theme}-${width}`);
    await signIn(page, key);
    await page.locator(".gauge").first().waitFor();
    assert.ok(page.url().endsWith("#/system"), "back where it was asked");
    const kept = await page.evaluate(() => JSON.stringify([document.cookie, { ...localStorage }, { ...sessionStorage }, document.documentElement.innerHTML]));
    assert.ok(!kept.includes(key) && !kept.includes("lorad_session"), "no script can read key or cookie");
    const [cookie] = (await page.context().cookies()).filter((c) => c.name === "lorad_session");
    assert.deepEqual([cookie.httpOnly, cookie.sameSite], [true, "Strict"]);
    await page.reload();
    await page.locator(".gauge").first().waitFor();
    clean(page);
    await page.close2();
  });
}

test("a signed-in browser uploads, streams and downloads; signing out and a revoked key bring the sign-in page back", { timeout: 240_000 }, async () => {
  const second = lorad("create", "--name", "second", "--scope", "submit");
  const page = await browser.page(server);
  await page.goto(server.url);
  await signIn(page, second);
  await page.locator(".who", { hasText: "second" }).waitFor();
  await page.getByRole("button", { name: "Run the demo" }).waitFor();
  await page.route("**/demo", async (route) => {
    const answer = await route.fetch();
    const job = await answer.json();
    await route.fulfill({ response: answer, json: { ...job, hyperparameters: { max_train_steps: 3, batch_size: 2 }, sampling: { ...job.sampling, prompts: job.sampling.prompts.slice(0, 1), every_steps: 0, num_inference_steps: 4 } } });
  });
  await page.getByRole("button", { name: "Run the demo" }).click();
  await page.waitForURL(/#\/jobs\/job_/);
  await page.locator('[data-connection="ended"]').waitFor({ timeout: 180_000 });
  await until("the sample pictures are shown", () => page.locator("button.shot img").first().evaluate((img) => img.naturalWidth > 0));
  const [download] = await Promise.all([page.waitForEvent("download"), page.locator('a[data-kind="receipt"]').click()]);
  assert.equal(await download.failure(), null);
  await page.goto(`${server.url}#/jobs`);
  await page.getByRole("button", { name: "Sign out" }).click();
  await page.getByRole("heading", { name: "Sign in" }).waitFor();
  await signIn(page, second);
  await page.locator(".job-row").waitFor();
  lorad("revoke", second.slice(0, 14));
  // The list asks again by itself.
  await page.getByRole("heading", { name: "Sign in" }).waitFor({ timeout: 60_000 });
  clean(page);
});

test("keys, webhooks and the audit log are managed on the system page", { timeout: 120_000 }, async () => {
  const heard = [];
  const receiver = createServer((request, response) => {
    heard.push([request.headers["webhook-id"], request.headers["webhook-signature"]]);
    response.writeHead(heard.length === 1 ? 500 : 204).end();
  });
  await new Promise((done) => receiver.listen(0, "127.0.0.1", done));
  const open = await Server.start({ LORAD_WEBHOOKS__ALLOW_PRIVATE: "127.0.0.0/8", LORAD_WEBHOOKS__ALLOW_HTTP: "true", LORAD_WEBHOOKS__RETRY_AFTER_MS: "100,100", LORAD_WEBHOOKS__POLL_MS: "50" });
  try {
    const page = await browser.page(open);
    await page.goto(`${open.url}#/system`);
    await page.getByText("whoever reaches this server may do everything").waitFor();
    // The first key: an admin one, shown once, and this browser is signed in with it.
    await page.getByRole("button", { name: "New key" }).click();
    await page.getByLabel("Name").fill('first <img src=x onerror="window.owned=1">');
    assert.ok(await page.getByLabel("May").isDisabled());
    await page.getByRole("button", { name: "Make the key" }).click();
    const dialog = page.getByRole("dialog");
    const text = (await dialog.locator("pre").innerText()).trim();
    assert.match(text, /^lorad_[0-9a-f]{80}$/);
    await shot(page, "key-made-light");
    await dialog.getByRole("button", { name: "I have it" }).click();
    await page.locator(".who", { hasText: "first <img" }).waitFor();
    await page.locator(".access-row", { hasText: "this browser" }).waitFor();
    assert.equal((await fetch(`${open.url}jobs`)).status, 401, "the server is locked");
    open.key = text;

    await page.getByRole("button", { name: "New webhook" }).click();
    await page.getByLabel("Address").fill("http://10.0.0.1/hook");
    await page.getByRole("button", { name: "Add the webhook" }).click();
    await page.locator(".problem", { hasText: "not public" }).waitFor();
    await page.getByLabel("Address").fill(`http://127.0.0.1:${receiver.address().port}/hook`);
    await page.getByRole("button", { name: "Add the webhook" }).click();
    assert.match(await page.getByRole("dialog").locator("pre").innerText(), /^whsec_/);
    await page.getByRole("dialog").getByRole("button", { name: "I have it" }).click();
    await page.getByRole("button", { name: "Test" }).click();
    await page.locator('[data-delivery="delivered"]', { hasText: "2 tried" }).waitFor();
    assert.equal(new Set(heard.map(([id]) => id)).size, 1, "one message, tried twice");
    await page.getByRole("button", { name: "Send again" }).click();
    await until("it comes again", () => heard.length === 3);

    await page.locator(".audit tr", { hasText: "POST /webhooks" }).first().waitFor();
    await page.locator(".audit tr", { hasText: "nobody" }).first().waitFor();
    await page.waitForTimeout(300);
    await shot(page, "system-manage-light");
    for (const [theme, width] of [["dark", 1280], ["light", 360]]) {
      const other = await browser.page(open, { theme, width, height: 800 });
      await other.goto(`${open.url}#/system`);
      await signIn(other, text);
      await other.locator(".audit tr").first().waitFor();
      await fits(other, `system ${theme} ${width}`);
      await shot(other, `system-manage-${theme}-${width}`);
      clean(other);
      await other.close2();
    }
    // The last admin key stays; another one goes.
    const revoke = page.getByRole("button", { name: "Revoke first" });
    await revoke.click();
    await page.getByRole("button", { name: "Revoke", exact: true }).last().click();
    await page.getByRole("dialog").getByText("last admin key").first().waitFor();
    await page.getByRole("button", { name: "Keep it" }).click();
    assert.equal(await page.evaluate(() => window.owned), undefined);
    clean(page);
  } finally {
    await open.stop();
    receiver.close();
  }
});
