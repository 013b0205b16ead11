// A Lambda function that uses the SDK as normal: it streams its flags, from the relay.
import { fileURLToPath } from 'node:url';
import { init } from '@launchdarkly/node-server-sdk';

const relay = process.env.RELAY_URL;
const flag = process.env.FLAG_KEY ?? 'greeting';
const START_LIMIT = 2; // seconds that a cold start waits for flags; without, there is the default
const FLUSH_LIMIT = 1000; // milliseconds that an answer waits for the delivery of its events

// Outside the handler: once for each cold start, and every invocation after it finds the flags in
// memory. Diagnostics would be one more request of each cold start.
export const client = init(process.env.LAUNCHDARKLY_SDK_KEY, {
  baseUri: relay,
  streamUri: relay,
  eventsUri: relay,
  diagnosticOptOut: true,
});
await client.waitForInitialization({ timeout: START_LIMIT }).catch(complain);

export async function handler(event) {
  const user = { kind: 'user', key: event.user ?? 'somebody' };
  const value = await client.variation(flag, user, null);
  client.track('answered', user);
  await flush();
  return { flag, value, initialized: client.initialized() };
}

// A relay that does not answer costs the limit, not the answer.
async function flush() {
  const limit = new Promise((passed) => {
    setTimeout(passed, FLUSH_LIMIT).unref();
  });
  await Promise.race([client.flush().catch(complain), limit]);
}

function complain(error) {
  console.error(String(error));
}

// Delivers what is left, and ends.
async function end() {
  await flush();
  client.close();
  process.exit(0);
}

process.once('SIGTERM', end);

if (process.argv[1] === fileURLToPath(import.meta.url)) {
  console.log(JSON.stringify(await handler({ user: 'anna' })));
  await end();
}
