/** One message of a conversation with tools, which can be edited and sent again. */

import { useState } from "react";
import type { Answer, Message, ToolCall } from "../../chatStream";
import { useSay } from "../../language";
import { Text } from "../../parts/Text";
import { Thought } from "../chat/Bubbles";

export function StepCard({ message, locked, onResend }: {
  message: Message;
  locked: boolean;
  onResend: (changed: Message[]) => void;
}) {
  const say = useSay();
  const [draft, setDraft] = useState<string | null>(null);
  const calls = (message as Answer).tool_calls ?? [];
  const kind = message.role === "assistant" && calls.length ? "call" : message.role;
  const names: Record<string, string> = {
    system: say("系统提示", "System prompt"),
    user: say("问题", "Question"),
    call: say("模型调用工具", "The model calls"),
    assistant: say("模型回答", "The model answers"),
    tool: say("工具的结果", "The tool's result"),
  };
  const { changed, problem } = draft === null ? { changed: null, problem: "" } : fromDraft(message, draft);
  return (
    <li className={`step ${kind}`}>
      <div className="row spread">
        <b>{names[kind]}</b>
        {draft === null ? (
          <button type="button" className="link" disabled={locked} onClick={() => setDraft(toDraft(message))}>
            {say("改", "Edit")}
          </button>
        ) : (
          <span className="row">
            <button
              type="button"
              disabled={locked || changed === null}
              onClick={() => {
                setDraft(null);
                onResend([changed!]);
              }}
            >
              {say("从这里重发", "Send again from here")}
            </button>
            <button type="button" className="quiet" onClick={() => setDraft(null)}>
              {say("不改了", "Cancel")}
            </button>
          </span>
        )}
      </div>
      {draft === null ? (
        <Content message={message} calls={calls} />
      ) : (
        <>
          <textarea
            className="code"
            rows={Math.min(12, draft.split("\n").length + 1)}
            aria-label={names[kind]}
            value={draft}
            onChange={(event) => setDraft(event.target.value)}
          />
          {problem && <span className="field-error">{problem}</span>}
        </>
      )}
    </li>
  );
}

function Content({ message, calls }: { message: Message; calls: ToolCall[] }) {
  return (
    <>
      {message.reasoning_content && <Thought text={message.reasoning_content} growing={false} />}
      {message.role === "assistant" && message.content && <Text>{message.content}</Text>}
      {message.role === "tool" && <pre className="result">{message.content}</pre>}
      {(message.role === "user" || message.role === "system") && <p>{message.content}</p>}
      {calls.map((call) => (
        <pre key={call.id} className="result">
          <b>{call.function.name}</b> {pretty(call.function.arguments)}
        </pre>
      ))}
    </>
  );
}

function pretty(text: string): string {
  try {
    return JSON.stringify(JSON.parse(text), null, 1);
  } catch {
    return text;
  }
}

interface CallDraft {
  name: string;
  arguments: unknown;
}

/** What is edited: the calls as JSON, or the text. */
function toDraft(message: Message): string {
  const calls = (message as Answer).tool_calls ?? [];
  if (!calls.length) return message.content;
  const drafts = calls.map((call) => {
    let args: unknown = call.function.arguments;
    try {
      args = JSON.parse(call.function.arguments);
    } catch {
      // what is no JSON is edited as text
    }
    return { name: call.function.name, arguments: args };
  });
  return JSON.stringify(drafts, null, 1);
}

function fromDraft(message: Message, draft: string): { changed: Message | null; problem: string } {
  const calls = (message as Answer).tool_calls ?? [];
  if (!calls.length) return { changed: { ...message, content: draft }, problem: "" };
  try {
    const drafts = JSON.parse(draft) as CallDraft[];
    const made = drafts.map((one, i) => ({
      id: calls[i]?.id ?? `call_${i}`,
      type: "function" as const,
      function: {
        name: String(one.name),
        arguments: typeof one.arguments === "string" ? one.arguments : JSON.stringify(one.arguments ?? {}),
      },
    }));
    return { changed: { ...message, tool_calls: made } as Message, problem: "" };
  } catch (error) {
    return { changed: null, problem: (error as Error).message };
  }
}
