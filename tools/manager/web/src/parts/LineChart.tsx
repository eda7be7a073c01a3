/** A chart of one or several curves over the steps of a run. */

import { useMemo, useState } from "react";
import { number } from "../format";
import { useWidth } from "../hooks";
import type { Points } from "../types";

export interface Curve {
  name: string;
  points: Points;
  dots?: boolean;
  /** a function, whose last value says nothing */
  still?: boolean;
}

const HEIGHT = 190;
const EDGE = { left: 52, right: 12, top: 10, bottom: 24 };
const MOST = 500; // points drawn of one curve

/** At most MOST points: each the mean of its neighbours. */
export function thinned(points: Points): Points {
  if (points.length <= MOST) return points;
  const size = points.length / MOST;
  return Array.from({ length: MOST }, (_, i) => {
    const part = points.slice(Math.floor(i * size), Math.floor((i + 1) * size));
    const mean = part.reduce((sum, [, y]) => sum + y, 0) / part.length;
    return [part[part.length - 1][0], mean] as [number, number];
  });
}

/** Round numbers between low and high, about `want` of them. */
export function ticks(low: number, high: number, want: number): number[] {
  const span = high - low;
  if (!(span > 0)) return [low];
  const raw = span / want;
  const power = 10 ** Math.floor(Math.log10(raw));
  const step = [1, 2, 5, 10].map((factor) => factor * power).find((one) => one >= raw)!;
  const first = Math.ceil(low / step) * step;
  const found: number[] = [];
  for (let tick = first; tick <= high + step / 1e6; tick += step) found.push(Number(tick.toPrecision(12)));
  return found;
}

export function LineChart({
  title,
  curves,
  unit = "",
  xTitle = "",
  height = HEIGHT,
  around = [],
}: {
  title: string;
  curves: Curve[];
  unit?: string;
  xTitle?: string;
  height?: number;
  /** values that the scale reaches in any case, so that small changes look small */
  around?: number[];
}) {
  const [frame, width] = useWidth();
  const [pointed, setPointed] = useState<number | null>(null);
  const drawn = useMemo(() => curves.map((curve) => ({ ...curve, points: thinned(curve.points) })), [curves]);
  const all = drawn.flatMap((curve) => curve.points);
  const xs = all.map(([x]) => x);
  const ys = [...all.map(([, y]) => y).filter(Number.isFinite), ...(all.length ? around : [])];
  const [x0, x1] = [Math.min(...xs), Math.max(...xs)];
  const [lowest, highest] = [Math.min(...ys), Math.max(...ys)];
  const pad = (highest - lowest) * 0.06 || Math.abs(highest) * 0.1 || 1;
  const [y0, y1] = [lowest - pad, highest + pad];
  const right = Math.max(width - EDGE.right, EDGE.left + 1);
  const bottom = height - EDGE.bottom;
  const atX = (x: number) => EDGE.left + ((x - x0) / (x1 - x0 || 1)) * (right - EDGE.left);
  const atY = (y: number) => bottom - ((y - y0) / (y1 - y0)) * (bottom - EDGE.top);
  const path = (points: Points) =>
    points.map(([x, y], i) => `${i ? "L" : "M"}${atX(x).toFixed(1)},${atY(y).toFixed(1)}`).join("");

  const nearest = (points: Points, x: number) =>
    points.reduce((best, point) => (Math.abs(point[0] - x) < Math.abs(best[0] - x) ? point : best));
  const move = (event: React.PointerEvent<SVGSVGElement>) => {
    const box = event.currentTarget.getBoundingClientRect();
    const share = (event.clientX - box.left - EDGE.left) / (right - EDGE.left);
    setPointed(x0 + Math.min(1, Math.max(0, share)) * (x1 - x0));
  };
  const shown = drawn.filter((curve) => curve.points.length);
  const values = shown.map((curve) =>
    pointed === null ? curve.points[curve.points.length - 1] : nearest(curve.points, pointed),
  );
  const label = shown.map((curve, i) => `${curve.name} ${number(values[i][1])}`).join(", ");

  return (
    <figure className="chart" ref={frame}>
      <figcaption>
        <span className="chart-title">{title}</span>
        {shown.map((curve, i) => (
          <span key={curve.name} className={`legend curve-${i}`}>
            {(shown.length > 1 || curve.still) && <>{curve.name} </>}
            {(pointed !== null || !curve.still) && (
              <>
                <b>{number(values[i][1])}</b> {unit}
              </>
            )}
          </span>
        ))}
        {pointed !== null && values[0] && <span className="faint">@ {number(values[0][0])}</span>}
      </figcaption>
      {width > 0 && ys.length > 0 && (
        <svg
          width={width}
          height={height}
          role="img"
          aria-label={`${title}: ${label}`}
          onPointerMove={move}
          onPointerLeave={() => setPointed(null)}
        >
          {ticks(y0, y1, 4).map((tick) => (
            <g key={`y${tick}`}>
              <line className="grid" x1={EDGE.left} x2={right} y1={atY(tick)} y2={atY(tick)} />
              <text className="tick" x={EDGE.left - 6} y={atY(tick) + 4} textAnchor="end">
                {number(tick)}
              </text>
            </g>
          ))}
          {ticks(x0, x1, Math.max(2, width / 130)).filter((tick) => !xTitle || atX(tick) < right - 44).map((tick) => (
            <text key={`x${tick}`} className="tick" x={atX(tick)} y={height - 6} textAnchor="middle">
              {number(tick)}
            </text>
          ))}
          {xTitle && (
            <text className="tick" x={right} y={height - 6} textAnchor="end">
              {xTitle}
            </text>
          )}
          {shown.map((curve, i) => (
            <g key={curve.name} className={`curve-${i}`}>
              <path className="curve" d={path(curve.points)} />
              {(curve.dots || curve.points.length === 1) &&
                curve.points.map(([x, y]) => <circle key={x} cx={atX(x)} cy={atY(y)} r="3" />)}
            </g>
          ))}
          {pointed !== null &&
            values.map(([x, y], i) => (
              <g key={i} className={`curve-${i}`}>
                <line className="cursor" x1={atX(x)} x2={atX(x)} y1={EDGE.top} y2={bottom} />
                <circle cx={atX(x)} cy={atY(y)} r="4" />
              </g>
            ))}
        </svg>
      )}
    </figure>
  );
}
