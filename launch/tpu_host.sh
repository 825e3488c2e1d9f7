#!/usr/bin/env bash
# What tpu_pod.sh starts over ssh on every host of a TPU slice.
#
#   run FLAGS  installs and runs `longjax FLAGS`, shows its log and exits with
#              its code. The job does not hang on the connection: if it is
#              running already, its log is shown again from here on.
#   setup      only installs
#   running    exits with 0 if a job is running here
#   status     prints `running` or the exit code of the last job
#   stop       lets the job save and stop, and waits for that
set -euo pipefail
# Not within the checkout, which each run replaces.
LONGJAX_VENV=${LONGJAX_VENV:-$HOME/longjax.venv}
source "$(dirname "${BASH_SOURCE[0]}")/setup.sh"

# Of the job: its log, its words, its process, its exit code, and a lock which
# its process holds.
files=$HOME/longjax.run
stop_seconds=600

is_running() {
  mkdir -p "$files"
  ! flock --nonblock "$files/lock" true
}

install() {
  # Ubuntu 22.04, which most TPU runtimes are, has Python 3.10.
  if ! (find_python) >/dev/null 2>&1; then
    say 'installing Python 3.12'
    curl -LsSf https://astral.sh/uv/0.13.5/install.sh | sh >/dev/null
    "$HOME/.local/bin/uv" python install --quiet 3.12
    PYTHON=$("$HOME/.local/bin/uv" python find --managed-python 3.12)
  fi
  LONGJAX_PLATFORM=tpu
  set_up gcs
}

# The job itself, in a session of its own.
run_longjax() {
  echo $$ >"$files/pid"
  trap 'echo $? >"$files/code"' EXIT
  trap 'is_interrupted=true; [[ -z $child ]] || kill -TERM "$child"' TERM
  install
  if [[ -n $is_interrupted ]]; then
    exit 143
  fi
  cd "$root"
  "$python" -m longjax "$@" &
  child=$!
  wait_for_child
}

# Prints the host's number within the slice; 0 leads.
worker() {
  curl -sf -H 'Metadata-Flavor: Google' --max-time 5 \
    http://metadata.google.internal/computeMetadata/v1/instance/attributes/agent-worker-number \
    2>/dev/null || echo 0
}

# show_log LINES: until the job ends; exits with its code.
show_log() {
  local number prefix=''
  number=$(worker)
  if [[ $number != 0 ]]; then
    prefix="[worker $number] "
  fi
  tail --lines="$1" --follow --pid="$(<"$files/pid")" --sleep-interval=0.5 \
    "$files/log" |
    sed --unbuffered "s/^/$prefix/"
  # Killed without a word, e.g. for want of memory.
  [[ -r $files/code ]] || exit 137
  exit "$(<"$files/code")"
}

case ${1-} in
  run)
    shift
    mkdir -p "$files"
    exec 9>"$files/lock"
    if flock --nonblock 9; then
      rm -f "$files/code" "$files/pid"
      quote "$@" >"$files/words"
      setsid bash "${BASH_SOURCE[0]}" job "$@" >"$files/log" 2>&1 </dev/null &
      exec 9>&-
      until [[ -s $files/pid || -s $files/code ]]; do sleep 0.1; done
      show_log +1
    fi
    exec 9>&-
    if [[ $(<"$files/words") != "$(quote "$@")" ]]; then
      echo 'longjax: error: another job is running on this slice: longjax' \
        "$(<"$files/words"); stop it first, with launch/tpu_pod.sh --stop" \
        --keep. >&2
      exit 3
    fi
    say 'the job is running; its last lines:'
    show_log 20
    ;;
  job)
    shift
    run_longjax "$@"
    ;;
  setup) install ;;
  running) is_running ;;
  status)
    if is_running; then
      echo running
    elif [[ -r $files/code ]]; then
      cat "$files/code"
    elif [[ -r $files/pid ]]; then
      echo 137
    fi
    ;;
  stop)
    is_running || exit 0
    kill -TERM "$(<"$files/pid")"
    flock --timeout "$stop_seconds" "$files/lock" true ||
      kill -KILL -- "-$(<"$files/pid")"
    ;;
  *) fail 'tpu_host.sh run|setup|running|status|stop; see its first lines.' ;;
esac
