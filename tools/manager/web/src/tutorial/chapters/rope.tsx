import { useState } from "react";
import { number } from "../../format";
import { useSay } from "../../language";
import { Slider } from "../../parts/common";
import { LineChart } from "../../parts/LineChart";
import type { Points } from "../../types";
import { FigureBox, useFigure } from "../figure";
import type { Chapter } from "./chapter";

interface Rope {
  size: number;
  base: number;
  pairs: { wavelength: number; angle: number; turns: number }[];
  curve: Points;
  moved: Points;
}

function Figure() {
  const say = useSay();
  const [position, setPosition] = useState(8);
  const [distance, setDistance] = useState(4);
  const figure = useFigure<Rope>("rope", { position, distance });
  return (
    <FigureBox
      title={say("位置就是转过的角度", "A position is an angle")}
      figure={figure}
      controls={
        <>
          <Slider label={say("位置", "position")} value={position} low={0} high={512} step={1} onChange={setPosition} />
          <Slider label={say("距离", "distance")} value={distance} low={0} high={64} step={1} onChange={setDistance} />
        </>
      }
    >
      {figure.data && (
        <>
          <div className="dials">
            {figure.data.pairs.slice(0, 16).map((pair, i) => (
              <Dial key={i} {...pair} />
            ))}
          </div>
          <p className="faint">
            {say(
              `一个头有 ${figure.data.size} 个数，两两成对；底数 ${number(figure.data.base)}。表盘下是转一圈要走多少个词元。`,
              `A head has ${figure.data.size} numbers in pairs; the base is ${number(figure.data.base)}. Below each dial: tokens for one turn.`,
            )}
          </p>
          <div className="charts">
            <LineChart
              title={say("同一个向量隔多远，还有多像", "How alike a vector stays over a distance")}
              xTitle={say("距离", "distance")}
              around={[0, 1]}
              curves={[{ name: "cos", points: figure.data.curve, still: true }]}
            />
            <LineChart
              title={say(`两个一起往后移，相隔 ${distance}`, `Both moved on, ${distance} apart`)}
              xTitle={say("位置", "position")}
              around={[0, 1]}
              curves={[{ name: "cos", points: figure.data.moved }]}
            />
          </div>
        </>
      )}
    </FigureBox>
  );
}

function Dial({ wavelength, angle }: { wavelength: number; angle: number }) {
  const x = 24 + 17 * Math.cos(angle);
  const y = 24 - 17 * Math.sin(angle);
  return (
    <svg width="48" height="64" viewBox="0 0 48 64" role="img" aria-label={`${number(wavelength)}: ${number(angle)}`}>
      <circle className="dial" cx="24" cy="24" r="20" />
      <line className="needle" x1="24" y1="24" x2={x} y2={y} />
      <circle className="dot" cx={x} cy={y} r="3" />
      <text className="tick" x="24" y="58" textAnchor="middle">
        {wavelength >= 1000 ? wavelength.toExponential(0) : wavelength.toFixed(wavelength < 10 ? 1 : 0)}
      </text>
    </svg>
  );
}

export const rope: Chapter = {
  id: "rope",
  title: ["旋转位置编码", "Rotary positions (RoPE)"],
  lead: ["模型怎样知道先后", "How the model knows what comes first"],
  Figure,
  before: [
    `注意力本身不知道先后：把词打乱，点积还是那些点积。**RoPE** 的办法是旋转：把查询和键里的数两两配成对，看作平面上的箭头；站在第 m 个位置，就把每个箭头转 m 份角度。

不同的对转得快慢不同：最快的每走一个词元转一弧度，像秒针；最慢的要走上百万个词元才转一圈，像年轮。合起来，每个位置的表盘组合都不一样。`,
    `Attention itself knows no order: shuffle the words and the products stay the same. **RoPE** turns: the numbers of queries and keys form pairs, each pair is an arrow in a plane, and at position m every arrow is turned by m portions of an angle.

The pairs turn at different speeds: the fastest by one radian a token, like a second hand; the slowest needs millions of tokens for one turn. Together, each position has dials that no other one has.`,
  ],
  after: [
    `**妙处**在后一条线，它是平的：查询和键都转，点积里只剩下角度之**差**。两个词元一起往后移多远都行，只要相隔一样，得分就一样。所以模型学到的是“前面第三个”，不是“第 1024 个”。

**试一试**

- 拖动位置：左边的指针转得飞快，右边的几乎不动。
- 拖动距离，看平线的高度怎样变：它就是前一条曲线在这个距离的值。

要读比训练时更长的文字，慢的那些对会走到没见过的角度。YaRN 把它们放慢（\`inference_rope_scaling\`），快的保持不变。

代码：\`minimind_npu/model.py\` 的 \`frequencies\`、\`rotary\` 和 \`rotate\`。`,
    `**The point** is the second line, which is flat: query and key are both turned, and in their product only the **difference** of the angles is left. Both may move on as far as they like; as long as they are equally far apart, the score is the same. So the model learns "three before", not "number 1024".

**Try**

- Move the position: the first hands spin, the last ones hardly move.
- Move the distance and watch the height of the flat line: it is the value of the first curve at that distance.

For texts longer than those of training the slow pairs would reach angles never seen. YaRN slows them down (\`inference_rope_scaling\`) and leaves the fast ones alone.

Code: \`frequencies\`, \`rotary\` and \`rotate\` in \`minimind_npu/model.py\`.`,
  ],
};
