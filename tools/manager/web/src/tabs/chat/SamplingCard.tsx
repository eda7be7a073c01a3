import { useSay } from "../../language";
import { Field, Slider } from "../../parts/common";
import type { Sampling } from "./servers";

export function SamplingCard({ sampling, onChange, withSystem = true }: {
  sampling: Sampling;
  onChange: (sampling: Sampling) => void;
  withSystem?: boolean;
}) {
  const say = useSay();
  const set = (change: Partial<Sampling>) => onChange({ ...sampling, ...change });
  return (
    <details className="card sampling">
      <summary>{say("采样与系统提示", "Sampling and system prompt")}</summary>
      <div className="fields">
        {withSystem && (
          <Field label={say("系统提示", "System prompt")} wide>
            <textarea
              rows={2}
              maxLength={8000}
              value={sampling.system}
              onChange={(event) => set({ system: event.target.value })}
            />
          </Field>
        )}
        <Slider
          label={say("温度", "temperature")}
          text={sampling.temperature === 0 ? say("0（不采样）", "0 (greedy)") : undefined}
          value={sampling.temperature}
          low={0}
          high={2}
          step={0.05}
          onChange={(temperature) => set({ temperature })}
        />
        <Slider label="top_p" value={sampling.top_p} low={0.05} high={1} step={0.05} onChange={(top_p) => set({ top_p })} />
        <Slider
          label="top_k"
          text={sampling.top_k === 0 ? say("0（不限）", "0 (off)") : undefined}
          value={sampling.top_k}
          low={0}
          high={200}
          step={1}
          onChange={(top_k) => set({ top_k })}
        />
        <Slider
          label={say("重复惩罚", "repetition penalty")}
          value={sampling.repetition_penalty}
          low={1}
          high={2}
          step={0.05}
          onChange={(repetition_penalty) => set({ repetition_penalty })}
        />
        <Slider
          label={say("最多词元", "max tokens")}
          value={sampling.max_tokens}
          low={16}
          high={2048}
          step={16}
          onChange={(max_tokens) => set({ max_tokens })}
        />
        <Field label={say("种子（空：每次不同）", "Seed (empty: different each time)")}>
          <input
            type="text"
            inputMode="numeric"
            value={sampling.seed}
            onChange={(event) => set({ seed: event.target.value.replace(/\D/g, "").slice(0, 9) })}
          />
        </Field>
        <label className="check">
          <input type="checkbox" checked={sampling.thinking} onChange={(event) => set({ thinking: event.target.checked })} />
          {say("先思考再回答", "Think first")}
        </label>
      </div>
    </details>
  );
}
