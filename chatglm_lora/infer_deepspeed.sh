#!/usr/bin/env bash
# Batch inference with DeepSpeed: every block is shared by all visible devices (heads must divide by their number).
#   MODEL=THUDM/chatglm-6b DATA=questions.jsonl OUTPUT=answers.jsonl NPROC=2 bash chatglm_lora/infer_deepspeed.sh
set -euo pipefail
here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
source "$here/../common/launch.sh"
launch "$here/infer.py" --tensor_parallel auto "$@"
