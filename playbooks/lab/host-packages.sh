#!/bin/sh
# Installs the OS packages that the lab needs on this machine, and only those that are missing.
set -eu
# netavark and nothing else of podman's network parts is pulled in by itself; uidmap and iptables neither.
packages="aardvark-dns crun debian-archive-keyring iproute2 iptables mmdebstrap netavark nftables
openssh-client podman python3-venv uidmap util-linux"
missing=""
for package in $packages; do
  dpkg-query -W -f '${db:Status-Abbrev}' "$package" 2>/dev/null | grep -q '^ii' || missing="$missing $package"
done
[ -n "$missing" ] || exit 0
if [ "$(id -u)" -eq 0 ]; then sudo=""; else sudo="sudo"; fi
echo "Installing:$missing"
$sudo apt-get update -qq
# shellcheck disable=SC2086
DEBIAN_FRONTEND=noninteractive $sudo apt-get install -qq -y --no-install-recommends $missing >/dev/null
