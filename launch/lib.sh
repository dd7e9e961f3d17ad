# Shared by the launchers: options, dry runs, the preflight, and the copy of the checkout that the machines get.
# shellcheck shell=bash
# shellcheck disable=SC2034  # variables that are set here and used by the launchers

set -euo pipefail

here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
checkout=$(dirname "$here")
launcher=$(basename "$0")
python=${PYTHON:-$checkout/.venv/bin/python}
command -v "$python" >/dev/null || python=python3

# What every launcher takes. A launcher adds its own to `options` (with a value) and `flags` before it calls `parse`.
options="name bucket project zone max-restarts"
flags="dry-run"
name='' bucket='' project='' zone='' max_restarts=100 dry_run=0
command=() # what follows --
# What `tele preflight` finds out.
jax='' libtpu='' code='' mount='' num_slices=1 inputs=()
accelerator_type='' runtime_version=''
gke_accelerator='' gke_topology='' machine_type='' xpk_type='' hosts='' chips_per_host=''

die() { # a mistake of the user's: one line, exit code 2
  echo "$launcher: $*" >&2
  exit 2
}

say() { # for people; a comment among the commands of a dry run
  if ((dry_run)); then echo "# $*"; else echo "$launcher: $*" >&2; fi
}

usage() { # the comment at the top of the launcher
  sed -n '2,/^$/s/^# \{0,1\}//p' "$0"
}

parse() {
  local option variable
  while (($#)); do
    case $1 in
      --help | -h)
        usage
        exit 0
        ;;
      --)
        command=("${@:2}")
        break
        ;;
      --*=*) set -- "${1%%=*}" "${1#*=}" "${@:2}" ;;
      --*)
        option=${1#--} variable=${1#--} variable=${variable//-/_}
        if [[ " $flags " == *" $option "* ]]; then
          printf -v "$variable" 1
          shift
        elif [[ " $options " != *" $option "* ]]; then
          die "$1: there is no such option; see $launcher --help"
        elif (($# < 2)); then
          die "$1: needs a value; see $launcher --help"
        else
          printf -v "$variable" %s "$2"
          shift 2
        fi
        ;;
      *) die "$1: not understood; the command comes after --, see $launcher --help" ;;
    esac
  done
  ((${#command[@]})) || die "the command is missing: -- tele ...; see $launcher --help"
  [[ $max_restarts =~ ^[0-9]+$ ]] || die "--max-restarts $max_restarts: not a number"
}

need() { # need OPTION ...: those must have been given
  local option variable
  for option in "$@"; do
    variable=${option//-/_}
    [[ -n ${!variable} ]] || die "--$option: missing; see $launcher --help"
  done
}

named() { # GCE, Kubernetes and xpk agree on these
  [[ $name =~ ^[a-z][-a-z0-9]{0,37}[a-z0-9]$ ]] || die "--name $name: give 2 to 39 of a-z, 0-9 and -, a letter first"
}

# ---- commands --------------------------------------------------------------------------------------------------------

quoted() { # one line that a shell reads back as these words
  local word line=''
  for word in "$@"; do
    [[ $word =~ ^[-a-zA-Z0-9_./:=,@%+]+$ ]] || word=${word@Q}
    line+=" $word"
  done
  echo "${line# }"
}

run() { # changes something: printed in a dry run, else done
  if ((dry_run)); then quoted "$@"; else "$@"; fi
}

ask() { # answers something: printed in a dry run, and answered by nothing
  if ((dry_run)); then quoted "$@" >&3; else "$@"; fi
}
exec 3>&1 # `answer=$(ask ...)`: what a dry run prints is no answer

tools() { # tools NAME ...: must be installed, except for a dry run
  local tool
  ((dry_run)) && return
  for tool in "$@"; do
    command -v "$tool" >/dev/null && continue
    case $tool in
      gcloud) die "gcloud is missing: cloud.google.com/sdk/docs/install says how to install it; then gcloud auth login" ;;
      kubectl) die "kubectl is missing: gcloud components install kubectl gke-gcloud-auth-plugin" ;;
      xpk) die "xpk is missing: pip install xpk" ;;
      docker) die "docker is missing: install it as docs.docker.com/engine/install says, or build the image elsewhere" ;;
      *) die "$tool is missing: install it" ;;
    esac
  done
}

tele() {
  PYTHONPATH=$checkout${PYTHONPATH:+:$PYTHONPATH} JAX_PLATFORMS=cpu "$python" -m tele_jax.cli.main "$@"
}

# ---- preflight: before anything is created ---------------------------------------------------------------------------

preflight() { # preflight OPTION ...: of `tele preflight`; sets what that prints: jax, inputs, command, names of the slice
  local assignments
  need bucket
  assignments=$(tele preflight --bucket "$bucket" --checkout "$checkout" "$@" -- "${command[@]}") || exit $?
  eval "$assignments"
  tracked
  say "runs on jax $jax with libtpu$libtpu: $(quoted "${command[@]}")"
}

