import { useState } from "react";
import { number } from "../../format";
import { useSay } from "../../language";
import { visible } from "../../parts/Tokens";
import { FigureBox, TextInput, useFigure } from "../figure";
import type { Chapter } from "./chapter";

interface RowLoss {
  tokens: { text: string; label: boolean; loss: number; probability: number }[];
  loss: number;
  perplexity: number;
  labels: number;
  uniform: number;
}

function Figure() {
  const say = useSay();
  const [question, setQuestion] = useState("法国的首都是哪里？");
  const [answer, setAnswer] = useState("法国的首都是巴黎。");
  const figure = useFigure<RowLoss>("row_loss", { question, answer });
  const { data } = figure;
  const most = data ? data.uniform * 1.5 : 1;
  return (
    <FigureBox
      title={say("一行数据里，哪些字算损失", "Which part of a row has a loss")}
      figure={figure}
      controls={
        <>
          <TextInput label={say("问题", "Question")} value={question} onChange={setQuestion} />
          <TextInput label={say("回答", "Answer")} value={answer} onChange={setAnswer} />
        </>
      }
    >
      {data && (
        <>
          <div className="loss-row">
            {data.tokens.map((one, i) => (
              <span
                key={i}
                className={one.label ? "loss-token trained" : "loss-token read"}
                title={one.label ? `−log ${number(one.probability)} = ${number(one.loss)}` : say("没有标签", "no label")}
              >
                <span className="loss-track">
                  <span
                    className="loss-bar"
                    style={{ height: one.label ? `${Math.min(1, one.loss / most) * 100}%` : "0" }}
                  />
                </span>
                <span className="loss-text">{visible(one.text).replaceAll("\n", "↵")}</span>
                <span className="loss-value">{one.label ? one.loss.toFixed(1) : ""}</span>
              </span>
            ))}
          </div>
          <p className="faint">
            {say(
              `${data.labels} 个词元有标签，平均损失 ${number(data.loss)}，困惑度 ${number(data.perplexity)}。什么都不知道的话是 ${number(data.uniform)}。`,
              `${data.labels} tokens have a label; mean loss ${number(data.loss)}, perplexity ${number(data.perplexity)}. Knowing nothing would be ${number(data.uniform)}.`,
            )}
          </p>
        </>
      )}
    </FigureBox>
  );
}

export const sft: Chapter = {
  id: "sft",
  title: ["指令微调", "Fine-tuning (SFT)"],
  lead: ["只在回答上算损失", "The loss is on the answers only"],
  Figure,
  before: [
    `预训练出来的模型会接话，不会答话：你问一句，它可能再问三句。**指令微调**（SFT）用“问题—回答”教它。损失还是猜下一个词元，只是**只在回答上算**：问题是读的，不是学着写的。

哪里开始是回答，由**对话模板**决定：它在每一轮前后加上 \`<|im_start|>\` 和 \`<|im_end|>\` 这样的特殊词元。回答末尾的结束词元也要训练，不然模型不知道什么时候停。`,
    `A pre-trained model continues; it does not answer: asked one question it may add three more. **Supervised fine-tuning** (SFT) teaches it with questions and answers. The loss is still that of the next token, but **only on the answers**: questions are read, not learnt to be written.

Where an answer begins is decided by the **chat template**, which puts special tokens such as \`<|im_start|>\` and \`<|im_end|>\` around every turn. The end token of an answer is trained too, or the model would never know when to stop.`,
  ],
  after: [
    `**试一试**

- 看清楚哪些词元有颜色：回答和它的结束词元，别的都没有。
- 写一个明显错的回答，训练过的模型会在错的那个字上突然拔高。
- 第一个字的损失常常最高，后面越来越顺。

在“数据”页里，你自己的文件也是这样上色的：用的是那个配方训练时同一段代码。

LoRA 只训练贴在大矩阵旁边的两个小矩阵，其余不动；损失是同一个。

代码：\`common/data/labels.py\` 找出回答，\`minimind_npu/stages/sft.py\` 只有二十行。`,
    `**Try**

- See which tokens have a colour: the answer and its end token, nothing else.
- Write an answer that is plainly wrong: a trained model jumps up at the wrong character.
- The first character is often the dearest; then it gets easier.

The Data tab colours your own files in the same way, with the very code that trains on them.

LoRA trains two small matrices beside each large one and leaves the rest alone; the loss is the same.

Code: \`common/data/labels.py\` finds the answers; \`minimind_npu/stages/sft.py\` has twenty lines.`,
  ],
};
