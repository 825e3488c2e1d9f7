#!/usr/bin/env bash
# Runs a job on a Cloud TPU slice: requests the slice and waits in the queue
# for it, installs this checkout on every host, shows the log, resumes after
# preemption, deletes the slice. Exits with longjax's exit code.
#
#   bash launch/tpu_pod.sh --name=NAME --zone=ZONE --accelerator_type=v5p-256 \
#     [FLAGS] -- --config=FILE --workdir=gs://BUCKET/DIR [longjax's flags]
#
#   --name, --zone, --project   of the slice; gcloud's own project if not given
#   --accelerator_type          v6e-64, v5p-256, v5litepod-16, v4-128, ...
#   --runtime_version           the hosts' system; by default the one for JAX
#   --spot | --reserved         cheap and preemptible, or from a reservation
#   --max_restarts              after preemptions and crashes; 10
#   --keep                      leave the slice running at the end, and its bill
#   --setup_only                request and install, run nothing; implies --keep
#   --stop                      let the job on the slice save and stop; delete
#   --create_flags, --ssh_flags more words for gcloud, e.g.
#                               --create_flags='--network=N --internal-ips'
#                               --ssh_flags=--internal-ip
#   --dry_run                   print the commands, one a line, and run nothing
#
# A slice of that name is used if there is one. Ctrl-C lets the job save and
# stop, and deletes the slice unless --keep. If this machine dies instead, the
# job goes on, and the same command shows it again.
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/lib.sh"

name='' zone='' project='' accelerator_type='' runtime_version=''
spot='' reserved='' keep='' setup_only='' stop='' create_flags='' ssh_flags=''
max_restarts=10
parse_flags 'name zone project accelerator_type runtime_version max_restarts
  create_flags ssh_flags' 'spot reserved keep setup_only stop' "$@"

need_flags name zone
need_number max_restarts
if [[ -z $stop ]]; then
  need_flags accelerator_type
fi
if [[ -z $stop && -z $setup_only ]]; then
  check_job gs://BUCKET/DIR
  check_job_is_remote
fi
if [[ -n $spot && -n $reserved ]]; then
  fail '--spot and --reserved exclude each other.'
fi
if [[ -z $runtime_version && -z $stop ]]; then
  case $accelerator_type in
    v6e-*) runtime_version=v2-alpha-tpuv6e ;;
    v5p-*) runtime_version=v2-alpha-tpuv5 ;;
    v5litepod-*) runtime_version=v2-alpha-tpuv5-lite ;;
    v[234]-*) runtime_version=tpu-ubuntu2204-base ;;
    v5e-*) fail "Cloud TPU calls a v5e slice v5litepod-${accelerator_type#*-}." ;;
    tpu7x* | v7*) fail 'TPU7x is to be had through GKE only: launch/xpk.sh.' ;;
    *) fail "--accelerator_type=$accelerator_type is unknown here; name its" \
      '--runtime_version.' ;;
  esac
fi
[[ -n $dry_run ]] || need_program gcloud 'install the Google Cloud CLI'

where=("--zone=$zone")
if [[ -n $project ]]; then
  where+=("--project=$project")
fi
# The word lists are split at spaces.
# shellcheck disable=SC2206
ssh_words=($ssh_flags) create_words=($create_flags)
queue=(gcloud compute tpus queued-resources)
describe=("${queue[@]}" describe "$name" "${where[@]}"
  '--format=value(state.state)')
delete=("${queue[@]}" delete "$name" "${where[@]}" --force --quiet)
create=("${queue[@]}" create "$name" "--node-id=$name" "${where[@]}"
  "--accelerator-type=$accelerator_type" "--runtime-version=$runtime_version"
  ${spot:+--spot} ${reserved:+--reserved}
  ${create_words[@]+"${create_words[@]}"})
archive=${TMPDIR:-/tmp}/longjax-$name.tgz
copy=(gcloud compute tpus tpu-vm scp "$archive" "$name:longjax.tgz"
  --worker=all "${where[@]}" ${ssh_words[@]+"${ssh_words[@]}"})
host_script='bash longjax/launch/tpu_host.sh'
# A job that is running, because only our connection broke, keeps its files.
unpack="$host_script running 2>/dev/null || { rm -rf longjax && mkdir longjax\
 && tar -xzf longjax.tgz -C longjax; }"
if [[ -n $setup_only ]]; then
  command="$unpack && $host_script setup"
else
  command="$unpack && $host_script run $(quote --distributed \
    ${job[@]+"${job[@]}"})"
fi

# on_hosts all|0 COMMAND: the words that run a command there.
on_hosts() {
  ssh=(gcloud compute tpus tpu-vm ssh "$name" "--worker=$1" "${where[@]}"
    ${ssh_words[@]+"${ssh_words[@]}"} "--command=$2")
}

