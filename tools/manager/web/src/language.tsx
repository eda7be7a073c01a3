/** Chinese and English stand beside each other where they are used: say("训练", "Training"). */

import { createContext, useContext, useEffect, type ReactNode } from "react";
import { useStored } from "./hooks";

export type Language = "zh" | "en";
export type Say = (zh: string, en: string) => string;

const Context = createContext<{ language: Language; choose: (language: Language) => void }>({
  language: "zh",
  choose: () => {},
});

export function LanguageProvider({ children }: { children: ReactNode }) {
  const [language, choose] = useStored<Language>("language", "zh");
  useEffect(() => {
    document.documentElement.lang = language === "zh" ? "zh-CN" : "en";
  }, [language]);
  return <Context value={{ language, choose }}>{children}</Context>;
}

export const useLanguage = () => useContext(Context);

export function useSay(): Say {
  const { language } = useLanguage();
  return (zh, en) => (language === "zh" ? zh : en);
}
