/** Data sets: what there is, uploading, and how a recipe's training sees them. */

import { useRef, useState } from "react";
import { get, upload } from "../api";
import { bytes, count, datasetName, moment } from "../format";
import { useLoaded } from "../hooks";
import { useSay } from "../language";
import { Card, Empty, Problem, Waiting } from "../parts/common";
import type { Dataset, Recipe } from "../types";
import { PreviewCard } from "./data/PreviewCard";

const KINDS = ".json,.jsonl,.csv,.tsv,.parquet,.txt,.gz";

export function Data({ chosen, go, recipe }: {
  chosen?: string;
  go: (...words: string[]) => void;
  recipe: string | null;
}) {
  const say = useSay();
  const datasets = useLoaded(() => get<{ datasets: Dataset[] }>("/api/datasets"), 15);
  const recipes = useLoaded(() => get<{ recipes: Recipe[] }>("/api/recipes"), 0);
  const [word, setWord] = useState("");
  const all = datasets.data?.datasets ?? [];
  const shown = all.filter((one) => `${one.path_label} ${one.recipe ?? ""}`.toLowerCase().includes(word.toLowerCase()));
  const samples = byRecipe(shown.filter((one) => one.kind === "sample"));
  const picked = all.find((one) => one.id === chosen);

  return (
    <>
      <h1>{say("数据", "Data")}</h1>
      <UploadCard
        onDone={(dataset) => {
          datasets.reload();
          go("data", dataset.id);
        }}
      />
      {picked && recipes.data && (
        <PreviewCard key={picked.id} dataset={picked} recipes={recipes.data.recipes} preferred={picked.recipe ?? recipe} />
      )}
      <Card
        title={say("数据集", "Data sets")}
        action={
          all.length > 8 && (
            <input
              type="search"
              className="search"
              placeholder={say("查找", "Search")}
              aria-label={say("查找数据集", "Search data sets")}
              value={word}
              onChange={(event) => setWord(event.target.value)}
            />
          )
        }
      >
        <Problem error={datasets.error} />
        {!datasets.data && !datasets.error && <Waiting />}
        {datasets.data && shown.length === 0 && <Empty>{say("没有数据集。", "No data set.")}</Empty>}
        <DatasetList datasets={shown.filter((one) => one.kind !== "sample")} chosen={chosen} />
        {samples.map(([name, own]) => (
          <details key={`${name} ${word !== ""}`} open={word !== "" || name === recipe}>
            <summary>
              {say(`${name} 的样例`, `Samples of ${name}`)} <span className="faint">{own.length}</span>
            </summary>
            <DatasetList datasets={own} chosen={chosen} />
          </details>
        ))}
      </Card>
    </>
  );
}

function byRecipe(datasets: Dataset[]): [string, Dataset[]][] {
  const groups = new Map<string, Dataset[]>();
  for (const one of datasets) groups.set(one.recipe ?? "", [...(groups.get(one.recipe ?? "") ?? []), one]);
  return [...groups];
}

function DatasetList({ datasets, chosen }: { datasets: Dataset[]; chosen?: string }) {
  const say = useSay();
  return (
    <ul className="datasets">
      {datasets.map((one) => (
        <li key={one.id}>
          <a href={`#/data/${encodeURIComponent(one.id)}`} aria-current={one.id === chosen ? "true" : undefined}>
            <span className="ellipsis" title={one.path_label}>
              {datasetName(one)}
            </span>
            {one.kind !== "sample" && <KindBadge kind={one.kind} />}
            <span className="faint">
              {[
                one.rows !== null ? say(`${count(one.rows)} 行`, `${count(one.rows)} rows`) : null,
                one.size_bytes !== null ? bytes(one.size_bytes) : say("文件夹", "folder"),
                moment(one.modified),
              ]
                .filter(Boolean)
                .join(" · ")}
            </span>
          </a>
        </li>
      ))}
    </ul>
  );
}

function KindBadge({ kind }: { kind: Dataset["kind"] }) {
  const say = useSay();
  const names = { sample: say("样例", "sample"), upload: say("上传", "uploaded"), folder: say("文件夹", "folder") };
  return <span className={`badge ${kind}`}>{names[kind]}</span>;
}

function UploadCard({ onDone }: { onDone: (dataset: Dataset) => void }) {
  const say = useSay();
  const input = useRef<HTMLInputElement>(null);
  const [share, setShare] = useState<number | null>(null);
  const [error, setError] = useState<Error | null>(null);
  const [over, setOver] = useState(false);

  const send = async (files: FileList | null) => {
    if (!files) return;
    setError(null);
    for (const file of files) {
      setShare(0);
      try {
        const answer = await upload<{ dataset: Dataset }>("/api/datasets/upload", file, setShare);
        onDone(answer.dataset);
      } catch (problem) {
        setError(problem as Error);
        break;
      } finally {
        setShare(null);
      }
    }
    if (input.current) input.current.value = "";
  };

  return (
    <section
      className={`card dropzone ${over ? "over" : ""}`}
      onDragOver={(event) => {
        event.preventDefault();
        setOver(true);
      }}
      onDragLeave={() => setOver(false)}
      onDrop={(event) => {
        event.preventDefault();
        setOver(false);
        send(event.dataTransfer.files);
      }}
    >
      <div className="row spread">
        <div>
          <b>{say("上传数据", "Upload data")}</b>
          <div className="faint">
            {say("拖到这里，或选择文件：", "Drop it here, or choose a file: ")}.json .jsonl .csv .tsv .parquet .txt (.gz)
          </div>
        </div>
        <button type="button" onClick={() => input.current?.click()} disabled={share !== null}>
          {share === null ? say("选择文件", "Choose a file") : `${Math.round(share * 100)} %`}
        </button>
        <input
          ref={input}
          type="file"
          accept={KINDS}
          multiple
          className="hidden-input"
          tabIndex={-1}
          aria-label={say("数据文件", "Data file")}
          onChange={(event) => send(event.target.files)}
        />
      </div>
      {share !== null && (
        <div className="progress">
          <span style={{ width: `${share * 100}%` }} />
        </div>
      )}
      <Problem error={error} />
    </section>
  );
}
