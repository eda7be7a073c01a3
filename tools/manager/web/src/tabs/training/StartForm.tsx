/** The form that starts a training: made from the trainer's own flags. */

import { useEffect, useState } from "react";
import { ApiError, get, post, query } from "../../api";
import { weightsName } from "../../format";
import { useLoaded } from "../../hooks";
import { useSay } from "../../language";
import { Card, Field, Problem, Waiting } from "../../parts/common";
import type { Dataset, Device, Flag, FlagGroup, Job, Machine, Recipe, Weights } from "../../types";
import { DataChoice, type Chosen } from "./DataChoice";
import { FlagField, valueOf, type Typed } from "./FlagField";

const TITLES: Record<string, [zh: string, en: string]> = {
  recipe: ["这个配方", "This recipe"],
  run: ["运行", "Run"],
  data: ["数据", "Data"],
  adapter: ["LoRA", "LoRA"],
  training: ["训练器", "Trainer"],
};

export function StartForm({ chosen, dataset, onStarted }: {
  chosen: string | null;
  dataset?: string;
  onStarted: (job: string) => void;
}) {
  const say = useSay();
  const recipes = useLoaded(() => get<{ recipes: Recipe[] }>("/api/recipes"), 0);
  const datasets = useLoaded(() => get<{ datasets: Dataset[] }>("/api/datasets"), 0);
  if (recipes.error) return <Problem error={recipes.error} />;
  if (!recipes.data || !datasets.data) return <Waiting />;
  if (recipes.data.recipes.length === 0) return <p>{say("没有找到配方。", "No recipe found.")}</p>;
  return (
    <Form
      recipes={recipes.data.recipes}
      datasets={datasets.data.datasets}
      chosen={chosen}
      dataset={dataset}
      onStarted={onStarted}
    />
  );
}

