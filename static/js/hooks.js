// Small hooks that every page shares. Know nothing of jobs or datasets.
import { useCallback, useEffect, useRef, useState } from "../vendor/preact-htm.js";

/**
 * Loads something, keeps the last good answer while reloading, and polls while the tab is visible.
 * @template T
 * @param {() => Promise<T>} load
 * @param {unknown[]} deps
 * @param {number} [everyMs] poll interval; 0: never
 */
export function useResource(load, deps, everyMs = 0) {
  const [state, setState] = useState({ data: /** @type {T|null} */ (null), error: null, loading: true });
  const run = useRef(0);
  const latest = useRef(load);
  latest.current = load;
  const reload = useCallback(async () => {
    const mine = ++run.current;
    try {
      const data = await latest.current();
      if (mine === run.current) setState({ data, error: null, loading: false });
    } catch (error) {
      if (mine === run.current && error.name !== "AbortError") setState((s) => ({ ...s, error, loading: false }));
    }
  }, []);
  useEffect(() => {
    setState({ data: null, error: null, loading: true });
    reload();
    const timer = everyMs ? setInterval(() => document.hidden || reload(), everyMs) : 0;
    const shown = () => document.hidden || (everyMs && reload());
    document.addEventListener("visibilitychange", shown);
    return () => {
      run.current += 1;
      clearInterval(timer);
      document.removeEventListener("visibilitychange", shown);
    };
  }, deps);
  return { ...state, reload };
}

/** The time, refreshed every `everyMs`, for relative times and countdowns. */
export function useNow(everyMs = 1000) {
  const [now, setNow] = useState(Date.now());
  useEffect(() => {
    const timer = setInterval(() => document.hidden || setNow(Date.now()), everyMs);
    return () => clearInterval(timer);
  }, [everyMs]);
  return now;
}

/** The document's title while a page is shown. */
export function useTitle(title) {
  useEffect(() => {
    document.title = title ? `${title} · lorad` : "lorad";
  }, [title]);
}

/** A number that changes with the colour theme, so that canvases redraw. */
export function useTheme() {
  const [theme, setTheme] = useState(() => window.loradTheme.current());
  useEffect(() => {
    const changed = () => setTheme(window.loradTheme.current());
    window.addEventListener("lorad:theme", changed);
    return () => window.removeEventListener("lorad:theme", changed);
  }, []);
  return theme;
}
