/** A matrix of shares as a grid of cells: rows look at columns. */

import { useState } from "react";
import { number } from "../format";
import { visible } from "../parts/Tokens";
import { useWidth } from "../hooks";

const LEFT = 64;
const TOP = 64;

export function Matrix({ rows, columns, values, label, marked, rowWord, columnWord }: {
  rows: string[];
  columns: string[];
  values: number[][];
  label: string;
  marked?: (row: number, column: number) => boolean;
  rowWord: string;
  columnWord: string;
}) {
  const [frame, width] = useWidth();
  const [pointed, setPointed] = useState<[number, number] | null>(null);
  const room = Math.max(0, width - LEFT - 4);
  const cell = Math.max(9, Math.min(40, room / columns.length));
  const size = Math.min(13, Math.max(9, cell * 0.6));
  const [row, column] = pointed ?? [-1, -1];
  const short = (text: string) => visible(text).replaceAll("\n", "↵").slice(0, 6);
  return (
    <div className="matrix" ref={frame}>
      <p className="faint matrix-facts" aria-live="off">
        {pointed
          ? `${rowWord} “${visible(rows[row])}” → ${columnWord} “${visible(columns[column])}”: ${number(values[row][column])}`
          : `${rowWord} → ${columnWord}`}
      </p>
      {width > 0 && (
        <div className="table-scroll">
          <svg
            width={LEFT + cell * columns.length + 4}
            height={TOP + cell * rows.length + 4}
            role="img"
            aria-label={label}
            onPointerLeave={() => setPointed(null)}
          >
            {columns.map((text, j) => (
              <text
                key={j}
                className={`tick ${j === column ? "pointed" : ""}`}
                fontSize={size}
                transform={`translate(${LEFT + cell * (j + 0.5) + size / 3},${TOP - 6}) rotate(-60)`}
              >
                {short(text)}
              </text>
            ))}
            {rows.map((text, i) => (
              <g key={i}>
                <text
                  className={`tick ${i === row ? "pointed" : ""}`}
                  fontSize={size}
                  x={LEFT - 6}
                  y={TOP + cell * (i + 0.5) + size / 3}
                  textAnchor="end"
                >
                  {short(text)}
                </text>
                {columns.map((_, j) => (
                  <rect
                    key={j}
                    className={marked?.(i, j) ? "cell marked" : "cell"}
                    x={LEFT + cell * j}
                    y={TOP + cell * i}
                    width={cell - 1}
                    height={cell - 1}
                    fillOpacity={Math.max(0.03, Math.min(1, values[i][j]))}
                    onPointerEnter={() => setPointed([i, j])}
                  />
                ))}
              </g>
            ))}
          </svg>
        </div>
      )}
    </div>
  );
}
