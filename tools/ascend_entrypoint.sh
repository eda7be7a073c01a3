#!/usr/bin/env bash
# Entry point of Dockerfile.ascend: CANN's environment, then the command in the place of this shell (exec), so that
# signals and exit codes pass. The image's login and interactive shells source it for the environment alone.
#   ASCEND_ROOT   where CANN is, default /usr/local/Ascend
[ -n "${BASH_VERSION:-}" ] || return 0 # /etc/profile.d is read by sh as well

danpu_source_cann() {
    local root=${ASCEND_ROOT:-/usr/local/Ascend} file options=$-
    [[ -z ${DANPU_CANN:-} ]] || return 0 # once: each time makes PATH and LD_LIBRARY_PATH longer
    for file in "$root/cann/set_env.sh" "$root/ascend-toolkit/set_env.sh"; do
        if [[ -r $file ]]; then
            export DANPU_CANN=$file
            set +eu # set_env.sh reads variables that may be unset
            # shellcheck disable=SC1090
            source "$file"
            if [[ $options == *u* ]]; then set -u; fi
            if [[ $options == *e* ]]; then set -e; fi
            return 0
        fi
    done
    echo "no set_env.sh in $root/cann or $root/ascend-toolkit: there is no CANN in this image" >&2
}

danpu_source_cann
if [[ ${BASH_SOURCE[0]} == "$0" ]]; then
    if (($# == 0)); then set -- bash; fi
    exec "$@"
fi
