# What runs the commands of a documentation page on this machine: sourced before them. LONG is set by
# `make docs-check`; without it, what takes minutes is done on less.
set -euo pipefail

at() { block=$1; echo "--- line $1" >&2; }
trap 'status=$?; stop_worker; [ $status = 0 ] || echo "FAILED in the block at line ${block:-0}" >&2' EXIT

worker=
stop_worker() { if [ -n "$worker" ]; then kill "$worker" 2>/dev/null && wait "$worker" || true; worker=; fi; }

# Serves beside the commands that follow, until another is started or the page ends.
start_worker() {
  stop_worker
  command streamrec worker "$@" >>"$TMPDIR/worker.log" 2>&1 &
  worker=$!
  for _ in $(seq 300); do
    curl -sf "localhost:$STREAMREC_HTTP_PORT/readyz" >"$TMPDIR/readyz" && return
    kill -0 "$worker" 2>/dev/null || break
    sleep 0.2
  done
  cat "$TMPDIR/worker.log" >&2
  return 1
}

streamrec() {
  local less=()
  if [ -z "${LONG:-}" ]; then
    case "$1 ${2:-}" in
      "models train")
        less=(--epochs 1 --validate-every 1 --limit 100 --no-baselines --width 16 --length 10 --blocks 1) ;;
      "models compress") less=(--limit 100) ;;
      # They measure for minutes: their options are checked, nothing more.
      "models search" | "models report" | "models rankers-demo") less=(--help) ;;
      "replay "*) less=(--limit 1500) ;;
    esac
  fi
  if [ "$1" = worker ]; then start_worker "${@:2}"; else command streamrec "$@" "${less[@]}"; fi
}

# The first bundle that this page's commands made, by the end of its name.
made() { find build -name "*-$1" -printf '%T@ %p\n' | sort | head -1 | cut -d' ' -f2; }
made_fp32() { made fp32; }
made_int8() { made int8; }

# Until the user has a list.
await_list() {
  for _ in $(seq 50); do command streamrec recommend "$1" >/dev/null 2>&1 && return; sleep 0.2; done
  echo "no list for user $1" >&2
  return 1
}

# Into a place of its own: the environment that runs this stays as it is.
pip() {
  if [ -n "${LONG:-}" ]; then
    python -m venv "$TMPDIR/venv" && PATH="$TMPDIR/venv/bin:$PATH" && hash -r && command pip "$@"
  else
    python -m pip --quiet "$@" --no-deps --target "$TMPDIR/installed"
  fi
}

# What acts on a cluster or a container engine is checked where they are deployed.
elsewhere() { echo "not run here: $*" >&2; }
for program in kubectl helm docker podman cosign redis-cli kafka-topics.sh kafka-consumer-groups.sh \
  kafka-console-consumer.sh kafka-acls.sh promtool kcat ssh systemctl; do
  eval "$program() { elsewhere $program \"\$@\"; }"
done
