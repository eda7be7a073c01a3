/** Token rows: what is trained in colour, or each token with a boundary. */

import { useSay } from "../language";

/** White space and halves of characters made visible. */
export function visible(text: string): string {
  return text.replaceAll(" ", "␣").replaceAll("\t", "⇥");
}

function withLines(text: string) {
  const parts = visible(text).split("\n");
  return parts.map((part, i) => (
    <span key={i}>
      {part}
      {i < parts.length - 1 && (
        <>
          <span className="newline">↵</span>
          <br />
        </>
      )}
    </span>
  ));
}

export function TrainedTokens({ tokens }: { tokens: { text: string; label: boolean }[] }) {
  return (
    <div className="tokens">
      {tokens.map((token, i) => (
        <span key={i} className={token.label ? "token trained" : "token read"}>
          {withLines(token.text)}
        </span>
      ))}
    </div>
  );
}

export function LabelLegend() {
  const say = useSay();
  return (
    <p className="legend-line">
      <span className="token trained">{say("参与训练（有标签）", "trained (has a label)")}</span>{" "}
      <span className="token read">{say("只读（无标签）", "read only (no label)")}</span>
    </p>
  );
}

export function ColouredToken({ text, index, title, onClick, strong }: {
  text: string;
  index: number;
  title?: string;
  onClick?: () => void;
  strong?: boolean;
}) {
  const name = `token hue-${index % 6} ${strong ? "strong" : ""}`;
  if (!onClick) {
    return (
      <span className={name} title={title}>
        {withLines(text)}
      </span>
    );
  }
  return (
    <button type="button" className={name} title={title} onClick={onClick} aria-pressed={strong}>
      {withLines(text)}
    </button>
  );
}
