/** A data set as the training of a recipe sees it: labels in colour, lengths, what is left out. */

import { useEffect, useState } from "react";
import { get, query } from "../../api";
import { count, datasetName, number } from "../../format";
import { useSettled } from "../../hooks";
import { useSay } from "../../language";
import { Histogram } from "../../parts/Bars";
import { Card, Field, Problem, Waiting } from "../../parts/common";
import { LabelLegend, TrainedTokens } from "../../parts/Tokens";
import type { Dataset, Preview, Recipe } from "../../types";

const ROWS = 5;
const WAIT = 800; // milliseconds between two looks
const PAUSE = 900; // and without typing before it is asked

export function PreviewCard({ dataset, recipes, preferred }: {
  dataset: Dataset;
  recipes: Recipe[];
  preferred: string | null;
}) {
  const say = useSay();
  const [recipe, setRecipe] = useState(preferred ?? recipes[0]?.name ?? "");
  const scripts = recipes.find((one) => one.name === recipe)?.scripts ?? [];
  const [script, setScript] = useState("train.py");
  const used = scripts.includes(script) ? script : (scripts[0] ?? "train.py");
  const [flags, setFlags] = useState("");
  const settled = useSettled(flags, PAUSE);
  const { preview, progress, error } = usePreview(dataset.id, recipe, used, argsOf(settled));

  return (
    <Card
      title={<span title={dataset.path_label}>{datasetName(dataset)}</span>}
      action={<a className="button" href={`#/train/new/${encodeURIComponent(dataset.id)}`}>{say("用它训练", "Train on it")}</a>}
    >
      <div className="row">
        <Field label={say("看作哪个配方的数据", "As data of the recipe")}>
          <select value={recipe} onChange={(event) => setRecipe(event.target.value)}>
            {recipes.map((one) => (
              <option key={one.name}>{one.name}</option>
            ))}
          </select>
        </Field>
        {scripts.length > 1 && (
          <Field label={say("脚本", "Script")}>
            <select value={used} onChange={(event) => setScript(event.target.value)}>
              {scripts.map((one) => (
                <option key={one}>{one}</option>
              ))}
            </select>
          </Field>
        )}
        <Field label={say("参数", "Flags")}>
          <input
            type="text"
            maxLength={400}
            spellCheck={false}
            autoComplete="off"
            placeholder="--stage sft"
            value={flags}
            onChange={(event) => setFlags(event.target.value)}
          />
        </Field>
      </div>
      <Problem error={error} />
      {!preview && !error && (
        <Waiting>
          {say("用这个配方自己的代码编码…", "Encoding with the recipe's own code…")} {progress}
        </Waiting>
      )}
      {preview && <PreviewFacts preview={preview} />}
    </Card>
  );
}

/** "--stage sft --use_lora" -> {"--stage":"sft","--use_lora":"true"} as JSON. */
function argsOf(text: string): string {
  const args: Record<string, string> = {};
  let name = "";
  for (const word of text.trim().split(/[\s=]+/)) {
    if (word.startsWith("--")) {
      name = word;
      args[name] = "true";
    } else if (name) {
      args[name] = args[name] === "true" ? word : `${args[name]} ${word}`;
    }
  }
  return JSON.stringify(args);
}

function usePreview(id: string, recipe: string, script: string, args: string) {
  const [preview, setPreview] = useState<Preview | null>(null);
  const [progress, setProgress] = useState("");
  const [error, setError] = useState<Error | null>(null);
  useEffect(() => {
    let gone = false;
    let timer = 0;
    setPreview(null);
    setError(null);
    setProgress("");
    const look = async () => {
      try {
        const found = await get<Preview>("/api/datasets/preview" + query({ id, recipe, script, rows: ROWS, args }));
        if (gone) return;
        if (found.pending) {
          setProgress(found.progress ? String(found.progress) : "");
          timer = window.setTimeout(look, WAIT);
        } else {
          setPreview(found);
        }
      } catch (problem) {
        if (!gone) setError(problem as Error);
      }
    };
    if (recipe) look();
    return () => {
      gone = true;
      clearTimeout(timer);
    };
  }, [id, recipe, script, args]);
  return { preview, progress, error };
}

function PreviewFacts({ preview }: { preview: Preview }) {
  const say = useSay();
  const dropped = Object.entries(preview.dropped ?? {});
  return (
    <>
      <div className="tiles">
        <div className="tile">
          <b>{say("读到 / 使用", "Read / used")}</b>
          <span>
            {count(preview.read)} / {count(preview.used)}
          </span>
        </div>
        <div className="tile">
          <b>{say("平均长度", "Mean length")}</b>
          <span>
            {number(preview.lengths.mean)} {say("词元", "tokens")}
          </span>
        </div>
        <div className="tile">
          <b>{say("最长", "Longest")}</b>
          <span>
            {count(preview.lengths.max)} {say("词元", "tokens")}
          </span>
        </div>
      </div>
      {preview.notes.map((note) => (
        <p key={note} className="note">
          {note}
        </p>
      ))}
      {preview.lengths.counts.length > 0 && (
        <Histogram
          title={say("长度分布（词元）", "Lengths (tokens)")}
          bins={preview.lengths.bins}
          counts={preview.lengths.counts}
        />
      )}
      {dropped.length > 0 && (
        <>
          <h3>{say("没有用上的行", "Rows left out")}</h3>
          <ul className="drops">
            {dropped.map(([reason, n]) => (
              <li key={reason}>
                <b>{count(n)}</b> {reason}
                {preview.examples?.[reason] && <code className="example">{preview.examples[reason]}</code>}
              </li>
            ))}
          </ul>
        </>
      )}
      <h3>{say("训练看到的前几行", "The first rows as training sees them")}</h3>
      <LabelLegend />
      {preview.rows.map((row, i) => (
        <div key={i} className="sample-row">
          <div className="faint">
            {say(`第 ${i + 1} 行：${row.length} 词元，${row.label_tokens} 个有标签`, `row ${i + 1}: ${row.length} tokens, ${row.label_tokens} with a label`)}
          </div>
          <TrainedTokens tokens={row.tokens} />
        </div>
      ))}
    </>
  );
}
