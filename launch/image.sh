#!/usr/bin/env bash
# Builds the image of launch/Dockerfile without a registry and without root: launch/image.sh cpu|cuda|tpu [COMMAND...]
# A COMMAND then runs in it without a network. BASE=NAME takes another base than a Debian made here.
set -euo pipefail
cd "$(dirname "$0")/.."
fail() { echo "error: $1" >&2 && exit 2; }

kind=${1:-cpu} && shift || true
case $kind in
cpu) extras=[gcs,s3] ;;
cuda) extras=[cuda,gcs,s3] ;;
tpu) extras=[tpu,gcs] ;;
*) fail "KIND=$kind: expected cpu, cuda or tpu" ;;
esac
PATH=$PATH:/usr/sbin:/sbin
for tool in buildah debootstrap newuidmap; do
    command -v $tool >/dev/null || fail "$tool: expected on PATH; apt-get install buildah debootstrap uidmap"
done
export BUILDAH_ISOLATION=chroot STORAGE_DRIVER=${STORAGE_DRIVER:-vfs}
image=jaxinfra:$kind

if [ -z "${BASE:-}" ]; then
    BASE=localhost/debian:trixie
    if ! buildah inspect --type image $BASE >/dev/null 2>&1; then
        root=$(mktemp -d)
        trap 'buildah unshare rm -rf "$root"' EXIT
        buildah unshare debootstrap --variant=minbase --include=ca-certificates,python3,python3-venv \
            trixie "$root" "${DEBIAN_MIRROR:-http://deb.debian.org/debian}" >"$root.log" || fail "debootstrap: see $root.log"
        buildah unshare rm -rf "$root"/var/cache/apt "$root"/var/lib/apt/lists "$root"/usr/share/{doc,locale,man} "$root.log"
        made=$(buildah from scratch)
        buildah add --quiet "$made" "$root" / >/dev/null
        buildah commit --quiet --rm "$made" $BASE >/dev/null
    fi
fi

# The certificates of this machine, for a proxy that opens TLS, are there while packages are installed, and not in the image.
arguments=(--build-arg "BASE=$BASE" --build-arg "EXTRAS=$extras" --volume /etc/ssl/certs:/run/certs:ro)
arguments+=(--build-arg PIP_CERT=/run/certs/ca-certificates.crt)
[ -z "${PIP_INDEX_URL:-}" ] || arguments+=(--build-arg "PIP_INDEX_URL=$PIP_INDEX_URL")
buildah build --quiet --format docker "${arguments[@]}" --file launch/Dockerfile --tag "$image" . >/dev/null

container=$(buildah from "$image")
trap 'buildah rm "$container" >/dev/null; [ -z "${root:-}" ] || buildah unshare rm -rf "$root"' EXIT
# shellcheck disable=SC2016
buildah unshare sh -c '"$1" launch/sbom.py "$(buildah mount "$2")" "$3" "$4"' \
    - "${PYTHON:-.venv/bin/python}" "$container" "image-$kind.cdx.json" "$image"
# chroot isolation shares the network of whoever runs it: a namespace of its own, with loopback alone, is around it.
[ $# -eq 0 ] || buildah unshare unshare --net sh -c 'ip link set lo up && exec buildah run "$@"' - "$container" -- "$@"
