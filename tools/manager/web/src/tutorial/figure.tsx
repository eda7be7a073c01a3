/** What every figure of the tutorial uses. */

import { createContext, useContext, useEffect, useState, type ReactNode } from "react";
import { post } from "../api";
import { useSettled } from "../hooks";
import { useSay } from "../language";
import { Problem } from "../parts/common";

export const WeightsContext = createContext("tiny");
const PAUSE = 350; // milliseconds without typing before it is computed

export interface Computed<T> {
  data: T | null;
  error: Error | null;
  busy: boolean;
}

/** POST /api/tutorial/{name} whenever the fields have settled; the last figure stays meanwhile. */
export function useFigure<T>(name: string, fields: Record<string, unknown>): Computed<T> {
  const weights = useContext(WeightsContext);
  const wanted = JSON.stringify({ ...fields, weights });
  const settled = useSettled(wanted, PAUSE);
  const [found, setFound] = useState<{ of: string; data: T | null; error: Error | null }>({ of: "", data: null, error: null });
  useEffect(() => {
    const stop = new AbortController();
    post<T>(`/api/tutorial/${name}`, JSON.parse(settled), stop.signal)
      .then((data) => setFound({ of: settled, data, error: null }))
      .catch((error) => {
        if (!stop.signal.aborted) setFound((before) => ({ of: settled, data: before.data, error }));
      });
    return () => stop.abort();
  }, [name, settled]);
  return { data: found.data, error: found.error, busy: found.of !== wanted };
}

export function FigureBox({ title, figure, controls, children }: {
  title: string;
  figure: Computed<unknown>;
  controls?: ReactNode;
  children: ReactNode;
}) {
  const say = useSay();
  return (
    <section className="card figure-box" aria-label={title} aria-busy={figure.busy}>
      <header className="card-head">
        <h2>{title}</h2>
        {figure.busy && <span className="spinner" role="status" aria-label={say("正在计算", "computing")} />}
      </header>
      {controls && <div className="figure-controls">{controls}</div>}
      <Problem error={figure.error} />
      {figure.data === null && figure.busy && (
        <p className="faint">{say("正在装入微型模型，第一次要十几秒…", "Loading the tiny model; the first time takes some seconds…")}</p>
      )}
      {figure.data !== null && children}
    </section>
  );
}

export function TextInput({ label, value, onChange, most = 200, rows = 1, code = false }: {
  label: string;
  value: string;
  onChange: (value: string) => void;
  most?: number;
  rows?: number;
  code?: boolean;
}) {
  return (
    <label className="field wide">
      <span className="field-label">{label}</span>
      {rows > 1 ? (
        <textarea
          className={code ? "code" : ""}
          rows={rows}
          maxLength={most}
          spellCheck={false}
          value={value}
          onChange={(event) => onChange(event.target.value)}
        />
      ) : (
        <input
          type="text"
          maxLength={most}
          autoComplete="off"
          spellCheck={false}
          value={value}
          onChange={(event) => onChange(event.target.value)}
        />
      )}
    </label>
  );
}

export function Choice({ label, count, value, onChange }: {
  label: string;
  count: number;
  value: number;
  onChange: (value: number) => void;
}) {
  return (
    <label className="field narrow">
      <span className="field-label">{label}</span>
      <select value={value} onChange={(event) => onChange(Number(event.target.value))}>
        {Array.from({ length: count }, (_, i) => (
          <option key={i} value={i}>
            {i + 1}
          </option>
        ))}
      </select>
    </label>
  );
}
