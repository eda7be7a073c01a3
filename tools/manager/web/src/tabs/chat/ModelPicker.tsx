/** Choose weights; a server is started for them where there is none. */

import { useState } from "react";
import { weightsName } from "../../format";
import { useSay } from "../../language";
import { Problem, Waiting } from "../../parts/common";
import type { ChatServer } from "../../types";
import type { Servers } from "./servers";

export interface Picked {
  weights: string;
  /** one of the server's: an adapter's and its base have two */
  model: string;
}

export const serverOf = (servers: Servers, picked: Picked): ChatServer | undefined =>
  servers.list.find((one) => one.weights === picked.weights);

export function ModelPicker({ servers, picked, onPick, label }: {
  servers: Servers;
  picked: Picked;
  onPick: (picked: Picked) => void;
  label: string;
}) {
  const say = useSay();
  const [error, setError] = useState<Error | null>(null);
  const [asked, setAsked] = useState(false);
  const server = serverOf(servers, picked);

  const start = async (weights: string) => {
    setError(null);
    setAsked(true);
    try {
      await servers.start(weights);
    } catch (problem) {
      setError(problem as Error);
    } finally {
      setAsked(false);
    }
  };
  const choose = (weights: string) => {
    onPick({ weights, model: "" });
    setError(null);
    if (weights && !servers.list.some((one) => one.weights === weights)) start(weights);
  };
  const models = server?.models ?? [];
  return (
    <div className="model-picker">
      <div className="row">
        <select aria-label={label} value={picked.weights} onChange={(event) => choose(event.target.value)}>
          <option value="">{say("选一个模型…", "Choose a model…")}</option>
          {servers.weights.map((one) => (
            <option key={one.id} value={one.id}>
              {weightsName(one.path_label)}
            </option>
          ))}
        </select>
        {models.length > 1 && (
          <select
            aria-label={say("微调前后", "Before or after")}
            value={picked.model || models[0]}
            onChange={(event) => onPick({ ...picked, model: event.target.value })}
          >
            {models.map((one) => (
              <option key={one} value={one}>
                {one === "base" ? say("微调前 (base)", "before (base)") : one}
              </option>
            ))}
          </select>
        )}
        {server && (
          <button type="button" className="quiet" onClick={() => servers.end(server.id).catch(setError)}>
            {say("卸下", "Unload")}
          </button>
        )}
        {picked.weights && servers.known && !server && !asked && (
          <button type="button" onClick={() => start(picked.weights)}>
            {say("装上", "Load")}
          </button>
        )}
      </div>
      {servers.known && servers.weights.length === 0 && (
        <p className="faint">
          {say("还没有能对话的权重。", "No weights to talk to yet. ")}
          <a href="#/train/new">{say("先训练一个", "Train some first")}</a>
        </p>
      )}
      <Problem error={error} />
      {(asked || server?.state === "starting") && <Waiting>{say("正在装入模型…", "Loading the model…")}</Waiting>}
      {server?.state === "failed" && (
        <p className="problem" role="alert">
          {server.error ?? say("模型没有启动", "the model did not start")}
        </p>
      )}
      {error && servers.list.length > 0 && (
        <ul className="loaded">
          {servers.list.map((one) => (
            <li key={one.id}>
              {weightsName(servers.weights.find((known) => known.id === one.weights)?.path_label ?? one.weights)}{" "}
              <button type="button" className="link" onClick={() => servers.end(one.id).catch(setError)}>
                {say("卸下", "Unload")}
              </button>
            </li>
          ))}
        </ul>
      )}
    </div>
  );
}
