#!/usr/bin/env bash
# What this machine has and lacks, on one page, with CANN and the Python that the recipes' shells take. Installs nothing.
#   bash tools/check_env.sh [--json] [--offline]
set -euo pipefail
if [[ -n ${OUTPUT:-} ]]; then OUTPUT=$(realpath -m "$OUTPUT"); fi
cd "$(dirname "${BASH_SOURCE[0]}")/.."
source common/launch.sh
source_cann
choose_python --look
exec "$python" -m tools.check_env "$@"
