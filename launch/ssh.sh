#!/bin/bash
# Hosts that ssh reaches: one process with all devices of the host per host, its lines marked with the host's name.
#
#   frugalmoe launch ssh --config=configs/small.py --hosts=node1,node2 --devices-per-node=8
#
# fills this in and runs it. Each host needs this directory and the environment in which you installed frugalmoe at the
# same paths (edit `cd` and PATH below where they are others) and the same runs/; the others must reach the first at PORT.
# When one host fails, at Ctrl-C, or when this script dies, all are told to save and end; after two minutes they are
# killed. Exit code: of the first host that failed; 75: saved, the same command goes on.
set -u
HOSTS=($hosts)
PORT=${PORT:-8476}
SSH=${SSH:-ssh -o BatchMode=yes -o ServerAliveInterval=15}
STATE=$(mktemp -d)
touch "$STATE/go" # the hosts train for as long as this is there
trap 'rm -r "$STATE"' EXIT

# What a host runs. It reads this whole (hence the braces), then waits for the end of its input, which says stop.
remote() {
  echo "COORDINATOR=${HOSTS[0]#*@}:$PORT COUNT=${#HOSTS[@]} INDEX=$1"
  cat << 'END'
{
  cd $directory && export PATH=$bin:"$PATH" || exit
  exec 3<&0
  $train \
    --coordinator="$COORDINATOR" --num-processes="$COUNT" --process-id="$INDEX" < /dev/null &
  TRAIN=$!
  {
    while read -r; do :; done
    kill -TERM "$TRAIN"
    for _ in {1..120}; do sleep 1; done
    kill -KILL "$TRAIN"
  } <&3 > /dev/null 2>&1 &
  WATCH=$!
  wait "$TRAIN"
  STATUS=$?
  kill "$WATCH"
  exit "$STATUS"
}
END
}

input() {
  remote "$1"
  while [ -e "$STATE/go" ] && kill -0 $$ 2> /dev/null; do sleep 0.2; done
}

run_on() {
  trap '' INT TERM HUP # which a terminal sends to all of us: the last lines and the status are still to come
  $SSH "$2" bash -s < <(input "$1") 2>&1 | while IFS= read -r LINE; do printf '[%s] %s\n' "$2" "$LINE"; done
  local STATUS=${PIPESTATUS[0]}
  if [ "$STATUS" -ne 0 ] && (set -C && echo "$STATUS" > "$STATE/failed") 2> /dev/null; then # the first
    [ ! -e "$STATE/go" ] || echo "[$2] ended with $STATUS; ending the others" >&2
    rm -f "$STATE/go"
  fi
}

stop() {
  rm -f "$STATE/go"
  trap 'exit 130' INT TERM HUP # the second time without waiting
}
trap stop INT TERM HUP

for INDEX in "${!HOSTS[@]}"; do
  run_on "$INDEX" "${HOSTS[$INDEX]}" &
done
until wait; do :; done # a signal interrupts it
exit "$(cat "$STATE/failed" 2> /dev/null || echo 0)"
