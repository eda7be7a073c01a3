/** What the runs measured: a table of all of them, and the report of one. */

import { get, query } from "../api";
import { number, weightsName } from "../format";
import { useLoaded } from "../hooks";
import { useSay } from "../language";
import { Card, Empty, Problem, Waiting } from "../parts/common";
import { Text } from "../parts/Text";
import type { EvaluationRow, Report } from "../types";

export function Evaluation({ chosen }: { chosen?: string }) {
  const say = useSay();
  const found = useLoaded(() => get<{ table: EvaluationRow[] }>("/api/evaluations"), 15);
  return (
    <>
      <h1>{say("评测", "Evaluation")}</h1>
      {chosen && <ReportCard key={chosen} weights={chosen} />}
      <Card title={say("训练前后", "Before and after")}>
        <Problem error={found.error} />
        {!found.data && !found.error && <Waiting />}
        {found.data?.table.length === 0 && (
          <Empty>{say("还没有报告：训练完成后会出现在这里。", "No report yet: finished runs appear here.")}</Empty>
        )}
        {found.data && found.data.table.length > 0 && <Table rows={found.data.table} chosen={chosen} />}
      </Card>
    </>
  );
}

function Table({ rows, chosen }: { rows: EvaluationRow[]; chosen?: string }) {
  const say = useSay();
  return (
    <div className="table-scroll">
      <table className="evaluations">
        <thead>
          <tr>
            <th>{say("权重", "Weights")}</th>
            <th>{say("配方", "Recipe")}</th>
            <th>{say("指标", "Metric")}</th>
            <th className="num">{say("训练前", "Before")}</th>
            <th className="num">{say("训练后", "After")}</th>
          </tr>
        </thead>
        <tbody>
          {rows.map((row, i) => {
            const first = i === 0 || rows[i - 1].weights !== row.weights;
            return (
              <tr key={`${row.weights} ${row.metric}`} className={`${first ? "first" : ""} ${row.weights === chosen ? "chosen" : ""}`}>
                <td>{first && <a href={`#/eval/${encodeURIComponent(row.weights)}`} title={row.path_label}>{weightsName(row.path_label)}</a>}</td>
                <td>{first && row.recipe}</td>
                <td>{row.metric}</td>
                <td className="num">{shown(row.before)}</td>
                <td className="num">
                  <b>{shown(row.after)}</b>
                </td>
              </tr>
            );
          })}
        </tbody>
      </table>
    </div>
  );
}

const shown = (value: unknown) => (typeof value === "number" ? number(value) : "–");

function ReportCard({ weights }: { weights: string }) {
  const say = useSay();
  const report = useLoaded(() => get<Report>("/api/report" + query({ weights })), 0, weights);
  const pictures = report.data?.pictures ?? [];
  const addresses = Object.fromEntries(pictures.map((one) => [one.name, one.url]));
  const others = pictures.filter((one) => !report.data!.markdown.includes(`(${one.name})`));
  return (
    <Card
      title={<span className="ellipsis">{say("报告", "Report")} </span>}
      action={<a className="button quiet" href="#/eval">{say("关上", "Close")}</a>}
    >
      <Problem error={report.error} />
      {!report.data && !report.error && <Waiting />}
      {report.data && (
        <>
          <Text pictures={addresses}>{report.data.markdown}</Text>
          <div className="pictures">
            {others.map((picture) => (
              <figure key={picture.url}>
                <img src={picture.url} alt={picture.name} loading="lazy" />
                <figcaption className="faint">{picture.name}</figcaption>
              </figure>
            ))}
          </div>
        </>
      )}
    </Card>
  );
}
