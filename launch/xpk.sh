#!/usr/bin/env bash
# Runs a job on a TPU slice of a GKE cluster, submitted with xpk, and shows its
# log. GKE restarts it after preemptions. Exits with longjax's exit code.
#
#   bash launch/xpk.sh --name=NAME --cluster=CLUSTER --tpu_type=v5p-256 \
#     [FLAGS] -- --config=FILE --workdir=gs://BUCKET/DIR [longjax's flags]
#
#   --name                      of the workload: a-z, 0-9 and -, at most 40
#   --cluster, --project, --zone  made with `xpk cluster create`; gcloud's own
#                               project and zone if not given
#   --tpu_type                  v6e-64, v5p-256, v5litepod-16, tpu7x-64, ...
#   --base_docker_image         gets this checkout and installs it at each
#                               start; python:3.12
#   --docker_image              used as it is, with longjax[tpu,gcs] in it
#   --restarts                  after preemptions and crashes; 10
#   --detach                    submit and do not show the log
#   --xpk_flags                 more words for `xpk workload create`, e.g.
#                               --xpk_flags='--priority=high --spot'
#   --dry_run                   print the commands, one a line, and run nothing
#
# Ctrl-C ends the showing, not the job: that is what `xpk workload delete` does.
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/lib.sh"

name='' cluster='' project='' zone='' tpu_type='' docker_image=''
base_docker_image='' detach='' xpk_flags=''
restarts=10
parse_flags 'name cluster project zone tpu_type docker_image base_docker_image
  restarts xpk_flags' detach "$@"

need_flags name cluster tpu_type
need_number restarts
if [[ ! $name =~ ^[a-z]([-a-z0-9]{0,38}[a-z0-9])?$ ]]; then
  fail "--name=$name should be at most 40 of a-z, 0-9 and -, and begin with" \
    'a letter.'
fi
if [[ -n $docker_image && -n $base_docker_image ]]; then
  fail '--docker_image and --base_docker_image exclude each other.'
fi
check_job gs://BUCKET/DIR
check_job_is_remote
if [[ -z $dry_run ]]; then
  need_program xpk 'pip install xpk'
  need_program kubectl 'gcloud components install kubectl'
fi

where=("--cluster=$cluster")
if [[ -n $project ]]; then
  where+=("--project=$project")
fi
if [[ -n $zone ]]; then
  where+=("--zone=$zone")
fi
# The word list is split at spaces.
# shellcheck disable=SC2206
xpk_words=($xpk_flags)
copy=${TMPDIR:-/tmp}/longjax-$name
# `exec`: SIGTERM is to reach longjax, which saves, and not a shell.
if [[ -n $docker_image ]]; then
  image=("--docker-image=$docker_image")
  command="exec python -m longjax"
else
  image=("--base-docker-image=${base_docker_image:-python:3.12}"
    "--script-dir=$copy")
  command="exec env LONGJAX_PLATFORM=tpu LONGJAX_EXTRAS=gcs bash launch/local.sh"
fi
# xpk restarts after exit codes 42 and 127 to 255, not after longjax's 1 and 2.
create=(xpk workload create "--workload=$name" "${where[@]}"
  "--tpu-type=$tpu_type" "${image[@]}" "--max-restarts=$restarts"
  --termination-grace-period-seconds=120
  ${xpk_words[@]+"${xpk_words[@]}"}
  "--command=$command $(quote --distributed "${job[@]}")")
list=(xpk workload list "${where[@]}" "--filter-by-job=$name")
delete=(xpk workload delete "${where[@]}" "--workload=$name")
# The pod that leads, after a restart the newest.
pods=(kubectl get pods --sort-by=.metadata.creationTimestamp
  "--selector=xpk.google.com/workload=$name,batch.kubernetes.io/job-completion-index=0")
phases=("${pods[@]}"
  '--output=jsonpath={range .items[*]}{.metadata.name} {.status.phase}{"\n"}{end}')
codes=("${pods[@]}"
  '--output=jsonpath={range .items[*]}{.status.containerStatuses[0].state.terminated.exitCode}{"\n"}{end}')
verdict=(kubectl get jobset "$name"
  '--output=jsonpath={.status.terminalState}')

# Shows the log of every attempt; returns the job's exit code.
follow() {
  local pod phase shown='' result code
  while true; do
    read -r pod phase < <("${phases[@]}" | tail -n 1) || true
    if [[ -n $pod && $pod != "$shown" && $phase != Pending ]]; then
      [[ -z $shown ]] || say "restarted as $pod"
      shown=$pod
      run_attended kubectl logs "$pod" --follow || true
    elif [[ -n $pod && $phase == Running ]]; then
      # kubectl lost its connection.
      run_attended kubectl logs "$pod" --follow --since="${poll_seconds}s" ||
        true
    fi
    result=$("${verdict[@]}") || result=''
    case $result in
      Completed) return 0 ;;
      Failed)
        code=$("${codes[@]}" | tail -n 1) || code=''
        say "workload $name failed" >&2
        return "${code:-1}"
        ;;
    esac
    pause
  done
}

if [[ -z $docker_image ]]; then
  pack "$copy.tgz"
  run rm -rf "$copy"
  run mkdir "$copy"
  run tar -xzf "$copy.tgz" -C "$copy"
fi
run "${create[@]}" ||
  fail "xpk could not create workload $name (see above)."
if [[ -n $dry_run ]]; then
  if [[ -z $detach ]]; then
    echo "# every $poll_seconds seconds until the last line prints Completed or Failed:"
    run "${phases[@]}"
    echo '# kubectl logs POD --follow'
    run "${verdict[@]}"
  fi
  exit
fi
rm -rf "$copy" "$copy.tgz"
say "to see its state:  $(quote "${list[@]}")"
say "to stop it:        $(quote "${delete[@]}")"
if [[ -n $detach ]]; then
  say "to see its log:    $(quote kubectl logs --follow \
    "${pods[@]: -1}")"
  exit
fi
trap 'say "workload $name goes on."; exit 130' INT
trap 'say "workload $name goes on."; exit 143' TERM
follow