function Form({ recipes, datasets, chosen, dataset, onStarted }: {
  recipes: Recipe[];
  datasets: Dataset[];
  chosen: string | null;
  dataset?: string;
  onStarted: (job: string) => void;
}) {
  const say = useSay();
  const asked = datasets.find((one) => one.id === dataset);
  const [recipe, setRecipe] = useState(asked?.recipe ?? chosen ?? recipes[0].name);
  const [script, setScript] = useState("train.py");
  const [name, setName] = useState("");
  const [model, setModel] = useState("tiny");
  const [data, setData] = useState<Chosen>(dataset ? { [dataset]: "" } : {});
  const [devices, setDevices] = useState<string[]>([]);
  const [typed, setTyped] = useState<Typed>({});
  const [error, setError] = useState<Error | null>(null);
  const [sending, setSending] = useState(false);

  const own = recipes.find((one) => one.name === recipe) ?? recipes[0];
  const isLauncher = own.launchers.includes(script);
  const parsed = isLauncher ? "train.py" : script;
  const flags = useLoaded(
    () =>
      get<{ groups: FlagGroup[] }>(
        `/api/recipes/${encodeURIComponent(recipe)}/flags` + query({ script: parsed }),
      ).then((found) => ({ ...found, of: `${recipe} ${parsed}` })),
    0,
    recipe,
    parsed,
  );
  const groups = flags.data?.of === `${recipe} ${parsed}` ? flags.data.groups : null;
  const all = groups?.flatMap((group) => group.flags) ?? [];
  const wrong = error instanceof ApiError ? error.param : null;
  const isWrong = (...names: string[]) =>
    wrong !== null && names.some((one) => sameName(one, wrong)) ? error!.message : null;
  const atAField = wrong !== null && (all.some((flag) => sameName(flag.name, wrong)) || ["dataset", "model", "name", "devices", "data_path", "model_name_or_path"].some((one) => sameName(one, wrong)));

  const start = async (event: React.FormEvent) => {
    event.preventDefault();
    setSending(true);
    setError(null);
    const given = all.filter((flag) => typed[flag.name] !== undefined);
    const weighted = Object.entries(data);
    try {
      const answer = await post<{ job: Job }>("/api/train/start", {
        recipe,
        [isLauncher ? "launcher" : "script"]: script,
        args: Object.fromEntries(given.map((flag) => [flag.name, valueOf(flag, typed[flag.name])])),
        dataset: weighted.map(([id, weight]) => (weight ? { id, weight: Number(weight) } : id)),
        model,
        devices: devices.length ? devices : null,
        name,
      });
      onStarted(answer.job.id);
    } catch (problem) {
      setError(problem as Error);
      setSending(false);
    }
  };

  useEffect(() => {
    if (wrong) document.querySelector(".field.wrong")?.scrollIntoView({ block: "center" });
  }, [error, wrong]);

  const set = (flag: Flag, value: string | undefined) => {
    setTyped((before) => {
      const { [flag.name]: _, ...others } = before;
      return value === undefined ? others : { ...others, [flag.name]: value };
    });
  };
  const field = (flag: Flag) => (
    <FlagField
      key={flag.name}
      flag={flag}
      usual={model === "tiny" ? flag.tiny_default : flag.default}
      value={typed[flag.name]}
      error={isWrong(flag.name)}
      onChange={(value) => set(flag, value)}
    />
  );

  return (
    <form onSubmit={start}>
      <Card title={say("什么", "What")}>
        <div className="fields">
          <Field label={say("配方", "Recipe")} hint={say(own.title_zh, own.title_en)}>
            <select
              value={recipe}
              onChange={(event) => {
                setRecipe(event.target.value);
                setScript("train.py");
                setTyped({});
                setModel("tiny");
              }}
            >
              {recipes.map((one) => (
                <option key={one.name}>{one.name}</option>
              ))}
            </select>
          </Field>
          <Field label={say("脚本", "Script")} hint={say(".py：一个进程；.sh：每个设备一个进程", ".py: one process; .sh: one process per device")}>
            <select value={script} onChange={(event) => setScript(event.target.value)}>
              {[...own.scripts, ...own.launchers].map((one) => (
                <option key={one}>{one}</option>
              ))}
            </select>
          </Field>
          <ModelChoice value={model} onChange={setModel} error={isWrong("model", "model_name_or_path")} />
          <Field label={say("名字", "Name")} hint={say("给自己看的；可以不填", "for yourself; may stay empty")} error={isWrong("name")}>
            <input type="text" maxLength={80} value={name} onChange={(event) => setName(event.target.value)} />
          </Field>
        </div>
        <DataChoice
          datasets={datasets}
          recipe={recipe}
          chosen={data}
          onChange={setData}
          error={isWrong("dataset", "data_path")}
        />
        <DeviceChoice chosen={devices} onChange={setDevices} error={isWrong("devices")} />
      </Card>
      <Card title={say("参数", "Flags")}>
        <Problem error={flags.error} />
        {!groups && !flags.error && (
          <Waiting>{say("读取这个脚本自己的参数…", "Reading the script's own flags…")}</Waiting>
        )}
        {groups && (
          <p className="faint">
            {say(
              "灰字是脚本的默认值；有的配方还按阶段、模型或设备另定（见它的 README）。空着就是默认。",
              "Grey: the script's defaults; some recipes choose others by stage, model or device (see their README). Empty means default.",
            )}
          </p>
        )}
        {groups && <Flags groups={groups} typed={typed} wrong={wrong} field={field} />}
      </Card>
      <div className="submit-bar">
        {!atAField && <Problem error={error} />}
        {atAField && <p className="problem">{say("有一项要改，已标红。", "One field has to be changed; it is marked.")}</p>}
        <button className="primary" disabled={sending || !groups}>
          {sending ? say("正在启动…", "Starting…") : say("开始训练", "Start training")}
        </button>
      </div>
    </form>
  );
}

const sameName = (a: string, b: string) => a.replace(/^--/, "") === b.replace(/^(args\.)?(--)?/, "");

