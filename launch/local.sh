#!/usr/bin/env bash
# Installs longjax into .venv and runs the main job on this machine.
#
#   bash launch/local.sh                        configs/tiny.py in runs/tiny
#   bash launch/local.sh --config.seed=1        one value changed
#   bash launch/local.sh --config=FILE --workdir=DIR
#
# The same command again resumes an unfinished run and reports a finished one.
# Paths are relative to the checkout.
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/setup.sh"
# shellcheck disable=SC2119
set_up

cd "$root"
config=(--config=configs/tiny.py)
for argument in "$@"; do
  case $argument in
    --config | --config=* | -config | -config=*) config=() ;;
  esac
done
# libtpu, there for tests, would look for a TPU at length.
if [[ -z ${JAX_PLATFORMS:-} && $(find_platform) == cpu ]]; then
  export JAX_PLATFORMS=cpu
fi
# ${config[@]+...}: bash 3.2 (macOS) takes an empty array for an unset one.
exec "$python" -m longjax ${config[@]+"${config[@]}"} "$@"
