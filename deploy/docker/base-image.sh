#!/usr/bin/env bash
# Makes a base image for the Dockerfile from a Debian mirror, where no registry can be reached, and prints its name.
#
#   base-image.sh            the image, made only if this script, the release or the mirror has changed since
#   REFRESH=1 base-image.sh  made anew in any case, with the latest security updates
#
# Needs root, a Debian machine (its apt names the mirror and has the keys that verify it) and Docker.
set -euo pipefail
here=$(dirname "$(readlink -f "$0")")
. "$here/debian.sh"

: "${SUITE:=$(. /etc/os-release && echo "$VERSION_CODENAME")}"
mirror=$(debian_mirror "$SUITE")
security=$(debian_mirror "$SUITE-security")
[ -n "$mirror" ] || { echo "the apt sources of this machine name no mirror of $SUITE" >&2; exit 1; }

image=vfleet-base:$SUITE-$(echo "$SUITE $mirror $security" | cat - "$0" | sha256sum | cut -c 1-12)
if [ -z "${REFRESH:-}" ] && docker image inspect "$image" >/dev/null 2>&1; then
    echo "$image"
    exit
fi
[ "$(id -u)" = 0 ] || { echo "debootstrap needs root (with a registry at hand: BASE_IMAGE=python:3.11-slim)" >&2; exit 1; }

work=$(mktemp -d)
trap 'rm -rf --one-file-system "$work"' EXIT
root=$work/root
{
    if ! command -v debootstrap; then
        debian_unpack "$SUITE" "$work/debootstrap" debootstrap
        export DEBOOTSTRAP_DIR=$work/debootstrap/usr/share/debootstrap
        PATH=$PATH:$work/debootstrap/usr/sbin
    fi
    debootstrap --variant=minbase --include=python3 "$SUITE" "$root" "$mirror"
    if [ -n "$security" ]; then
        echo "deb $security $SUITE-security main" >>"$root/etc/apt/sources.list"
        chroot "$root" apt-get -q update
        DEBIAN_FRONTEND=noninteractive chroot "$root" apt-get -qy upgrade
    fi
    # Nobody reads in an image; licences stay.
    find "$root/usr/share/doc" -type f ! -name copyright -delete
    rm -rf "$root"/usr/share/{locale,man,info}/* "$root"/var/cache/apt/* "$root"/var/lib/apt/lists/* "$root"/var/log/*
    tar -C "$root" --exclude='./proc/*' --exclude='./sys/*' --exclude='./dev/*' -c . |
        docker import --change 'ENV PATH=/usr/local/bin:/usr/bin:/bin' --message "debootstrap $SUITE" - "$image"
} >&2
echo "$image"
