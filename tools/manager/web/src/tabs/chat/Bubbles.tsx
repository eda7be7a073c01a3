/** Messages of a conversation. */

import { useSay } from "../../language";
import { Text } from "../../parts/Text";
import type { Answer, Message } from "../../chatStream";

export interface Turn {
  message: Message | Answer;
  seconds?: number;
  stopped?: boolean;
  error?: string;
}

export function Bubble({ turn, growing }: { turn: Turn; growing: boolean }) {
  const { message } = turn;
  if (message.role === "user") return <div className="bubble user">{message.content}</div>;
  return (
    <div className="bubble assistant" aria-busy={growing}>
      {message.reasoning_content && <Thought text={message.reasoning_content} growing={growing && !message.content} />}
      {message.content && <Text>{message.content}</Text>}
      {growing && !message.content && !message.reasoning_content && <span className="typing" aria-hidden="true">…</span>}
      {message.tool_calls?.map((call) => (
        <code key={call.id} className="call">
          {call.function.name}({call.function.arguments})
        </code>
      ))}
      {turn.error && (
        <p className="problem" role="alert">
          {turn.error}
        </p>
      )}
      {!growing && <AnswerFacts turn={turn} />}
    </div>
  );
}

export function Thought({ text, growing }: { text: string; growing: boolean }) {
  const say = useSay();
  return (
    <details className="thought">
      <summary>{growing ? say("正在思考…", "Thinking…") : say("思考过程", "Thought")}</summary>
      <div className="thought-text">{text}</div>
    </details>
  );
}

function AnswerFacts({ turn }: { turn: Turn }) {
  const say = useSay();
  const answer = turn.message as Answer;
  const facts = [];
  if (answer.tokens) {
    facts.push(say(`${answer.tokens} 词元`, `${answer.tokens} tokens`));
    if (turn.seconds) facts.push(say(`${Math.round(answer.tokens / turn.seconds)} 词元/秒`, `${Math.round(answer.tokens / turn.seconds)} tokens/s`));
  }
  if (turn.seconds) facts.push(`${turn.seconds.toFixed(1)} s`);
  if (answer.continued) facts.push(say("续写：这个模型没有学过对话", "continued: this model has not learnt to chat"));
  if (turn.stopped) facts.push(say("已停止", "stopped"));
  if (answer.finish === "length") facts.push(say("到了长度上限", "cut at the limit"));
  return facts.length ? <div className="answer-facts">{facts.join(" · ")}</div> : null;
}
