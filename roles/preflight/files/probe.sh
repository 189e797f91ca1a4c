# Run by the action plugin on a bare node, as root, with nothing but a POSIX shell and coreutils to count on.
# Arguments: the Python interpreter, then the folders whose free space matters. Prints one `key value …` per line.
python=$1
shift
echo "python $("$python" -c 'import platform; print(platform.python_version())' 2>/dev/null)"
(
  . /etc/os-release 2>/dev/null
  echo "os ${ID:-unknown} ${VERSION_ID:-unknown}"
)
sed -n 's/^MemTotal: *\([0-9]*\) kB$/memory_kb \1/p' /proc/meminfo
# Our certificates are the first thing a deployment leaves behind and the last it would remove.
[ -d /etc/airflow-ha/tls ] && echo "deployed yes"
for folder in "$@"; do
  existing=$folder
  while [ ! -d "$existing" ]; do existing=$(dirname "$existing"); done
  df -Pk "$existing" | awk -v folder="$folder" 'NR == 2 { print "disk", folder, $4, $6 }'
done
if listeners=$(ss -H -ltnp 2>/dev/null); then
  echo "sockets yes"
  # State, two queues, local address, peer, and the processes, whose names may hold blanks.
  echo "$listeners" | sed -n 's/^[^ ]* *[^ ]* *[^ ]* *\([^ ]*\) *[^ ]* */listen \1 /p'
  for pid in $(echo "$listeners" | grep -o 'pid=[0-9]*' | cut -d= -f2 | sort -u); do
    echo "unit $pid $(sed -n 's#^[^:]*:[^:]*:.*/\([^/]*\.service\).*#\1#p' "/proc/$pid/cgroup" 2>/dev/null | head -n 1)"
  done
fi
# What the roles would otherwise ask for one by one: packages, accounts and services.
dpkg-query -W -f='package ${db:Status-Status} ${Package} ${Version}\n' 2>/dev/null | sed -n 's/^package installed /package /p'
getent passwd | sed 's/^/passwd /'
getent group | sed 's/^/group /'
systemctl list-unit-files --type=service --no-legend --plain 2>/dev/null | awk '{ print "service_file", $1, $2 }'
systemctl list-units --type=service --state=running --no-legend --plain 2>/dev/null | awk '{ print "service_running", $1 }'
true
