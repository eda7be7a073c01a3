import { useState } from "react";
import { number } from "../../format";
import { useSay } from "../../language";
import { NamedBars } from "../../parts/Bars";
import { Slider } from "../../parts/common";
import { FigureBox, useFigure } from "../figure";
import type { Chapter } from "./chapter";

interface Rl {
  mean: number;
  deviation: number;
  grpo: number[];
  reinforce: number[];
  silent: boolean;
}

const FEWEST = 2;
const MOST = 8;

function Figure() {
  const say = useSay();
  const [rewards, setRewards] = useState([1, 0, 0.2, 1, 0, 0.5]);
  const figure = useFigure<Rl>("rl", { rewards });
  const { data } = figure;
  const name = (i: number) => say(`回答 ${i + 1}`, `answer ${i + 1}`);
  const bars = (values: number[]) => values.map((value, i) => ({ key: String(i), name: name(i), value, text: value.toFixed(2) }));
  return (
    <FigureBox
      title={say("一组回答的优势", "Advantages within a group")}
      figure={figure}
      controls={
        <>
          {rewards.map((reward, i) => (
            <Slider
              key={i}
              label={say(`${name(i)} 的奖励`, `reward of ${name(i)}`)}
              value={reward}
              low={-1}
              high={2}
              step={0.1}
              onChange={(value) => setRewards((before) => before.map((one, j) => (j === i ? value : one)))}
            />
          ))}
          <div className="row">
            <button type="button" disabled={rewards.length >= MOST} onClick={() => setRewards([...rewards, 0])}>
              {say("加一个", "Add one")}
            </button>
            <button type="button" disabled={rewards.length <= FEWEST} onClick={() => setRewards(rewards.slice(0, -1))}>
              {say("减一个", "Remove one")}
            </button>
            <button type="button" className="quiet" onClick={() => setRewards(rewards.map(() => 1))}>
              {say("全都答对", "All right")}
            </button>
          </div>
        </>
      }
    >
      {data && (
        <>
          <div className="two-columns">
            <div>
              <h3>GRPO: (r − {say("平均", "mean")}) / {say("标准差", "deviation")}</h3>
              <NamedBars bars={bars(data.grpo)} />
            </div>
            <div>
              <h3>REINFORCE: r − {say("平均", "mean")}</h3>
              <NamedBars bars={bars(data.reinforce)} />
            </div>
          </div>
          <p className={data.silent ? "note" : "faint"}>
            {data.silent
              ? say("这一组奖励全一样：没有谁比谁好，什么也学不到。", "All rewards of this group are equal: nothing is better than anything, nothing is learnt.")
              : say(`平均 ${number(data.mean)}，标准差 ${number(data.deviation)}。`, `Mean ${number(data.mean)}, deviation ${number(data.deviation)}.`)}
          </p>
        </>
      )}
    </FigureBox>
  );
}

export const rl: Chapter = {
  id: "rl",
  title: ["强化学习", "Reinforcement learning"],
  lead: ["自己答题，按分数调整", "Answer by oneself and follow the score"],
  Figure,
  before: [
    `微调是抄范文，强化学习是自己写、等打分。一道题让模型写出好几个回答，每个得一个**奖励**：答案对不对、格式好不好、工具用没用成。

奖励的绝对值不重要，重要的是比同组的别人好多少，这叫**优势**。优势为正的回答，每个词元的概率都往上推；为负的往下压。**GRPO** 用同组的平均当基准，再除以标准差，省掉了 PPO 里那个专门估分的价值网络。`,
    `Fine-tuning copies model answers; reinforcement learning writes its own and waits for a score. The model answers a question several times, and each answer gets a **reward**: is it right, is its form good, did the tool work.

What counts is not the reward but how much better it is than the others of its group: its **advantage**. Where it is positive, all tokens of the answer are pushed up; where negative, down. **GRPO** takes the mean of the group as its baseline and divides by the deviation, which saves PPO's separate network that estimates values.`,
  ],
  after: [
    `**试一试**

- 点“全都答对”：优势全是 0。题太容易或太难，都学不到东西；训练记录里的 \`no_signal\` 就是这样的组占多少。
- 只留一个 1，其余全 0：稀有的好回答，GRPO 给它很大的优势。
- 把差异调得很小：除以标准差会把它放大，REINFORCE（以及 Dr. GRPO）不会。

还要拴一根绳子：KL 惩罚让模型别离起点太远，剪裁让一步别迈太大。不然它会找到奖励的漏洞，比如一直重复让长度分变高的话。

代码：\`minimind_npu/rl/losses/\` 里一种算法一个文件；\`minimind_npu/train_rl.py\` 把它们串起来。`,
    `**Try**

- "All right": every advantage is 0. Questions that are too easy or too hard teach nothing; \`no_signal\` in the records is the share of such groups.
- One 1 and zeros: GRPO gives the rare good answer a large advantage.
- Make the differences tiny: dividing by the deviation blows them up; REINFORCE (and Dr. GRPO) does not.

A leash is needed too: a KL penalty keeps the model near its start, clipping keeps each step small. Otherwise it finds the holes in the reward, say by repeating what scores for length.

Code: \`minimind_npu/rl/losses/\` has one file per algorithm; \`minimind_npu/train_rl.py\` ties them together.`,
  ],
};
