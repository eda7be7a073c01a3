/** A chapter: text before and after its figure as Markdown, each [Chinese, English]. */

import type { ComponentType } from "react";

export type Both = [zh: string, en: string];

export interface Chapter {
  id: string;
  title: Both;
  lead: Both;
  before: Both;
  after: Both;
  Figure: ComponentType;
}
