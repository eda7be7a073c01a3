/** Small pieces that every tab uses. */

import type { ReactNode } from "react";
import { ApiError } from "../api";
import { useSay } from "../language";
import type { Job, State } from "../types";

export function Card({ title, action, children, className = "" }: {
  title?: ReactNode;
  action?: ReactNode;
  children: ReactNode;
  className?: string;
}) {
  return (
    <section className={`card ${className}`}>
      {(title || action) && (
        <header className="card-head">
          <h2>{title}</h2>
          {action}
        </header>
      )}
      {children}
    </section>
  );
}

export function Problem({ error }: { error: Error | null }) {
  if (!error) return null;
  const param = error instanceof ApiError ? error.param : null;
  return (
    <p className="problem" role="alert">
      {param && <code>{param}</code>} {error.message}
    </p>
  );
}

export function Empty({ children }: { children: ReactNode }) {
  return <p className="empty">{children}</p>;
}

export function Waiting({ children }: { children?: ReactNode }) {
  const say = useSay();
  return (
    <p className="waiting" role="status">
      <span className="spinner" aria-hidden="true" /> {children ?? say("正在读取…", "Loading…")}
    </p>
  );
}

const STATES: Record<State, [string, string]> = {
  queued: ["排队", "queued"],
  running: ["运行中", "running"],
  stopping: ["正在停止", "stopping"],
  done: ["完成", "done"],
  failed: ["失败", "failed"],
  stopped: ["已停止", "stopped"],
  lost: ["失联", "lost"],
};

export function Badge({ state }: { state: State }) {
  const say = useSay();
  const [zh, en] = STATES[state] ?? [state, state];
  return <span className={`badge ${state}`}>{say(zh, en)}</span>;
}

export const isAlive = (job: Job) => ["queued", "running", "stopping"].includes(job.state);

/** step / steps as a bar; without steps nothing. */
export function ProgressBar({ job }: { job: Job }) {
  const step = job.progress?.step;
  const steps = job.progress?.steps;
  if (!step || !steps) return null;
  const share = Math.min(1, step / steps);
  return (
    <div
      className="progress"
      role="progressbar"
      aria-valuemin={0}
      aria-valuemax={steps}
      aria-valuenow={step}
      aria-label={job.name}
    >
      <span style={{ width: `${share * 100}%` }} />
    </div>
  );
}

export function Field({ label, hint, error, children, wide = false }: {
  label: ReactNode;
  hint?: ReactNode;
  error?: string | null;
  children: ReactNode;
  wide?: boolean;
}) {
  // hint and error stand outside of the label, which would else be their text too
  return (
    <div className={`field ${error ? "wrong" : ""} ${wide ? "wide" : ""}`}>
      <label>
        <span className="field-label">{label}</span>
        {children}
      </label>
      {error && (
        <span className="field-error" role="alert">
          {error}
        </span>
      )}
      {hint && !error && <span className="hint">{hint}</span>}
    </div>
  );
}

export function Slider({ label, value, low, high, step, onChange, text }: {
  label: ReactNode;
  value: number;
  low: number;
  high: number;
  step: number;
  onChange: (value: number) => void;
  text?: string;
}) {
  return (
    <label className="slider">
      <span>
        {label} <span className="slider-value">{text ?? value}</span>
      </span>
      <input
        type="range"
        min={low}
        max={high}
        step={step}
        value={value}
        onChange={(event) => onChange(Number(event.target.value))}
      />
    </label>
  );
}
