/** Numbers with units, short. */

export function megabytes(mb: number | null | undefined): string {
  if (mb === null || mb === undefined) return "–";
  if (mb >= 1024) return `${(mb / 1024).toFixed(1)} GiB`;
  if (mb >= 10) return `${Math.round(mb)} MiB`;
  return mb >= 1 ? `${mb.toFixed(1)} MiB` : `${Math.round(mb * 1024)} KiB`;
}

export const bytes = (count: number): string =>
  count < 1024 ? `${count} B` : megabytes(count / 1024 / 1024);

export function count(value: number | null | undefined): string {
  if (value === null || value === undefined) return "–";
  return value.toLocaleString("en-US");
}

/** 0.000123 → 1.23e-4, 3.14159 → 3.142, 12345.6 → 12,346. */
export function number(value: number | null | undefined): string {
  if (value === null || value === undefined || !Number.isFinite(value)) return "–";
  const size = Math.abs(value);
  if (size !== 0 && size < 0.001) return value.toExponential(2);
  if (size >= 1000) return Math.round(value).toLocaleString("en-US");
  return String(Number(value.toPrecision(4)));
}

export function duration(seconds: number | null | undefined): string {
  if (seconds === null || seconds === undefined || seconds < 0) return "–";
  const whole = Math.round(seconds);
  if (whole < 60) return `${whole} s`;
  if (whole < 3600) return `${Math.floor(whole / 60)} min ${whole % 60} s`;
  return `${Math.floor(whole / 3600)} h ${Math.floor((whole % 3600) / 60)} min`;
}

/** The time of a moment, which the manager gives as seconds since 1970 or as ISO text. */
export function moment(value: number | string | null | undefined): string {
  if (value === null || value === undefined) return "–";
  const date = typeof value === "number" ? new Date(value * 1000) : new Date(value);
  if (Number.isNaN(date.getTime())) return "–";
  const two = (part: number) => String(part).padStart(2, "0");
  const time = `${two(date.getHours())}:${two(date.getMinutes())}`;
  if (date.toDateString() === new Date().toDateString()) return time;
  return `${date.getFullYear()}-${two(date.getMonth() + 1)}-${two(date.getDate())} ${time}`;
}

export const seconds = (value: number | string): number =>
  typeof value === "number" ? value : new Date(value).getTime() / 1000;

/** Of a data set: the name of an uploaded file, of a sample its place in the recipe's data. */
export function datasetName(one: { path_label: string; kind: string; recipe: string | null }): string {
  if (one.kind === "upload") return one.path_label.split("/").pop()!;
  const start = `${one.recipe}/data/`;
  const within = one.path_label.startsWith(start) ? one.path_label.slice(start.length) : one.path_label;
  return within || "data/";
}

/** Of weights: the end of their path, which tells them apart; "final" is in every run. */
export function weightsName(label: string): string {
  const parts = label.split("/").filter((part) => part !== "" && part !== "final");
  return parts.slice(-2).join("/");
}
