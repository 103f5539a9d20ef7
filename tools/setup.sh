#!/bin/sh
# Install what vfsmap needs on Debian or Ubuntu: system packages, then a virtual environment.
# Usage: tools/setup.sh [VENV]
set -eu
cd "$(dirname "$0")/.."
venv=${1:-.venv}

# needed to build pyfuse3 and to mount; then what the tests hold vfsmap against
packages="fuse3 libfuse3-dev pkg-config gcc python3-dev python3-venv libpmem1 libpmemlog1
    attr acl e2fsprogs xfsprogs rsync fsverity fuse2fs bindfs qemu-system-x86 busybox-static
    systemd util-linux procps man-db groff-base mandoc bash zsh fish stress-ng fio"

missing=""
for package in $packages; do
    dpkg-query -W -f '${db:Status-Status}\n' "$package" 2>/dev/null | grep -qx installed ||
        missing="$missing $package"
done
if [ -n "$missing" ]; then
    if [ "$(id -u)" = 0 ]; then
        sudo=""
    elif command -v sudo >/dev/null; then
        sudo=sudo
    else
        echo "setup: you are neither root nor have sudo; have root do: apt-get install$missing" >&2
        exit 1
    fi
    $sudo apt-get update -qq
    # shellcheck disable=SC2086  # a list of words
    $sudo env DEBIAN_FRONTEND=noninteractive apt-get install -y -qq --no-install-recommends $missing
fi

# one that was interrupted, or whose Python is gone, is made anew
"$venv/bin/python" -m pip --version >/dev/null 2>&1 ||
    "${PYTHON:-python3}" -m venv --clear "$venv"
"$venv/bin/python" -m pip install --quiet --upgrade "pip>=25.1"
"$venv/bin/python" -m pip install --quiet --editable . --group test --group lint --group wheel --group docs
[ -e /dev/fuse ] || echo "setup: /dev/fuse is missing: load it with 'modprobe fuse' to mount" >&2
echo "vfsmap is ready: $venv/bin/vfsmap --help"
