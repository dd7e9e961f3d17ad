#!/usr/bin/env bash
# Trains on GKE: renders launch/gke_jobset.yaml and applies it to the cluster that kubectl is set to. The cluster starts
# everything again that is lost.
#
#   launch/gke_jobset.sh --name N --topology T --bucket gs://B --image I [options] -- tele train --config PAGE ...
#
#   --name N              of the JobSet
#   --topology T          v5p:4x4x8, v6e-256, tpu7x:4x4x8, ...; there must be a node pool for each slice
#   --num-slices N        so many of them (1)
#   --bucket gs://B       the current directory of the command: tokenizer, cache and W are paths in it
#   --image I             of launch/Dockerfile, such as us-docker.pkg.dev/P/R/tele:1
#   --build               builds and pushes it first, from the checkout
#   --namespace S         (default)
#   --service-account A   of Kubernetes, which may write to the bucket (default)
#   --spot                on Spot nodes
#   --project P           for the checks of the bucket
#   --max-restarts N      how often all is started again after a failure (100)
#   --dry-run             print the commands and the manifest instead
#
# A JobSet of that name that has ended is replaced, and the run goes on; one that runs is left alone. What
# launch/README.md names is checked before anything is created; a mistake of yours is one line and exit code 2.

# shellcheck source=launch/lib.sh
source "$(dirname "${BASH_SOURCE[0]}")/lib.sh"
options+=" topology num-slices image namespace service-account" flags+=" spot build"
topology='' image='' namespace=default service_account=default spot=0 build=0
parse "$@"
need name topology bucket image
named
tools gcloud git kubectl
((!build)) || tools docker
preflight --topology "$topology" --num-slices "$num_slices" --api gke
access

label=cloud.google.com/gke
node_selector="{\"$label-tpu-accelerator\": \"$gke_accelerator\", \"$label-tpu-topology\": \"$gke_topology\""
((!spot)) || node_selector+=", \"$label-spot\": \"true\""
manifest=$("$python" "$here/render.py" "$here/gke_jobset.yaml" name="$name" namespace="$namespace" image="$image" \
  service_account="$service_account" bucket="${bucket#gs://}" mount="$mount" max_restarts:="$max_restarts" \
  num_slices:="$num_slices" hosts:="$hosts" chips_per_host:="$chips_per_host" node_selector:="$node_selector}" \
  command -- "${command[@]}")

kube=(kubectl --namespace "$namespace")
ask "${kube[@]}" get crd jobsets.jobset.x-k8s.io --output=name >/dev/null ||
  die "the cluster has no JobSets, or is out of reach; kubectl apply --server-side -f" \
    "https://github.com/kubernetes-sigs/jobset/releases/latest/download/manifests.yaml installs them"
state="jsonpath={.metadata.name} {.status.terminalState}"
before=$(ask "${kube[@]}" get jobset "$name" --ignore-not-found "--output=$state")
case $before in
  '') ;;
  *" Complete"* | *" Failed") run "${kube[@]}" delete jobset "$name" ;;
  *) die "--name $name: this JobSet is at work; kubectl --namespace $namespace delete jobset $name stops it" ;;
esac
((!build)) || build "$image" tpu,data python:3.12-slim
if ((dry_run)); then
  printf "%s <<'MANIFEST'\n%s\nMANIFEST\n" "$(quoted "${kube[@]}" apply --filename -)" "$manifest"
else
  "${kube[@]}" apply --filename - <<<"$manifest"
fi
say "what it says: kubectl --namespace $namespace logs --follow job/$name-slice-0"
