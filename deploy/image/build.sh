#!/bin/sh
# Builds the target `cpu` of the Dockerfile as localhost/aqt:cpu, without a Docker engine or a
# registry: buildah builds it, on a base that debootstrap makes of Debian's packages. Needs root, and
# both of them (apt-get install buildah debootstrap). What pip of this machine is told of its index
# is told to the pip of the build too, by a secret that stays out of the image.
set -eu
cd "$(dirname "$0")/../.."
export STORAGE_DRIVER=vfs BUILDAH_ISOLATION=chroot
work=out/image
mkdir -p $work

if ! buildah inspect --type image localhost/aqt-base >/dev/null 2>&1; then
    rm -rf $work/base
    debootstrap --variant=minbase --include=python3,python3-venv,ca-certificates bookworm $work/base
    rm -rf $work/base/var/cache/apt/* $work/base/var/lib/apt/lists/* $work/base/var/log/*
    container=$(buildah from scratch)
    buildah add --quiet "$container" $work/base /
    buildah commit --quiet --rm "$container" localhost/aqt-base
    rm -rf $work/base
fi

umask 077
{
    echo "[global]"
    for option in cert index-url extra-index-url proxy timeout; do
        # `:env:` comes last, and goes before `global`.
        python3 -m pip config list | sed -n "s/^[^.]*\.$option='\(.*\)'$/$option = \1/p" | tail -1
    done
} | grep -v 'file://' >$work/pip.conf
trap 'rm -f $work/pip.conf' EXIT
buildah bud --quiet --layers --format docker --network host -v /etc/ssl/certs:/etc/ssl/certs:ro \
    --secret id=pip,src=$work/pip.conf --build-arg BASE=localhost/aqt-base \
    --target "${1:-cpu}" --tag "localhost/aqt:${1:-cpu}" .
