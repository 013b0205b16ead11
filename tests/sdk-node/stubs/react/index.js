function noComponents() {
  throw new Error('this test has no components');
}

export const createContext = () => ({ Provider: noComponents, Consumer: noComponents });
export const useCallback = noComponents;
export const useContext = noComponents;
export const useEffect = noComponents;
export const useMemo = noComponents;
export const useRef = noComponents;
export const useState = noComponents;
export default { createContext };
