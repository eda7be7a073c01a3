/** One job: its curves, its log, and what can be done with it. */

import { useState } from "react";
import { get, post } from "../../api";
import { duration, moment, seconds } from "../../format";
import { useLoaded } from "../../hooks";
import { useSay } from "../../language";
import { Badge, Card, isAlive, Problem, ProgressBar } from "../../parts/common";
import type { Dataset, Job, Weights } from "../../types";
import { Curves } from "./Curves";
import { LogTail } from "./LogTail";

export function JobView({ job, reload, onStarted, onRemoved }: {
  job: Job;
  reload: () => void;
  onStarted: (job: string) => void;
  onRemoved: () => void;
}) {
  const say = useSay();
  const { progress } = job;
  return (
    <>
      <div className="job-head">
        <h1>
          {job.name || job.id} <Badge state={job.state} />
        </h1>
        <Actions job={job} reload={reload} onStarted={onStarted} onRemoved={onRemoved} />
      </div>
      <p className="faint job-meta">
        {[
          `${job.recipe}/${job.script}`,
          job.devices?.length ? job.devices.join(", ") : null,
          say(`开始 ${moment(job.started)}`, `started ${moment(job.started)}`),
          job.ended !== null && job.started !== null
            ? say(`用时 ${duration(seconds(job.ended) - seconds(job.started))}`, `took ${duration(seconds(job.ended) - seconds(job.started))}`)
            : null,
          job.exit_code !== null ? say(`退出码 ${job.exit_code}`, `exit code ${job.exit_code}`) : null,
        ]
          .filter(Boolean)
          .join(" · ")}
      </p>
      {job.error && (
        <p className="problem" role="alert">
          {job.error}
        </p>
      )}
      {isAlive(job) && progress && (
        <div className="job-progress">
          <div className="row spread">
            <span>
              {progress.stage && `${progress.stage} · `}
              {progress.step !== null && say(`第 ${progress.step} / ${progress.steps ?? "?"} 步`, `step ${progress.step} / ${progress.steps ?? "?"}`)}
              {progress.epoch !== null && say(` · 第 ${progress.epoch} 轮`, ` · epoch ${progress.epoch}`)}
            </span>
            {progress.eta_seconds !== null && (
              <span className="faint">
                {say(`还要约 ${duration(progress.eta_seconds)}`, `about ${duration(progress.eta_seconds)} left`)}
              </span>
            )}
          </div>
          <ProgressBar job={job} />
        </div>
      )}
      <Card title={say("曲线", "Curves")}>
        <Curves job={job.id} alive={isAlive(job)} />
      </Card>
      <LogTail job={job.id} onState={reload} />
      <Settings job={job} />
    </>
  );
}

function Actions({ job, reload, onStarted, onRemoved }: {
  job: Job;
  reload: () => void;
  onStarted: (job: string) => void;
  onRemoved: () => void;
}) {
  const say = useSay();
  const [error, setError] = useState<Error | null>(null);
  const [busy, setBusy] = useState(false);
  const [sure, setSure] = useState(false);
  const act = async (work: () => Promise<void>) => {
    setBusy(true);
    setError(null);
    try {
      await work();
      reload();
    } catch (problem) {
      setError(problem as Error);
    } finally {
      setBusy(false);
      setSure(false);
    }
  };
  const stop = (force: boolean) => act(async () => void (await post("/api/train/stop", { job: job.id, force })));
  const resume = () =>
    act(async () => {
      const answer = await post<{ job: Job }>("/api/train/start", { resume: job.id });
      onStarted(answer.job.id);
    });
  const forget = () =>
    act(async () => {
      await post("/api/train/remove", { job: job.id });
      onRemoved();
    });
  const running = job.state === "running" || job.state === "stopping";
  return (
    <div className="actions">
      {job.state === "running" && (
        <button type="button" disabled={busy} onClick={() => stop(false)}>
          {say("停止（先存检查点）", "Stop (saves a checkpoint)")}
        </button>
      )}
      {running && !sure && (
        <button type="button" className="danger-quiet" disabled={busy} onClick={() => setSure(true)}>
          {say("强制停止", "Force stop")}
        </button>
      )}
      {running && sure && (
        <button type="button" className="danger" disabled={busy} onClick={() => stop(true)}>
          {say("确定：不存，立刻结束", "Sure: end at once, save nothing")}
        </button>
      )}
      {job.resumable && !isAlive(job) && (
        <button type="button" className="primary" disabled={busy} onClick={resume}>
          {say("接着训练", "Resume")}
        </button>
      )}
      {job.output_id && job.state === "done" && (
        <a className="button" href={`#/chat/${encodeURIComponent(job.output_id)}`}>
          {say("和它对话", "Talk to it")}
        </a>
      )}
      {job.output_id && job.state === "done" && (
        <a className="button" href={`#/eval/${encodeURIComponent(job.output_id)}`}>
          {say("看报告", "See the report")}
        </a>
      )}
      {!running && (
        <button type="button" className="quiet" disabled={busy} onClick={forget}>
          {job.state === "queued" ? say("不排了", "Leave the queue") : say("从列表去掉", "Forget")}
        </button>
      )}
      <Problem error={error} />
    </div>
  );
}

function Settings({ job }: { job: Job }) {
  const say = useSay();
  const datasets = useLoaded(() => get<{ datasets: Dataset[] }>("/api/datasets"), 0);
  const weights = useLoaded(() => get<{ weights: Weights[] }>("/api/weights"), 0);
  const labels = new Map<string, string>();
  for (const one of [...(datasets.data?.datasets ?? []), ...(weights.data?.weights ?? [])]) {
    labels.set(one.id, one.path_label);
  }
  const label = (id: string) => labels.get(id) ?? id;
  const given = Object.entries(job.args);
  if (job.model) given.unshift([say("模型", "model"), label(job.model)]);
  const data = job.dataset.map((one) =>
    typeof one === "string" ? label(one) : `${label(one.id)}:${one.weight ?? 1}`,
  );
  if (data.length) given.unshift([say("数据", "data"), data]);
  if (given.length === 0) return null;
  return (
    <Card title={say("给定的", "What was given")}>
      <dl className="settings">
        {given.map(([name, value]) => (
          <div key={name}>
            <dt>
              <code>{name}</code>
            </dt>
            <dd>{Array.isArray(value) ? value.join(" ") : String(value)}</dd>
          </div>
        ))}
      </dl>
    </Card>
  );
}
