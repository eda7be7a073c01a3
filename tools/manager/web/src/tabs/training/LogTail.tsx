/** The end of a job's log as it is written; it goes on by itself after a break. */

import { useEffect, useRef, useState } from "react";
import { query } from "../../api";
import { useSay } from "../../language";
import { Card } from "../../parts/common";

const MOST = 1500; // lines kept here; the whole log is in the run's folder
const AGAIN = 2000; // milliseconds until the next try

/** Text behind text: a carriage return begins the last line anew, as bars do. */
export function appended(lines: string[], text: string): string[] {
  const next = [...lines];
  const plain = text.replace(/\u001b\[[0-9;?]*[A-Za-z]/g, "");
  plain.split("\n").forEach((piece, i) => {
    if (i > 0) next.push("");
    const last = next.length - 1;
    const parts = piece.split("\r").filter((part, j) => j === 0 || part !== "");
    if (parts.length > 1) next[last] = parts[parts.length - 1];
    else next[last] = (next[last] ?? "") + parts[0];
  });
  return next.slice(-MOST);
}

export function LogTail({ job, onState }: { job: string; onState: () => void }) {
  const say = useSay();
  const [lines, setLines] = useState<string[]>([""]);
  const [link, setLink] = useState<"open" | "broken" | "ended">("broken");
  const [follow, setFollow] = useState(true);
  const box = useRef<HTMLPreElement>(null);
  const heard = useRef(onState);
  heard.current = onState;

  useEffect(() => {
    let source: EventSource;
    let timer = 0;
    let last = "";
    const open = () => {
      source = new EventSource("/api/train/logs" + query({ job, after: last }));
      source.addEventListener("open", () => setLink("open"));
      source.addEventListener("log", (event) => {
        last = (event as MessageEvent).lastEventId;
        const { text } = JSON.parse((event as MessageEvent).data) as { text: string };
        setLines((before) => appended(before, text));
      });
      source.addEventListener("state", () => heard.current());
      source.addEventListener("end", () => {
        setLink("ended");
        heard.current();
        source.close();
      });
      source.addEventListener("error", () => {
        setLink((before) => (before === "ended" ? before : "broken"));
        // the browser tries again by itself unless the answer was no stream
        if (source.readyState === EventSource.CLOSED) timer = window.setTimeout(open, AGAIN);
      });
    };
    setLines([""]);
    open();
    return () => {
      clearTimeout(timer);
      source.close();
    };
  }, [job]);

  useEffect(() => {
    if (follow && box.current) box.current.scrollTop = box.current.scrollHeight;
  }, [lines, follow]);

  const scrolled = () => {
    const pre = box.current!;
    setFollow(pre.scrollHeight - pre.scrollTop - pre.clientHeight < 30);
  };
  const state = {
    open: say("实时", "live"),
    broken: say("连接断了，正在重连…", "connection lost, trying again…"),
    ended: say("已结束", "ended"),
  }[link];
  return (
    <Card title={say("日志", "Log")} action={<span className={`faint link-${link}`}>{state}</span>}>
      <pre className="log" ref={box} onScroll={scrolled} tabIndex={0} aria-label={say("日志", "Log")}>
        {lines.join("\n")}
      </pre>
      {!follow && (
        <button type="button" className="quiet" onClick={() => setFollow(true)}>
          ↓ {say("跟到最后", "Follow the end")}
        </button>
      )}
    </Card>
  );
}
