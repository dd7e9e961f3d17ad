#!/usr/bin/env bash
# On every machine: mounts the bucket, installs the checkout that this file lies in, and runs a command in the bucket.
#
#   worker.sh BUCKET MOUNT EXTRAS JAX MAX_RESTARTS -- tele VERB ...
#
# EXTRAS are those of setup.py, JAX is a version. A command that fails is started again: one machine that fails or has to
# stop makes the others stop, and together they go on from the last checkpoint. Not after 0 (done) and 2 (a mistake, which
# stays one), and not where this machine itself was asked to stop (143).

set -euo pipefail

bucket=${1#gs://} mount=$2 extras=$3 jax=$4 max_restarts=$5
shift 6
checkout=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
venv=$checkout/.venv
as_root() { if ((EUID)); then sudo "$@"; else "$@"; fi; }

# A launcher that was started again takes over: what runs here saves its state and goes.
exec 9>>"$checkout/.worker"
if ! flock --nonblock 9; then
  kill -TERM "$(cat "$checkout/.worker")" || true
  flock 9
fi
echo $$ >"$checkout/.worker"

if ! command -v gcsfuse >/dev/null; then
  keyring=/usr/share/keyrings/cloud.google.asc
  curl -fsSL https://packages.cloud.google.com/apt/doc/apt-key.gpg | as_root tee "$keyring" >/dev/null
  release=$(. /etc/os-release && echo "$VERSION_CODENAME")
  echo "deb [signed-by=$keyring] https://packages.cloud.google.com/apt gcsfuse-$release main" |
    as_root tee /etc/apt/sources.list.d/gcsfuse.list >/dev/null
  as_root apt-get -o DPkg::Lock::Timeout=600 update -q
  as_root apt-get -o DPkg::Lock::Timeout=600 install -q -y gcsfuse
fi
if ! mountpoint -q "$mount"; then
  as_root install -d -o "$(id -u)" -g "$(id -g)" "$mount"
  # On large machines gcsfuse believes for ever what it once saw of a directory, but other machines write here too.
  gcsfuse --implicit-dirs --metadata-cache-ttl-secs 0 --metadata-cache-negative-ttl-secs 0 "$bucket" "$mount" 9>&-
fi

# The images of TPU VMs come with Python 3.10, which is too old; uv brings another.
PATH=$checkout/.uv:$PATH
if ! command -v uv >/dev/null; then
  curl -fsSL https://astral.sh/uv/install.sh | env UV_INSTALL_DIR="$checkout/.uv" UV_NO_MODIFY_PATH=1 sh
fi
[[ -x $venv/bin/python ]] || uv venv --quiet --python 3.12 "$venv"
uv pip install --quiet --python "$venv" --editable "${checkout}[$extras]" "jax==$jax"
PATH=$venv/bin:$PATH
if [[ ,$extras, == *,tpu,* ]]; then tele preflight --installed; fi

cd "$mount"
child='' stopping=0
trap 'stopping=1; [[ -z $child ]] || kill -TERM "$child"' TERM
for ((attempt = 0; ; attempt++)); do
  "$@" 9>&- &
  child=$!
  code=0
  wait "$child" || code=$?
  while kill -0 "$child" 2>/dev/null; do # the wait was cut short by the signal, and the command is saving its state
    code=0
    wait "$child" || code=$?
  done
  if ((stopping)); then exit 143; fi
  case $code in 0 | 2) exit "$code" ;; esac
  ((attempt < max_restarts)) || exit "$code"
  echo "worker.sh: exit code $code; start $((attempt + 2)) of at most $((max_restarts + 1))" >&2
  sleep "${TELE_RESTART_SECONDS:-10}"
done
