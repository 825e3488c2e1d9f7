# Sourced by the other scripts: messages, flags and what the cluster scripts
# share. Sets $root, the checkout.
# shellcheck shell=bash disable=SC2034  # the scripts use what is set here

root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
poll_seconds=${LONGJAX_POLL_SECONDS:-30}
# What was given: the script's own flags are variables of their names.
dry_run=''
job=()
# The process that is waited for; traps that let it end set $is_interrupted.
child=''
is_interrupted=''

fail() {
  echo "longjax: error: $*" >&2
  exit 2
}

say() {
  echo "longjax: $*"
}

# Prints the comment a script begins with.
usage() {
  sed -n '2,/^[^#]/s/^# \{0,1\}//p' "$0" | grep -v '^SBATCH\|^shellcheck'
}

# parse_flags VALUED SWITCHES "$@": sets $NAME for each --NAME=VALUE whose name
# is among the words of VALUED, $NAME to true for each --NAME among those of
# SWITCHES, and ${job[@]} to what stands behind `--`.
parse_flags() {
  local valued=" ${1//$'\n'/ } " switches=" $2 dry_run " flag
  shift 2
  while (($#)); do
    flag=${1%%=*}
    flag=${flag#--}
    # gcloud's and Slurm's spelling means the same.
    flag=${flag//-/_}
    case $1 in
      --help | -h)
        usage
        exit 0
        ;;
      --)
        shift
        job=("$@")
        return
        ;;
      --*) ;;
      *) fail "unexpected argument '$1'; see --help." ;;
    esac
    if [[ $switches == *" $flag "* ]]; then
      [[ $1 != *=* ]] || fail "--$flag takes no value."
      printf -v "$flag" true
    elif [[ $valued == *" $flag "* ]]; then
      if [[ $1 == *=* ]]; then
        printf -v "$flag" %s "${1#*=}"
      else
        (($# > 1)) || fail "--$flag needs a value."
        shift
        printf -v "$flag" %s "$1"
      fi
      [[ -n ${!flag} ]] || fail "--$flag needs a value."
    else
      fail "${1%%=*} is no flag of this script (see --help); longjax's own" \
        'flags stand behind a lone --.'
    fi
    shift
  done
}

# need_flags NAME...: each must have been given.
need_flags() {
  local flag
  for flag in "$@"; do
    [[ -n ${!flag} ]] || fail "--$flag is missing; see --help."
  done
}

need_number() {
  [[ ${!1} =~ ^[0-9]+$ ]] || fail "--$1=${!1} should be a whole number."
}

need_program() {
  command -v "$1" >/dev/null || fail "there is no $1 on this machine; $2."
}

# Prints the value of --NAME in longjax's flags.
job_flag() {
  local i
  for ((i = 0; i < ${#job[@]}; i++)); do
    case ${job[i]} in
      "--$1="* | "-$1="*) echo "${job[i]#*=}" ;;
      "--$1" | "-$1") echo "${job[i + 1]-}" ;;
    esac
  done
}

# check_job EXAMPLE_WORKDIR: refuses, before anything is rented, a job that
# could not start.
check_job() {
  local config path
  ((${#job[@]})) || fail "no job given; for example" \
    "-- --config=configs/tiny.py --workdir=$1"
  config=$(job_flag config)
  config=${config%%:*}
  [[ -n $config ]] || fail "no --config=FILE behind the --."
  path=$config
  [[ $config == /* ]] || path=$root/$config
  [[ -r $path ]] || fail "cannot read --config=$config in $root."
  [[ -n $(job_flag workdir) ]] || fail "no --workdir=DIR behind the --; for" \
    "example --workdir=$1"
}

# For hosts that come and go, and their disks with them.
check_job_is_remote() {
  local config
  config=$(job_flag config)
  [[ $config != /* ]] || fail "--config=$config should be a path within the" \
    'checkout, which is all that the hosts get.'
  [[ $(job_flag workdir) == gs://* ]] || fail \
    "--workdir=$(job_flag workdir) should be a gs:// directory: the disks of" \
    'the hosts are lost with them.'
}

# quote WORD...: one line that a shell reads as these words.
quote() {
  local word line='' apostrophe="'\\''"
  for word in "$@"; do
    if [[ ! $word =~ ^[A-Za-z0-9_@%+=:,./-]+$ ]]; then
      word="'${word//\'/$apostrophe}'"
    fi
    line+="$word "
  done
  echo "${line% }"
}

# Runs a command; with --dry_run only prints it.
run() {
  if [[ -n $dry_run ]]; then
    quote "$@"
  else
    "$@"
  fi
}

# The same in the background, so that a trap for a signal runs at once and not
# when the command has ended; $child is its process.
run_attended() {
  local code=0
  if [[ -n $dry_run ]]; then
    quote "$@"
    return
  fi
  "$@" &
  child=$!
  wait "$child" || code=$?
  child=''
  return "$code"
}

# Returns the code of $child, when it has ended and not when a signal came.
wait_for_child() {
  local code
  while true; do
    is_interrupted=''
    code=0
    wait "$child" || code=$?
    [[ -n $is_interrupted ]] || return "$code"
  done
}

pause() {
  run_attended sleep "$poll_seconds"
}

# pack FILE: the checkout with what is not committed, without what is made.
pack() {
  run tar --exclude=./.git --exclude=./.venv --exclude=./.venv.* \
    --exclude=./runs --exclude=./*.egg-info --exclude=./.*_cache \
    --exclude=./.hypothesis --exclude=__pycache__ \
    -czf "$1" -C "$root" . ||
    fail 'tar could not pack the checkout (see above).'
}
