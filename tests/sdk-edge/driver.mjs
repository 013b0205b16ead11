// Evaluates flags with an edge SDK: {sdk, id, values, evaluations} in JSON comes in, the results go out.
// `values` is what a key-value store holds: texts by key.
import { createServer } from 'node:http';
import { createRequire } from 'node:module';
import { readFileSync } from 'node:fs';
import { buildSync } from 'esbuild';
import { Miniflare } from 'miniflare';

const require = createRequire(import.meta.url); // their ES modules are for bundlers only
const { createClient } = require('@vercel/edge-config');
const { init } = require('@launchdarkly/vercel-server-sdk');
const silent = { debug() {}, info() {}, warn() {}, error() {} };

// Cloudflare's own runtime, with its KV.
async function cloudflare({ id, values, evaluations }) {
  const bundle = buildSync({
    entryPoints: ['worker.mjs'],
    bundle: true,
    write: false,
    format: 'esm',
    platform: 'browser',
    conditions: ['import'],
    external: ['node:*'],
    logLevel: 'silent',
  });
  const miniflare = new Miniflare({
    modules: true,
    script: bundle.outputFiles[0].text,
    kvNamespaces: ['FLAGS'],
    compatibilityDate: '2025-01-01',
    compatibilityFlags: ['nodejs_compat'],
  });
  try {
    const flags = await miniflare.getKVNamespace('FLAGS');
    for (const [key, text] of Object.entries(values)) await flags.put(key, text);
    const body = JSON.stringify({ id, evaluations });
    return await (await miniflare.dispatchFetch('http://worker/', { method: 'POST', body })).json();
  } finally {
    await miniflare.dispose();
  }
}

// Vercel's own client, and a server that answers as Edge Config does.
async function vercel({ id, values, evaluations }) {
  const server = createServer((request, response) => {
    const text = values[/\/item\/([^?]*)/.exec(request.url)?.[1]];
    response.writeHead(text ? 200 : 404, { 'Content-Type': 'application/json' });
    response.end(text);
  });
  await new Promise((resolve) => server.listen(0, '127.0.0.1', resolve));
  const { port } = server.address();
  const config = createClient(`http://127.0.0.1:${port}/?id=ecfg_tests&token=tests`);
  const client = init(id, config, { logger: silent });
  try {
    await client.waitForInitialization();
    const results = [];
    for (const [flag, context] of evaluations) {
      results.push(await client.variation(flag, context, '(none)'));
    }
    return results;
  } finally {
    client.close();
    server.closeAllConnections();
    server.close();
  }
}

const { sdk, ...what } = JSON.parse(readFileSync(0, 'utf8'));
console.log(JSON.stringify(await { cloudflare, vercel }[sdk](what)));
