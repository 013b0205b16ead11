// Bundle what a page needs of the React Native SDK:  node bundle.mjs OUTPUT
import { readFile } from 'node:fs/promises';
import { build } from 'esbuild';

// Metro, the bundler of React Native, gives each file a `module`, on which one of the SDK's relies.
const moduleAsInMetro = {
  name: 'module as in Metro',
  setup({ onLoad }) {
    onLoad({ filter: /fromExternal\/js-sha256\/index\.js$/ }, async ({ path }) => {
      const text = await readFile(path, 'utf8');
      const contents = `const module = { exports: {} };\n${text}\nexport const { sha256 } = module.exports;`;
      return { contents };
    });
  },
};

await build({
  stdin: {
    contents: `export { AutoEnvAttributes, ReactNativeLDClient } from '@launchdarkly/react-native-client-sdk';`,
    resolveDir: new URL(".", import.meta.url).pathname,
  },
  bundle: true,
  format: 'esm',
  logLevel: 'error',
  outfile: process.argv[2],
  plugins: [moduleAsInMetro],
});
