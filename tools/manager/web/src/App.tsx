import { useEffect, useState } from "react";
import { ApiError, get } from "./api";
import { useHash, useLoaded } from "./hooks";
import { useLanguage, useSay } from "./language";
import { Chat } from "./tabs/Chat";
import { Data } from "./tabs/Data";
import { Evaluation } from "./tabs/Evaluation";
import { Overview } from "./tabs/Overview";
import { Tools } from "./tabs/Tools";
import { Training } from "./tabs/Training";
import { Tutorial } from "./tutorial/Tutorial";
import type { Status } from "./types";

const TABS = [
  { id: "overview", zh: "概览", en: "Overview", icon: "M3 12h4l3-8 4 16 3-8h4" },
  { id: "data", zh: "数据", en: "Data", icon: "M4 6c0-4 16-4 16 0v12c0 4-16 4-16 0V6m0 6c0 4 16 4 16 0M4 6c0 4 16 4 16 0" },
  { id: "train", zh: "训练", en: "Training", icon: "M4 4v16h16M7 8c4 8 6 8 12 9" },
  { id: "chat", zh: "对话", en: "Chat", icon: "M4 5h16v11H9l-5 4z" },
  { id: "tools", zh: "工具", en: "Tools", icon: "M14 6a4 4 0 0 1 5 5l-8 8a2.8 2.8 0 0 1-4-4l8-8zM5 5l4 4" },
  { id: "eval", zh: "评测", en: "Evaluation", icon: "M5 20V10m7 10V4m7 16v-7" },
  { id: "tutorial", zh: "教程", en: "Tutorial", icon: "M4 5c3-1 6-1 8 1 2-2 5-2 8-1v13c-3-1-6-1-8 1-2-2-5-2-8-1zM12 6v13" },
];

export function App() {
  const say = useSay();
  const [[tab, ...rest], go] = useHash();
  const status = useLoaded(() => get<Status>("/api/status"), 2);
  const chosen = TABS.some((one) => one.id === tab) ? tab : "overview";
  const unauthorised = status.error instanceof ApiError && status.error.status === 401;
  // a chat goes on while another tab is looked at
  const [visited, setVisited] = useState<string[]>([]);
  useEffect(() => {
    setVisited((known) => (known.includes(chosen) ? known : [...known, chosen]));
    const name = TABS.find((one) => one.id === chosen)!;
    document.title = `${say(name.zh, name.en)} · 丹谱`;
  }, [chosen, say]);

  return (
    <div className="app">
      <a className="skip" href="#main" onClick={(event) => {
        event.preventDefault();
        document.getElementById("main")?.focus();
      }}>
        {say("跳到内容", "Skip to content")}
      </a>
      <Head status={status.data} />
      <nav className="tabs" aria-label={say("主菜单", "Main menu")}>
        {TABS.map((one) => (
          <a key={one.id} href={`#/${one.id}`} aria-current={one.id === chosen ? "page" : undefined}>
            <svg viewBox="0 0 24 24" aria-hidden="true">
              <path d={one.icon} />
            </svg>
            {say(one.zh, one.en)}
          </a>
        ))}
      </nav>
      <main id="main" tabIndex={-1}>
        {unauthorised && <TokenForm />}
        {!unauthorised && status.error && (
          <p className="problem" role="alert">
            {say("管理器没有应答，正在重试。训练不受影响。", "The manager does not answer; trying again. Training goes on.")}
          </p>
        )}
        {!unauthorised && chosen === "overview" && <Overview status={status.data} />}
        {!unauthorised && chosen === "data" && <Data chosen={rest[0]} go={go} recipe={status.data?.chosen ?? null} />}
        {!unauthorised && chosen === "train" && (
          <Training status={status.data} words={rest} go={go} reload={status.reload} />
        )}
        {!unauthorised && visited.includes("chat") && (
          <div hidden={chosen !== "chat"}>
            <Chat looked={chosen === "chat"} wanted={chosen === "chat" ? rest[0] : undefined} />
          </div>
        )}
        {!unauthorised && visited.includes("tools") && (
          <div hidden={chosen !== "tools"}>
            <Tools looked={chosen === "tools"} />
          </div>
        )}
        {!unauthorised && chosen === "eval" && <Evaluation chosen={rest[0]} />}
        {!unauthorised && chosen === "tutorial" && <Tutorial chapter={rest[0]} />}
      </main>
    </div>
  );
}

function Head({ status }: { status: Status | null }) {
  const say = useSay();
  const { language, choose } = useLanguage();
  return (
    <header className="head">
      <a className="brand" href="#/overview">
        <img src="/icon.svg" alt="" width="28" height="28" />
        <span>
          丹谱 <small>{say("训练管理器", "training manager")}</small>
        </span>
      </a>
      <span className="head-facts faint">{status?.version}</span>
      <button type="button" className="quiet" onClick={() => choose(language === "zh" ? "en" : "zh")}>
        {language === "zh" ? "English" : "中文"}
      </button>
    </header>
  );
}

function TokenForm() {
  const say = useSay();
  const [token, setToken] = useState("");
  const wasWrong = new URLSearchParams(location.search).has("token");
  return (
    <form className="card" action="/" method="get">
      <h2>{say("需要令牌", "A token is needed")}</h2>
      {wasWrong && <p className="problem">{say("这个令牌不对。", "That token is not right.")}</p>}
      <p>{say("令牌由启动管理器的人设定。", "It was set by whoever started the manager.")}</p>
      <div className="row">
        <input
          name="token"
          type="password"
          autoComplete="off"
          aria-label={say("令牌", "Token")}
          value={token}
          onChange={(event) => setToken(event.target.value)}
        />
        <button disabled={!token}>{say("进入", "Enter")}</button>
      </div>
    </form>
  );
}
