/** Eleven short chapters, each with a figure that is computed as it is touched. */

import { useEffect } from "react";
import { get } from "../api";
import { weightsName } from "../format";
import { useLoaded, useStored } from "../hooks";
import { useSay } from "../language";
import { Text } from "../parts/Text";
import type { Weights } from "../types";
import { attention } from "./chapters/attention";
import type { Chapter } from "./chapters/chapter";
import { deployment } from "./chapters/deployment";
import { dpo } from "./chapters/dpo";
import { embedding } from "./chapters/embedding";
import { moe } from "./chapters/moe";
import { pretraining } from "./chapters/pretraining";
import { rl } from "./chapters/rl";
import { rope } from "./chapters/rope";
import { sft } from "./chapters/sft";
import { tokenizer } from "./chapters/tokenizer";
import { toolCalls } from "./chapters/tools";
import { WeightsContext } from "./figure";

const CHAPTERS: Chapter[] = [
  tokenizer,
  embedding,
  attention,
  rope,
  moe,
  pretraining,
  sft,
  dpo,
  rl,
  toolCalls,
  deployment,
];

export function Tutorial({ chapter }: { chapter?: string }) {
  const say = useSay();
  const [weights, setWeights] = useStored("tutorial-weights", "tiny");
  const place = CHAPTERS.findIndex((one) => one.id === chapter);
  if (place < 0) return <Contents />;
  const shown = CHAPTERS[place];
  const previous = CHAPTERS[place - 1];
  const next = CHAPTERS[place + 1];
  return (
    <WeightsContext value={weights}>
      <div className="row spread chapter-top">
        <a className="back" href="#/tutorial">
          ← {say("目录", "Contents")}
        </a>
        <WeightsChoice value={weights} onChange={setWeights} />
      </div>
      <article className="chapter" key={shown.id}>
        <p className="faint chapter-number">
          {say(`第 ${place + 1} 章，共 ${CHAPTERS.length} 章`, `Chapter ${place + 1} of ${CHAPTERS.length}`)}
        </p>
        <h1>{say(...shown.title)}</h1>
        <Text>{say(...shown.before)}</Text>
        <shown.Figure />
        <Text>{say(...shown.after)}</Text>
      </article>
      <nav className="row spread chapter-nav" aria-label={say("章节", "Chapters")}>
        {previous ? (
          <a className="button" href={`#/tutorial/${previous.id}`}>
            ← {say(...previous.title)}
          </a>
        ) : (
          <span />
        )}
        {next ? (
          <a className="button primary" href={`#/tutorial/${next.id}`}>
            {say(...next.title)} →
          </a>
        ) : (
          <a className="button primary" href="#/train/new">
            {say("现在训练一个", "Now train one")} →
          </a>
        )}
      </nav>
    </WeightsContext>
  );
}

function Contents() {
  const say = useSay();
  return (
    <>
      <h1>{say("教程", "Tutorial")}</h1>
      <p className="lead">
        {say(
          "一个语言模型从文字到回答经过哪些步骤？每章读三分钟，再动手改一改图里的字和数：图是这台机器上的微型模型当场算的，不是画好的。",
          "What happens between a text and an answer? Each chapter takes three minutes; then change the words and numbers of its figure: it is computed by a tiny model on this machine, not drawn beforehand.",
        )}
      </p>
      <ol className="contents">
        {CHAPTERS.map((one, i) => (
          <li key={one.id}>
            <a href={`#/tutorial/${one.id}`}>
              <span className="chapter-mark">{i + 1}</span>
              <span>
                <b>{say(...one.title)}</b>
                <span className="faint">{say(...one.lead)}</span>
              </span>
            </a>
          </li>
        ))}
      </ol>
    </>
  );
}

function WeightsChoice({ value, onChange }: { value: string; onChange: (id: string) => void }) {
  const say = useSay();
  const found = useLoaded(() => get<{ weights: Weights[] }>("/api/weights"), 0);
  const runs = found.data?.weights ?? [];
  const known = value === "tiny" || runs.some((one) => one.id === value);
  const gone = found.data !== null && !known;
  useEffect(() => {
    if (gone) onChange("tiny");
  }, [gone, onChange]);
  return (
    <label className="row">
      <span className="faint">{say("用哪个模型算", "Computed by")}</span>
      <select value={value} onChange={(event) => onChange(event.target.value)}>
        <option value="tiny">{say("随机的微型模型", "a random tiny model")}</option>
        {runs
          .filter((one) => one.recipe === "minimind_npu" || one.chat)
          .map((one) => (
            <option key={one.id} value={one.id}>
              {weightsName(one.path_label)}
            </option>
          ))}
      </select>
    </label>
  );
}
