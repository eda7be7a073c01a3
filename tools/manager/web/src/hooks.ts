import { useCallback, useEffect, useRef, useState } from "react";

/** State that outlives a reload, in this browser only. */
export function useStored<T>(name: string, initial: T): [T, (value: T) => void] {
  const key = `danpu.${name}`;
  const [value, setValue] = useState<T>(() => {
    try {
      const kept = localStorage.getItem(key);
      return kept === null ? initial : (JSON.parse(kept) as T);
    } catch {
      return initial;
    }
  });
  const store = useCallback(
    (next: T) => {
      setValue(next);
      try {
        localStorage.setItem(key, JSON.stringify(next));
      } catch {
        // private windows may refuse; then it lasts until the reload
      }
    },
    [key],
  );
  return [value, store];
}

/** The address behind #: a list of words, ["train", "job-1"]. */
export function useHash(): [string[], (...words: string[]) => void] {
  const read = () => location.hash.replace(/^#\/?/, "").split("/").map(decodeURIComponent);
  const [words, setWords] = useState(read);
  useEffect(() => {
    const changed = () => setWords(read());
    addEventListener("hashchange", changed);
    return () => removeEventListener("hashchange", changed);
  }, []);
  const go = useCallback((...next: string[]) => {
    location.hash = "/" + next.map(encodeURIComponent).join("/");
  }, []);
  return [words, go];
}

export interface Loaded<T> {
  data: T | null;
  error: Error | null;
  reload: () => void;
}

/** What `load` gives, again every `seconds` while the page is looked at (0: once).
 *  An error does not take away what was there before. */
export function useLoaded<T>(load: () => Promise<T>, seconds: number, ...keys: unknown[]): Loaded<T> {
  const [data, setData] = useState<T | null>(null);
  const [error, setError] = useState<Error | null>(null);
  const [turn, setTurn] = useState(0);
  const latest = useRef(load);
  latest.current = load;

  useEffect(() => {
    let gone = false;
    let timer = 0;
    const step = async () => {
      if (!document.hidden) {
        try {
          const found = await latest.current();
          if (!gone) {
            setData(found);
            setError(null);
          }
        } catch (problem) {
          if (!gone) setError(problem as Error);
        }
      }
      if (!gone && seconds > 0) timer = window.setTimeout(step, seconds * 1000);
    };
    step();
    return () => {
      gone = true;
      clearTimeout(timer);
    };
    // eslint-disable-next-line react-hooks/exhaustive-deps
  }, [seconds, turn, ...keys]);

  const reload = useCallback(() => setTurn((n) => n + 1), []);
  return { data, error, reload };
}

/** Width of an element in pixels, as it changes. */
export function useWidth(): [React.RefObject<HTMLDivElement | null>, number] {
  const ref = useRef<HTMLDivElement>(null);
  const [width, setWidth] = useState(0);
  useEffect(() => {
    if (!ref.current) return;
    const observer = new ResizeObserver(([entry]) => setWidth(entry.contentRect.width));
    observer.observe(ref.current);
    return () => observer.disconnect();
  }, []);
  return [ref, width];
}

/** `value` once it has not changed for so many milliseconds. */
export function useSettled<T>(value: T, milliseconds: number): T {
  const [settled, setSettled] = useState(value);
  useEffect(() => {
    const timer = setTimeout(() => setSettled(value), milliseconds);
    return () => clearTimeout(timer);
  }, [value, milliseconds]);
  return settled;
}
