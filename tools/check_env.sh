#!/usr/bin/env bash
# What this machine has and lacks, on one page, with CANN and the Python that the recipes' shells take. Installs nothing.
#   bash tools/check_env.sh [--json] [--offline]
set -euo pipefail
if [[ -n ${OUTPUT:-} ]]; then OUTPUT=$(realpath -m "$OUTPUT"); fi
cd "$(dirname "${BASH_SOURCE[0]}")/.."
source common/launch.sh
source_cann
python=$(command -v python || command -v python3) || die "needs Python 3.10, 3.11 or 3.12; none is on PATH"
if [[ -x .venv/bin/python && -n $(missing "$python" requirements.txt 2>&1) ]]; then python=$PWD/.venv/bin/python; fi
"$python" -c 'import sys; sys.exit(sys.version_info < (3, 8))' || die "needs Python 3.10, 3.11 or 3.12; $python is older"
exec "$python" -m tools.check_env "$@"
