// One LaunchDarkly SDK, driven by a test: JSON lines in, an answer for each (tests/support/sdk.py).
import { readFileSync } from 'node:fs';
import { createRequire } from 'node:module';
import { createInterface } from 'node:readline';

const require = createRequire(import.meta.url);
const silent = { debug() {}, info() {}, warn() {}, error() {} };
const domain = 'test';
let client;
let openFeature;
let clientSide; // the setup of such an SDK

// The SDKs poll every 30 s at the least; for a test that cannot wait, the clock runs faster then.
function hasten(seconds) {
  for (const name of ['setTimeout', 'setInterval']) {
    const original = globalThis[name];
    globalThis[name] = (callback, delay, ...rest) => {
      const polls = delay > 20_000 && delay <= 30_000; // less the time that the last poll took
      return original(callback, polls ? seconds * 1000 : delay, ...rest);
    };
  }
}

// The flags and the members of big segments in a database, for daemon mode.
function stores(setup) {
  return setup.dynamodb ? storesInDynamoDB(setup) : storesInRedis(setup);
}

function storesInDynamoDB({ dynamodb, table, prefix }) {
  // Only that of the old line is in every registry; without this it warns of its library's age.
  process.env.AWS_SDK_JS_SUPPRESS_MAINTENANCE_MODE_MESSAGE = '1';
  const name = 'launchdarkly-node-server-sdk-dynamodb';
  const { DynamoDBFeatureStore, DynamoDBBigSegmentStore } = require(name);
  const options = { clientOptions: { endpoint: dynamodb, region: process.env.AWS_REGION }, prefix };
  return {
    featureStore: DynamoDBFeatureStore(table, { ...options, cacheTTL: 0 }),
    bigSegments: { store: DynamoDBBigSegmentStore(table, options) },
  };
}

function storesInRedis({ line, redis, prefix }) {
  const name = line === '7' ? 'launchdarkly-node-server-sdk-redis' : '@launchdarkly/node-server-sdk-redis';
  const { RedisFeatureStore, RedisBigSegmentStore } = require(name);
  const { hostname, port } = new URL(redis);
  const redisOpts = line === '7' ? { url: redis } : { host: hostname, port: Number(port) };
  const options = { redisOpts, prefix, logger: silent };
  return {
    featureStore: RedisFeatureStore({ ...options, cacheTTL: 0 }),
    bigSegments: { store: RedisBigSegmentStore(options) },
  };
}

function options(setup) {
  const { url, stream, redis, dynamodb, ca, fdv2, events } = setup;
  const all = { logger: silent, sendEvents: events, diagnosticOptOut: !events, stream };
  if (url) Object.assign(all, { baseUri: url, streamUri: url, eventsUri: url });
  if (redis || dynamodb) Object.assign(all, { useLdd: true, ...stores(setup) });
  if (ca) all.tlsParams = { ca: readFileSync(ca) };
  if (fdv2) {
    const dataSource = { default: undefined, streaming: { dataSourceOptionsType: 'streamingOnly' } };
    dataSource.polling = { dataSourceOptionsType: 'pollingOnly', pollInterval: 30 };
    all.dataSystem = dataSource[fdv2] ? { dataSource: dataSource[fdv2] } : {};
  }
  if (setup.compressed) all.enableEventCompression = true;
  if (setup.line === '9') all.initialReconnectDelay = 0.1;
  else all.streamInitialReconnectDelay = 0.1;
  return all;
}

// With flags to start from it does not stream: there are no listeners to changes.
async function startClientSide({ line, key, bootstrap, context, url, events, proof, more }) {
  const all = { logger: silent, sendEvents: events, diagnosticOptOut: !events };
  if (!bootstrap) Object.assign(all, { streaming: true, streamReconnectDelay: 50 });
  if (proof) all.hash = proof;
  if (line === 'client') {
    const { initialize } = require('launchdarkly-node-client-sdk');
    const urls = { baseUrl: url, streamUrl: url, eventsUrl: url };
    const from = { bootstrap: bootstrap ?? undefined };
    client = initialize(key, context, { ...all, ...urls, ...from, ...more });
  } else {
    const { createClient } = require('@launchdarkly/js-client-sdk');
    const uris = { baseUri: url, streamUri: url, eventsUri: url };
    client = createClient(key, context, { ...all, ...uris });
    await client.start({ bootstrap });
  }
}

const operations = {
  async init(setup) {
    if (setup.context) {
      clientSide = setup;
      await startClientSide(setup);
      client.on('error', () => {});
      return;
    }
    if (setup.poll_interval < 30) hasten(setup.poll_interval);
    if (setup.openfeature) {
      const { LaunchDarklyProvider } = require('@launchdarkly/openfeature-node-server');
      const { OpenFeature } = require('@openfeature/server-sdk');
      const provider = new LaunchDarklyProvider(setup.key, options(setup));
      client = provider.getClient();
      await OpenFeature.setProviderAndWait(domain, provider);
      openFeature = OpenFeature.getClient(domain);
      return;
    }
    const old = setup.line === '7';
    const name = old ? 'launchdarkly-node-server-sdk' : '@launchdarkly/node-server-sdk';
    client = require(name).init(setup.key, options(setup));
    client.on('error', () => {}); // without a listener the SDK ends the process
  },
  async ready() {
    // The test sets the limit; the old line knows none.
    if (!openFeature) await client.waitForInitialization();
  },
  async value({ flag, context, fallback }) {
    if (clientSide) return client.variation(flag, fallback);
    if (!openFeature) return client.variation(flag, context, fallback);
    const { key, ...attributes } = context;
    return openFeature.getStringValue(flag, fallback, { targetingKey: key, ...attributes });
  },
  async track({ event, context, data }) {
    if (clientSide) client.track(event, data);
    else client.track(event, context, data);
  },
  async identify({ context }) {
    if (clientSide?.line === 'browser') {
      await client.identify(context, { bootstrap: clientSide.bootstrap });
    } else await client.identify(context);
  },
  async flush() {
    await client.flush();
  },
  async close() {
    // Those of servers do not wait for the events that `close` sends, and this process ends.
    if (!clientSide) await client?.flush().catch(() => {});
    await client?.close();
  },
};

async function answer(line) {
  const { operation, ...what } = JSON.parse(line);
  try {
    return { result: (await operations[operation](what)) ?? null };
  } catch (e) {
    return { error: String(e?.message ?? e) };
  }
}

for await (const line of createInterface({ input: process.stdin })) {
  process.stdout.write(`${JSON.stringify(await answer(line))}\n`);
}
process.exit(0);
