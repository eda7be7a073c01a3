import { useState } from "react";
import { bytes, count } from "../../format";
import { useSay } from "../../language";
import { NamedBars } from "../../parts/Bars";
import { Slider } from "../../parts/common";
import { FigureBox, useFigure } from "../figure";
import type { Chapter } from "./chapter";

interface Deploy {
  parameters: number;
  layers: number;
  width: number;
  heads: number;
  shared_heads: number;
  formats: { name: string; bytes: number }[];
  cache: number;
  cache_unshared: number;
  training: number;
}

const SIZES = ["tiny", "26m", "64m", "104m", "145m-moe", "198m-moe"];

function Figure() {
  const say = useSay();
  const [size, setSize] = useState("26m");
  const [context, setContext] = useState(2048);
  const [batch, setBatch] = useState(1);
  const figure = useFigure<Deploy>("deploy", { size, context, batch });
  const { data } = figure;
  return (
    <FigureBox
      title={say("要多少内存", "How much memory it takes")}
      figure={figure}
      controls={
        <>
          <label className="field narrow">
            <span className="field-label">{say("大小", "Size")}</span>
            <select value={size} onChange={(event) => setSize(event.target.value)}>
              {SIZES.map((one) => (
                <option key={one}>{one}</option>
              ))}
            </select>
          </label>
          <Slider label={say("上下文（词元）", "context (tokens)")} value={context} low={256} high={32768} step={256} onChange={setContext} />
          <Slider label={say("同时多少人", "at once")} value={batch} low={1} high={64} step={1} onChange={setBatch} />
        </>
      }
    >
      {data && (
        <>
          <p>
            {say(
              `${count(data.parameters)} 个参数：${data.layers} 层，宽 ${data.width}，${data.heads} 个查询头共用 ${data.shared_heads} 组键值。`,
              `${count(data.parameters)} parameters: ${data.layers} layers, width ${data.width}, ${data.heads} query heads on ${data.shared_heads} sets of keys and values.`,
            )}
          </p>
          <div className="two-columns">
            <div>
              <h3>{say("权重，按格式", "Weights, by format")}</h3>
              <NamedBars
                bars={data.formats.map((one) => ({
                  key: one.name,
                  name: one.name,
                  value: one.bytes,
                  text: bytes(one.bytes),
                }))}
              />
            </div>
            <div>
              <h3>{say("这些人的键值缓存", "Keys and values of all of them")}</h3>
              <NamedBars
                bars={[
                  { key: "gqa", name: say("共用（GQA）", "shared (GQA)"), value: data.cache, text: bytes(data.cache) },
                  { key: "mha", name: say("不共用", "not shared"), value: data.cache_unshared, text: bytes(data.cache_unshared) },
                  { key: "training", name: say("对比：训练", "training, to compare"), value: data.training, text: bytes(data.training) },
                ]}
              />
            </div>
          </div>
        </>
      )}
    </FigureBox>
  );
}

export const deployment: Chapter = {
  id: "deployment",
  title: ["部署", "Deployment"],
  lead: ["从权重到服务", "From weights to a service"],
  Figure,
  before: [
    `训练完的文件是一堆矩阵。让人用上它，要装进内存，还要给每个对话留一块**键值缓存**：前文每个词元的键和值都存着，新的词元才不用从头算。

权重的大小看格式：训练用 32 位，推理 16 位就够，量化到 8 位、4 位更小，也会差一点。缓存的大小看有多少人、说多长：每个词元要存 \`2 × 层数 × 键值头 × 头宽\` 个数。`,
    `A trained model is a heap of matrices. To be used it has to fit into memory, with room for the **key-value cache** of each conversation: keys and values of all earlier tokens are kept, so that a new token need not compute them again.

The size of the weights depends on the format: 32 bits for training, 16 are enough for use, 8 or 4 are smaller and a little worse. The cache depends on how many people talk for how long: each token keeps \`2 × layers × key-value heads × size of a head\` numbers.`,
  ],
  after: [
    `**试一试**

- 把人数拖到 64、上下文拖到最长：缓存远远超过权重。服务器的批处理，一大半是在管这块内存。
- 比较“共用”和“不共用”：这就是第 3 章里 GQA 省下的。
- 训练要的是权重的四倍以上：主权重、梯度、优化器的两份动量，还没算激活值。

\`minimind_npu/serve_openai_api.py\` 是兼容 OpenAI 的服务，很多请求随时加入、离开同一批。\`export.py\` 把权重写成 transformers、vLLM、SGLang 和 llama.cpp 都认识的样子；\`deploy_vllm.sh\` 再往前走一步，起 vLLM 或 vllm-ascend 的容器。

到这里就看完了。去训练一个，再回来把图里的模型换成它。`,
    `**Try**

- 64 people and the longest context: the cache is far larger than the weights. Batching servers are mostly about managing this memory.
- Compare shared and not shared: that is what GQA of chapter 3 saves.
- Training takes more than four times the weights: master weights, gradients and two moments of the optimizer, activations not counted.

\`minimind_npu/serve_openai_api.py\` is an OpenAI-compatible server whose requests join and leave a running batch. \`export.py\` writes weights as transformers, vLLM, SGLang and llama.cpp know them; \`deploy_vllm.sh\` goes one step further to a container of vLLM or vllm-ascend.

That is all. Train one, then come back and let it compute the figures.`,
  ],
};
