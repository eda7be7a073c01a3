#!/usr/bin/env bash
# Any stage on Ascend cards, DistributedDataParallel over HCCL: all eight of a machine, or those in DEVICES.
#   bash minimind_npu/train_npu.sh --stage pretrain --size 64m --data_path pretrain.jsonl
#   DEVICES=0,1,2,3 bash minimind_npu/train_npu.sh --stage sft --from_weight pretrain --data_path sft.jsonl
set -euo pipefail
here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
source "$here/../common/launch.sh"
export DANPU_DEVICE=npu # without a usable card this ends with the reason instead of training on the CPU
export TASK_QUEUE_ENABLE=${TASK_QUEUE_ENABLE:-2} # operators are prepared on a thread of their own
launch "$here/train.py" "$@"
