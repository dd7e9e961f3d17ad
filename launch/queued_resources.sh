#!/usr/bin/env bash
# Trains on one TPU slice, or on several equal ones, as soon as there is room: a queued resource whose machines install
# and start by themselves when they boot. This launcher may be stopped and started again while they work.
#
#   launch/queued_resources.sh --name N --topology T --bucket gs://B --zone Z [options] -- tele train --config PAGE ...
#
#   --name N              of the queued resource and its slices
#   --topology T          v5p:4x4x8, v5p-256, v6e-256, ...; for TPU7x see gke_jobset.sh and xpk.sh
#   --num-slices N        so many of them (1)
#   --bucket gs://B       the current directory of the command: tokenizer, cache and W are paths in it
#   --zone Z --project P  where, and for whom
#   --spot | --reserved   cheaper and preemptible, or out of a reservation
#   --service-account A   of the workers; by default the project's
#   --max-restarts N      how often a command that fails is started again (100)
#   --poll S              seconds between two looks (60)
#   --no-wait             only ask for the resource; without this launcher nobody asks again after a preemption
#   --keep                leave the slices there in the end
#   --dry-run             print the commands instead
#
# A resource that was preempted is SUSPENDED for good: it is deleted and asked for again, and the run goes on from its
# last checkpoint. What launch/README.md names is checked before anything is created; a mistake of yours is one line and
# exit code 2.

# shellcheck source=launch/lib.sh
source "$(dirname "${BASH_SOURCE[0]}")/lib.sh"
options+=" topology num-slices service-account poll" flags+=" spot reserved no-wait keep"
topology='' service_account='' poll=60 spot=0 reserved=0 no_wait=0 keep=0
parse "$@"
need name topology bucket zone
named
tools gcloud git
preflight --topology "$topology" --num-slices "$num_slices" --api tpu
access
tpu_access
upload
startup tpu,data

queue=(gcloud compute tpus queued-resources)
at=(--zone="$zone" ${project:+--project="$project"})
create=("${queue[@]}" create "$name" "${at[@]}" --accelerator-type="$accelerator_type")
create+=(--runtime-version="$runtime_version" --metadata-from-file=startup-script="$script" --scopes=cloud-platform)
if ((num_slices > 1)); then
  create+=(--node-count="$num_slices" --node-prefix="$name")
else
  create+=(--node-id="$name")
fi
create+=(${service_account:+--service-account="$service_account"})
((!spot)) || create+=(--spot)
((!reserved)) || create+=(--reserved)
delete=("${queue[@]}" delete "$name" "${at[@]}" --force --quiet)

while true; do
  state=$(ask "${queue[@]}" describe "$name" "${at[@]}" "--format=value(state.state)" 2>/dev/null) || state=''
  case $state in
    '') # what an earlier resource of this name left is no outcome of this one
      run gcloud storage rm "$outcome" 2>/dev/null || true
      run "${create[@]}"
      ;;
    SUSPENDED | FAILED)
      say "$name is $state"
      run "${delete[@]}"
      [[ $state == SUSPENDED ]] || exit 1
      run "${create[@]}"
      ;;
  esac
  ((!no_wait)) || exit 0
  if ended || ((dry_run)); then
    ((!keep)) || delete=()
    ((!dry_run)) || result=0
    leave "${delete[@]}"
  fi
  sleep "$poll"
done
