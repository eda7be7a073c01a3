/** Devices, memory, jobs and the newest runs. */

import { get } from "../api";
import { duration, megabytes, moment, number, seconds, weightsName } from "../format";
import { useLoaded } from "../hooks";
import { useSay } from "../language";
import { Meter } from "../parts/Bars";
import { Badge, Card, Empty, isAlive, Problem, ProgressBar, Waiting } from "../parts/common";
import type { Device, Job, Machine, Status, Weights } from "../types";

const NEWEST = 6;

export function Overview({ status }: { status: Status | null }) {
  const say = useSay();
  const machine = useLoaded(() => get<Machine>("/api/npu"), 3);
  const weights = useLoaded(() => get<{ weights: Weights[] }>("/api/weights"), 10);
  if (!status) return <Waiting />;
  const active = status.jobs.filter(isAlive);
  return (
    <>
      <h1>{say("概览", "Overview")}</h1>
      {status.problem && <p className="problem">{status.problem}</p>}
      {status.jobs.length === 0 && <FirstSteps />}
      <Card title={say("机器", "Machine")}>
        <Problem error={machine.error} />
        {machine.data?.problem && <p className="note">{machine.data.problem}</p>}
        {machine.data ? <MachineFacts machine={machine.data} jobs={status.jobs} /> : <Waiting />}
      </Card>
      <Card
        title={say("正在进行", "In progress")}
        action={<a className="button" href="#/train/new">{say("开始训练", "Start training")}</a>}
      >
        {active.length === 0 && <Empty>{say("现在没有任务。", "No job at the moment.")}</Empty>}
        <ul className="jobs">
          {active.map((job) => (
            <JobLine key={job.id} job={job} place={status.queue.indexOf(job.id)} />
          ))}
        </ul>
      </Card>
      <Card title={say("最近的结果", "Newest results")}>
        <Problem error={weights.error} />
        {weights.data ? <Newest weights={weights.data.weights} /> : <Waiting />}
      </Card>
    </>
  );
}

function FirstSteps() {
  const say = useSay();
  const steps = [
    { href: "#/tutorial", zh: "看教程", en: "Read the tutorial", why: say("十一章，每章一张能动手的图", "eleven chapters, each with a figure to play with") },
    { href: "#/data", zh: "放进数据", en: "Bring data", why: say("看清哪些字会参与训练", "see which characters are trained") },
    { href: "#/train/new", zh: "训练", en: "Train", why: say("内置样例，几分钟就有结果", "built-in samples give a result in minutes") },
    { href: "#/chat", zh: "对话", en: "Chat", why: say("训练前后并排比较", "before and after, side by side") },
  ];
  return (
    <ol className="first-steps">
      {steps.map((step, i) => (
        <li key={step.href}>
          <a href={step.href}>
            <b>
              {i + 1}. {say(step.zh, step.en)}
            </b>
            <span className="faint">{step.why}</span>
          </a>
        </li>
      ))}
    </ol>
  );
}

function MachineFacts({ machine, jobs }: { machine: Machine; jobs: Job[] }) {
  const say = useSay();
  const { host } = machine;
  return (
    <div className="tiles">
      {machine.devices.map((device) => (
        <DeviceTile key={device.id} device={device} job={jobs.find((job) => job.id === device.job)} />
      ))}
      <div className="tile">
        <b>{say("内存", "Memory")}</b>
        <span>
          {megabytes(host.memory_used_mb)} / {megabytes(host.memory_total_mb)}
        </span>
        <Meter used={host.memory_used_mb} total={host.memory_total_mb} label={say("内存", "Memory")} />
      </div>
      <div className="tile">
        <b>{say("硬盘余量", "Free disk")}</b>
        <span>{megabytes(host.disk_free_mb)}</span>
      </div>
      <div className="tile">
        <b>{say("负载", "Load")}</b>
        <span>{host.load.map((one) => one.toFixed(1)).join(" · ")}</span>
        <span className="faint">{say("1、5、15 分钟", "1, 5, 15 minutes")}</span>
      </div>
    </div>
  );
}

