#!/usr/bin/env bash
# Continued pre-training on plain text with DeepSpeed ZeRO-2 on every visible device.
#   bash chinese_bloom/pretrain.sh                                    # built-in tiny model, sample data
#   MODEL=bigscience/bloom-560m DATA="a.txt:0.7 b.jsonl:0.3" bash chinese_bloom/pretrain.sh
set -euo pipefail
here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
source "$here/../common/launch.sh"
OUTPUT=${OUTPUT:-$(dirname "$here")/output/$(basename "$here")_pt}
launch "$here/train.py" --stage pt --deepspeed "$here/ds_zero2.json" "$@"
