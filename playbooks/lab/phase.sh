# Sourced by lab.sh and molecule.sh: runs named phases and keeps their times for the table at the end.
phases=""
started=$(date +%s)

# phase <name> <command …>: shows the command's output as it comes; returns its exit code.
phase() {
  _name=$1
  shift
  printf '\n\033[1m==> %s\033[0m\n' "$_name"
  _from=$(date +%s)
  _code=0
  "$@" || _code=$?
  _took=$(($(date +%s) - _from))
  [ "$_code" -eq 0 ] && _end="ok" || _end="FAILED"
  phases="$phases$(printf '%5d s  %-6s  %s' "$_took" "$_end" "$_name")
"
  return "$_code"
}

# times: the table of all phases so far.
times() {
  printf '\n%s%5d s          all together\n' "$phases" "$(($(date +%s) - started))"
}
