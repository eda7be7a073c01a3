/** Upright bars of a histogram, and lying bars of named values. */

import { number } from "../format";

export function Histogram({ bins, counts, title }: { bins: number[]; counts: number[]; title: string }) {
  const most = Math.max(1, ...counts);
  const total = counts.reduce((sum, one) => sum + one, 0);
  const edge = (i: number) => (bins.length > counts.length ? `${bins[i]}–${bins[i + 1]}` : `${bins[i]}`);
  const label = counts.map((count, i) => `${edge(i)}: ${count}`).join(", ");
  return (
    <figure className="histogram" role="img" aria-label={`${title}: ${label}`}>
      <figcaption className="chart-title">{title}</figcaption>
      <div className="columns">
        {counts.map((count, i) => (
          <div key={i} className="column" title={`${edge(i)}: ${count} (${number((count / Math.max(1, total)) * 100)} %)`}>
            <div className="filled" style={{ height: `${(count / most) * 100}%` }} />
          </div>
        ))}
      </div>
      <div className="columns-axis">
        <span>{bins[0]}</span>
        <span>{bins[Math.floor(bins.length / 2)]}</span>
        <span>{bins[bins.length - 1]}</span>
      </div>
    </figure>
  );
}

export interface Bar {
  name: React.ReactNode;
  key: string;
  value: number;
  text?: string;
  marked?: boolean;
  onClick?: () => void;
}

/** Bars from a common zero; negative ones go to the left. */
export function NamedBars({ bars, most }: { bars: Bar[]; most?: number }) {
  const largest = most ?? Math.max(1e-9, ...bars.map((bar) => Math.abs(bar.value)));
  const hasNegative = bars.some((bar) => bar.value < 0);
  const width = (value: number) => `${Math.min(1, Math.abs(value) / largest) * (hasNegative ? 50 : 100)}%`;
  return (
    <ul className={`named-bars ${hasNegative ? "two-sided" : ""}`}>
      {bars.map((bar) => (
        <li key={bar.key} className={bar.marked === false ? "unmarked" : ""}>
          {bar.onClick ? (
            <button type="button" className="bar-name link" onClick={bar.onClick}>
              {bar.name}
            </button>
          ) : (
            <span className="bar-name">{bar.name}</span>
          )}
          <span className="bar-track">
            <span className={`bar-fill ${bar.value < 0 ? "negative" : ""}`} style={{ width: width(bar.value) }} />
          </span>
          <span className="bar-value">{bar.text ?? number(bar.value)}</span>
        </li>
      ))}
    </ul>
  );
}

/** How much of something is used. */
export function Meter({ used, total, label }: { used: number | null; total: number | null; label: string }) {
  if (!total || used === null) return null;
  const share = Math.min(1, used / total);
  return (
    <div
      className={`meter ${share > 0.9 ? "high" : ""}`}
      role="meter"
      aria-label={label}
      aria-valuemin={0}
      aria-valuemax={100}
      aria-valuenow={Math.round(share * 100)}
    >
      <span style={{ width: `${share * 100}%` }} />
    </div>
  );
}
