/** Loss, throughput and what else a run logs, as it grows. */

import { useEffect, useRef, useState } from "react";
import { get, query } from "../../api";
import { useSay } from "../../language";
import { Empty, Problem } from "../../parts/common";
import { LineChart, type Curve } from "../../parts/LineChart";
import type { Points } from "../../types";

const SECONDS = 2;
type Series = Record<string, Points>;

export function Curves({ job, alive }: { job: string; alive: boolean }) {
  const say = useSay();
  const { series, error } = useSeries(job, alive);
  const has = (name: string) => (series[name]?.length ?? 0) > 0;
  const loss: Curve[] = [{ name: say("训练", "training"), points: series.loss ?? [] }];
  if (has("eval_loss")) loss.push({ name: say("留出", "held out"), points: series.eval_loss, dots: true });
  const others = [
    { name: "tokens_per_second", title: say("吞吐量", "Throughput"), unit: say("词元/秒", "tokens/s") },
    { name: "learning_rate", title: say("学习率", "Learning rate"), unit: "" },
    { name: "grad_norm", title: say("梯度范数", "Gradient norm"), unit: "" },
  ];
  const known = ["loss", "eval_loss", ...others.map((one) => one.name)];
  const further = Object.keys(series).filter((name) => !known.includes(name) && has(name));
  if (!has("loss") && further.length === 0) {
    return (
      <>
        <Problem error={error} />
        <Empty>{alive ? say("等第一步…", "Waiting for the first step…") : say("没有记录。", "Nothing was logged.")}</Empty>
      </>
    );
  }
  return (
    <>
      <Problem error={error} />
      <div className="charts">
        {has("loss") && (
          <div className="chart-wide">
            <LineChart title={say("损失", "Loss")} curves={loss} xTitle={say("步", "step")} height={240} />
          </div>
        )}
        {others.filter((one) => has(one.name)).map((one) => (
          <LineChart
            key={one.name}
            title={one.title}
            unit={one.unit}
            curves={[{ name: one.title, points: series[one.name] }]}
          />
        ))}
      </div>
      {further.length > 0 && (
        <details className="more-curves">
          <summary>
            {say("更多曲线", "More curves")} <span className="faint">{further.length}</span>
          </summary>
          <div className="charts">
            {further.map((name) => (
              <LineChart key={name} title={name} curves={[{ name, points: series[name] }]} />
            ))}
          </div>
        </details>
      )}
    </>
  );
}

/** The curves of a job; only what is new is fetched. */
function useSeries(job: string, alive: boolean): { series: Series; error: Error | null } {
  const [series, setSeries] = useState<Series>({});
  const [error, setError] = useState<Error | null>(null);
  const known = useRef<Series>({});
  useEffect(() => {
    let gone = false;
    let timer = 0;
    const look = async () => {
      try {
        const after = lastButOne(known.current);
        const found = await get<{ series: Series }>("/api/train/metrics" + query({ job, after }));
        if (gone) return;
        known.current = merged(known.current, found.series);
        setSeries(known.current);
        setError(null);
      } catch (problem) {
        if (!gone) setError(problem as Error);
      }
      if (!gone && alive) timer = window.setTimeout(look, SECONDS * 1000);
    };
    look();
    return () => {
      gone = true;
      clearTimeout(timer);
    };
  }, [job, alive]);
  return { series, error };
}

/** The evaluation of a step is logged after its loss: the newest step may still get more. */
function lastButOne(series: Series): number | null {
  const loss = series.loss ?? [];
  return loss.length > 1 ? loss[loss.length - 2][0] : null;
}

function merged(before: Series, more: Series): Series {
  const names = [...new Set([...Object.keys(before), ...Object.keys(more)])];
  return Object.fromEntries(
    names.map((name) => {
      const points = new Map(before[name] ?? []);
      for (const [step, value] of more[name] ?? []) points.set(step, value);
      return [name, [...points].sort(([a], [b]) => a - b)];
    }),
  );
}
