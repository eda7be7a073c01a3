"""The training manager in the browser, with this recipe chosen.

    python minimind_npu/serve_train_manager.py               # http://127.0.0.1:8999
    python minimind_npu/serve_train_manager.py --port 9000 --datasets /data/texts

It starts all recipes beside this one; see tools/manager/README.md.
"""

import sys
from pathlib import Path

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent))  # for tools/

if __name__ == "__main__":
    try:
        from tools.manager import serve
    except ModuleNotFoundError as error:
        raise SystemExit(f"error: {error}: the manager stands in tools/ of the project") from None
    serve.main(chosen=HERE.name)
