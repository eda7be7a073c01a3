/** One flag of a trainer as a field of the form. */

import { useSay } from "../../language";
import { Field } from "../../parts/common";
import type { Flag } from "../../types";

/** What stands in the fields: text as it was typed, only of flags that somebody has set. */
export type Typed = Record<string, string>;

export function FlagField({ flag, usual, value, error, onChange }: {
  flag: Flag;
  usual: unknown;
  value: string | undefined;
  error: string | null;
  onChange: (value: string | undefined) => void;
}) {
  return (
    <Field
      label={<code>{flag.name.replace(/^--/, "")}</code>}
      hint={flag.help}
      error={error}
    >
      <Input flag={flag} usual={shown(usual)} value={value} onChange={onChange} />
    </Field>
  );
}

function Input({ flag, usual, value, onChange }: {
  flag: Flag;
  usual: string;
  value: string | undefined;
  onChange: (value: string | undefined) => void;
}) {
  const say = useSay();
  if (flag.type === "bool" || flag.choices?.length) {
    const choices = flag.choices ?? ["true", "false"];
    return (
      <select value={value ?? ""} onChange={(event) => onChange(event.target.value || undefined)}>
        <option value="">{usual ? say(`默认：${usual}`, `default: ${usual}`) : say("默认", "default")}</option>
        {choices.map((one) => (
          <option key={one}>{one}</option>
        ))}
      </select>
    );
  }
  return (
    <input
      type="text"
      inputMode={flag.type === "int" || flag.type === "float" ? "decimal" : "text"}
      autoComplete="off"
      spellCheck={false}
      placeholder={usual}
      value={value ?? ""}
      onChange={(event) => onChange(event.target.value || undefined)}
    />
  );
}

function shown(value: unknown): string {
  if (value === null || value === undefined) return "";
  return Array.isArray(value) ? value.join(" ") : String(value);
}

/** Typed text -> the value that the manager checks; what is no number goes as text, so that the
 *  trainer's own parser says what is wrong. */
export function valueOf(flag: Flag, text: string): unknown {
  if (flag.nargs === "*" || flag.nargs === "+") return text.trim().split(/\s+/).map((word) => single(flag, word));
  return single(flag, text.trim());
}

function single(flag: Flag, text: string): unknown {
  if (flag.type === "bool") return text === "true";
  const isNumber = flag.type === "int" || flag.type === "float";
  if (isNumber && text !== "" && Number.isFinite(Number(text))) return Number(text);
  return text;
}
