#!/usr/bin/env bash
# Any stage with DistributedDataParallel on every visible device (two processes on a CPU).
#   bash minimind_npu/train_ddp.sh                                         # pre-trains a tiny model on the sample data
#   NPROC=4 DATA=my.jsonl bash minimind_npu/train_ddp.sh --stage pretrain --size 26m
#   bash minimind_npu/train_ddp.sh --stage sft --from_weight pretrain --data_path sft.jsonl
set -euo pipefail
here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
source "$here/../common/launch.sh"
launch "$here/train.py" "$@"
