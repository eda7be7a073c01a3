#!/usr/bin/env bash
# Stage 1: the projector learns from captions; nothing else moves, so there is nothing large to shard.
#   bash train_llava/train_stage1.sh                                  # built-in tiny model, sample captions
#   MODEL=my_llava DATA=captions.json OUTPUT=output/stage1 bash train_llava/train_stage1.sh --image_folder pictures
set -euo pipefail
here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
source "$here/../common/launch.sh"
launch "$here/train.py" --train_type projector "$@"
