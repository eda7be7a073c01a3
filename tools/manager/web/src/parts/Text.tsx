/** Markdown of models and reports: no HTML of theirs is obeyed, no picture is fetched from elsewhere. */

import Markdown from "markdown-to-jsx";
import { createContext, useContext } from "react";

type Addresses = Record<string, string>;
const Pictures = createContext<Addresses>({});

function Picture({ src, alt }: { src?: string; alt?: string }) {
  const address = useContext(Pictures)[src ?? ""];
  return address ? <img src={address} alt={alt ?? ""} /> : <span className="faint">[{alt || src}]</span>;
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

/** pictures: name in the text -> address; all others are named and not fetched. */
export function Text({ children, pictures = {} }: { children: string; pictures?: Addresses }) {
  return (
    <Pictures value={pictures}>
      <div className="markdown">
        <Markdown options={OPTIONS}>{children}</Markdown>
      </div>
    </Pictures>
  );
}
