import { useState } from "react";
import { count, number } from "../../format";
import { useSay } from "../../language";
import { NamedBars } from "../../parts/Bars";
import { Choice, FigureBox, TextInput, useFigure } from "../figure";
import { Matrix } from "../Matrix";
import type { Chapter } from "./chapter";

interface Experts {
  tokens: string[];
  layers: number;
  experts: number;
  picks: number;
  probabilities: number[][];
  chosen: number[][];
  shares: number[];
  parameters: number;
  active: number;
}

function Figure() {
  const say = useSay();
  const [text, setText] = useState("三加五等于八。北京的天气很好。");
  const [layer, setLayer] = useState(0);
  const figure = useFigure<Experts>("experts", { text, layer });
  const { data } = figure;
  const names = Array.from({ length: data?.experts ?? 0 }, (_, i) => say(`专家${i + 1}`, `exp. ${i + 1}`));
  return (
    <FigureBox
      title={say("每个词元去了哪位专家", "Which expert each token went to")}
      figure={figure}
      controls={
        <>
          <TextInput label={say("一句话", "A sentence")} value={text} onChange={setText} most={80} />
          <Choice label={say("层", "Layer")} count={data?.layers ?? 1} value={layer} onChange={setLayer} />
        </>
      }
    >
      {data && (
        <div className="two-columns">
          <div>
            <h3>{say("路由的概率（框出的是选中的）", "The router's probabilities (framed: chosen)")}</h3>
            <Matrix
              rows={data.tokens}
              columns={names}
              values={data.probabilities}
              marked={(i, j) => data.chosen[i].includes(j)}
              label={say("专家概率", "probabilities of experts")}
              rowWord={say("词元", "token")}
              columnWord={say("专家", "expert")}
            />
          </div>
          <div>
            <h3>{say("各专家分到多少", "The share of each expert")}</h3>
            <NamedBars
              most={1}
              bars={data.shares.map((share, i) => ({
                key: names[i],
                name: names[i],
                value: share,
                text: `${(share * 100).toFixed(1)} %`,
              }))}
            />
            <p className="faint">
              {say(
                `均匀的话每位 ${number(100 / data.experts)} %。模型共 ${count(data.parameters)} 个参数，每个词元只用到 ${count(data.active)} 个。`,
                `Even shares would be ${number(100 / data.experts)} % each. Of ${count(data.parameters)} parameters a token uses ${count(data.active)}.`,
              )}
            </p>
          </div>
        </div>
      )}
    </FigureBox>
  );
}

export const moe: Chapter = {
  id: "moe",
  title: ["混合专家", "Mixture of experts (MoE)"],
  lead: ["参数很多，每次只用一点", "Many parameters, few used at a time"],
  Figure,
  before: [
    `注意力之后是**前馈层**：每个词元各自经过两次放大和一次收缩（SwiGLU）。模型的大部分参数在这里。

**混合专家**把它换成几个并排的前馈层，前面加一个小小的**路由**：它给每位专家打分，分最高的一两位处理这个词元，其余的不算。参数可以多几倍，每个词元的计算量几乎不变。`,
    `After attention comes the **feed-forward layer**: each token for itself is widened twice and narrowed once (SwiGLU). Most parameters are here.

A **mixture of experts** puts several such layers side by side with a small **router** in front: it scores the experts, the best one or two process the token, the others rest. There may be several times the parameters at nearly the same computation per token.`,
  ],
  after: [
    `**麻烦**在均衡。要是路由偏爱一位专家，它学得最多，就更受偏爱，其余的荒废了。所以损失里加一小项：各专家的份额乘以它的平均概率，全部相等时最小。

**试一试**

- 换层：每层的路由各选各的。
- 随机模型的概率都接近均等，选谁几乎是碰运气；训练之后会分出工来，不过常常是按字形和位置，不是按“数学专家”“诗歌专家”。

一位专家时不要把权重归一化成 1：那样路由从语言损失里得不到梯度（这里的 \`norm_topk_prob\` 默认是关的）。

代码：\`minimind_npu/model.py\` 的 \`SparseFeedForward\`。你选的权重没有专家时，这张图用随机的 \`tiny-moe\`。`,
    `**The trouble** is balance. If the router prefers one expert, that one learns most and is preferred even more while the others lie idle. So a small term is added to the loss: the share of each expert times its mean probability, smallest when all are equal.

**Try**

- Change the layer: each router chooses for itself.
- In a random model the probabilities are nearly even and the choice is luck; training divides the work, though more often by spelling and position than into "experts of maths" and "of poems".

With one expert per token its weight must not be normalised to 1, or the router gets no gradient from the language model's loss (\`norm_topk_prob\` is off here).

Code: \`SparseFeedForward\` in \`minimind_npu/model.py\`. Where the chosen weights have no experts, the figure uses a random \`tiny-moe\`.`,
  ],
};
