#!/usr/bin/env bash
# Cleans text on Dataflow: `tele data clean` from gs:// to gs://, with workers out of an image of launch/Dockerfile.
#
#   launch/dataflow.sh --name N --bucket gs://B --region R --project P --image I [options] --
#       tele data clean --config PAGE --out gs://B/OUT
#
#   --name N              of the job
#   --bucket gs://B       for what Dataflow stages; files in the page and OUT are given with gs://
#   --region R --project P  where, and for whom
#   --image I             such as us-docker.pkg.dev/P/R/tele-data:1
#   --build               builds and pushes it first, from the checkout, for the Beam and Python of this machine
#   --max-workers N       (100)
#   --service-account A   of the workers; by default the project's
#   --dry-run             print the commands instead
#
# The command runs here and waits for Dataflow, which replaces workers that are lost. Where it is interrupted itself, the
# output has no manifest.json: start again with another --out. `tele data cache` writes through a file system, which
# Dataflow's workers do not have: launch/cpu_vm.sh.

# shellcheck source=launch/lib.sh
source "$(dirname "${BASH_SOURCE[0]}")/lib.sh"
options+=" region image max-workers service-account" flags+=" build"
region='' image='' max_workers=100 service_account='' build=0
parse "$@"
need name bucket region project image
named
[[ ${command[*]:0:3} == "tele data clean" ]] ||
  die "${command[*]:0:3}: only tele data clean runs on Dataflow; launch/cpu_vm.sh runs the others"
tools gcloud git
((!build)) || tools docker
typed=("${command[@]}")
preflight --api dataflow
access

# Workers need the Beam and the Python of this machine; a dry run without Beam shows the oldest that setup.py takes.
beam=$("$python" -c 'import apache_beam, apache_beam.io.gcp.gcsfilesystem; print(apache_beam.__version__)' 2>/dev/null) || {
  ((dry_run)) || die "Apache Beam for Google Cloud is missing: pip install -e '.[clean]' 'apache-beam[gcp]'"
  beam=$(sed -n 's/.*"apache-beam>=\([0-9.]*\),.*/\1.0/p' "$checkout/setup.py" | head -n 1)
}
base=apache/beam_python$("$python" -c 'import sys; print("3.%d" % sys.version_info.minor)')_sdk:$beam
((!build)) || build "$image" clean "$base"
options=(--runner=DataflowRunner)
for option in project="$project" region="$region" job_name="$name" temp_location="$bucket/launch/dataflow" \
  sdk_container_image="$image" sdk_location=container max_num_workers="$max_workers" \
  ${service_account:+service_account_email="$service_account"}; do
  options+=("--beam=--$option")
done
run "${typed[@]}" "${options[@]}"
