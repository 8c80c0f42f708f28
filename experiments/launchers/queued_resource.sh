#!/usr/bin/env bash
# A run on a slice of Cloud TPU: asks for it, waits, and starts the same command on all of its hosts.
#   PROJECT=... ZONE=us-west4-a BUCKET=gs://... bash experiments/launchers/queued_resource.sh
# Where the slice is taken away, start it again: the run goes on behind its newest checkpoint.
set -euo pipefail

NAME=${NAME:-effjax}
ACCELERATOR=${ACCELERATOR:-v5litepod-16}
RUNTIME=${RUNTIME:-v2-alpha-tpuv5-lite}
CONFIG=${CONFIG:-configs/vision/vit.py:b16}
SOURCE=${SOURCE:?SOURCE is a git address that the hosts can clone}
where=(--project="${PROJECT:?}" --zone="${ZONE:?}")

gcloud compute tpus queued-resources create "$NAME" --node-id="$NAME" "${where[@]}" \
  --accelerator-type="$ACCELERATOR" --runtime-version="$RUNTIME" --spot
until gcloud compute tpus queued-resources describe "$NAME" "${where[@]}" --format='value(state.state)' | grep -q ACTIVE; do
  sleep 30
done

on_all() {
  gcloud compute tpus tpu-vm ssh "$NAME" "${where[@]}" --worker=all --command="$1"
}
on_all "git clone --depth=1 '$SOURCE' effjax && python3 -m pip install --quiet -e './effjax[tpu]'"
# The workdir has to be a folder for every host: the bucket is mounted as one.
on_all "mkdir -p runs && gcsfuse --implicit-dirs '${BUCKET#gs://}' runs"
on_all "cd effjax && python3 -m experiments.train --distributed --config='$CONFIG' --workdir=../runs/$NAME"
