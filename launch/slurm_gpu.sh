#!/usr/bin/env bash
# Runs a job on NVIDIA GPUs of a Slurm cluster, one process a GPU. Shortly
# before the time limit, and when preempted, longjax saves; Slurm queues the
# job again, and it resumes.
#
#   bash launch/slurm_gpu.sh --nodes=4 --gpus_per_node=8 [FLAGS] \
#     -- --config=FILE --workdir=DIR [longjax's flags]
#   sbatch --nodes=4 --gpus-per-node=8 --ntasks-per-node=8 --cpus-per-task=8 \
#     launch/slurm_gpu.sh -- --config=FILE --workdir=DIR
#
#   --name                      of the job; longjax
#   --nodes, --gpus_per_node    1 and 8
#   --cpus_per_gpu              8
#   --partition, --account, --time  as sbatch has them
#   --sbatch_flags              more words for sbatch, e.g.
#                               --sbatch_flags='--mem=0 --constraint=h100'
#   --container                 an image for Pyxis (enroot) with Python and
#                               longjax[cuda] in it, instead of .venv
#   --dry_run                   print the commands, one a line, and run nothing
#
# Checkout, .venv and --workdir must be on a file system that all nodes share.
# The first form installs here and submits the second; within an allocation
# (salloc) it runs at once. `scancel JOB` stops the job for good.
#SBATCH --job-name=longjax
#SBATCH --output=longjax-%j.log
#SBATCH --open-mode=append
#SBATCH --requeue
#SBATCH --signal=B:TERM@120
set -euo pipefail
launch=$(dirname "${BASH_SOURCE[0]}")
if [[ ! -r $launch/lib.sh ]]; then
  # sbatch runs a copy; the checkout is where it was submitted.
  launch=${SLURM_SUBMIT_DIR-}/launch
fi
if [[ ! -r $launch/lib.sh ]]; then
  echo 'longjax: error: submit from the checkout:' \
    'cd CHECKOUT && sbatch ... launch/slurm_gpu.sh' >&2
  exit 2
fi
source "$launch/lib.sh"

name=longjax nodes=1 gpus_per_node=8 cpus_per_gpu=8 partition='' account=''
time='' sbatch_flags='' container=''
parse_flags 'name nodes gpus_per_node cpus_per_gpu partition account time
  sbatch_flags container' '' "$@"
need_number nodes
need_number gpus_per_node
need_number cpus_per_gpu
check_job DIR
workdir=$(job_flag workdir)

extras=''
if [[ $workdir == gs://* ]]; then
  extras=gcs
fi
# shellcheck disable=SC2016
install=(env LONGJAX_PLATFORM=cuda ${extras:+"LONGJAX_EXTRAS=$extras"} bash -c 'source "$0"; set_up'
  "$root/launch/setup.sh")

# Sets ${step[@]}: what runs longjax on NODES times GPUS.
make_step() {
  step=(srun "--nodes=$1" "--ntasks=$(($1 * $2))" "--ntasks-per-node=$2"
    # srun no longer takes it over from sbatch.
    "--cpus-per-task=$3"
    # jax.distributed gives each process the GPU of its number on the node,
    # so that every process must see all of them (no --gpus-per-task).
    # A process that stops first must not take those that still save with it.
    --kill-on-bad-exit=0 --wait=600)
  if [[ -n $container ]]; then
    step+=("--container-image=$container" "--container-mounts=$root:$root$(
      [[ $workdir != /* ]] || echo ",$workdir:$workdir")"
      "--container-workdir=$root" python)
  else
    step+=("${LONGJAX_VENV:-$root/.venv}/bin/python")
  fi
  step+=(-m longjax --distributed "${job[@]}")
}

# At SIGTERM, which Slurm sends to this shell and not to longjax.
told_to_stop() {
  is_interrupted=true
  if [[ -n $child ]]; then
    # srun hands it on to every process.
    kill -TERM "$child" 2>/dev/null || true
  fi
  # Only before its time limit is a job told to stop while Slurm calls it
  # running: cancelled it is CANCELLED, and preempted Slurm queues it itself.
  if [[ $(scontrol show job --oneliner "$SLURM_JOB_ID") == \
    *JobState=RUNNING* ]]; then
    is_out_of_time=true
  fi
}

run_in_allocation() {
  local code=0 is_out_of_time=''
  if [[ -z $container ]]; then
    run "${install[@]}"
  elif [[ $workdir == /* ]]; then
    run mkdir -p "$workdir"
  fi
  make_step "${SLURM_JOB_NUM_NODES:-1}" "${SLURM_GPUS_ON_NODE:-1}" \
    "${SLURM_CPUS_PER_TASK:-$cpus_per_gpu}"
  if [[ -n $dry_run ]]; then
    run "${step[@]}"
    return
  fi
  if [[ -n ${SLURM_RESTART_COUNT-} ]]; then
    say "resuming, restart $SLURM_RESTART_COUNT"
  fi
  cd "$root"
  trap told_to_stop TERM
  "${step[@]}" &
  child=$!
  wait_for_child || code=$?
  if [[ -n $is_out_of_time ]] && ((code > 2)); then
    say 'out of time; queued again'
    scontrol requeue "$SLURM_JOB_ID"
  fi
  return "$code"
}

if [[ -n ${SLURM_JOB_ID-} ]]; then
  run_in_allocation
  exit
fi

if [[ -z $dry_run ]]; then
  need_program sbatch 'run this on a login node of the cluster'
fi
# The word list is split at spaces.
# shellcheck disable=SC2206
sbatch_words=($sbatch_flags)
own=()
if [[ -n $container ]]; then
  own+=("--container=$container")
else
  run "${install[@]}"
fi
run sbatch "--job-name=$name" "--chdir=$root" "--nodes=$nodes" \
  "--gpus-per-node=$gpus_per_node" "--ntasks-per-node=$gpus_per_node" \
  "--cpus-per-task=$cpus_per_gpu" ${partition:+"--partition=$partition"} \
  ${account:+"--account=$account"} ${time:+"--time=$time"} \
  ${sbatch_words[@]+"${sbatch_words[@]}"} "$root/launch/slurm_gpu.sh" \
  ${own[@]+"${own[@]}"} -- "${job[@]}"
if [[ -n $dry_run ]]; then
  make_step "$nodes" "$gpus_per_node" "$cpus_per_gpu"
  echo '# in the job, on its first node:'
  echo "# $(quote "${step[@]}")"
else
  say "its log: $root/longjax-JOB.log; to stop it: scancel JOB"
fi
