#!/usr/bin/env bash
# The smallest run: a GPT-2 on synthetic Chinese text, on whichever device is there (NPU, CUDA card or CPU).
#   bash minimind_npu/quickstart.sh                                            # no model, data or network needed
#   DEVICES=0,1 bash minimind_npu/quickstart.sh --model_name gpt2 --batch_size 8 --epochs 3
#   MODEL=output/quickstart/final DATA=my.txt OUTPUT=output/mine bash minimind_npu/quickstart.sh
set -euo pipefail
here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
source "$here/../common/launch.sh"
launch "$here/quickstart/quickstart.py" "$@"
