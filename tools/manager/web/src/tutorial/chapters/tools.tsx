import { useState } from "react";
import { useSay } from "../../language";
import { FigureBox, TextInput, useFigure } from "../figure";
import type { Chapter } from "./chapter";

interface ToolSteps {
  steps: { kind: "prompt" | "call" | "result" | "again"; text: string }[];
  problem: string;
  tools: string[];
  failed: boolean;
}

const CALLS: [string, string, string][] = [
  ["37乘52等于多少？", '{"name": "calculator", "arguments": {"expression": "37*52"}}', "calculator"],
  ["2024-2-28再过2天是哪天？", '{"name": "date", "arguments": {"date": "2024-2-28", "days": 2}}', "date"],
  ["3公里是多少米？", '{"name": "units", "arguments": {"value": 3, "unit": "公里", "to": "米"}}', "units"],
  ["37乘52等于多少？", '{"name": "calculator", "arguments": {"expr": 37}}', "✗"],
];

function Figure() {
  const say = useSay();
  const [question, setQuestion] = useState(CALLS[0][0]);
  const [call, setCall] = useState(CALLS[0][1]);
  const figure = useFigure<ToolSteps>("tools", { question, call });
  const { data } = figure;
  const first = data?.steps[0].text ?? "";
  const names = {
    prompt: say("1. 模型读到的：工具清单和问题", "1. What the model reads: the tools and the question"),
    call: say("2. 模型写出的：一次调用", "2. What the model writes: a call"),
    result: say("3. 程序执行的结果", "3. What the program gives back"),
    again: say("4. 模型再读到的：结果接在后面", "4. What the model reads next: the result behind it"),
  };
  return (
    <FigureBox
      title={say("一次工具调用，一步一步", "A call step by step")}
      figure={figure}
      controls={
        <>
          <TextInput label={say("问题", "Question")} value={question} onChange={setQuestion} />
          <TextInput label={say("模型写的调用（JSON）", "The model's call (JSON)")} value={call} onChange={setCall} most={400} rows={3} code />
          <div className="row">
            {CALLS.map(([text, json, label]) => (
              <button
                key={json}
                type="button"
                className="chip"
                onClick={() => {
                  setQuestion(text);
                  setCall(json);
                }}
              >
                {label === "✗" ? say("写错的", "a wrong one") : label}
              </button>
            ))}
          </div>
        </>
      }
    >
      {data?.problem && <p className="note">{data.problem}</p>}
      <ol className="steps">
        {data?.steps.map((step) => (
          <li key={step.kind} className={`step ${step.kind === "result" ? "tool" : step.kind}`}>
            <b>{names[step.kind]}</b>
            {step.kind === "again" && <p className="faint">{say("（前面同第 1 步）", "(as in step 1, then)")}</p>}
            <pre className="result">{step.kind === "again" ? behind(first, step.text) : step.text}</pre>
          </li>
        ))}
      </ol>
    </FigureBox>
  );
}

/** The part of a text that an earlier one does not begin with. */
function behind(before: string, text: string): string {
  let same = 0;
  while (same < before.length && before[same] === text[same]) same++;
  return text.slice(same);
}

export const toolCalls: Chapter = {
  id: "tools",
  title: ["工具调用", "Tool calls"],
  lead: ["模型写字，程序办事", "The model writes, the program acts"],
  Figure,
  before: [
    `模型不会真的“用”计算器，它只会写字。所谓**工具调用**，是约好一种写法：系统提示里用 JSON 列出有哪些工具、要哪些参数；模型需要时，写出一段 \`<tool_call>\` 和 JSON；程序认出来，检查参数，执行，再把结果当作新的一轮放回去；模型接着写回答。

训练数据里，调用是回答的一部分，要学；结果是外面来的，只读不学。`,
    `A model does not "use" a calculator; it writes. A **tool call** is an agreed way of writing: the system prompt lists tools and their parameters as JSON; where the model needs one it writes \`<tool_call>\` with JSON; the program recognises it, checks the arguments, runs it and puts the result back as a new turn; the model goes on with its answer.

In training data calls are part of the answer and learnt; results come from outside and are only read.`,
  ],
  after: [
    `**试一试**

- 把 \`37*52\` 改成别的算式，结果是真的算出来的。
- 点“写错的”：参数名不对，程序不执行，把错误告诉模型。好的模型会改正再来。
- 写 \`9**9**9**9\`：被拒绝，不会卡住。模型写什么都不可信，所以这些工具不执行代码，不读文件，不上网。

在“工具”页里可以让训练过的模型自己来，每一步都能改了重发。

代码：\`minimind_npu/toolcall/\`：\`calls.py\` 认出调用，\`registry.py\` 检查和执行，\`play.py\` 一轮一轮地跑。`,
    `**Try**

- Change \`37*52\` to another sum: the result is really computed.
- "A wrong one": the argument has another name, so nothing is run and the model is told the error. A good model corrects itself.
- \`9**9**9**9\` is refused and hangs nothing. What a model writes cannot be trusted, so these tools run no code, read no files and open no connections.

In the Tools tab a trained model does it by itself; each step can be changed and sent again.

Code: \`minimind_npu/toolcall/\`: \`calls.py\` recognises calls, \`registry.py\` checks and runs them, \`play.py\` goes from turn to turn.`,
  ],
};
