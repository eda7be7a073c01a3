/** Training: the list of jobs, one job, or the form that starts one. */

import { useSay } from "../language";
import { Card, Empty, Waiting } from "../parts/common";
import { seconds } from "../format";
import type { Status } from "../types";
import { JobLine } from "./Overview";
import { JobView } from "./training/JobView";
import { StartForm } from "./training/StartForm";

export function Training({ status, words, go, reload }: {
  status: Status | null;
  words: string[];
  go: (...words: string[]) => void;
  reload: () => void;
}) {
  const say = useSay();
  const [what, dataset] = words;
  if (!status) return <Waiting />;
  const job = status.jobs.find((one) => one.id === what);
  const started = (id: string) => {
    reload();
    go("train", id);
  };
  if (what === "new") {
    return (
      <>
        <Back />
        <h1>{say("开始训练", "Start training")}</h1>
        <StartForm chosen={status.chosen} dataset={dataset} onStarted={started} />
      </>
    );
  }
  if (what) {
    return (
      <>
        <Back />
        {job ? (
          <JobView key={job.id} job={job} reload={reload} onStarted={started} onRemoved={() => {
            reload();
            go("train");
          }} />
        ) : (
          <Empty>{say("没有这个任务。", "There is no such job.")}</Empty>
        )}
      </>
    );
  }
  const newestFirst = [...status.jobs].sort((a, b) => seconds(b.created ?? 0) - seconds(a.created ?? 0));
  return (
    <>
      <h1>{say("训练", "Training")}</h1>
      <Card
        title={say("任务", "Jobs")}
        action={<a className="button primary" href="#/train/new">{say("开始训练", "Start training")}</a>}
      >
        {newestFirst.length === 0 && (
          <Empty>
            {say(
              "还没有任务。默认的微型模型和样例数据不用准备任何东西，一两分钟就能看到损失下降。",
              "No job yet. The built-in tiny model and its samples need no preparation: the loss falls within a minute or two.",
            )}
          </Empty>
        )}
        <ul className="jobs">
          {newestFirst.map((one) => (
            <JobLine key={one.id} job={one} place={status.queue.indexOf(one.id)} />
          ))}
        </ul>
      </Card>
    </>
  );
}

function Back() {
  const say = useSay();
  return (
    <a className="back" href="#/train">
      ← {say("所有任务", "All jobs")}
    </a>
  );
}
