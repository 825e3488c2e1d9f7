# Sourced by the scripts that install: `set_up [EXTRA...]` makes .venv in the
# checkout, installs longjax into it and sets $python. Fast when nothing has
# changed.
#
#   PYTHON=python3.12        the interpreter to build .venv from
#   LONGJAX_VENV=DIR         another place for the environment
#   LONGJAX_PLATFORM=cpu     or cuda, tpu: instead of looking for hardware
#   LONGJAX_EXTRAS=gcs       more extras, e.g. for work directories at gs://
# shellcheck shell=bash

source "$(dirname "${BASH_SOURCE[0]}")/lib.sh"

venv=${LONGJAX_VENV:-$root/.venv}
python=$venv/bin/python
# A directory without this file was not made here and is never deleted.
mark=$venv/.made-by-longjax
# Written last: what was installed. Without it the environment is half made.
stamp=$venv/.longjax-installed

# Prints a Python >= 3.11 that can make environments.
find_python() {
  local candidate
  for candidate in ${PYTHON:-python3.13 python3.12 python3.11 python3 python}
  do
    if "$candidate" -c 'import sys, venv
sys.exit(not (3, 11) <= sys.version_info < (3, 14))' >/dev/null 2>&1; then
      command -v "$candidate"
      return
    fi
  done
  fail "no Python 3.11, 3.12 or 3.13 found${PYTHON:+ at PYTHON=$PYTHON};" \
    'install one, or name it: PYTHON=/path/to/python3.12 bash launch/...'
}

# Prints cuda, tpu or cpu.
find_platform() {
  local device
  if [[ -n ${LONGJAX_PLATFORM:-} ]]; then
    case $LONGJAX_PLATFORM in
      cpu | cuda | tpu) echo "$LONGJAX_PLATFORM" ;;
      *) fail "LONGJAX_PLATFORM=$LONGJAX_PLATFORM should be cpu, cuda or tpu" ;;
    esac
    return
  fi
  # Google's PCI ids of TPU chips, v3 to TPU7x.
  for device in /sys/bus/pci/devices/*; do
    if [[ -r $device/vendor && $(<"$device/vendor") == 0x1ae0 ]]; then
      case $(<"$device/device") in
        0x0027 | 0x0056 | 0x005e | 0x0062 | 0x0063 | 0x006f | 0x0076)
          echo tpu
          return
          ;;
      esac
    fi
  done
  if command -v nvidia-smi >/dev/null && nvidia-smi -L >/dev/null 2>&1; then
    echo cuda
  else
    echo cpu
  fi
}

make_venv() {
  local base
  base=$(find_python) || exit 2
  rm -rf "$venv"
  mkdir -p "$venv"
  : >"$mark"
  echo "longjax: making $venv with $("$base" --version)"
  if "$base" -c 'import ensurepip' 2>/dev/null; then
    "$base" -m venv "$venv"
  elif "$base" -m pip --version >/dev/null 2>&1; then
    # Debian's python3 without python3-venv, but with pip.
    "$base" -m venv --without-pip "$venv"
    "$base" -m pip --quiet --python "$python" install pip
  else
    fail "$base has neither ensurepip nor pip;" \
      'install python3-venv or python3-pip.'
  fi
}

# True if the words of $2 are all among those of $1.
includes() {
  local word
  for word in $2; do
    [[ " $1 " == *" $word "* ]] || return 1
  done
}

set_up() {
  local wanted="$* ${LONGJAX_EXTRAS-}" platform sources installed='' found=''
  platform=$(find_platform) || exit 2
  if [[ $platform != cpu ]]; then
    wanted="$wanted $platform"
  fi
  # With the path: an editable installation breaks when the checkout moves.
  sources=$({
    echo "$root"
    cat "$root/pyproject.toml" "$root/launch/constraints.txt"
  } | cksum)

  if [[ -e $venv && ! -e $mark ]]; then
    fail "$venv exists but was not made by launch/*.sh; move it away, or set" \
      'LONGJAX_VENV to another directory.'
  fi
  if [[ -r $stamp ]]; then
    { read -r found && read -r installed; } <"$stamp" || true
  fi
  if [[ ! -r $stamp ]] || ! "$python" -c '' 2>/dev/null; then
    make_venv
    installed=''
  elif [[ $found == "$sources" ]] && includes "$installed" "$wanted"; then
    return
  fi

  # shellcheck disable=SC2086
  wanted=$(printf '%s\n' $installed $wanted | sort -u | xargs)
  rm -f "$stamp"
  echo "longjax: installing longjax${wanted:+[${wanted// /,}]} and what it" \
    'needs (a few minutes the first time)'
  "$python" -m pip install --quiet --disable-pip-version-check \
    --constraint "$root/launch/constraints.txt" \
    --editable "$root${wanted:+[${wanted// /,}]}" ||
    fail 'pip could not install longjax (see above); run this again to retry.'
  printf '%s\n%s\n' "$sources" "$wanted" >"$stamp"
}