# Sets $state to the request's; '' if there is none.
read_state() {
  local output
  if output=$("${describe[@]}" 2>&1); then
    # Warnings of gcloud stand above it.
    state=${output##*$'\n'}
  elif [[ $output == *NOT_FOUND* ]]; then
    state=''
  else
    problem=${output//$'\n'/ }
    return 1
  fi
}

# The same, for as long as it takes: without network or credentials nobody
# could delete the slice either.
read_state_patiently() {
  local failures=0
  until read_state; do
    if ((failures++ % 10 == 0)); then
      say "gcloud cannot tell how slice $name is; trying on: $problem" >&2
    fi
    pause
  done
}

count_restart() {
  if ((restarts >= max_restarts)); then
    echo "longjax: error: $1; gave up after $restarts restarts. The same" \
      'command resumes from --workdir.' >&2
    finish 1
  fi
  restarts=$((restarts + 1))
  say "$1; restart $restarts of $max_restarts"
}

# Returns when the slice is there.
get_slice() {
  local shown=none
  while true; do
    read_state_patiently
    case $state in
      ACTIVE)
        requested=true
        return
        ;;
      '')
        if [[ -n $requested ]]; then
          echo "longjax: error: slice $name was deleted by someone else. The" \
            'same command resumes from --workdir.' >&2
          exit 1
        fi
        say "requesting $accelerator_type as $name in $zone"
        if ! run_attended "${create[@]}"; then
          ((restarts > 0)) ||
            fail 'gcloud could not request the slice (see above).'
          count_restart 'gcloud could not request the slice'
          pause
          continue
        fi
        # Described next: it may have failed at once.
        requested=true
        continue
        ;;
      SUSPENDED | FAILED)
        count_restart "slice $name is $state"
        if run_attended "${delete[@]}"; then
          requested=''
        else
          say "gcloud could not delete $name yet; trying again"
          pause
        fi
        continue
        ;;
    esac
    if [[ $state != "$shown" ]]; then
      say "slice $name is $state"
      shown=$state
    fi
    pause
  done
}

# Ends the script; what costs money goes first.
finish() {
  trap '' INT TERM
  if [[ -n $keep ]]; then
    say "slice $name is left running and is billed until:" \
      "$(quote "${delete[@]}")"
  elif [[ -n $requested || -n $state ]]; then
    say "deleting slice $name"
    "${delete[@]}" || {
      echo "longjax: error: gcloud could not delete slice $name, which may" \
        "be billed until: $(quote "${delete[@]}")" >&2
      (($1)) || exit 1
    }
  fi
  exit "$1"
}

# stopped CODE: for SIGINT and SIGTERM.
stopped() {
  # shellcheck disable=SC2064
  trap "abandoned $1" INT TERM
  if [[ -n $child ]]; then
    kill -TERM "$child" 2>/dev/null || true
  fi
  if [[ -n $is_started ]]; then
    say 'letting the job save and stop; Ctrl-C again leaves it as it is'
    on_hosts all "$host_script stop"
    run_attended "${ssh[@]}" || say 'the job could not be reached'
  fi
  finish "$1"
}

abandoned() {
  say "slice $name is left as it is and is billed until:" \
    "bash launch/tpu_pod.sh --stop --name=$name $(quote "${where[@]}")"
  exit "$1"
}

# True if the slice went away, which Cloud TPU may tell a minute late.
is_lost() {
  local i
  for i in 1 2 3; do
    read_state_patiently
    if [[ $state != ACTIVE ]]; then
      return 0
    fi
    ((i == 3)) || pause
  done
  return 1
}

# Installs and runs the job on a slice that is there. Ends the script with the
# job's exit code, or returns if the job is to be run again.
run_job() {
  local code=0 left
  say "installing on every host of $name"
  # In the foreground: at first gcloud may ask for a passphrase of its key.
  if ! run "${copy[@]}"; then
    if is_lost; then
      return
    fi
    echo 'longjax: error: gcloud could not copy the checkout (see above).' >&2
    finish 2
  fi
  is_started=true
  on_hosts all "$command"
  while true; do
    code=0
    run_attended "${ssh[@]}" || code=$?
    case $code in
      0 | 2) finish "$code" ;;
      3)
        # Another job is running there, which is not ours to end.
        keep=true
        finish 2
        ;;
    esac
    if is_lost; then
      return
    fi
    [[ -z $setup_only ]] || finish "$code"
    # A broken connection, or the job's own code?
    on_hosts 0 "$host_script status"
    left=$("${ssh[@]}" 2>/dev/null) || left=''
    left=${left##*$'\n'}
    on_hosts all "$command"
    case $left in
      running)
        say 'the connection broke; the job goes on'
        pause
        ;;
      # Some other host may have failed after this one was done.
      0) finish $((code == 255 ? 0 : code)) ;;
      1 | 2 | 130 | 143) finish "$left" ;;
      '')
        count_restart 'the hosts cannot be reached'
        pause
        return
        ;;
      *)
        # Killed, or aborted because another host died.
        count_restart "the job ended with exit code $left"
        return
        ;;
    esac
  done
}

state='' problem='' requested='' is_started='' restarts=0
if [[ -n $dry_run ]]; then
  if [[ -n $stop ]]; then
    on_hosts all "$host_script stop"
    run "${ssh[@]}"
  else
    pack "$archive"
    echo '# unless the slice is there:'
    run "${create[@]}"
    echo "# every $poll_seconds seconds until it prints ACTIVE:"
    run "${describe[@]}"
    run "${copy[@]}"
    on_hosts all "$command"
    run "${ssh[@]}"
    [[ -n $setup_only ]] ||
      echo '# after a preemption: delete as below, then all of the above again'
  fi
  if [[ -n $keep || -n $setup_only ]]; then
    echo '# not run now; the slice is billed until:'
    echo "# $(quote "${delete[@]}")"
  else
    run "${delete[@]}"
  fi
  exit
fi

read_state || fail "gcloud: $problem"
if [[ -n $stop ]]; then
  [[ -n $state ]] || fail "there is no slice $name in $zone."
  if [[ $state == ACTIVE ]]; then
    on_hosts all "$host_script stop"
    "${ssh[@]}" || say 'the job could not be reached'
  fi
  requested=true
  finish 0
fi

trap 'stopped 130' INT
trap 'stopped 143' TERM
if [[ -n $setup_only ]]; then
  keep=true
fi
# Once: a run that is resumed days later is to be of the same code.
trap 'rm -f "$archive"' EXIT
pack "$archive"
while true; do
  get_slice
  run_job
done
