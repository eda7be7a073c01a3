#!/usr/bin/env bash
# The acceptance run of this project on one NVIDIA card: under ten minutes, one table at the end.
#   bash tests/gpu/acceptance.sh                    on the first visible card
#   WHEELS=/media/wheels bash tests/gpu/acceptance.sh    without network; the folder comes from
#                                                   pip download -r requirements.txt -d /media/wheels
#   bash tests/gpu/acceptance.sh --dry-run          each check's code on tiny shapes, on a CPU too
# Further flags go to acceptance.py: --output_dir FOLDER --minutes 10 --only kernels losses ...
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/../.."
source common/launch.sh
if [[ -n ${WHEELS:-} ]]; then
    [[ -d $WHEELS ]] || die "WHEELS=$WHEELS is no folder" 2
    export PIP_NO_INDEX=1 PIP_FIND_LINKS=$WHEELS
fi
choose_python "$root"
PATH=$(cd "$(dirname "$python")" && pwd):$PATH # ninja, which DeepSpeed looks for
export PATH
exec "$python" tests/gpu/acceptance.py "$@"
