#!/usr/bin/env bash
# Runs a command that needs no TPU on one machine of Compute Engine with the bucket mounted: `tele data cache`, `tele
# grow` of checkpoints, `tele import`. The machine installs and starts by itself when it boots, and is deleted in the end.
#
#   launch/cpu_vm.sh --name N --bucket gs://B --zone Z [options] -- tele grow SRC DST --config PAGE --opt
#
#   --name N              of the machine
#   --machine-type M      (c3-standard-88)
#   --disk-gb G           of its disk (500)
#   --extras E            of setup.py, which the command needs (data)
#   --bucket gs://B       the current directory of the command
#   --zone Z --project P  where, and for whom
#   --spot                cheaper and preemptible: the machine is stopped, and started again
#   --service-account A   of the machine; by default the project's
#   --max-restarts N      how often a command that fails is started again (100)
#   --poll S              seconds between two looks (60)
#   --keep                leave the machine there in the end
#   --dry-run             print the commands instead
#
# `tele data cache` keeps the shards that are done; `tele grow` begins anew where its machine was lost. What
# launch/README.md names is checked before anything is created; a mistake of yours is one line and exit code 2.

# shellcheck source=launch/lib.sh
source "$(dirname "${BASH_SOURCE[0]}")/lib.sh"
options+=" machine-type disk-gb extras service-account poll" flags+=" spot keep"
machine_type=c3-standard-88 disk_gb=500 extras=data service_account='' poll=60 spot=0 keep=0
parse "$@"
need name bucket zone
named
tools gcloud git
preflight --num-slices 1
access
upload
startup "$extras"

machine=(gcloud compute instances)
at=(--zone="$zone" ${project:+--project="$project"})
create=("${machine[@]}" create "$name" "${at[@]}" --machine-type="$machine_type" --boot-disk-size="${disk_gb}GB")
create+=(--image-family=ubuntu-2404-lts-amd64 --image-project=ubuntu-os-cloud --scopes=cloud-platform)
create+=(--metadata-from-file=startup-script="$script" ${service_account:+--service-account="$service_account"})
((!spot)) || create+=(--provisioning-model=SPOT --instance-termination-action=STOP)
delete=("${machine[@]}" delete "$name" "${at[@]}" --quiet)

while true; do
  state=$(ask "${machine[@]}" describe "$name" "${at[@]}" "--format=value(status)" 2>/dev/null) || state=''
  case $state in
    '')
      run gcloud storage rm "$outcome" 2>/dev/null || true
      run "${create[@]}"
      ;;
    TERMINATED) run "${machine[@]}" start "$name" "${at[@]}" || true ;; # no room now: asked again at the next look
  esac
  if ended || ((dry_run)); then
    ((!keep)) || delete=()
    ((!dry_run)) || result=0
    leave "${delete[@]}"
  fi
  sleep "$poll"
done
