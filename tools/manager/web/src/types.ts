/** What the manager answers. */

export type State = "queued" | "running" | "stopping" | "done" | "failed" | "stopped" | "lost";
export type Moment = number | string | null;

export interface Progress {
  step: number | null;
  steps: number | null;
  epoch: number | null;
  eta_seconds: number | null;
  stage: string | null;
}

export interface Job {
  id: string;
  name: string;
  recipe: string;
  script: string;
  args: Record<string, unknown>;
  dataset: (string | { id: string; weight: number | null })[];
  model: string | null;
  state: State;
  exit_code: number | null;
  error: string | null;
  devices: string[] | null;
  created: Moment;
  started: Moment;
  ended: Moment;
  progress: Progress | null;
  output_id: string | null;
  resumable: boolean;
}

export interface Status {
  version: string;
  project: string;
  time: Moment;
  manager: { pid: number; started: Moment; restarts: number };
  jobs: Job[];
  queue: string[];
  token_required: boolean;
  chosen: string | null;
  problem: string | null;
}

export interface Device {
  id: string;
  kind: "npu" | "cuda" | "cpu";
  name: string;
  memory_total_mb: number | null;
  memory_used_mb: number | null;
  utilization: number | null;
  job: string | null;
}

export interface Machine {
  devices: Device[];
  problem: string | null;
  host: { memory_total_mb: number; memory_used_mb: number; disk_free_mb: number; load: number[] };
}

export interface Recipe {
  name: string;
  folder: string;
  title_zh: string;
  title_en: string;
  scripts: string[];
  launchers: string[];
}

export interface Flag {
  name: string;
  type: "int" | "float" | "str" | "bool" | "choice";
  default: unknown;
  choices: string[] | null;
  help: string;
  nargs: string | null;
  /** a switch has no value: true sets it */
  switch: boolean;
  /** what it is for the built-in model */
  tiny_default: unknown;
  common: boolean;
  /** the manager gives it itself */
  managed: boolean;
}

export interface FlagGroup {
  title: string;
  flags: Flag[];
}

export interface Weights {
  id: string;
  path_label: string;
  recipe: string | null;
  kind: "run" | "folder" | "adapter";
  size_mb: number;
  modified: Moment;
  finished: boolean;
  metrics: Record<string, unknown> | null;
  chat: boolean;
}

export interface Dataset {
  id: string;
  path_label: string;
  size_bytes: number | null;
  modified: Moment;
  rows: number | null;
  kind: "sample" | "upload" | "folder";
  recipe: string | null;
}

export interface Preview {
  pending?: boolean;
  progress?: unknown;
  rows: { tokens: { text: string; label: boolean }[]; length: number; label_tokens: number }[];
  lengths: { bins: number[]; counts: number[]; mean: number; max: number };
  read: number;
  used: number;
  dropped: Record<string, number>;
  examples: Record<string, string>;
  notes: string[];
}

export type Points = [number, number][];

export interface ChatServer {
  id: string;
  weights: string;
  state: "starting" | "ready" | "failed";
  error: string | null;
  models: string[];
}

export interface Report {
  markdown: string;
  json: Record<string, unknown>;
  pictures: { name: string; url: string }[];
}

export interface EvaluationRow {
  weights: string;
  path_label: string;
  recipe: string | null;
  metric: string;
  before: unknown;
  after: unknown;
}

export interface Tool {
  type: "function";
  function: { name: string; description: string; parameters: Record<string, unknown> };
}
