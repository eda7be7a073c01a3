#!/usr/bin/env bash
# Sets up what the tests need and runs them.
#   bash tests/run.sh                        all of them
#   bash tests/run.sh train_qwen             what a change of that recipe needs
#   bash tests/run.sh core|tools|npu|gpu|real|fast    a room; real: with a real model of 135M; fast: no training runs
# Further flags go to pytest.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
source common/launch.sh
choose_python "$PWD/requirements-dev.txt"
PATH=$(dirname "$python"):$PATH
export PATH

room=()
case ${1:-} in
    core | tools | npu | gpu | real | fast) room=(--room "$1"); shift ;;
    "" | -*) ;;
    *)
        [[ -f ${1%/}/train.py ]] || die "$1 is no recipe and none of core, tools, npu, gpu, real, fast" 2
        room=(--room "${1%/}"); shift ;;
esac

# Debian's Chromium and CJK fonts for the demo tests, shellcheck for the scripts (grep -q would end
# fc-list by SIGPIPE, which counts as a failure here)
if ! command -v chromium >/dev/null || ! command -v shellcheck >/dev/null || ! fc-list 2>/dev/null | grep -i "noto.*cjk" >/dev/null; then
    if command -v apt-get >/dev/null && [[ $(id -u) == 0 ]]; then
        echo "tests: installing chromium, fonts-noto-cjk and shellcheck"
        apt-get update -qq >/dev/null
        DEBIAN_FRONTEND=noninteractive apt-get install -y -qq --no-install-recommends chromium fonts-noto-cjk fontconfig shellcheck >/dev/null
    else
        echo "tests: chromium, fonts-noto-cjk or shellcheck is missing; the tests that need them will fail. As root: apt-get install them" >&2
    fi
fi

# the simulated NPU: fetches the torch-npu wheel beside the environment and compiles, once
python tests/npu/npu_sim/simulator.py >/dev/null

ruff check .
ruff format --check .
git ls-files '*.sh' .ci/run | xargs shellcheck -x -e SC1091

# half as many files at a time as there are cores, three at least: most of a run is the start of
# processes, which leaves a core idle (a fifth of two cores with two at a time), and many tests
# start two
workers=$(($(nproc) / 2))
if ((workers < 3)); then workers=3; fi
exec python -m pytest -q --durations=25 -n "$workers" --dist loadfile --no-loadscope-reorder "${room[@]}" "$@"
