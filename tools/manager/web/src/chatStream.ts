/** Streamed chat completions in OpenAI's format. */

import { ApiError, readAnswer } from "./api";

export interface ToolCall {
  id: string;
  type: "function";
  function: { name: string; arguments: string };
}

export interface Message {
  role: "system" | "user" | "assistant" | "tool";
  content: string;
  reasoning_content?: string;
  tool_calls?: ToolCall[];
  tool_call_id?: string;
}

export interface Answer extends Message {
  role: "assistant";
  reasoning_content: string;
  tool_calls: ToolCall[];
  finish: string | null;
  tokens: number | null;
  /** by a model that has not learnt to chat: it went on with the last text */
  continued: boolean;
}

interface Delta {
  content?: string | null;
  reasoning_content?: string | null;
  tool_calls?: { index: number; id?: string; function?: { name?: string; arguments?: string } }[];
}

interface Chunk {
  choices: { delta?: Delta; text?: string; finish_reason: string | null }[];
  usage?: { completion_tokens: number } | null;
  error?: { message: string };
}

export const emptyAnswer = (): Answer => ({
  role: "assistant",
  content: "",
  reasoning_content: "",
  tool_calls: [],
  finish: null,
  tokens: null,
  continued: false,
});

const TEXTS = "/v1/completions";
const continuing = new Set<string>(); // servers whose models do not chat

type Body = Record<string, unknown> & { messages: Message[] };

/** Ask, and hear the answer as it grows. Aborting `signal` also ends the generation. A model that
 *  does not chat, as after pre-training, continues the last text. */
export async function* streamAnswer(server: string, body: Body, signal: AbortSignal): AsyncGenerator<Answer> {
  if (!continuing.has(server)) {
    try {
      yield* streamed(server, "/v1/chat/completions", body, signal);
      return;
    } catch (problem) {
      const sent = problem instanceof ApiError && problem.status === 400 && problem.message.includes(TEXTS);
      if (!sent) throw problem;
      continuing.add(server);
    }
  }
  const { messages, tools: _, chat_template_kwargs: __, ...rest } = body;
  const text = { ...rest, prompt: messages[messages.length - 1].content };
  for await (const answer of streamed(server, TEXTS, text, signal)) yield { ...answer, continued: true };
}

async function* streamed(
  server: string,
  path: string,
  body: Record<string, unknown>,
  signal: AbortSignal,
): AsyncGenerator<Answer> {
  const response = await fetch(`/api/chat/${encodeURIComponent(server)}${path}`, {
    method: "POST",
    credentials: "same-origin",
    headers: { "content-type": "application/json" },
    body: JSON.stringify({ ...body, stream: true, stream_options: { include_usage: true } }),
    signal,
  });
  if (!response.ok || !response.body) {
    await readAnswer(response);
    throw new ApiError(response.status, "no answer");
  }
  let answer = emptyAnswer();
  for await (const data of events(response.body)) {
    if (data === "[DONE]") return;
    const chunk = JSON.parse(data) as Chunk;
    if (chunk.error) throw new ApiError(500, chunk.error.message);
    answer = grown(answer, chunk);
    yield answer;
  }
}

function grown(answer: Answer, chunk: Chunk): Answer {
  const next = { ...answer, tool_calls: [...answer.tool_calls] };
  if (chunk.usage) next.tokens = chunk.usage.completion_tokens;
  const choice = chunk.choices[0];
  if (!choice) return next;
  const delta = choice.delta ?? { content: choice.text };
  next.content += delta.content ?? "";
  next.reasoning_content += delta.reasoning_content ?? "";
  for (const piece of delta.tool_calls ?? []) {
    const known = next.tool_calls[piece.index];
    next.tool_calls[piece.index] = {
      id: piece.id ?? known?.id ?? `call_${piece.index}`,
      type: "function",
      function: {
        name: (known?.function.name ?? "") + (piece.function?.name ?? ""),
        arguments: (known?.function.arguments ?? "") + (piece.function?.arguments ?? ""),
      },
    };
  }
  if (choice.finish_reason) next.finish = choice.finish_reason;
  return next;
}

/** The data of server-sent events. */
async function* events(body: ReadableStream<Uint8Array>): AsyncGenerator<string> {
  const reader = body.pipeThrough(new TextDecoderStream() as TransformStream<Uint8Array, string>).getReader();
  let rest = "";
  try {
    while (true) {
      const { done, value } = await reader.read();
      if (done) return;
      rest += value.replaceAll("\r\n", "\n");
      const parts = rest.split("\n\n");
      rest = parts.pop()!;
      for (const part of parts) {
        const lines = part.split("\n").filter((line) => line.startsWith("data:"));
        if (lines.length) yield lines.map((line) => line.slice(5).trimStart()).join("\n");
      }
    }
  } finally {
    reader.cancel().catch(() => {});
  }
}

/** A message as a request has it: without what only this page knows, and without its thought, which
 *  chat templates leave out of a history. */
export function forRequest(message: Message): Message {
  const sent: Message = { role: message.role, content: message.content };
  if (message.tool_calls?.length) sent.tool_calls = message.tool_calls;
  if (message.tool_call_id) sent.tool_call_id = message.tool_call_id;
  return sent;
}
