#!/bin/sh
# Installs the OS packages that the lab needs on this machine, and only those that are missing.
set -eu
# netavark and nothing else of podman's network parts is pulled in by itself; uidmap and iptables neither.
# postgresql and redis-server are what the watchdog's tests start on their own; no server of theirs may run here.
packages="aardvark-dns crun debian-archive-keyring iproute2 iptables mmdebstrap netavark nftables
openssh-client podman postgresql python3-venv redis-server uidmap util-linux"
missing=""
for package in $packages; do
  dpkg-query -W -f '${db:Status-Abbrev}' "$package" 2>/dev/null | grep -q '^ii' || missing="$missing $package"
done
[ -n "$missing" ] || exit 0
if [ "$(id -u)" -eq 0 ]; then sudo=""; else sudo="sudo"; fi
echo "Installing:$missing"
$sudo apt-get update -qq
# Neither a cluster nor a service is made of them: what is here already stays as it is.
case " $missing " in
  *" postgresql "*)
    $sudo apt-get install -qq -y --no-install-recommends postgresql-common >/dev/null
    echo "create_main_cluster = false" | $sudo tee /etc/postgresql-common/createcluster.d/airflow-ha.conf >/dev/null ;;
esac
case " $missing " in
  *" redis-server "*) [ -e /etc/systemd/system/redis-server.service ] \
    || $sudo ln -s /dev/null /etc/systemd/system/redis-server.service ;;
esac
# shellcheck disable=SC2086
DEBIAN_FRONTEND=noninteractive $sudo apt-get install -qq -y --no-install-recommends $missing >/dev/null
