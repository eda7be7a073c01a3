import { useState } from "react";
import { number } from "../../format";
import { useSay } from "../../language";
import { NamedBars } from "../../parts/Bars";
import { Slider } from "../../parts/common";
import { visible } from "../../parts/Tokens";
import { FigureBox, TextInput, useFigure } from "../figure";
import type { Chapter } from "./chapter";

interface NextToken {
  tokens: string[];
  candidates: { id: number; text: string; probability: number; sampled: number }[];
  rest: number;
  kept: number;
  vocabulary: number;
  entropy: number;
}

function Figure() {
  const say = useSay();
  const [text, setText] = useState("三加五等于");
  const [temperature, setTemperature] = useState(1);
  const [topK, setTopK] = useState(0);
  const [topP, setTopP] = useState(1);
  const figure = useFigure<NextToken>("next_token", { text, temperature, top_k: topK, top_p: topP });
  const { data } = figure;
  const most = Math.max(0.001, ...(data?.candidates.map((one) => one.sampled) ?? []));
  return (
    <FigureBox
      title={say("下一个词元是什么", "What comes next")}
      figure={figure}
      controls={
        <>
          <TextInput label={say("开头", "Beginning")} value={text} onChange={setText} />
          <Slider label={say("温度", "temperature")} value={temperature} low={0.1} high={3} step={0.1} onChange={setTemperature} />
          <Slider
            label="top_k"
            text={topK === 0 ? say("不限", "off") : undefined}
            value={topK}
            low={0}
            high={50}
            step={1}
            onChange={setTopK}
          />
          <Slider label="top_p" value={topP} low={0.05} high={1} step={0.05} onChange={setTopP} />
        </>
      }
    >
      {data && (
        <>
          <NamedBars
            most={most}
            bars={data.candidates.map((one) => ({
              key: String(one.id),
              name: visible(one.text).replaceAll("\n", "↵"),
              value: one.sampled,
              marked: one.sampled > 0,
              text: `${(one.sampled * 100).toFixed(2)} %`,
              onClick: one.text.startsWith("⟨") ? undefined : () => setText((before) => (before + one.text).slice(0, 200)),
            }))}
          />
          <p className="faint">
            {say(
              `点一个就接上去。可能抽到的有 ${data.kept} 个（词表 ${data.vocabulary}），没画出的占原来的 ${number(data.rest * 100)} %；模型的犹豫是 ${data.entropy.toFixed(2)} 比特，完全不知道是 ${Math.log2(data.vocabulary).toFixed(2)}。`,
              `Choose one to append it. ${data.kept} of ${data.vocabulary} may be drawn; those not shown had ${number(data.rest * 100)} %. The model hesitates by ${data.entropy.toFixed(2)} bits; knowing nothing would be ${Math.log2(data.vocabulary).toFixed(2)}.`,
            )}
          </p>
        </>
      )}
    </FigureBox>
  );
}

export const pretraining: Chapter = {
  id: "pretraining",
  title: ["预训练", "Pre-training"],
  lead: ["猜下一个词元，猜上万亿次", "Guess the next token, trillions of times"],
  Figure,
  before: [
    `预训练只有一道题：看前面的文字，猜下一个词元。模型给词表里每个词元一个概率；真正出现的那个概率是 p，**损失**就是 −log p。猜得越准，损失越低。

一段文字的每个位置都是一道题，一次前向就能全部算完，不用人标注。要猜准“西班牙的首都是”后面的字，得记住事实；要猜准算式后面的数，得会算。语言、知识和一点推理，就这样从一道题里长出来。`,
    `Pre-training has a single exercise: read what stands before and guess the next token. The model gives every token of its vocabulary a probability; if the one that really comes had p, the **loss** is −log p. Better guesses, lower loss.

Every position of a text is such an exercise, one forward pass does all of them, and nobody has to label anything. To guess what follows "the capital of Spain is" one has to remember facts; to guess what follows a sum one has to add. Language, knowledge and a little reasoning grow out of one exercise.`,
  ],
  after: [
    `**试一试**

- 随机模型：二十个候选的概率几乎一样，约等于 1 除以词表大小。训练后换上你的权重，第一名会远远领先。
- 降低温度：高的更高，低的更低；调到最低就总选第一名。
- \`top_k\` 只留前几名，\`top_p\` 只留加起来够 p 的前几名：长尾里的怪字就抽不到了。

几段短文拼在一个窗口里时，位置从头数起，注意力互不相见：没有填充，也不会串味。

代码：\`minimind_npu/stages/pretrain.py\`；训练循环在 \`minimind_npu/train.py\`，从上往下读。`,
    `**Try**

- A random model: the twenty candidates are nearly equal, each about 1 over the size of the vocabulary. With trained weights the first one is far ahead.
- Lower the temperature: the high get higher, the low lower; at the lowest it is always the first.
- \`top_k\` keeps the first few, \`top_p\` the first that sum to p: odd tokens of the long tail are never drawn.

Where short texts share one window, positions restart and attention does not cross: no padding, no mixing.

Code: \`minimind_npu/stages/pretrain.py\`; the loop is \`minimind_npu/train.py\`, to be read from top to bottom.`,
  ],
};
