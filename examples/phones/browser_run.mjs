// Opens the page in a Chromium without a window: node browser_run.mjs http://127.0.0.1:8000/browser.html
// CHROMIUM names the browser. Needs playwright-core.
import { chromium } from 'playwright-core';

const browser = await chromium.launch({ executablePath: process.env.CHROMIUM || '/usr/bin/chromium', args: ['--no-sandbox'] });
const page = await browser.newPage();
const hosts = new Set();
page.on('request', (request) => hosts.add(new URL(request.url()).host));
page.on('console', (message) => console.log(message.text()));
await page.goto(process.argv[2]);
await page.waitForFunction(() => document.title !== 'running', null, { timeout: 300000 });
console.log(await page.textContent('#log'));
console.log(`asked: ${[...hosts].join(', ')}`);
const failed = (await page.title()) !== 'done';
await browser.close();
process.exit(failed ? 1 : 0);
