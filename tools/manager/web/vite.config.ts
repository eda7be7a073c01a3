import { createHash } from "node:crypto";
import { readFileSync, readdirSync, statSync, writeFileSync } from "node:fs";
import { join, relative } from "node:path";
import react from "@vitejs/plugin-react";
import { defineConfig, type Plugin } from "vite";

const here = import.meta.dirname;
const SOURCES = ["index.html", "package.json", "package-lock.json", "tsconfig.json", "vite.config.ts", "public", "src"];

function files(path: string): string[] {
  if (!statSync(path).isDirectory()) return [path];
  return readdirSync(path).flatMap((name) => files(join(path, name)));
}

/** Writes dist/sources.json: the sha256 of every file that the page is built from, so that a test
 *  without npm can tell whether dist/ belongs to src/. */
function stamp(): Plugin {
  return {
    name: "stamp",
    apply: "build",
    closeBundle() {
      const listed = SOURCES.flatMap((name) => files(join(here, name)));
      const names = listed.map((file) => relative(here, file).replaceAll("\\", "/")).sort();
      const hashed = names.map((name) => {
        const content = readFileSync(join(here, name));
        return [name, createHash("sha256").update(content).digest("hex")];
      });
      const text = JSON.stringify(Object.fromEntries(hashed), null, 1);
      writeFileSync(join(here, "dist", "sources.json"), text + "\n");
    },
  };
}

export default defineConfig({
  plugins: [react(), stamp()],
  build: {
    target: "es2022",
    assetsInlineLimit: 0, // a data: address is outside of the page's content security policy
    modulePreload: { polyfill: false },
    license: { fileName: "licenses.md" },
    chunkSizeWarningLimit: 1000,
  },
  server: { proxy: { "/api": "http://127.0.0.1:8999" } },
});
