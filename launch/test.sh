#!/usr/bin/env bash
# Installs longjax[dev] into .venv, then linter, type check and tests.
#
#   bash launch/test.sh                         what CI runs: all but slow tests
#   bash launch/test.sh tests/rl                only these tests
#   bash launch/test.sh -m slow                 the tests that take minutes
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/setup.sh"
# The tests simulate eight devices on the CPU whatever the hardware.
LONGJAX_PLATFORM=cpu set_up dev

cd "$root"
echo 'longjax: ruff'
"$python" -m ruff check .
echo 'longjax: mypy'
"$python" -m mypy
echo 'longjax: pytest'
# A process a core; one file stays in one process and shares its programs.
exec "$python" -m pytest -q -n auto --dist loadfile "$@"
