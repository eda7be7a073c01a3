#!/usr/bin/env bash
# The name this script had in older collections: the same as train_zero2.sh.
set -euo pipefail
exec bash "$(dirname "${BASH_SOURCE[0]}")/train_zero2.sh" "$@"