access() { # the account, the bucket, and what the command reads from it
  local input
  if [[ -z $(ask gcloud auth list --filter=status:ACTIVE "--format=value(account)") ]] && ! ((dry_run)); then
    die "gcloud has no account: gcloud auth login"
  fi
  local nested
  nested=$(ask gcloud storage buckets describe "$bucket" "--format=value(hierarchicalNamespace.enabled)" --raw) ||
    die "$bucket: cannot be read by this account; see above"
  # Checkpoints, caches and growths appear by the renaming of a directory, which is one operation only there.
  if [[ ${nested,,} != true ]] && ! ((dry_run)); then
    die "$bucket: has no hierarchical namespace, which cannot be added; gcloud storage buckets create gs://..." \
      "--uniform-bucket-level-access --enable-hierarchical-namespace --location=... makes one that has"
  fi
  for input in "${inputs[@]}"; do
    ask gcloud storage ls "$input" >/dev/null || die "$input: is not there, and $(quoted "${command[@]:0:2}") reads it"
  done
}

tpu_access() { # the zone offers the slice and its image to this project
  local at=(--zone="$zone" ${project:+--project="$project"})
  ask gcloud compute tpus accelerator-types describe "$accelerator_type" "${at[@]}" >/dev/null ||
    die "$accelerator_type: $zone does not offer it to this project; see above"
  ask gcloud compute tpus tpu-vm versions describe "$runtime_version" "${at[@]}" >/dev/null ||
    die "$runtime_version: there is no such image in $zone; see above"
}

# ---- the code --------------------------------------------------------------------------------------------------------

packed() { # the files of the checkout that git tracks, as they are now, as one archive: the same bytes each time
  git -C "$checkout" ls-files -z --deduplicate |
    tar --create --directory "$checkout" --null --files-from=- --ignore-failed-read --sort=name --mtime=@0 --owner=0 \
      --group=0 --numeric-owner
}

tracked() { # the page of the command must be among them
  local page
  page=$(printf '%s\n' "${command[@]}" | sed -n "s|^\(--config=\)\{0,1\}$code/||p" | sed 's/:[^/]*$//')
  if [[ -n $page ]] && ! git -C "$checkout" ls-files --error-unmatch "$page" >/dev/null 2>&1; then
    die "$page: git does not track it, and the machines get what git tracks; git add $page"
  fi
}

upload() { # the code into the bucket; sets $archive
  local file digest
  file=$(mktemp)
  packed >"$file"
  digest=$(sha256sum "$file" | cut -c 1-12)
  mv "$file" "${TMPDIR:-/tmp}/tele-code-$digest.tar"
  archive=$bucket/launch/code-$digest.tar
  run gcloud storage cp "${TMPDIR:-/tmp}/tele-code-$digest.tar" "$archive" --no-clobber
}

build() { # build IMAGE EXTRAS BASE: with docker, and pushes it
  local docker=(docker build --file launch/Dockerfile --build-arg "BASE=$3" --build-arg "EXTRAS=$2")
  docker+=(--build-arg "JAX=$jax" --tag "$1" -)
  if ((dry_run)); then
    echo "git ls-files -z | tar --create --null --files-from=- | $(quoted "${docker[@]}")"
  else
    packed | "${docker[@]}"
  fi
  run docker push "$1"
}

on_worker() { # on_worker EXTRAS: the command line of worker.sh, as a machine with the code has it
  quoted bash "$code/launch/worker.sh" "$bucket" "$mount" "$1" "$jax" "$max_restarts" -- "${command[@]}"
}

# ---- machines that start by themselves -------------------------------------------------------------------------------

outcome=launch/NAME/exit-code # in the bucket: how the command ended

startup() { # startup EXTRAS: writes the script that a machine runs whenever it boots; sets $script
  script=${TMPDIR:-/tmp}/tele-startup-$name.sh
  outcome=$bucket/launch/$name/exit-code
  cat >"$script" <<SCRIPT
#!/usr/bin/env bash
set -euo pipefail
export HOME=/root
mkdir -p $code
until gcloud storage cat $archive | tar -x -C $code; do sleep 10; done
result=0
$(on_worker "$1") || result=\$?
# 143: the machine goes away, and another one will go on.
((result == 143)) || echo "\$result" | gcloud storage cp - $outcome
SCRIPT
  if ((dry_run)); then sed 's/^/#   /; 1i # every machine runs, when it boots:' "$script"; fi
}

ended() { # whether the command has ended; then sets $result
  result=$(ask gcloud storage cat "$outcome" 2>/dev/null) || result=''
  [[ -n $result ]]
}

leave() { # leave [DELETE ...]: ends as the command did; deletes the machines where it is done
  case $result in
    0)
      (($# == 0)) || run "$@"
      exit 0
      ;;
    2) die "the command ended with exit code 2: its last line says what to change; $name is kept" ;;
    *)
      say "the command ended with exit code $result; $name is kept"
      exit 1
      ;;
  esac
}
