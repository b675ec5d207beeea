#!/usr/bin/env bash
# Builds the image of launch/Dockerfile without a registry and without root: launch/image.sh cpu|cuda|tpu [COMMAND...]
# A COMMAND then runs in it without a network. BASE=NAME takes another base than a Debian made here.
set -euo pipefail
cd "$(dirname "$0")/.."
fail() { echo "error: $1" >&2 && exit 81; }

kind=$1 && shift
case $kind in cpu | cuda | tpu) ;; *) fail "KIND=$kind: expected cpu, cuda or tpu" ;; esac
[ "$(id -u)" != 0 ] || fail "make image: expected an ordinary user, not root; su USER -c 'make image'"
PATH=$PATH:/usr/sbin:/sbin
for tool in buildah debootstrap dpkg-query newuidmap; do
    command -v $tool >/dev/null || fail "$tool: expected on PATH; apt-get install buildah debootstrap dpkg uidmap"
done
export BUILDAH_ISOLATION=chroot
image=localhost/jaxinfra:$kind root='' container=''
trap '[ -z "$container" ] || buildah rm "$container" >/dev/null; [ -z "$root" ] || buildah unshare rm -rf "$root"' EXIT

if [ -z "${BASE:-}" ]; then
    BASE=localhost/jaxinfra-base:trixie
    if ! buildah inspect --type image $BASE >/dev/null 2>&1; then
        root=$(mktemp -d)
        buildah unshare debootstrap --variant=minbase --include=ca-certificates,python3,python3-venv \
            trixie "$root" "${DEBIAN_MIRROR:-http://deb.debian.org/debian}" >debootstrap.log 2>&1 ||
            fail "debootstrap has failed: see debootstrap.log"
        # The licenses of Debian's packages stay.
        buildah unshare sh -c 'cd "$1" && rm -rf var/cache/apt/* var/lib/apt/lists/* var/log/* usr/share/man/* \
            usr/share/locale/* && find usr/share/doc -type f ! -name copyright -delete' - "$root"
        rm debootstrap.log
        container=$(buildah from scratch)
        buildah add --quiet "$container" "$root" / >/dev/null
        buildah commit --quiet "$container" $BASE >/dev/null
        buildah rm "$container" >/dev/null && container=''
    fi
fi

# Of this machine while packages are installed, and not in the image: certificates for a proxy that opens TLS, and a pip.conf.
arguments=(--build-arg "BASE=$BASE" --build-arg "KIND=$kind" --build-arg "EXTRAS=${EXTRAS-gcs,s3}")
certificates=${SSL_CERT_FILE:-/etc/ssl/certs/ca-certificates.crt}
[ ! -r "$certificates" ] || arguments+=(--secret "id=ca,src=$certificates")
[ ! -r "${PIP_CONFIG_FILE:-}" ] || arguments+=(--secret "id=pip,src=$PIP_CONFIG_FILE")
buildah build --quiet "${arguments[@]}" --file launch/Dockerfile --tag "$image" . >/dev/null

container=$(buildah from "$image")
buildah unshare sh -c '"$1" launch/sbom.py "$(buildah mount "$2")" "$3" "$4"' \
    - "${PYTHON:-.venv/bin/python}" "$container" "image-$kind.cdx.json" "$image"
# As a pod of the standard "restricted": without rights. chroot isolation shares the network of whoever runs it, so a
# namespace of its own, with loopback alone, is around it.
[ $# -eq 0 ] || buildah unshare unshare --net sh -c 'ip link set lo up &&
    exec setpriv --no-new-privs buildah run --cap-drop ALL "$@"' - "$container" -- "$@"
