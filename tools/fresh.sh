#!/usr/bin/env bash
# The README and the tutorial as a new user would: a clone of the last commit, an empty home, nothing in the environment,
# every command in order and as printed. What a page marks as not run is listed and left out.
#
#   tools/fresh.sh [--extra-index-url URL]     pip's options for `make demo`, where its own index lacks something
#
# Takes what the first `make demo` takes, and some minutes more. Everything is in one temporary directory, which is
# removed where all went well.
set -euo pipefail

here=$(cd "$(dirname "$0")/.." && pwd)
place=$(mktemp -d "${TMPDIR:-/tmp}/fresh.XXXXXX")
mkdir "$place/home"
git clone --quiet "$here" "$place/kneebench"
cd "$place/kneebench"

# pip's own configuration is the one thing that is taken along: it says where packages come from.
keep=(HOME="$place/home" PATH="$place/kneebench/.venv/bin:/usr/local/bin:/usr/bin:/bin" LANG=C.UTF-8 TERM=dumb)
for name in PIP_CONFIG_FILE PIP_INDEX_URL PIP_EXTRA_INDEX_URL http_proxy https_proxy no_proxy SSL_CERT_FILE; do
  [ -z "${!name:-}" ] || keep+=("$name=${!name}")
done
if [ -z "${PIP_CONFIG_FILE:-}" ]; then
  for file in "$HOME/.config/pip/pip.conf" "$HOME/.pip/pip.conf"; do
    [ ! -f "$file" ] || keep+=("PIP_CONFIG_FILE=$file")
  done
fi

failed=0
try() {
  echo "\$ $1"
  if env -i "${keep[@]}" bash -c "$1" >"$place/said" 2>&1; then
    tail -n 3 "$place/said" | sed 's/^/    /'
  else
    echo "FAILED with exit code $?"
    tail -n 30 "$place/said" | sed 's/^/    /'
    failed=1
  fi
}

try "make demo${*:+ INDEX=\"$*\"}"
[ "$failed" = 0 ] || exit 1

# From here on RUN is the run that `make demo` made.
run=$(basename "$(ls -d results/*-demo-chat | tail -n 1)")
while IFS= read -r line; do
  case "$line" in
    "#"*) echo "$line" ;;
    *) try "$line" ;;
  esac
done < <(.venv/bin/python tools/doc_commands.py --run "$run" README.md docs/tutorial.md)

if [ "$failed" = 0 ]; then
  rm -rf "$place"
  echo "all of it worked as printed"
else
  echo "something failed; all is left in $place"
  exit 1
fi
