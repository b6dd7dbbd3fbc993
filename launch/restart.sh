#!/usr/bin/env bash
# Runs a command again for as long as that helps:
#
#   bash launch/restart.sh COMMAND [ARGUMENT ...]
#
# Started again: exit code 75 (drift_jax saved a checkpoint, lost another process
# or waited for one in vain) and death by a signal. Not started again: 0, any
# other code, Ctrl-C, and whatever the code is once this script itself got SIGTERM
# or SIGINT, which it forwards. Exits with the last exit code of the command.
#
#   MAX_RESTARTS=100    starts after the first
#   RESTART_DELAY=10    seconds before each
set -uo pipefail
# A background child of a script ignores Ctrl-C, unless there is job control.
set -m

case ${1:-} in
  -h | --help)
    awk 'NR > 1 { if (!/^#/) exit; sub(/^# ?/, ""); print }' "$0"
    exit 0
    ;;
esac
limit=${MAX_RESTARTS:-100} delay=${RESTART_DELAY:-10}
for setting in "MAX_RESTARTS=$limit" "RESTART_DELAY=$delay"; do
  [[ ${setting#*=} =~ ^[0-9]+$ ]] || {
    echo "Error: $setting: want a number from 0" >&2
    exit 2
  }
done
[ $# -gt 0 ] || {
  echo "Error: no command; see bash $0 --help" >&2
  exit 2
}

child='' stopped='' forwarded='' interrupted=''

# Once: a second signal may mean 'now', which nobody said.
forward() {
  interrupted=yes
  stopped=${stopped:-$1}
  if [ -n "$child" ] && [ -z "$forwarded" ]; then
    forwarded=yes
    kill "-$stopped" "$child" 2>/dev/null
  fi
}
trap 'forward TERM' TERM
trap 'forward INT' INT

# The exit code of the child, whatever signals come meanwhile: each of them ends
# bash's wait early.
await() {
  while :; do
    interrupted=''
    wait "$child"
    code=$?
    [ -n "$interrupted" ] || return
  done
}

say() {
  echo "$(date +%H:%M:%S) restart.sh: $*" >&2
}

code=143
for ((count = 0; ; count++)); do
  [ -z "$stopped" ] || break
  "$@" &
  child=$!
  [ -z "$stopped" ] || forward "$stopped" # came before the child was known
  await
  child=''
  if [ -n "$stopped" ] || [ "$code" -eq 130 ] ||
    { [ "$code" -ne 75 ] && [ "$code" -lt 128 ]; }; then
    break
  fi
  if [ "$count" -ge "$limit" ]; then
    say "exit code $code after $count restarts, which is MAX_RESTARTS"
    exit "$code"
  fi
  say "exit code $code: restart $((count + 1)) of $limit in $delay s"
  # By the second, because a signal may come just before the wait.
  for ((left = delay; left > 0; left--)); do
    [ -z "$stopped" ] || break
    sleep 1 &
    wait $!
  done
done
say "exit code $code${stopped:+ after SIG$stopped}: not started again"
exit "$code"