function DeviceTile({ device, job }: { device: Device; job?: Job }) {
  const say = useSay();
  return (
    <div className="tile">
      <b>
        {device.kind.toUpperCase()} {device.id !== device.kind && <span className="faint">{device.id}</span>}
      </b>
      <span className="ellipsis" title={device.name}>
        {device.name}
      </span>
      {device.memory_total_mb !== null && (
        <span>
          {megabytes(device.memory_used_mb)} / {megabytes(device.memory_total_mb)}
        </span>
      )}
      <Meter used={device.memory_used_mb} total={device.memory_total_mb} label={device.name} />
      <span className="faint">
        {device.utilization !== null && `${Math.round(device.utilization)} % · `}
        {job ? job.name : say("空闲", "free")}
      </span>
    </div>
  );
}

export function JobLine({ job, place = -1 }: { job: Job; place?: number }) {
  const say = useSay();
  const { progress } = job;
  return (
    <li>
      <a className="job-line" href={`#/train/${encodeURIComponent(job.id)}`}>
        <span className="job-name">
          {job.name || job.id}
          <span className="faint"> · {job.recipe}/{job.script}</span>
        </span>
        <Badge state={job.state} />
        <span className="faint job-facts">
          {job.state === "queued" && place >= 0 && say(`第 ${place + 1} 位`, `place ${place + 1}`)}
          {isAlive(job) && progress?.step != null && `${progress.step}/${progress.steps ?? "?"}`}
          {isAlive(job) && progress?.eta_seconds != null &&
            say(` · 还要 ${duration(progress.eta_seconds)}`, ` · ${duration(progress.eta_seconds)} left`)}
          {!isAlive(job) && moment(job.ended ?? job.created)}
        </span>
        {isAlive(job) && <ProgressBar job={job} />}
      </a>
    </li>
  );
}

function Newest({ weights }: { weights: Weights[] }) {
  const say = useSay();
  const newest = [...weights]
    .sort((a, b) => seconds(b.modified ?? 0) - seconds(a.modified ?? 0))
    .slice(0, NEWEST);
  if (newest.length === 0) return <Empty>{say("还没有结果。", "No result yet.")}</Empty>;
  return (
    <ul className="results">
      {newest.map((one) => (
        <li key={one.id}>
          <div>
            <a href={`#/eval/${encodeURIComponent(one.id)}`} title={one.path_label}>
              {weightsName(one.path_label)}
            </a>
            <div className="faint">
              {[one.recipe, kindOf(one, say), megabytes(one.size_mb), moment(one.modified)].filter(Boolean).join(" · ")}
            </div>
          </div>
          <Metrics metrics={one.metrics} />
        </li>
      ))}
    </ul>
  );
}

function kindOf(weights: Weights, say: (zh: string, en: string) => string): string {
  if (weights.kind === "adapter") return "LoRA";
  if (weights.kind === "folder") return say("模型", "model");
  return weights.finished ? say("训练结果", "run") : say("未完成", "unfinished");
}

/** Numbers of {before, after}, or of a flat object. */
function Metrics({ metrics }: { metrics: Record<string, unknown> | null }) {
  if (!metrics) return null;
  const before = (metrics.before ?? {}) as Record<string, unknown>;
  const after = (metrics.after ?? metrics) as Record<string, unknown>;
  const names = Object.keys(after).filter((name) => typeof after[name] === "number").slice(0, 3);
  return (
    <dl className="metrics">
      {names.map((name) => (
        <div key={name}>
          <dt>{name}</dt>
          <dd>
            {typeof before[name] === "number" && <span className="faint">{number(before[name] as number)} → </span>}
            {number(after[name] as number)}
          </dd>
        </div>
      ))}
    </dl>
  );
}
