import { useState } from "react";
import { useSay } from "../../language";
import { ColouredToken } from "../../parts/Tokens";
import { FigureBox, TextInput, useFigure } from "../figure";
import type { Chapter } from "./chapter";

interface Tokens {
  tokens: { id: number; text: string; bytes: string; special: boolean }[];
  characters: number;
  bytes: number;
  vocabulary: number;
}

function Figure() {
  const say = useSay();
  const [text, setText] = useState("今天天气很好，我们去公园。Hello, tokens! 龘");
  const [chosen, setChosen] = useState(0);
  const figure = useFigure<Tokens>("tokens", { text });
  const tokens = figure.data?.tokens ?? [];
  const token = tokens[chosen];
  return (
    <FigureBox
      title={say("这段字切成了哪些词元", "Which tokens this text becomes")}
      figure={figure}
      controls={<TextInput label={say("随便写点什么", "Write anything")} value={text} onChange={setText} />}
    >
      <div className="tokens big">
        {tokens.map((one, i) => (
          <ColouredToken
            key={i}
            index={i}
            text={one.text}
            title={`${one.id}: ${one.bytes}`}
            strong={i === chosen}
            onClick={() => setChosen(i)}
          />
        ))}
      </div>
      {token && (
        <p>
          {say("点中的词元：编号", "The chosen token: number")} <code>{token.id}</code>
          {token.bytes && (
            <>
              {say("，字节", ", bytes")} <code>{token.bytes}</code>
            </>
          )}
        </p>
      )}
      {figure.data && (
        <p className="faint">
          {say(
            `${figure.data.characters} 个字，${figure.data.bytes} 个字节，${tokens.length} 个词元：每个词元 ${(figure.data.characters / tokens.length).toFixed(2)} 个字。词表共 ${figure.data.vocabulary} 个。`,
            `${figure.data.characters} characters, ${figure.data.bytes} bytes, ${tokens.length} tokens: ${(figure.data.characters / tokens.length).toFixed(2)} characters a token. The vocabulary has ${figure.data.vocabulary}.`,
          )}
        </p>
      )}
    </FigureBox>
  );
}

export const tokenizer: Chapter = {
  id: "tokenizer",
  title: ["分词", "Tokenizer"],
  lead: ["文字怎样变成一串编号", "How text becomes a row of numbers"],
  Figure,
  before: [
    `模型只会算数，所以第一步是把文字换成编号。**词元**（token）是模型的字：有的是一个汉字，有的是一个常用词，有的只是一个字的一部分。

词表是从文本里学出来的。开始只有 256 个字节；每一轮把最常挨在一起的两个合成一个新的，直到词表够大。这叫**字节对编码**（BPE）。常见的词因此只占一个词元，生僻字退回成几个字节，但不会有写不出来的字。`,
    `A model only computes, so the first step is to trade text for numbers. **Tokens** are the model's letters: some are a whole Chinese character, some a frequent word, some only a part of a character.

The vocabulary is learnt from text. At first there are the 256 bytes; each round joins the two neighbours that occur together most often, until the vocabulary is large enough. This is **byte pair encoding** (BPE). Frequent words become one token, rare characters fall back to several bytes, and nothing is impossible to write.`,
  ],
  after: [
    `**试一试**

- 写一个生僻字（龘、犇），看它被拆成哪几个字节。
- 写数字 2026：每个数字各是一个词元，这样学算术更容易。
- 写英文和中文各一句，比较每个词元管多少个字。

词表小，每个词元管的字就少，同一段话更长、更慢；词表大，词元少了，可模型开头和结尾的两张大表也更大。微型模型的词表只有一千多个，真正的模型常用十几万个。

代码：\`minimind_npu/train_tokenizer.py\` 训练词表，\`common/tiny.py\` 里的 \`make_tokenizer\` 是最短的版本。`,
    `**Try**

- Write a rare character (龘, 犇) and see which bytes it becomes.
- Write 2026: each digit is a token of its own, which makes arithmetic easier to learn.
- Write a sentence in English and one in Chinese and compare the characters per token.

With a small vocabulary a token covers less, so the same text is longer and slower; with a large one there are fewer tokens, but the two tables at both ends of the model grow. The tiny model has some 1,500 tokens, real models often 150,000.

Code: \`minimind_npu/train_tokenizer.py\` trains a vocabulary, \`make_tokenizer\` in \`common/tiny.py\` is the shortest version.`,
  ],
};
