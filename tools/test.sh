#!/bin/sh
# Run the tests: those that mount or take the whole machine, and the others beside them.
# Usage: tools/test.sh VENV MARKERS
set -u
cd "$(dirname "$0")/.."
pytest=$1/bin/pytest
markers=$2
export VFSMAP_FORCE_FUSE=1

printed=$(mktemp)
others=""
trap 'rm -f "$printed"' EXIT
trap 'kill $others 2>/dev/null; wait $others; exit 130' INT TERM
"$pytest" -q -m "$markers" --ignore tests/fuse --ignore tests/whole >"$printed" 2>&1 &
others=$!
"$pytest" -q -m "$markers" tests/fuse tests/whole
status=$?
wait $others || status=1
others=""
echo "The tests that need no mount:"
cat "$printed"
exit $status
