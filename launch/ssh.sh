#!/bin/bash
# Hosts that ssh reaches: one process with all devices of the host per host, its lines marked with the host's name.
#
#   frugalmoe launch ssh --config=configs/small.py --hosts=node1,node2 --devices-per-node=8
#
# fills this in and runs it. Each host needs this checkout with its .venv at the same path (edit the `cd` below where it
# is another) and the same runs/; the others must reach the first at PORT.
# When one host fails, or at Ctrl-C, or when this script dies, all are told to save and end; after two minutes they are
# killed. Exit code: of the first host that failed; 75: saved, the same command goes on.
set -u
HOSTS=($hosts)
PORT=${PORT:-8476}
SSH=${SSH:-ssh -o BatchMode=yes -o ServerAliveInterval=15}

# What a host runs. It reads this whole (hence the braces), then waits for the end of its input, which says stop.
remote() {
  echo "COORDINATOR=${HOSTS[0]#*@}:$PORT COUNT=${#HOSTS[@]} INDEX=$1"
  cat << 'END'
{
  cd $directory && source .venv/bin/activate || exit
  exec 3<&0
  $train \
    --coordinator="$COORDINATOR" --num_processes="$COUNT" --process_id="$INDEX" < /dev/null &
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

# Lines of "host status" come back through ended; every host's input is open for as long as descriptor 7 is.
PIPES=$(mktemp -d)
mkfifo "$PIPES/input" "$PIPES/ended"
exec 5<> "$PIPES/input" 6<> "$PIPES/ended"
exec 8< "$PIPES/input" 7> "$PIPES/input" 5>&-
rm -r "$PIPES"

run_on() {
  exec 7>&-
  trap '' INT TERM HUP # which a terminal sends to all of us: the host's last lines and its status are still to come
  { remote "$1"; cat <&8; } \
    | { (trap - TERM; exec $SSH "$2" bash -s 2>&1); echo "$2 $?" >&6; } \
    | while IFS= read -r LINE; do printf '[%s] %s\n' "$2" "$LINE"; done
}

stop() {
  exec 7>&-
  trap 'exit 130' INT TERM HUP # the second time without waiting
}
trap stop INT TERM HUP

for INDEX in "${!HOSTS[@]}"; do
  run_on "$INDEX" "${HOSTS[$INDEX]}" &
done

FAILED=0
for _ in "${HOSTS[@]}"; do
  read -r HOST STATUS <&6
  if [ "$STATUS" -ne 0 ] && [ "$FAILED" -eq 0 ]; then
    FAILED=$STATUS
    echo "[$HOST] ended with $STATUS; ending the others" >&2
    stop
  fi
done
exec 7>&-
wait # for the last lines
exit "$FAILED"
