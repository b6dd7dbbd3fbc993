# Sourced by the launchers: flags, checks of them, and dry runs. Runs in bash
# 3.2, which macOS has: hence the ${array[@]+...} of arrays that may be empty.
# shellcheck shell=bash disable=SC2154  # variables that parse_flags sets

root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
dry_run=
overrides=() # --config.KEY=VALUE and whatever follows --

# die WORD...: bad input, in one line.
die() {
  echo "Error: $*" >&2
  exit 2
}

# The comment at the head of the script.
usage() {
  awk 'NR > 1 { if (!/^#/) exit; if (/^#SBATCH/) next; sub(/^# ?/, ""); print }' \
    "$0"
}

# parse_flags '--NAME ...' '--SWITCH ...' ARGUMENT...: sets the variable of each
# flag that is given (--max-restarts=3 is max_restarts).
parse_flags() {
  local names=" $1 " switches="$2 --dry-run " flag variable
  shift 2
  while [ $# -gt 0 ]; do
    flag=${1%%=*}
    flag=${flag#--}
    variable=${flag//-/_}
    case $1 in
      -h | --help)
        usage
        exit 0
        ;;
      --)
        shift
        overrides+=("$@")
        return
        ;;
      --config.*=*) overrides+=("$1") ;;
      --config.*) die "$1 has no value: write $1=VALUE" ;;
      --*)
        if [[ " $switches" == *" --$flag "* ]]; then
          [ "$1" = "--$flag" ] || die "$1: --$flag takes no value"
          printf -v "$variable" yes
        elif [[ $names != *" --$flag "* ]]; then
          die "unknown flag --$flag: valid options are --config.KEY=VALUE" \
            "and$names$switches"
        elif [[ $1 == *=* ]]; then
          printf -v "$variable" %s "${1#*=}"
        else
          [ $# -gt 1 ] || die "--$flag has no value: write --$flag=VALUE"
          printf -v "$variable" %s "$2"
          shift
        fi
        ;;
      *) die "unexpected argument '$1': flags are --NAME=VALUE" ;;
    esac
    shift
  done
}

# require FLAG...: all of them were given.
require() {
  local flag variable
  for flag in "$@"; do
    variable=${flag//-/_}
    [ -n "${!variable}" ] || die "--$flag is missing; see bash $0 --help"
  done
}

# check FLAG PATTERN WANTED: the flag's value matches the regular expression.
check() {
  local variable=${1//-/_}
  [[ ${!variable} =~ ^($2)$ ]] || die "--$1='${!variable}': want $3"
}

# one_of FLAG WORD...: the flag's value is one of the words.
one_of() {
  local flag=$1 variable=${1//-/_} word
  shift
  for word in "$@"; do
    [ "${!variable}" != "$word" ] || return 0
  done
  die "--$flag='${!variable}': valid options are $*"
}

# --config names a file of this repository, which is what travels, or NAME for
# configs/NAME.py.
check_config() {
  local file=${config%%:*}
  case $file in
    /* | *..*) ;;
    *) [ ! -f "$root/$file" ] && [ ! -f "$root/configs/$file.py" ] || return 0 ;;
  esac
  die "--config='$config': there is no file '$file' in $root; valid options" \
    "are $(cd "$root" && grep -l '^def get_config' configs/*.py | tr '\n' ' ')"
}

# home FLAG: the ~ of a path on this machine becomes the home folder, which the
# shell does in front of a word only.
home() {
  local variable=${1//-/_}
  # shellcheck disable=SC2088  # it is to be taken literally
  case ${!variable} in
    '~' | '~/'*) printf -v "$variable" %s "$HOME${!variable#\~}" ;;
    '~'*) die "--$1='${!variable}': give the whole path, or ./${!variable}" ;;
  esac
}

# check_workdir WHERE: gs://, or else a path: unless WHERE is empty, one
# that begins with / and is found WHERE.
check_workdir() {
  [ -n "$1" ] || home workdir
  case $workdir in
    gs://*)
      [[ $workdir =~ ^gs://[a-z0-9][a-z0-9._-]*/. ]] ||
        die "--workdir='$workdir': want gs://BUCKET/PATH; names of buckets" \
          "are lower case, e.g. gs://my-bucket/run"
      return
      ;;
    *://*) ;;
    /*) return ;;
    *) [ -n "$1" ] || return 0 ;;
  esac
  die "--workdir='$workdir': valid options are gs://BUCKET/PATH and" \
    "${1:+an absolute path }${1:-a path}"
}

# need TOOL WHERE: it is installed, or nothing but a dry run is asked for.
need() {
  [ -z "$dry_run" ] || return 0
  command -v "$1" >/dev/null || {
    echo "Error: $1 is not on PATH: install it ($2), or add --dry-run to see" \
      "the commands" >&2
    exit 1
  }
}

# quote WORD...: one line that a shell reads as these words.
quote() {
  local word line='' apostrophe="'" escaped="'\\''"
  for word in "$@"; do
    case $word in
      '' | *[!A-Za-z0-9_./:=@%+,-]*)
        word="'${word//$apostrophe/$escaped}'"
        ;;
    esac
    line+="${line:+ }$word"
  done
  printf '%s\n' "$line"
}

# run WORD...: runs the command, or prints it in a dry run.
run() {
  if [ -n "$dry_run" ]; then quote "$@"; else "$@"; fi
}
