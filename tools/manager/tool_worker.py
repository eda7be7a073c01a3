"""One call of a built-in tool: JSON in, JSON out.

echo '{"name": "calculator", "arguments": {"expression": "1+1"}}' |
    python tools/manager/tool_worker.py RECIPE_FOLDER
"""

from __future__ import annotations

import json
import os
import resource
import sys

SECONDS = 10  # of a processor
BYTES = 1 << 30


def main() -> None:
    sys.path[0] = sys.argv[1]
    from toolcall.tools import built_in

    resource.setrlimit(resource.RLIMIT_CPU, (SECONDS, SECONDS))
    resource.setrlimit(resource.RLIMIT_AS, (BYTES, BYTES))
    asked = json.loads(sys.stdin.buffer.read())
    registry = built_in()
    if asked:
        answer = {"result": registry.call(asked["name"], asked["arguments"])}
    else:
        answer = {"tools": registry.schemas}
    print(json.dumps(answer), flush=True)
    os._exit(0)  # a call that hangs is left behind


if __name__ == "__main__":
    main()
