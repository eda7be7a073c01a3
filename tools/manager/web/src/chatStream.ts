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
}

interface Delta {
  content?: string | null;
  reasoning_content?: string | null;
  tool_calls?: { index: number; id?: string; function?: { name?: string; arguments?: string } }[];
}

interface Chunk {
  choices: { delta: Delta; finish_reason: string | null }[];
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
});

/** Ask, and hear the answer as it grows. Aborting `signal` also ends the generation. */
export async function* streamAnswer(
  server: string,
  body: Record<string, unknown>,
  signal: AbortSignal,
): AsyncGenerator<Answer> {
  const response = await fetch(`/api/chat/${encodeURIComponent(server)}/v1/chat/completions`, {
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
  const { delta } = choice;
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
