#!/usr/bin/env bash
# Trains on a cluster that xpk made (`xpk cluster create`): attaches the bucket and creates the workload, which xpk queues
# and starts again when something is lost.
#
#   launch/xpk.sh --name N --cluster C --topology T --bucket gs://B --image I --zone Z [options] --
#       tele train --config PAGE --workdir W ...
#
#   --name N              of the workload
#   --cluster C           that `xpk cluster create` made for this topology
#   --topology T          v5p:4x4x8, v6e-256, tpu7x:4x4x8, ...
#   --num-slices N        so many of them (1)
#   --bucket gs://B       the current directory of the command: tokenizer, cache and W are paths in it
#   --image I             of launch/Dockerfile, such as us-docker.pkg.dev/P/R/tele:1
#   --build               builds and pushes it first, from the checkout
#   --zone Z --project P  of the cluster
#   --max-restarts N      how often all is started again after a failure (100)
#   --dry-run             print the commands instead
#
# Run again under another name, or after `xpk workload delete`, the run goes on from its last checkpoint. What
# launch/README.md names is checked before anything is created; a mistake of yours is one line and exit code 2.

# shellcheck source=launch/lib.sh
source "$(dirname "${BASH_SOURCE[0]}")/lib.sh"
options+=" cluster topology num-slices image" flags+=" build"
cluster='' topology='' image='' build=0
parse "$@"
need name cluster topology bucket image zone
named
tools gcloud git kubectl xpk
((!build)) || tools docker
preflight --topology "$topology" --num-slices "$num_slices" --api gke
access

at=(--cluster="$cluster" --zone="$zone" ${project:+--project="$project"})
storage=tele-${bucket#gs://} storage=${storage//[._]/-}
storages=$(ask xpk storage list "${at[@]}") || die "--cluster $cluster: xpk cannot reach it; see above"
((!build)) || build "$image" tpu,data python:3.12-slim
if ! grep -qw -- "$storage" <<<"$storages"; then # --size is of the claim, and means nothing for a bucket
  run xpk storage attach "$storage" "${at[@]}" --type=gcsfuse --bucket="${bucket#gs://}" --mount-point="$mount" \
    --readonly=false --auto-mount=false --size=1 \
    --mount-options=implicit-dirs,metadata-cache:ttl-secs:0,metadata-cache:negative-ttl-secs:0
fi
# xpk starts a workload again after exit codes 42 and 127 to 255; 1 is what the others end with where one host was lost.
run xpk workload create --workload="$name" "${at[@]}" --tpu-type="$xpk_type" --num-slices="$num_slices" \
  --docker-image="$image" --storage="$storage" --max-restarts="$max_restarts" --restart-on-exit-codes=1 \
  --termination-grace-period-seconds=600 --command="cd $mount && exec $(quoted "${command[@]}")"
