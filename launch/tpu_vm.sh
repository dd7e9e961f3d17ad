#!/usr/bin/env bash
# Trains on one TPU slice, over ssh to all of its workers: creates it, installs, runs, and deletes it when all is done.
#
#   launch/tpu_vm.sh --name N --topology T --bucket gs://B --zone Z [options] -- tele train --config PAGE --workdir W
#
#   --name N              of the slice
#   --topology T          v5p:4x4x8, v5p-256, v6e-256, ...; for TPU7x see gke_jobset.sh and xpk.sh
#   --bucket gs://B       the current directory of the command: tokenizer, cache and W are paths in it
#   --zone Z --project P  where, and for whom
#   --spot | --reserved   cheaper and preemptible, or out of a reservation
#   --service-account A   of the workers; by default the project's
#   --max-restarts N      how often a slice that is lost, or a command that fails, is started again (100)
#   --keep                leave the slice there in the end
#   --dry-run             print the commands instead
#
# Started again, it goes on: with the slice where there is one, with the run in any case. A preempted slice is deleted
# and asked for again. What launch/README.md names is checked before anything is created; a mistake of yours is one line
# and exit code 2.

# shellcheck source=launch/lib.sh
source "$(dirname "${BASH_SOURCE[0]}")/lib.sh"
options+=" topology service-account" flags+=" spot reserved keep"
topology='' service_account='' spot=0 reserved=0 keep=0
parse "$@"
need name topology bucket zone
named
tools gcloud git
preflight --topology "$topology" --api tpu
access
tpu_access
upload

tpu=(gcloud compute tpus tpu-vm)
at=(--zone="$zone" ${project:+--project="$project"})
create=("${tpu[@]}" create "$name" "${at[@]}" --accelerator-type="$accelerator_type" --version="$runtime_version")
create+=(--scopes=cloud-platform ${service_account:+--service-account="$service_account"})
((!spot)) || create+=(--spot)
((!reserved)) || create+=(--reserved)
delete=("${tpu[@]}" delete "$name" "${at[@]}" --quiet)
start="sudo install -d -o \$USER $code && gcloud storage cat $archive | tar -x -C $code && $(on_worker tpu,data)"

for ((attempt = 0; attempt <= max_restarts; attempt++)); do
  state=$(ask "${tpu[@]}" describe "$name" "${at[@]}" "--format=value(state)" 2>/dev/null) || state=''
  if [[ -n $state && $state != READY ]]; then # PREEMPTED, TERMINATED: nothing on it is of use, the run is in the bucket
    say "$name is $state"
    run "${delete[@]}"
    state=''
  fi
  if [[ -z $state ]] && ! run "${create[@]}"; then
    if ((attempt == 0)); then
      say "$name: not created, see above; launch/queued_resources.sh waits until there is room"
      exit 1
    fi
    sleep 60
    continue
  fi
  result=0
  run "${tpu[@]}" ssh "$name" "${at[@]}" --worker=all --command="$start" || result=$?
  case $result in
    0 | 2)
      ((!keep)) || delete=()
      leave "${delete[@]}"
      ;;
  esac
  say "exit code $result; looking at the slice again"
done
leave
