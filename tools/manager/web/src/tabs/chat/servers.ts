/** The servers of models, which the manager starts and ends. */

import { useCallback } from "react";
import { get, post, remove } from "../../api";
import { useLoaded } from "../../hooks";
import type { ChatServer, Weights } from "../../types";

export interface Servers {
  list: ChatServer[];
  /** whether the lists have been read */
  known: boolean;
  weights: Weights[];
  error: Error | null;
  start: (weights: string) => Promise<ChatServer>;
  end: (id: string) => Promise<void>;
}

/** looked: whether the tab is looked at; otherwise nothing is asked again and again. */
export function useServers(looked: boolean): Servers {
  const servers = useLoaded(() => get<{ servers: ChatServer[] }>("/api/chat/servers"), looked ? 2 : 0);
  const weights = useLoaded(() => get<{ weights: Weights[] }>("/api/weights"), looked ? 10 : 0);
  const { reload } = servers;
  const start = useCallback(
    async (id: string) => {
      const answer = await post<{ server: ChatServer }>("/api/chat/servers", { weights: id });
      reload();
      return answer.server;
    },
    [reload],
  );
  const end = useCallback(
    async (id: string) => {
      await remove(`/api/chat/servers/${encodeURIComponent(id)}`);
      reload();
    },
    [reload],
  );
  return {
    list: servers.data?.servers ?? [],
    known: servers.data !== null && weights.data !== null,
    weights: (weights.data?.weights ?? []).filter((one) => one.chat),
    error: servers.error,
    start,
    end,
  };
}

export interface Sampling {
  temperature: number;
  top_p: number;
  top_k: number;
  repetition_penalty: number;
  max_tokens: number;
  seed: string;
  system: string;
  thinking: boolean;
}

export const SAMPLING: Sampling = {
  temperature: 0.7,
  top_p: 0.9,
  top_k: 0,
  repetition_penalty: 1,
  max_tokens: 512,
  seed: "",
  system: "",
  thinking: false,
};

/** The part of a request that says how to sample. */
export function fieldsOf(sampling: Sampling): Record<string, unknown> {
  const fields: Record<string, unknown> = {
    temperature: sampling.temperature,
    top_p: sampling.top_p,
    top_k: sampling.top_k,
    repetition_penalty: sampling.repetition_penalty,
    max_tokens: sampling.max_tokens,
  };
  if (sampling.seed.trim() !== "") fields.seed = Number(sampling.seed);
  if (sampling.thinking) fields.chat_template_kwargs = { enable_thinking: true };
  return fields;
}
