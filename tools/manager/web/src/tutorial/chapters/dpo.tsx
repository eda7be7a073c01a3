import { useState } from "react";
import { number } from "../../format";
import { useSay } from "../../language";
import { Slider } from "../../parts/common";
import { LineChart } from "../../parts/LineChart";
import type { Points } from "../../types";
import { FigureBox, TextInput, useFigure } from "../figure";
import type { Chapter } from "./chapter";

interface Side {
  log_prob: number;
  tokens: number;
}

interface Dpo {
  chosen: Side;
  rejected: Side;
  margin: number;
  loss: number;
  pull: number;
  curve: Points;
  pulls: Points;
}

function Figure() {
  const say = useSay();
  const [prompt, setPrompt] = useState("法国的首都叫什么？");
  const [chosen, setChosen] = useState("您好，法国的首都是巴黎。");
  const [rejected, setRejected] = useState("笨死了，法国的首都是巴黎。");
  const [beta, setBeta] = useState(0.15);
  const [up, setUp] = useState(0);
  const [down, setDown] = useState(0);
  const figure = useFigure<Dpo>("dpo", {
    prompt,
    chosen,
    rejected,
    beta,
    gained_chosen: up,
    gained_rejected: down,
  });
  const { data } = figure;
  return (
    <FigureBox
      title={say("一对回答站在损失曲线的哪里", "Where a pair stands on the loss")}
      figure={figure}
      controls={
        <>
          <TextInput label={say("问题", "Question")} value={prompt} onChange={setPrompt} />
          <TextInput label={say("更好的", "Chosen")} value={chosen} onChange={setChosen} />
          <TextInput label={say("较差的", "Rejected")} value={rejected} onChange={setRejected} />
          <Slider label={say("训练让更好的 log 概率变了", "training changed chosen by")} value={up} low={-20} high={20} step={0.5} onChange={setUp} />
          <Slider label={say("让较差的变了", "and rejected by")} value={down} low={-20} high={20} step={0.5} onChange={setDown} />
          <Slider label="beta" value={beta} low={0.05} high={1} step={0.05} onChange={setBeta} />
        </>
      }
    >
      {data && (
        <>
          <dl className="metrics wide">
            <div>
              <dt>{say("起点：更好的", "start: chosen")}</dt>
              <dd>{number(data.chosen.log_prob)}</dd>
            </div>
            <div>
              <dt>{say("起点：较差的", "start: rejected")}</dt>
              <dd>{number(data.rejected.log_prob)}</dd>
            </div>
            <div>
              <dt>{say("差距", "margin")}</dt>
              <dd>{number(data.margin)}</dd>
            </div>
            <div>
              <dt>{say("损失", "loss")}</dt>
              <dd>{number(data.loss)}</dd>
            </div>
            <div>
              <dt>{say("拉力", "pull")}</dt>
              <dd>{number(data.pull)}</dd>
            </div>
          </dl>
          <div className="charts">
            <LineChart
              title={say("损失", "Loss")}
              xTitle={say("差距", "margin")}
              curves={[
                { name: "−log σ", points: data.curve, still: true },
                { name: say("这一对", "this pair"), points: [[data.margin, data.loss]], dots: true },
              ]}
            />
            <LineChart
              title={say("拉力（梯度的大小）", "Pull (size of the gradient)")}
              xTitle={say("差距", "margin")}
              curves={[
                { name: "β σ(−m)", points: data.pulls, still: true },
                { name: say("这一对", "this pair"), points: [[data.margin, data.pull]], dots: true },
              ]}
            />
          </div>
        </>
      )}
    </FigureBox>
  );
}

export const dpo: Chapter = {
  id: "dpo",
  title: ["偏好优化", "Preferences (DPO)"],
  lead: ["两个回答里，哪个更好", "Which of two answers is better"],
  Figure,
  before: [
    `有些事没有标准答案，但比得出高下：更客气、更准确、更安全。**DPO** 的一行数据是一个问题和两个回答，一个更好，一个较差。

它比较的是**变化**：训练以来，更好的那个概率涨了多少，较差的涨了多少，起点的模型是参照。两者之差乘以 β 叫**差距**，损失是

\`−log σ(β · (更好的涨幅 − 较差的涨幅))\``,
    `Some things have no right answer, but one can say which is better: more polite, more exact, safer. A row of **DPO** is a question and two answers, one chosen, one rejected.

What is compared is the **change**: since the start of training, how much likelier has the chosen one become, how much the rejected one; the model at the start is the reference. The difference times β is the **margin**, and the loss is

\`−log σ(β · (gain of chosen − gain of rejected))\``,
  ],
  after: [
    `**试一试**

- 刚开始谁也没变：差距 0，损失 log 2 ≈ 0.693，拉力是 β 的一半。
- 拉大差距：损失趋近 0，拉力也消失，学会了的对子不再拉扯模型。
- 把两个滑块一起往左拖：损失不变！DPO 只管差距，两个回答的概率可以一起掉。这是它常见的毛病，所以训练报告里要看差距，也要看回答本身。
- β 大，同样的变化算得更重，模型离参照更近就满足了。

代码：\`minimind_npu/stages/dpo.py\` 的 \`loss\`，公式来自 Rafailov 等人 2023。`,
    `**Try**

- At first nothing has changed: margin 0, loss log 2 ≈ 0.693, and the pull is half of β.
- Widen the margin: the loss goes to 0 and so does the pull; a pair that is learnt pulls no more.
- Move both sliders to the left together: the loss stays! DPO minds the difference only, both answers may become less likely. That is its usual weakness, so look at the answers in the report, not only at the margin.
- With a large β the same change counts for more, and the model is content nearer to its reference.

Code: \`loss\` in \`minimind_npu/stages/dpo.py\`; the formula is that of Rafailov et al. 2023.`,
  ],
};
