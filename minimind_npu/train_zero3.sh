#!/usr/bin/env bash
# Any stage with DeepSpeed ZeRO-3 on every visible device: for the larger sizes, whose weights it spreads too.
#   bash minimind_npu/train_zero3.sh                                       # pre-trains a tiny model on the sample data
#   DATA=my.jsonl bash minimind_npu/train_zero3.sh --stage pretrain --size 104m
set -euo pipefail
here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
source "$here/../common/launch.sh"
launch "$here/train.py" --deepspeed "$here/ds_zero3.json" "$@"
