// A function with the Node SDK (bench/cold_start/burst.py): says "ready", waits for a byte or the end of
// its standard input, and then says on a line how it fared. Arguments: the packages' folder, the setup.
import { readFileSync, readSync, writeSync } from 'node:fs';
import { createRequire } from 'node:module';
import { join } from 'node:path';

const require = createRequire(join(process.argv[2], 'package.json'));
const setup = JSON.parse(process.argv[3]);
const { init } = require('@launchdarkly/node-server-sdk');
const { RedisFeatureStore } = require('@launchdarkly/node-server-sdk-redis');

const MISSING = '(none)'; // the fallback value: to get it means that flags did not arrive
const silent = { debug() {}, info() {}, warn() {}, error() {} };
const context = { kind: 'user', key: `user-${setup.number}` };

function options() {
  const all = { logger: silent, diagnosticOptOut: true, stream: setup.stream };
  Object.assign(all, { baseUri: setup.flags_url, streamUri: setup.flags_url });
  all.eventsUri = setup.events_url;
  if (setup.redis) {
    const { hostname, port } = new URL(setup.redis);
    const redisOpts = { host: hostname, port: Number(port) };
    Object.assign(all, { useLdd: true, featureStore: RedisFeatureStore({ redisOpts }) });
  }
  return all;
}

writeSync(1, 'ready\n');
readSync(0, Buffer.alloc(1));
const queued = () => Number(readFileSync('/proc/self/schedstat', 'utf8').split(' ')[1]) / 1e9;
const queuedBefore = queued(); // seconds for which the only thread that matters had no core
const usedBefore = process.cpuUsage();
const start = performance.now();
const seconds = () => (performance.now() - start) / 1000;
let error = '';
const client = init(setup.sdk_key, options());
client.on('error', () => {}); // without a listener the SDK ends the process
try {
  await client.waitForInitialization({ timeout: setup.limit });
} catch (e) {
  error = String(e?.message ?? e);
}
const value = await client.variation(setup.flag, context, MISSING);
if (value === MISSING) error ||= 'no flag';
const first = seconds();
const queuedUntilFirst = queued() - queuedBefore;
const used = process.cpuUsage(usedBefore);
client.track(`${setup.event}${String(setup.number).padStart(8, '0')}`, context);
let closed = true;
try {
  await client.flush(); // `close` does not wait for the events that it sends
  await client.close();
} catch (e) {
  closed = false;
}
const times = { first, queued: queuedUntilFirst, cpu: (used.user + used.system) / 1e6, total: seconds() };
writeSync(1, `${JSON.stringify({ number: setup.number, ...times, error, closed })}\n`);
process.exit(0);
