import { useState } from "react";
import { useSay } from "../../language";
import { Choice, FigureBox, TextInput, useFigure } from "../figure";
import { Matrix } from "../Matrix";
import type { Chapter } from "./chapter";

interface AttentionMap {
  tokens: string[];
  layers: number;
  heads: number;
  weights: number[][];
}

function Figure() {
  const say = useSay();
  const [text, setText] = useState("小明把苹果给了小红，他很高兴。");
  const [layer, setLayer] = useState(0);
  const [head, setHead] = useState(0);
  const figure = useFigure<AttentionMap>("attention", { text, layer, head });
  return (
    <FigureBox
      title={say("谁在看谁", "Who looks at whom")}
      figure={figure}
      controls={
        <>
          <TextInput label={say("一句话", "A sentence")} value={text} onChange={setText} most={80} />
          <Choice label={say("层", "Layer")} count={figure.data?.layers ?? 1} value={layer} onChange={setLayer} />
          <Choice label={say("头", "Head")} count={figure.data?.heads ?? 1} value={head} onChange={setHead} />
        </>
      }
    >
      {figure.data && (
        <Matrix
          rows={figure.data.tokens}
          columns={figure.data.tokens}
          values={figure.data.weights}
          label={say("注意力热图", "attention heat map")}
          rowWord={say("这个词元", "this token")}
          columnWord={say("看前面的", "looks at")}
        />
      )}
    </FigureBox>
  );
}

export const attention: Chapter = {
  id: "attention",
  title: ["注意力", "Attention"],
  lead: ["每个词元从前文里取什么", "What each token takes from those before it"],
  Figure,
  before: [
    `词向量只认识自己。要明白“他”是谁，得往前看，这就是**注意力**。

每个词元算出三个向量：**查询**（我在找什么）、**键**（我有什么可找）、**值**（找到我能拿走什么）。查询和前面每个键做点积，除以 √d，经过 softmax 变成一行加起来等于 1 的份额；按份额把值加起来，就是它从前文取到的东西。

\`softmax(Q Kᵀ / √d) V\`

只许往前看（因果），不然预测下一个词元就成了抄答案：所以下图右上方是空的。`,
    `An embedding knows only itself. To find out who "he" is one has to look back: that is **attention**.

Each token computes three vectors: a **query** (what am I looking for), a **key** (what can be found here) and a **value** (what one takes away). The query is multiplied with every key before it, divided by √d, and softmax turns the products into shares that sum to 1; the values added up by these shares are what the token takes from its past.

\`softmax(Q Kᵀ / √d) V\`

Looking ahead is forbidden (causal), or predicting the next token would be copying it: the upper right of the figure is empty.`,
  ],
  after: [
    `**试一试**

- 换层、换头：每个头有自己的查询和键，学会看不同的东西。
- 第一行只能看自己，份额是 1；越往后可看的越多，颜色越淡。
- 换成训练过的权重，会看到有的头总看前一个词元，有的总看开头。

几个查询头可以共用一组键和值（GQA）：微型模型 4 个查询头共用 2 组。推理时存下来的键和值因此少一半，第 11 章会算这笔账。

代码：\`minimind_npu/model.py\` 的 \`Attention\`；这张热图由 \`tools/manager/tutorial/lesson.py\` 取出。`,
    `**Try**

- Change layer and head: each head has its own queries and keys and learns to look at something else.
- The first row can only look at itself, with a share of 1; later rows have more to look at and are paler.
- With trained weights some heads always look at the token before, others at the beginning.

Several query heads may share one set of keys and values (GQA): the tiny model has 4 query heads and 2 shared sets. What is kept while generating is halved; chapter 11 has the sums.

Code: \`Attention\` in \`minimind_npu/model.py\`; the map is taken out by \`tools/manager/tutorial/lesson.py\`.`,
  ],
};
