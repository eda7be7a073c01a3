/** Chat with one model, or with two side by side. */

import { useEffect, useRef, useState } from "react";
import { emptyAnswer, forRequest, streamAnswer, type Message } from "../chatStream";
import { useStored } from "../hooks";
import { useSay } from "../language";
import { Problem } from "../parts/common";
import { Bubble, type Turn } from "./chat/Bubbles";
import { ModelPicker, serverOf, type Picked } from "./chat/ModelPicker";
import { SamplingCard } from "./chat/SamplingCard";
import { fieldsOf, SAMPLING, useServers, type Sampling } from "./chat/servers";

const MOST_CHARACTERS = 8000;
const EXAMPLES = ["你是谁？", "七加五等于几？", "西班牙的首都是哪里？", "用一句话介绍北京。"];

interface Column {
  picked: Picked;
  turns: Turn[];
}

const emptyColumn = (weights = ""): Column => ({ picked: { weights, model: "" }, turns: [] });

/** wanted: weights that a link asks for. */
export function Chat({ looked, wanted }: { looked: boolean; wanted?: string }) {
  const say = useSay();
  const servers = useServers(looked);
  const [sampling, setSampling] = useStored<Sampling>("sampling", SAMPLING);
  const [columns, setColumns] = useState<Column[]>([emptyColumn()]);
  const [text, setText] = useState("");
  const [busy, setBusy] = useState(0);
  const stop = useRef(new AbortController());

  const change = (index: number, changed: (column: Column) => Column) =>
    setColumns((before) => before.map((column, i) => (i === index ? changed(column) : column)));
  useEffect(() => {
    if (!wanted) return;
    setColumns((before) => [{ ...before[0], picked: { weights: wanted, model: "" } }, ...before.slice(1)]);
  }, [wanted]);
  const ready = columns.every((column) => serverOf(servers, column.picked)?.state === "ready");

  const ask = async (question: string) => {
    if (!question.trim() || !ready || busy) return;
    setText("");
    stop.current = new AbortController();
    setBusy(columns.length);
    const { signal } = stop.current;
    await Promise.all(columns.map((column, i) => answerIn(i, column, question, signal)));
  };

  const answerIn = async (index: number, column: Column, question: string, signal: AbortSignal) => {
    const server = serverOf(servers, column.picked)!;
    const turns: Turn[] = [...column.turns, { message: { role: "user", content: question } }];
    const messages: Message[] = turns.map((turn) => forRequest(turn.message));
    if (sampling.system.trim()) messages.unshift({ role: "system", content: sampling.system.trim() });
    let turn: Turn = { message: emptyAnswer() };
    const show = (next: Turn) => {
      turn = next;
      change(index, (before) => ({ ...before, turns: [...turns, turn] }));
    };
    show(turn);
    const began = performance.now();
    const took = () => (performance.now() - began) / 1000;
    try {
      const body = { model: column.picked.model || server.models[0], messages, ...fieldsOf(sampling) };
      for await (const answer of streamAnswer(server.id, body, signal)) show({ message: answer });
      show({ ...turn, seconds: took() });
    } catch (problem) {
      const stopped = signal.aborted;
      show({ ...turn, seconds: took(), stopped, error: stopped ? undefined : (problem as Error).message });
    } finally {
      setBusy((n) => n - 1);
    }
  };

  const compare = () => setColumns((before) => (before.length > 1 ? before.slice(0, 1) : [...before, emptyColumn()]));
  const clear = () => setColumns((before) => before.map((column) => ({ ...column, turns: [] })));
  const anyTurn = columns.some((column) => column.turns.length);

  return (
    <div className="chat">
      <div className="row spread">
        <h1>{say("对话", "Chat")}</h1>
        <div className="row">
          <button type="button" className="quiet" onClick={compare} disabled={busy > 0}>
            {columns.length > 1 ? say("只看一个", "One model") : say("两个并排", "Two side by side")}
          </button>
          <button type="button" className="quiet" onClick={clear} disabled={busy > 0 || !anyTurn}>
            {say("清空", "Clear")}
          </button>
        </div>
      </div>
      <Problem error={servers.error} />
      <div className={`chat-columns of-${columns.length}`}>
        {columns.map((column, i) => (
          <section key={i} className="card chat-column" aria-label={say(`对话 ${i + 1}`, `chat ${i + 1}`)}>
            <ModelPicker
              servers={servers}
              picked={column.picked}
              label={columns.length > 1 ? say(`模型 ${i + 1}`, `Model ${i + 1}`) : say("模型", "Model")}
              onPick={(picked) => change(i, (before) => ({ ...before, picked }))}
            />
            <Conversation turns={column.turns} busy={busy > 0} />
          </section>
        ))}
      </div>
      {ready && !anyTurn && (
        <div className="examples">
          {EXAMPLES.map((example) => (
            <button key={example} type="button" className="chip" onClick={() => ask(example)}>
              {example}
            </button>
          ))}
        </div>
      )}
      <form
        className="ask"
        onSubmit={(event) => {
          event.preventDefault();
          ask(text);
        }}
      >
        <textarea
          rows={2}
          maxLength={MOST_CHARACTERS}
          aria-label={say("问题", "Question")}
          placeholder={ready ? say("问点什么，回车发送，Shift+回车换行", "Ask; Enter sends, Shift+Enter is a new line") : say("先选一个模型", "Choose a model first")}
          value={text}
          onChange={(event) => setText(event.target.value)}
          onKeyDown={(event) => {
            if (event.key === "Enter" && !event.shiftKey && !event.nativeEvent.isComposing) {
              event.preventDefault();
              ask(text);
            }
          }}
        />
        {busy > 0 ? (
          <button type="button" onClick={() => stop.current.abort()}>
            {say("停止", "Stop")}
          </button>
        ) : (
          <button className="primary" disabled={!ready || !text.trim()}>
            {say("发送", "Send")}
          </button>
        )}
      </form>
      <SamplingCard sampling={sampling} onChange={setSampling} />
    </div>
  );
}

function Conversation({ turns, busy }: { turns: Turn[]; busy: boolean }) {
  const box = useRef<HTMLDivElement>(null);
  useEffect(() => {
    const element = box.current;
    if (!element) return;
    const near = element.scrollHeight - element.scrollTop - element.clientHeight < 160;
    if (near) element.scrollTop = element.scrollHeight;
  }, [turns]);
  return (
    <div className="conversation" ref={box} role="log" aria-live="polite" tabIndex={0}>
      {turns.map((turn, i) => (
        <Bubble key={i} turn={turn} growing={busy && i === turns.length - 1 && turn.seconds === undefined} />
      ))}
    </div>
  );
}
