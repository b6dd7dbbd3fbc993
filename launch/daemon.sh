#!/usr/bin/env bash
# One run that outlives the shell that started it, on this machine:
#
#   bash launch/daemon.sh start COMMAND [ARGUMENT ...]
#   bash launch/daemon.sh status
#   bash launch/daemon.sh logs      follows; Ctrl-C ends the view, not the run
#   bash launch/daemon.sh stop      SIGTERM, then waits; kills what is still
#                                   there after STOP_SECONDS=300
#
# The command runs under launch/restart.sh. Its output and process id are in
# DAEMON_FOLDER=~/.drift_jax.
set -euo pipefail
source "$(dirname "$0")/common.sh"
folder=${DAEMON_FOLDER:-$HOME/.drift_jax}

# Sets pid; a file from before a reboot may name someone else's process.
running() {
  pid=$(cat "$folder/pid" 2>/dev/null) &&
    grep -aq 'launch/restart\.sh' "/proc/$pid/cmdline" 2>/dev/null
}

command=${1:-}
[ $# -eq 0 ] || shift
case $command in
  -h | --help) usage ;;
  start)
    [ $# -gt 0 ] || die "start has no command; see bash $0 --help"
    ! running || die "a run is already there: process $pid; stop it first"
    mkdir -p "$folder"
    # A session of its own, so that stop finds all that belongs to it.
    setsid bash "$root/launch/restart.sh" "$@" \
      >>"$folder/log" 2>&1 </dev/null &
    echo $! >"$folder/pid"
    echo "$(hostname): started process $!, log in $folder/log"
    ;;
  status)
    state="not running"
    ! running || state="running as process $pid"
    echo "$(hostname): $state. $(tail -n 1 "$folder/log" 2>/dev/null)"
    ;;
  logs) exec tail -n 100 -F "$folder/log" ;;
  stop)
    if ! running; then
      echo "$(hostname): not running"
      exit 0
    fi
    kill -TERM "$pid"
    for ((i = 0; i < 10 * ${STOP_SECONDS:-300}; i++)); do
      running || break
      sleep 0.1
    done
    if running; then
      pkill -KILL -s "$pid"
      echo "$(hostname): killed, after ${STOP_SECONDS:-300} s"
    else
      echo "$(hostname): stopped. $(tail -n 1 "$folder/log")"
    fi
    ;;
  *) die "command '$command': valid options are start status logs stop" ;;
esac
