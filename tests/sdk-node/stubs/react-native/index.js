// An Android device whose app is in the foreground; `fetch` and XMLHttpRequest are the browser's.
export const Platform = {
  OS: 'android',
  Version: 34,
  constants: { Manufacturer: 'Example', Model: 'One' },
  select: (choices) => choices.android ?? choices.default,
};
export const NativeModules = { I18nManager: { localeIdentifier: 'en_US' } };
export const AppState = {
  currentState: 'active',
  addEventListener: () => ({ remove() {} }),
};
