/** Tool playground: the model calls, the tool answers, step by step; every step can be changed and
 *  the conversation sent again from there. */

import { useEffect, useRef, useState } from "react";
import { get, post } from "../api";
import { forRequest, streamAnswer, type Answer, type Message, type ToolCall } from "../chatStream";
import { useLoaded } from "../hooks";
import { useSay } from "../language";
import { Card, Field, Problem, Waiting } from "../parts/common";
import type { Tool } from "../types";
import { ModelPicker, serverOf, type Picked } from "./chat/ModelPicker";
import { SamplingCard } from "./chat/SamplingCard";
import { fieldsOf, SAMPLING, useServers } from "./chat/servers";
import { StepCard } from "./tools/StepCard";

const MOST_ROUNDS = 6;
const EXAMPLES = ["37乘52等于多少？", "2024-2-28再过2天是哪天？", "3公里是多少米？", "红苹果多少钱？"];

export function Tools({ looked }: { looked: boolean }) {
  const say = useSay();
  const servers = useServers(looked);
  const builtIn = useLoaded(() => get<{ tools: Tool[] }>("/api/tools"), 0);
  const [schema, setSchema] = useState("");
  const [picked, setPicked] = useState<Picked>({ weights: "", model: "" });
  const [sampling, setSampling] = useState({ ...SAMPLING, temperature: 0 });
  const [question, setQuestion] = useState("");
  const [messages, setMessages] = useState<Message[]>([]);
  const [byHand, setByHand] = useState(false);
  const [busy, setBusy] = useState(false);
  const [error, setError] = useState<Error | null>(null);
  const stop = useRef(new AbortController());

  useEffect(() => {
    if (builtIn.data) setSchema((before) => before || JSON.stringify(builtIn.data!.tools, null, 2));
  }, [builtIn.data]);
  const { tools, problem } = read(schema);
  const known = builtIn.data?.tools.map((tool) => tool.function.name) ?? [];
  const server = serverOf(servers, picked);
  // a question without tools would be another one
  const hasTools = builtIn.data !== null || schema !== "";
  const canRun = server?.state === "ready" && hasTools && tools !== null && !busy;

  /** Let it go on from these messages until the model no longer calls (or, by hand, one step). */
  const run = async (start: Message[]) => {
    let now = start;
    const show = (next: Message[]) => {
      now = next;
      setMessages(next);
    };
    show(start);
    setBusy(true);
    setError(null);
    stop.current = new AbortController();
    try {
      for (let round = 0; round < MOST_ROUNDS; round++) {
        const open = openCalls(now);
        if (open.length) {
          const results = await Promise.all(open.map((call) => resultOf(call, known, stop.current.signal)));
          show([...now, ...results]);
          if (byHand) return;
        }
        const before = now;
        for await (const answer of streamAnswer(server!.id, body(before), stop.current.signal)) show([...before, answer]);
        if (byHand || !openCalls(now).length) return;
      }
    } catch (problem) {
      if (!stop.current.signal.aborted) setError(problem as Error);
    } finally {
      setBusy(false);
    }
  };
  const body = (before: Message[]) => ({
    model: picked.model || server!.models[0],
    messages: before.map(forRequest),
    tools,
    ...fieldsOf(sampling),
  });
  const ask = (text: string) => {
    if (!text.trim() || !canRun) return;
    setQuestion("");
    const system: Message[] = sampling.system.trim() ? [{ role: "system", content: sampling.system.trim() }] : [];
    run([...system, { role: "user", content: text.trim() }]);
  };
  const last = messages[messages.length - 1];
  const goesOn = !busy && last && (last.role !== "assistant" || openCalls(messages).length > 0);

  return (
    <>
      <h1>{say("工具", "Tools")}</h1>
      <div className="two-columns">
        <div>
          <Card title={say("模型", "Model")}>
            <ModelPicker servers={servers} picked={picked} onPick={setPicked} label={say("模型", "Model")} />
          </Card>
          <Card
            title={say("工具（JSON）", "Tools (JSON)")}
            action={
              <button
                type="button"
                className="quiet"
                onClick={() => setSchema(JSON.stringify(builtIn.data?.tools ?? [], null, 2))}
              >
                {say("恢复内置的", "Built-in ones")}
              </button>
            }
          >
            <Problem error={builtIn.error} />
            {!hasTools && !builtIn.error && <Waiting>{say("正在读取内置的工具…", "Reading the built-in tools…")}</Waiting>}
            <Field
              label={say("模型看得到的工具", "The tools that the model is shown")}
              error={problem && say(`不是工具的列表：${problem}`, `no list of tools: ${problem}`)}
              hint={say(`真会执行的只有：${known.join("、")}；别的由你写结果。`, `Only these are really run: ${known.join(", ")}; results of others are yours to write.`)}
              wide
            >
              <textarea
                className="code"
                rows={14}
                spellCheck={false}
                maxLength={40000}
                value={schema}
                onChange={(event) => setSchema(event.target.value)}
              />
            </Field>
          </Card>
          <SamplingCard sampling={sampling} onChange={setSampling} />
        </div>
        <Card
          title={say("一步一步", "Step by step")}
          action={
            <label className="check">
              <input type="checkbox" checked={byHand} onChange={(event) => setByHand(event.target.checked)} />
              {say("每步停下", "Pause at each step")}
            </label>
          }
        >
          {messages.length === 0 && (
            <div className="examples">
              {EXAMPLES.map((example) => (
                <button key={example} type="button" className="chip" disabled={!canRun} onClick={() => ask(example)}>
                  {example}
                </button>
              ))}
            </div>
          )}
          <ol className="steps" aria-live="polite">
            {messages.map((message, i) => (
              <StepCard
                key={i}
                message={message}
                locked={!canRun}
                onResend={(changed) => run([...messages.slice(0, i), ...changed])}
              />
            ))}
          </ol>
          <Problem error={error} />
          <form
            className="ask"
            onSubmit={(event) => {
              event.preventDefault();
              ask(question);
            }}
          >
            <input
              type="text"
              maxLength={4000}
              aria-label={say("问题", "Question")}
              placeholder={server?.state === "ready" && hasTools ? say("问一个用得上工具的问题", "Ask what needs a tool") : server?.state === "ready" ? say("正在读取工具…", "Reading the tools…") : say("先选一个模型", "Choose a model first")}
              value={question}
              onChange={(event) => setQuestion(event.target.value)}
            />
            {busy ? (
              <button type="button" onClick={() => stop.current.abort()}>
                {say("停止", "Stop")}
              </button>
            ) : (
              <button className="primary" disabled={!canRun || !question.trim()}>
                {say("发送", "Send")}
              </button>
            )}
            {goesOn && (
              <button type="button" disabled={!canRun} onClick={() => run(messages)}>
                {say("下一步", "Next step")}
              </button>
            )}
          </form>
        </Card>
      </div>
    </>
  );
}

