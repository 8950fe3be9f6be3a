// Open a notebook in JupyterLab with a real browser, run all cells, and print what came out.
// node run_in_browser.js SERVER NOTEBOOK CHROMIUM SCREENSHOT
const { chromium } = require('playwright-core');

const [server, notebook, executablePath, screenshot] = process.argv.slice(2);
const quiet = ['--no-sandbox', '--disable-gpu', '--disable-quic', '--no-first-run',
  '--disable-background-networking', '--disable-component-update', '--disable-sync'];

(async () => {
  const browser = await chromium.launch({ executablePath, args: quiet });
  const page = await browser.newPage({ viewport: { width: 1200, height: 900 } });
  const errors = [];
  page.on('pageerror', (error) => errors.push(error.message));
  await page.goto(`${server}/lab/tree/${notebook}?reset`);
  await page.waitForSelector('.jp-NotebookPanel .jp-Cell', { timeout: 60000 });
  const idle = '.jp-Notebook-ExecutionIndicator[data-status="idle"]';
  await page.waitForSelector(idle, { timeout: 60000 });
  await page.click('.jp-NotebookPanel .jp-Cell >> nth=0');
  await page.click('.lm-MenuBar-itemLabel:text-is("Run")');
  await page.click('.lm-Menu-itemLabel:text-is("Run All Cells")');
  await page.waitForSelector('.jp-Notebook-ExecutionIndicator[data-status="busy"]',
    { timeout: 60000 });
  await page.waitForSelector(idle, { timeout: 180000 });
  const failed = await page.$$eval('.jp-OutputArea [data-mime-type="application/vnd.jupyter.error"],'
    + ' .jp-OutputArea-output[data-mime-type="application/vnd.jupyter.stderr"]',
    (found) => found.map((output) => output.innerText));
  await page.screenshot({ path: screenshot });
  console.log(JSON.stringify({ failed, errors }));
  await browser.close();
})().catch((error) => { console.error(String(error)); process.exit(1); });
