#!/usr/bin/env bash
# A run on one slice of TPU VMs: makes the slice, runs on all of its hosts, starts again after a
# preemption or a failure, and deletes the slice at the end, also after Ctrl-C: what was saved lies in
# the bucket. Filled in by `moejax launch --target tpu_vm`. Start, in the git repository to be copied
# to the hosts: bash FILE. This machine has to stay on.
set -euo pipefail

NAME=@{name}
ZONE=@{zone}
MAX_RESTARTS=@{max_restarts}
RETRY_SECONDS="${RETRY_SECONDS:-60}"

# On every host, before each start: ends what a lost connection left running, mounts the bucket and
# installs.
SETUP="$(
  cat <<'END'
set -euo pipefail
pkill -x moejax || true
while pgrep -x moejax >/dev/null; do sleep 1; done
if ! command -v gcsfuse >/dev/null; then
  curl -fsSL https://packages.cloud.google.com/apt/doc/apt-key.gpg |
    sudo tee /usr/share/keyrings/cloud.google.asc >/dev/null
  echo "deb [signed-by=/usr/share/keyrings/cloud.google.asc] https://packages.cloud.google.com/apt gcsfuse-$(lsb_release -c -s) main" |
    sudo tee /etc/apt/sources.list.d/gcsfuse.list >/dev/null
  sudo apt-get -q update
  sudo apt-get -q install -y gcsfuse
fi
if ! mountpoint -q /bucket; then
  sudo mkdir -p /bucket
  sudo chown "$USER" /bucket
  # Every host must see at once what another one has written, and a folder must be renamed at once
  # or not at all (docs/cloud.md).
  gcsfuse --implicit-dirs --metadata-cache-ttl-secs=0 --metadata-cache-negative-ttl-secs=0 \
    --rename-dir-limit=0 @{bucket} /bucket
fi
rm -rf ~/moejax_source
mkdir ~/moejax_source
tar -xzf ~/moejax_source.tar.gz -C ~/moejax_source
cd ~/moejax_source
python3 -m pip install --quiet --user uv
python3 -m uv venv --quiet --allow-existing --python 3.12 ~/moejax_venv
python3 -m uv pip install --quiet --python ~/moejax_venv/bin/python @{package}
END
)"

# On every host; jax finds the other hosts by the metadata of the slice.
TRAIN="$(
  cat <<'END'
cd ~/moejax_source || exit
PATH="$HOME/moejax_venv/bin:$PATH"
status=0
@{command} || status=$?
echo "$status" >~/moejax_status
exit "$status"
END
)"

tpu() {
  local verb="$1"
  shift
  gcloud compute tpus tpu-vm "$verb" "$NAME" --zone="$ZONE" --quiet "$@"
}

on_all_hosts() {
  tpu ssh --worker=all --command="$1"
}

state() {
  tpu describe --format='value(state)' 2>/dev/null || true
}

delete_slice() {
  if [ -n "$(state)" ]; then
    tpu delete
  fi
}

# A slice that was preempted is still there by name, and has to be made anew.
make_slice() {
  if [ "$(state)" != READY ]; then
    delete_slice &&
      tpu create @{accelerator_flags} --version=@{version} @{spot}
  fi
}

copy_source() {
  gcloud compute tpus tpu-vm scp "$ARCHIVE" "$NAME":moejax_source.tar.gz --zone="$ZONE" --quiet --worker=all
}

# What a host's last start ended with, or nothing.
last_status() {
  tpu ssh --worker=0 --command='cat ~/moejax_status' 2>/dev/null || true
}

if [ -n "$(git status --porcelain)" ]; then
  echo "note: what is not committed is not copied to the hosts" >&2
fi
ARCHIVE="$(mktemp -d)/moejax_source.tar.gz"
trap 'delete_slice; rm -rf "$(dirname "$ARCHIVE")"' EXIT
git archive --format=tar.gz --output="$ARCHIVE" HEAD

for ((start = 0; start <= MAX_RESTARTS; start++)); do
  if make_slice && copy_source && on_all_hosts "$SETUP" && on_all_hosts "$TRAIN"; then
    exit 0
  fi
  if [ "$(state)" = READY ] && [ "$(last_status)" = 2 ]; then
    echo "a mistake in the input, which no restart mends; see above" >&2
    exit 2
  fi
  echo "start $start ended early; $((MAX_RESTARTS - start)) left" >&2
  sleep "$RETRY_SECONDS"
done
exit 1