function read(text: string): { tools: Tool[] | null; problem: string | null } {
  if (!text.trim()) return { tools: [], problem: null };
  try {
    const value: unknown = JSON.parse(text);
    if (!Array.isArray(value)) return { tools: null, problem: "[ … ]" };
    return { tools: value as Tool[], problem: null };
  } catch (error) {
    return { tools: null, problem: (error as Error).message };
  }
}

/** Calls of the last answer that nothing has answered. */
function openCalls(messages: Message[]): ToolCall[] {
  const place = messages.findLastIndex((message) => message.role === "assistant");
  if (place < 0) return [];
  const calls = (messages[place] as Answer).tool_calls ?? [];
  const answered = messages.slice(place + 1).map((message) => message.tool_call_id);
  return calls.filter((call) => !answered.includes(call.id));
}

async function resultOf(call: ToolCall, known: string[], signal: AbortSignal): Promise<Message> {
  const said = (content: string): Message => ({ role: "tool", tool_call_id: call.id, content });
  const { name } = call.function;
  if (!known.includes(name)) {
    return said(JSON.stringify({ error: `${name} is not built in: write its result here and send again` }));
  }
  try {
    const args: unknown = JSON.parse(call.function.arguments || "{}");
    const answer = await post<{ result: unknown }>("/api/tools/call", { name, arguments: args }, signal);
    return said(typeof answer.result === "string" ? answer.result : JSON.stringify(answer.result));
  } catch (error) {
    if (signal.aborted) throw error;
    return said(JSON.stringify({ error: (error as Error).message }));
  }
}
