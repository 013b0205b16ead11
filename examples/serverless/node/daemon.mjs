// A Lambda function in daemon mode: it reads flags from Redis, which the relay keeps current.
import { fileURLToPath } from 'node:url';
import { init } from '@launchdarkly/node-server-sdk';
import { RedisFeatureStore } from '@launchdarkly/node-server-sdk-redis';

const relay = process.env.RELAY_URL;
const flag = process.env.FLAG_KEY ?? 'greeting';
const CACHED = 5; // seconds until a flag that was read is read again: a change is seen that later
const DATABASE_LIMIT = 1000; // milliseconds for Redis; then the handler uses its default
const FLUSH_LIMIT = 1000; // milliseconds that an answer waits for the delivery of its events

const redis = new URL(process.env.REDIS_URL);
const redisOpts = {
  host: redis.hostname,
  port: Number(redis.port || 6379),
  username: decodeURIComponent(redis.username) || undefined,
  password: decodeURIComponent(redis.password) || undefined,
  db: Number(redis.pathname.slice(1) || 0),
  tls: redis.protocol === 'rediss:' ? {} : undefined,
  connectTimeout: DATABASE_LIMIT,
  commandTimeout: DATABASE_LIMIT,
};
const prefix = process.env.REDIS_PREFIX ?? 'launchdarkly';

// Outside the handler: once for each cold start. `useLdd` opens no connection for flags.
// Events do not go through Redis but to the relay, or else to LaunchDarkly.
export const client = init(process.env.LAUNCHDARKLY_SDK_KEY, {
  featureStore: RedisFeatureStore({ redisOpts, prefix, cacheTTL: CACHED }),
  useLdd: true,
  ...(relay && { baseUri: relay, streamUri: relay, eventsUri: relay }),
  diagnosticOptOut: true,
});
await client.waitForInitialization({ timeout: 1 }).catch(complain); // says so at once

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
