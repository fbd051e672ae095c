#!/bin/sh
# A new version of a model, tried on some of its users: search for the smallest or fastest form that
# loses little on recent events, publish it, start a canary. The workers' gate decides about it.
#
# STREAMREC_REGISTRY and STREAMREC_KAFKA say where it goes; STREAMREC_EVENTS which events it is
# judged by (docs/models.md): a path or glob of .parquet or .jsonl, or kafka://host:port/topic?from=...
set -eu
: "${STREAMREC_EVENTS:?which events: a path, a glob, or kafka://host:port/topic?from=...}"
: "${MODEL:=posts}"       # its name in the registry
: "${SHARE:=10%}"         # of the users, for the canary
: "${MAX_LOSS:=1%}"       # relative loss of NDCG@10 that is accepted
: "${OBJECTIVE:=latency}" # or size
: "${TRAIN:=false}"       # true: train on the events first; else the newest fp32 version is used
: "${TRAIN_ARGS:=}"       # further arguments of streamrec models train
: "${SEARCH_ARGS:=}"      # and of streamrec models search
: "${SIGNING_KEY:=}"      # file of streamrec models keygen, where bundles are to be signed
: "${WORK:=$(mktemp -d)}" # scratch space, some times the size of the model

status=$(streamrec models status "$MODEL" --json)
case $status in
*'"promoted": true'*) ;;
*) # Publishing would make it serve all users at once.
  echo "no version of $MODEL is promoted: streamrec models promote $MODEL VERSION" >&2
  exit 65
  ;;
esac
case $status in
*'"canary": null'*) ;;
*)
  echo "a canary of $MODEL is on trial: nothing to do"
  exit 0
  ;;
esac

# Arguments are split into words on purpose.
# shellcheck disable=SC2086
if [ "$TRAIN" = true ]; then
  streamrec models train "$STREAMREC_EVENTS" --name "$MODEL" --registry "$WORK/float" $TRAIN_ARGS
else
  streamrec models fetch "$MODEL" --precision fp32 --out "$WORK/float"
fi
# shellcheck disable=SC2086
streamrec models search "$WORK/float/$MODEL"/* --events "$STREAMREC_EVENTS" --max-loss "$MAX_LOSS" \
  --objective "$OBJECTIVE" --registry "$WORK/found" --write $SEARCH_ARGS
found=$(echo "$WORK/found/$MODEL"/*)
if [ ! -d "$found" ]; then
  echo "nothing $OBJECTIVE gains within a loss of $MAX_LOSS: nothing to do"
  exit 0
fi
stable=$(streamrec models fetch "$MODEL" --out "$WORK/stable")
if cmp -s "$found/model.onnx" "$stable/model.onnx"; then
  echo "the best is what serves: nothing to do"
  exit 0
fi
if [ -n "$SIGNING_KEY" ]; then
  streamrec models sign "$found" --key "$SIGNING_KEY"
fi
streamrec models publish "$found"
streamrec models canary "$MODEL" "$(basename "$found")" --share "$SHARE"