function Flags({ groups, typed, wrong, field }: {
  groups: FlagGroup[];
  typed: Typed;
  wrong: string | null;
  field: (flag: Flag) => React.ReactNode;
}) {
  const say = useSay();
  const [word, setWord] = useState("");
  const free = groups.map((group) => ({
    ...group,
    flags: group.flags.filter((flag) => !flag.managed),
  }));
  const common = free.flatMap((group) => group.flags).filter((flag) => flag.common);
  const found = (flag: Flag) => `${flag.name} ${flag.help}`.toLowerCase().includes(word.toLowerCase());
  const rest = free
    .map((group) => ({ ...group, flags: group.flags.filter((flag) => !flag.common) }))
    .filter((group) => group.flags.length);
  const total = rest.reduce((sum, group) => sum + group.flags.length, 0);
  const isOpen = (group: FlagGroup) =>
    word !== "" || group.flags.some((flag) => wrong !== null && sameName(flag.name, wrong));
  return (
    <>
      <div className="fields">{common.map(field)}</div>
      <div className="row spread more-flags">
        <h3>{say(`其余 ${total} 个参数`, `${total} more flags`)}</h3>
        <input
          type="search"
          className="search"
          placeholder={say("按名字或说明查找", "Search names and help")}
          aria-label={say("查找参数", "Search flags")}
          value={word}
          onChange={(event) => setWord(event.target.value)}
        />
      </div>
      {rest.map((group) => {
        const shown = word ? group.flags.filter(found) : group.flags;
        const set = group.flags.filter((flag) => typed[flag.name] !== undefined).length;
        if (shown.length === 0) return null;
        return (
          <details key={group.title + (isOpen(group) ? " open" : "")} open={isOpen(group)}>
            <summary>
              {TITLES[group.title] ? say(...TITLES[group.title]) : group.title} <span className="faint">{shown.length}</span>
              {set > 0 && <span className="badge running">{say(`已设 ${set}`, `${set} set`)}</span>}
            </summary>
            <div className="fields">{shown.map(field)}</div>
          </details>
        );
      })}
    </>
  );
}

function ModelChoice({ value, onChange, error }: {
  value: string;
  onChange: (id: string) => void;
  error: string | null;
}) {
  const say = useSay();
  const weights = useLoaded(() => get<{ weights: Weights[] }>("/api/weights"), 0);
  return (
    <Field label={say("从哪个模型开始", "Model to start from")} error={error} hint={say("tiny：随机的微型模型，一两分钟", "tiny: a small random model, a minute or two")}>
      <select value={value} onChange={(event) => onChange(event.target.value)}>
        <option value="tiny">tiny</option>
        {weights.data?.weights.map((one) => (
          <option key={one.id} value={one.id}>
            {weightsName(one.path_label)}
          </option>
        ))}
      </select>
    </Field>
  );
}

function DeviceChoice({ chosen, onChange, error }: {
  chosen: string[];
  onChange: (ids: string[]) => void;
  error: string | null;
}) {
  const say = useSay();
  const machine = useLoaded(() => get<Machine>("/api/npu"), 5);
  const devices = machine.data?.devices ?? [];
  if (devices.length < 2) return null;
  const toggle = (device: Device) =>
    onChange(chosen.includes(device.id) ? chosen.filter((id) => id !== device.id) : [...chosen, device.id]);
  return (
    <fieldset className={error ? "wrong field" : ""}>
      <legend>{say("设备（都不选：全部）", "Devices (none chosen: all)")}</legend>
      <div className="row">
        {devices.map((device) => (
          <label key={device.id} className="check">
            <input type="checkbox" checked={chosen.includes(device.id)} onChange={() => toggle(device)} />
            {device.id} {device.name} {device.job && <span className="faint">{say("使用中", "in use")}</span>}
          </label>
        ))}
      </div>
      {error && <span className="field-error" role="alert">{error}</span>}
    </fieldset>
  );
}
