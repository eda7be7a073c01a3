#!/usr/bin/env bash
# Every way to share negatives over ranks, one training each, then modes.png and modes.md: losses, gradients, recall.
#   bash chinese_clip_ddp/train_ddp_ti_all.sh                         # built-in tiny model, sample data
#   OUTPUT=output/modes bash chinese_clip_ddp/train_ddp_ti_all.sh --num_train_epochs 20
set -euo pipefail
here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
source "$here/../common/launch.sh"
out=${OUTPUT:-$root/output/$(basename "$here")_modes}
for mode in exact gather_nn custom gather base; do
    (OUTPUT=$out/$mode; launch "$here/train.py" --cross_embedding "$mode" "$@")
done
choose_python "$root"
quiet_libraries
"${python:?}" "$here/compare_modes.py" --runs "$out"
