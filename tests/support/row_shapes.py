"""One row of every shape that people have, with the canonical row it means."""

import json

Q = "怎么做西红柿炒蛋？"
A = "先炒鸡蛋，再炒西红柿，合在一起加盐。"
HI = "你好"
HELLO = "你好，有什么可以帮你？"


def chat(*texts, system=None):
    messages = [{"role": ("user", "assistant")[i % 2], "content": t} for i, t in enumerate(texts)]
    return {"messages": ([{"role": "system", "content": system}] if system else []) + messages}


def pair(*prompt, chosen="好的", rejected="不好", system=None):
    reply = [[{"role": "assistant", "content": text}] for text in (chosen, rejected)]
    return {
        "prompt": chat(*prompt, system=system)["messages"],
        "chosen": reply[0],
        "rejected": reply[1],
    }


TURNS = [("human", HI), ("gpt", HELLO), ("human", Q), ("gpt", A)]
SHARED = [{"from": who, "value": text} for who, text in TURNS]
ROLES = [
    {"role": who, "content": text}
    for who, text in zip(["user", "assistant"] * 2, [HI, HELLO, Q, A], strict=True)
]
CALL = {"type": "function", "function": {"name": "weather", "arguments": {"city": "杭州"}}}
TOOLS = [{"type": "function", "function": {"name": "weather", "parameters": {"type": "object"}}}]
CALLED = {
    "messages": [
        {"role": "user", "content": "杭州天气？"},
        {"role": "assistant", "content": "", "tool_calls": [CALL]},
        {"role": "tool", "content": "晴"},
        {"role": "assistant", "content": "晴天。"},
    ],
    "tools": TOOLS,
}
CHATS = {
    "alpaca": ("alpaca", {"instruction": Q, "input": "", "output": A}, chat(Q, A)),
    "alpaca null": ("alpaca", {"instruction": Q, "input": None, "output": A}, chat(Q, A)),
    "alpaca no input": ("alpaca", {"instruction": Q, "output": A}, chat(Q, A)),
    "alpaca input": (
        "alpaca",
        {"instruction": "翻译", "input": HI, "output": "hello"},
        chat(f"翻译\n{HI}", "hello"),
    ),
    "alpaca history": (
        "alpaca",
        {
            "instruction": Q,
            "input": "",
            "output": A,
            "history": [[HI, HELLO]],
            "system": "你是厨师",
        },
        chat(HI, HELLO, Q, A, system="你是厨师"),
    ),
    "alpaca empty history": (
        "alpaca",
        {"instruction": Q, "output": A, "history": [], "system": ""},
        chat(Q, A),
    ),
    "alpaca zh": (
        "alpaca zh",
        {
            "instruction": "Hi",
            "input": "",
            "output": "hey",
            "instruction_zh": Q,
            "input_zh": "",
            "output_zh": A,
        },
        chat(Q, A),
    ),
    "belle": (
        "belle multi-turn",
        {
            "instruction": f"Human:{HI}\nAssistant:{HELLO}\nHuman:{Q}\nAssistant:",
            "input": "",
            "output": A,
        },
        chat(HI, HELLO, Q, A),
    ),
    "belle wide colon": (
        "belle multi-turn",
        {"instruction": f"Human：{Q}\n Assistant：", "output": A},
        chat(Q, A),
    ),
    "belle 3.5M": (
        "sharegpt",
        {
            "id": "1",
            "conversations": [{"from": "human", "value": Q}, {"from": "assistant", "value": A}],
        },
        chat(Q, A),
    ),
    "sharegpt": (
        "sharegpt",
        {"conversations": SHARED, "system": "厨师"},
        chat(HI, HELLO, Q, A, system="厨师"),
    ),
    "sharegpt tools": (
        "sharegpt",
        {
            "conversations": [
                {"from": "human", "value": "杭州天气？"},
                {
                    "from": "function_call",
                    "value": '{"name": "weather", "arguments": {"city": "杭州"}}',
                },
                {"from": "observation", "value": "晴"},
                {"from": "gpt", "value": "晴天。"},
            ],
            "tools": json.dumps(TOOLS),
        },
        CALLED,
    ),
    "human/assistant": (
        "human/assistant",
        {"conversation": [{"human": Q, "assistant": A}]},
        chat(Q, A),
    ),
    "messages": ("messages", {"messages": ROLES}, chat(HI, HELLO, Q, A)),
    "conversations roles": ("messages", {"conversations": ROLES}, chat(HI, HELLO, Q, A)),
    "messages tools": ("messages", CALLED, CALLED),
    "minimind tools": (
        "messages",
        {
            "conversations": [
                {"role": "system", "content": "", "tools": json.dumps(TOOLS)},
                {"role": "user", "content": "杭州天气？"},
                {
                    "role": "assistant",
                    "content": "",
                    "tool_calls": '[{"name": "weather", "arguments": "{\\"city\\": \\"杭州\\"}"}]',
                },
                {"role": "tool", "content": "晴"},
                {"role": "assistant", "content": "晴天。"},
            ]
        },
        CALLED,
    ),
    "thinking": (
        "messages",
        {
            "messages": [
                {"role": "user", "content": "1+1?"},
                {"role": "assistant", "content": "2", "reasoning_content": "一加一"},
            ]
        },
        {
            "messages": [
                {"role": "user", "content": "1+1?"},
                {"role": "assistant", "content": "2", "reasoning_content": "一加一"},
            ]
        },
    ),
    "content/summary": (
        "content/summary",
        {"content": "类型#裙", "summary": "一条裙子"},
        chat("类型#裙", "一条裙子"),
    ),
    "p-tuning history": (
        "content/summary",
        {"content": Q, "summary": A, "history": [[HI, HELLO]]},
        chat(HI, HELLO, Q, A),
    ),
    "p-tuning no history": (
        "content/summary",
        {"content": Q, "summary": A, "history": []},
        chat(Q, A),
    ),
    "context/target": (
        "context/target",
        {"context": f"Instruction: 翻译\nInput: {HI}\nAnswer: ", "target": "hello"},
        chat(f"翻译\n{HI}", "hello"),
    ),
    "context/target no input": (
        "context/target",
        {"context": f"Instruction: {Q}\nAnswer: ", "target": A},
        chat(Q, A),
    ),
    "context/target history": (
        "context/target",
        {"context": f"Instruction: {Q}\nInput: \nAnswer:", "target": A, "history": [[HI, HELLO]]},
        chat(HI, HELLO, Q, A),
    ),
    "context/target bare": (
        "context/target",
        {"context": f"{Q}\nAnswer: 在后面", "target": A},
        chat(f"{Q}\nAnswer: 在后面", A),
    ),
    "firefly": ("firefly", {"kind": "QA", "input": Q, "target": A}, chat(Q, A)),
    "medical": (
        "ask/answer",
        {"department": "内科", "title": "头晕", "ask": "我头晕，怎么办", "answer": A},
        chat("我头晕，怎么办", A),
    ),
    "medical title": (
        "ask/answer",
        {"title": "感冒", "ask": "吃什么药？", "answer": A},
        chat("感冒\n吃什么药？", A),
    ),
    "medical only title": (
        "ask/answer",
        {"title": "感冒吃什么药", "ask": "无", "answer": A},
        chat("感冒吃什么药", A),
    ),
    "question": ("question/answer", {"question": Q, "answer": A}, chat(Q, A)),
    "query": (
        "query/response",
        {"query": Q, "response": A, "history": [[HI, HELLO]]},
        chat(HI, HELLO, Q, A),
    ),
    "prompt response": ("prompt/response", {"prompt": Q, "response": A}, chat(Q, A)),
    "prompt completion": ("prompt/completion", {"prompt": Q, "completion": A}, chat(Q, A)),
    "prompt completion lists": (
        "prompt/completion",
        {"prompt": ROLES[2:3], "completion": ROLES[3:]},
        chat(Q, A),
    ),
    "prompt output": ("prompt/output", {"prompt": Q, "output": A}, chat(Q, A)),
}
GOOD = {"role": "assistant", "content": "好的"}
BAD = {"role": "assistant", "content": "不好"}
PAIRS = {
    "hh": (
        "hh strings",
        {
            "chosen": f"\n\nHuman: {HI}\n\nAssistant: {HELLO}\n\nHuman: {Q}\n\nAssistant: 好的",
            "rejected": f"\n\nHuman: {HI}\n\nAssistant: {HELLO}\n\nHuman: {Q}\n\nAssistant: 不好",
        },
        pair(HI, HELLO, Q),
    ),
    "hh_rlhf_cn": (
        "hh_rlhf_cn",
        {
            "context": [
                {"role": "human", "text": HI},
                {"role": "assistant", "text": HELLO},
                {"role": "human", "text": Q},
            ],
            "chosen": {"role": "assistant", "text": "好的"},
            "rejected": {"role": "assistant", "text": "不好"},
        },
        pair(HI, HELLO, Q),
    ),
    "triple": ("prompt pairs", {"prompt": Q, "chosen": "好的", "rejected": "不好"}, pair(Q)),
    "triple hh prompt": (
        "prompt pairs",
        {"prompt": f"\n\nHuman: {Q}\n\nAssistant:", "chosen": "好的", "rejected": "不好"},
        pair(Q),
    ),
    "triple lists": (
        "prompt pairs",
        {"prompt": ROLES[:3], "chosen": [GOOD], "rejected": [BAD]},
        pair(HI, HELLO, Q),
    ),
    "ultrafeedback": (
        "prompt pairs",
        {"prompt": Q, "chosen": [ROLES[2], GOOD], "rejected": [ROLES[2], BAD], "score_chosen": 9.0},
        pair(Q),
    ),
    "implicit": (
        "implicit prompt",
        {"chosen": [*ROLES[:3], GOOD], "rejected": [*ROLES[:3], BAD]},
        pair(HI, HELLO, Q),
    ),
    "llama-factory": (
        "llama-factory pairs",
        {
            "conversations": SHARED[:3],
            "chosen": {"from": "gpt", "value": "好的"},
            "rejected": {"from": "gpt", "value": "不好"},
        },
        pair(HI, HELLO, Q),
    ),
    "llama-factory strings": (
        "llama-factory pairs",
        {"conversations": SHARED[:1], "chosen": "好的", "rejected": "不好"},
        pair(HI),
    ),
    "instruction": (
        "instruction pairs",
        {"instruction": "翻译", "input": HI, "chosen": "好的", "rejected": "不好"},
        pair(f"翻译\n{HI}"),
    ),
    "output pair": (
        "output pair",
        {"instruction": Q, "input": "", "output": ["好的", "不好"]},
        pair(Q),
    ),
    "orca": (
        "question pairs",
        {"system": "厨师", "question": Q, "chosen": "好的", "rejected": "不好"},
        pair(Q, system="厨师"),
    ),
    "reward": (
        "reward",
        {
            "system": "厨师",
            "history": [[HI, HELLO]],
            "question": Q,
            "response_chosen": "好的",
            "response_rejected": "不好",
        },
        pair(HI, HELLO, Q, system="厨师"),
    ),
}
TEXTS = {
    "text": ("text", {"text": "一篇文章"}, "一篇文章"),
    "wiki": ("text", {"id": "1", "title": "杭州", "text": "浙江的省会"}, "杭州\n浙江的省会"),
    "content": (
        "content",
        {"uniqueKey": "k", "dataType": "百科", "title": "杭州", "content": "杭州是省会"},
        "杭州是省会",
    ),
    "summary under text": ("content", {"content": "一篇新闻", "summary": "新闻"}, "一篇新闻"),
    "completion": ("completion", {"completion": "一篇文章", "source": "wikipedia.zh"}, "一篇文章"),
}
