/** Markdown of models and reports: no HTML of theirs is obeyed, no picture is fetched from elsewhere. */

import Markdown from "markdown-to-jsx";

function Picture({ src, alt }: { src?: string; alt?: string }) {
  const isOwn = src?.startsWith("/api/") ?? false;
  return isOwn ? <img src={src} alt={alt ?? ""} /> : <span className="faint">[{alt || src}]</span>;
}

function Link({ href, children }: { href?: string; children?: React.ReactNode }) {
  return (
    <a href={href} target="_blank" rel="noreferrer noopener">
      {children}
    </a>
  );
}

const Table = (props: { children?: React.ReactNode }) => (
  <div className="table-scroll">
    <table>{props.children}</table>
  </div>
);

const OPTIONS = {
  disableParsingRawHTML: true,
  forceBlock: true,
  overrides: { img: Picture, a: Link, table: Table },
} as const;

export function Text({ children }: { children: string }) {
  return (
    <div className="markdown">
      <Markdown options={OPTIONS}>{children}</Markdown>
    </div>
  );
}
