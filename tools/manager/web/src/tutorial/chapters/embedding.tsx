import { useState } from "react";
import { number } from "../../format";
import { useWidth } from "../../hooks";
import { useSay } from "../../language";
import { NamedBars } from "../../parts/Bars";
import { ColouredToken, visible } from "../../parts/Tokens";
import { FigureBox, TextInput, useFigure } from "../figure";
import type { Chapter } from "./chapter";

interface Point {
  text: string;
  x: number;
  y: number;
  own: boolean;
}

interface Embedding {
  tokens: string[];
  width: number;
  norm: number;
  neighbours: { id: number; text: string; cosine: number }[];
  points: Point[];
}

function Figure() {
  const say = useSay();
  const [text, setText] = useState("猫狗红蓝三五北京");
  const [chosen, setChosen] = useState(0);
  const figure = useFigure<Embedding>("embedding", { text, chosen });
  const change = (value: string) => {
    setText(value);
    setChosen(0);
  };
  return (
    <FigureBox
      title={say("向量空间里的邻居", "Neighbours in the space of vectors")}
      figure={figure}
      controls={<TextInput label={say("几个词", "Some words")} value={text} onChange={change} most={60} />}
    >
      <p className="faint">{say("点一个词元，看谁离它最近：", "Choose a token to see what is closest to it:")}</p>
      <div className="tokens big">
        {figure.data?.tokens.map((one, i) => (
          <ColouredToken key={i} index={i} text={one} strong={i === chosen} onClick={() => setChosen(i)} />
        ))}
      </div>
      {figure.data && (
        <div className="two-columns">
          <div>
            <h3>{say("最近的十个（余弦）", "The ten closest (cosine)")}</h3>
            <NamedBars
              most={1}
              bars={figure.data.neighbours.map((one) => ({
                key: String(one.id),
                name: visible(one.text),
                value: one.cosine,
                text: one.cosine.toFixed(3),
              }))}
            />
          </div>
          <div>
            <h3>{say("压到平面上", "Pressed flat")}</h3>
            <Scatter points={figure.data.points} />
            <p className="faint">
              {say(
                `每个词元是 ${figure.data.width} 个数，这里只画出变化最大的两个方向。长度 ${number(figure.data.norm)}。`,
                `A token is ${figure.data.width} numbers; drawn are the two directions in which they differ most. Length ${number(figure.data.norm)}.`,
              )}
            </p>
          </div>
        </div>
      )}
    </FigureBox>
  );
}

const HEIGHT = 280;
const PAD = 28;

function Scatter({ points }: { points: Point[] }) {
  const [frame, width] = useWidth();
  const span = (values: number[]) => [Math.min(...values), Math.max(...values)];
  const [x0, x1] = span(points.map((one) => one.x));
  const [y0, y1] = span(points.map((one) => one.y));
  const atX = (x: number) => PAD + ((x - x0) / (x1 - x0 || 1)) * (width - 2 * PAD);
  const atY = (y: number) => HEIGHT - PAD - ((y - y0) / (y1 - y0 || 1)) * (HEIGHT - 2 * PAD);
  return (
    <div ref={frame} className="scatter">
      {width > 0 && (
        <svg width={width} height={HEIGHT} role="img" aria-label={points.map((one) => one.text).join(" ")}>
          {points.map((one, i) => (
            <g key={i} className={one.own ? "curve-0" : "curve-1"}>
              <circle cx={atX(one.x)} cy={atY(one.y)} r={one.own ? 4.5 : 3} />
              <text className="tick" x={atX(one.x)} y={atY(one.y) - 8} textAnchor="middle">
                {visible(one.text)}
              </text>
            </g>
          ))}
        </svg>
      )}
    </div>
  );
}

export const embedding: Chapter = {
  id: "embedding",
  title: ["词向量", "Embedding"],
  lead: ["编号怎样变成有意思的方向", "How numbers become directions with a meaning"],
  Figure,
  before: [
    `编号本身没有意义：431 号不比 430 号“多一点”。所以模型有一张大表，每个词元一行，每行是一串可以学习的数，叫**词向量**。第一层做的就是查表。

两个向量朝向越接近，**余弦**越接近 1。训练从不直接规定谁和谁接近；只是在相似的上下文里出现的词元，要做出相似的预测，于是慢慢转到相近的方向。`,
    `The numbers mean nothing by themselves: 431 is not "a bit more" than 430. So the model has a large table with a row of learnable numbers for each token, its **embedding**. The first layer only looks up rows.

The closer two directions are, the closer their **cosine** is to 1. Nobody says which tokens should be close; but tokens that occur in similar contexts have to predict similar things, and so they slowly turn towards each other.`,
  ],
  after: [
    `**试一试**

- 现在是随机的微型模型：最近的邻居余弦也只有 0.2、0.3，谁和谁都没有关系。
- 训练一次（预训练或微调），在右上角换成你的权重，再看：数字挨着数字，颜色挨着颜色。

模型末尾还有一张同样大小的表，把向量变回每个词元的得分。小模型里这两张是同一张（权重共享），能省下很大一部分参数。

代码：\`minimind_npu/model.py\` 里的 \`embed_tokens\` 和 \`lm_head\`。`,
    `**Try**

- This is a random tiny model: even the nearest neighbours have a cosine of 0.2 or 0.3; nothing is related to anything.
- Train once (pre-training or fine-tuning), choose your weights at the top right and look again: digits stand beside digits, colours beside colours.

At its end the model has a table of the same size that turns vectors back into a score for every token. Small models use one table for both, which saves a large part of their parameters.

Code: \`embed_tokens\` and \`lm_head\` in \`minimind_npu/model.py\`.`,
  ],
};
