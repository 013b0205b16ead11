// A Cloudflare worker that evaluates flags by its KV namespace with LaunchDarkly's SDK.
import { init } from '@launchdarkly/cloudflare-server-sdk';

export default {
  async fetch(request, env) {
    const { id, evaluations } = await request.json();
    const client = init(id, env.FLAGS);
    await client.waitForInitialization();
    const values = [];
    for (const [flag, context] of evaluations) {
      values.push(await client.variation(flag, context, '(none)'));
    }
    return Response.json(values);
  },
};
