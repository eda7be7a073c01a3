/** Which data sets a training reads, with weights where there are several. */

import { useState } from "react";
import { count, datasetName } from "../../format";
import { useSay } from "../../language";
import type { Dataset } from "../../types";

/** id -> weight as typed, "" for none. */
export type Chosen = Record<string, string>;

export function DataChoice({ datasets, recipe, chosen, onChange, error }: {
  datasets: Dataset[];
  recipe: string;
  chosen: Chosen;
  onChange: (chosen: Chosen) => void;
  error: string | null;
}) {
  const say = useSay();
  const [all, setAll] = useState(false);
  const fits = (one: Dataset) => one.recipe === null || one.recipe === recipe || one.id in chosen;
  const shown = all ? datasets : datasets.filter(fits);
  const others = datasets.length - shown.length;
  const several = Object.keys(chosen).length > 1;
  const toggle = (id: string) => {
    const { [id]: weight, ...rest } = chosen;
    onChange(weight === undefined ? { ...chosen, [id]: "" } : rest);
  };
  return (
    <fieldset className={error ? "wrong field" : ""}>
      <legend>{say("数据（都不选：配方自带的样例）", "Data (none chosen: the recipe's own samples)")}</legend>
      <div className="choices">
        {shown.map((one) => (
          <div key={one.id} className="choice">
            <label className="check">
              <input type="checkbox" checked={one.id in chosen} onChange={() => toggle(one.id)} />
              <span className="ellipsis" title={one.path_label}>
                {datasetName(one)}
                {one.kind === "sample" && one.recipe !== recipe && <span className="faint"> {one.recipe}</span>}
              </span>
              {one.rows !== null && <span className="faint">{say(`${count(one.rows)} 行`, `${count(one.rows)} rows`)}</span>}
            </label>
            {several && one.id in chosen && (
              <input
                type="text"
                inputMode="decimal"
                className="weight"
                placeholder="1.0"
                aria-label={say(`${one.path_label} 的权重`, `weight of ${one.path_label}`)}
                value={chosen[one.id]}
                onChange={(event) => onChange({ ...chosen, [one.id]: event.target.value })}
              />
            )}
          </div>
        ))}
      </div>
      {(others > 0 || all) && (
        <button type="button" className="link" onClick={() => setAll(!all)}>
          {all ? say("只看这个配方的", "Only those of this recipe") : say(`还有 ${others} 个别的配方的`, `${others} of other recipes`)}
        </button>
      )}
      {error && <span className="field-error" role="alert">{error}</span>}
    </fieldset>
  );
}
