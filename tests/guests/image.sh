#!/usr/bin/env bash
# Makes what a guest is run with, from Debian packages, and prints the folder: qemu (a launcher), kernel, initramfs.
#
#   image.sh            the folder, made only if this script or the mirror has changed since
#   REFRESH=1 image.sh  made anew in any case, with the latest packages
#
# Nothing is installed: packages are fetched and verified by this machine's apt, and unpacked. QEMU runs with the C library
# that comes with it. Needs a Debian machine, whose mirror has trixie and trixie-backports; not root.
set -euo pipefail
here=$(dirname "$(readlink -f "$0")")
. "$here/../../deploy/docker/debian.sh"

suite=trixie
mirror=$(debian_mirror "$(. /etc/os-release && echo "$VERSION_CODENAME")")
[ -n "$mirror" ] || { echo "the apt sources of this machine name no mirror of Debian" >&2; exit 1; }
cache=${XDG_CACHE_HOME:-$HOME/.cache}/vfleet
folder=$cache/guest-$(echo "$mirror" | cat - "$0" | sha256sum | cut -c 1-12)
if [ -z "${REFRESH:-}" ] && [ -e "$folder/initramfs" ]; then
    echo "$folder"
    exit
fi
mkdir -p "$cache"
exec 9>"$cache/guest.lock"
flock 9 # who waited finds it made
if [ -z "${REFRESH:-}" ] && [ -e "$folder/initramfs" ]; then
    echo "$folder"
    exit
fi

work=$(mktemp -d "$cache/making.XXXXXX")
trap 'rm -rf "$work"' EXIT
mkdir -p "$work"/{state/lists,archives}/partial "$work/made"
printf 'deb %s %s main\n' "$mirror" "$suite" "$mirror" "$suite-backports" >"$work/sources.list"
: >"$work/status"
apt() {
    apt-get -q -o Dir::Etc::SourceList="$work/sources.list" -o Dir::Etc::SourceParts=- -o Dir::Etc::Preferences=- \
        -o Dir::State="$work/state" -o Dir::State::status="$work/status" -o Dir::Cache="$work" \
        -o APT::Sandbox::User=root -o APT::Install-Recommends=false -o Debug::NoLocking=1 "$@"
}

# unpack FOLDER RELEASE PACKAGE…: packages, and all that they depend on, from a release.
unpack() {
    local folder=$1 release=$2
    shift 2
    rm -f "$work"/archives/*.deb
    apt -t "$release" -y --download-only install "$@"
    mkdir -p "$folder"/usr/{bin,sbin,lib,lib64}
    # Programs look for these where they were before Debian merged the two.
    for name in bin sbin lib lib64; do ln -sfn "usr/$name" "$folder/$name"; done
    for package in "$work"/archives/*.deb; do dpkg-deb --fsys-tarfile "$package" | tar -C "$folder" --keep-directory-symlink -x; done
    rm -rf "$folder"/usr/share/{doc,man,info,locale,bash-completion,lintian}
}

{
    apt update

    # QEMU, with a client of vfio-user, which the release's own does not have. Its display and audio modules stay unused.
    unpack "$work/made/qemu.d" "$suite-backports" qemu-system-x86
    cat >"$work/made/qemu" <<'END'
#!/bin/sh
here=$(dirname "$(readlink -f "$0")")/qemu.d
libraries=$here/usr/lib/x86_64-linux-gnu
for more in pulseaudio systemd; do libraries=$libraries:$here/usr/lib/x86_64-linux-gnu/$more; done
exec "$here/usr/lib64/ld-linux-x86-64.so.2" --library-path "$libraries" "$here/usr/bin/qemu-system-x86_64" \
    -L "$here/usr/share/qemu" -L "$here/usr/share/seabios" -L "$here/usr/lib/ipxe/qemu" "$@"
END
    chmod +x "$work/made/qemu"

    # The kernel, of which only some modules go into the initramfs.
    unpack "$work/kernel" "$suite" "$(apt -s install linux-image-amd64 | sed -n 's/^Inst \(linux-image-[0-9][^ ]*\) .*/\1/p')"
    version=$(basename "$work"/kernel/usr/lib/modules/*)
    cp "$work/kernel/boot/vmlinuz-$version" "$work/made/kernel"

    root=$work/root
    unpack "$root" "$suite" busybox-static python3-minimal libpython3-stdlib e2fsprogs pciutils
    # What this guest never starts is what takes most of the room.
    rm -rf "$root"/usr/lib/python3*/{idlelib,ensurepip,lib2to3,pydoc_data,unittest,turtledemo,test} \
        "$root"/usr/lib/x86_64-linux-gnu/{gconv,perl-base,ossl-modules,libssl.so*,libdb-*} \
        "$root"/usr/share/{perl5,perl,zoneinfo,misc/magic*} "$root"/usr/bin/{perl*,dpkg*,apt*,gdb*,bash}
    find "$root" -name __pycache__ -prune -exec rm -rf {} +
    ln -s busybox "$root/usr/bin/sh"
    mkdir -p "$root"/{proc,sys,dev,tmp,run,mnt,root,etc,var}
    modules=$root/usr/lib/modules/$version
    mkdir -p "$modules"
    cp "$work/kernel/usr/lib/modules/$version"/modules.{builtin,order} "$modules"
    cp -r "$work/kernel/usr/lib/modules/$version/kernel" "$work/all"
    wanted="nvme nvme-core nvme-auth nvme-keyring virtio_net net_failover failover virtio_pci virtio_pci_modern_dev
        virtio_pci_legacy_dev virtio virtio_ring igb igbvf i2c-algo-bit dca ptp pps_core ext4 jbd2 mbcache crc16 crc32c_generic
        libcrc32c crc32c-intel"
    for name in $wanted; do
        find "$work/all" -name "${name//_/[_-]}.ko*" -o -name "${name//-/[_-]}.ko*" | sort -u | while read -r file; do
            xz -dc "$file" >"$modules/$(basename "${file%.xz}")" # a guest takes longer
        done
    done
    "$root/usr/bin/busybox" depmod -b "$root" "$version"
    (cd "$root" && find . -print0 | "$root/usr/bin/busybox" cpio -0 -o -H newc) >"$work/made/initramfs.part"
    mv "$work/made/initramfs.part" "$work/made/initramfs"
    rm -rf "$folder" && mv "$work/made" "$folder"
} >&2
echo "$folder"
