# Sourced by tests/run and the scripts of bench: answers, installs what is missing and builds.

top=$(cd "$(dirname "${BASH_SOURCE[0]}")/../.." && pwd)
jobs=$(nproc 2>/dev/null || echo 2)

# The comment that the script begins with.
usage() { sed -n '2,/^set -/{/^#/s/^# \{0,1\}//p}' "$0"; }

say() { printf '== %s\n' "$*"; }

fail() {
  printf '%s: %s\n' "$0" "$*" >&2
  exit 1
}

unknown_argument() { fail "unknown argument $1; see --help."; }

# need_value OPTION [VALUE]...: fails unless the option is followed by one.
need_value() { [ $# -ge 2 ] || fail "$1 needs a value; see --help."; }

# install_packages PACKAGE...: installs those Debian packages that are missing, after saying so. Where it cannot it fails,
# and `missing` has their names.
install_packages() {
  local package as_root=(sudo)
  missing=()
  for package in "$@"; do
    [ "$(dpkg-query --show --showformat '${db:Status-Status}' "$package" 2>/dev/null)" = installed ] ||
      missing+=("$package")
  done
  [ ${#missing[@]} -gt 0 ] || return 0
  [ "$(id -u)" -ne 0 ] || as_root=(env)
  command -v apt-get >/dev/null && command -v "${as_root[0]}" >/dev/null || return 1
  say "Installing Debian packages: ${missing[*]}"
  "${as_root[@]}" apt-get update --quiet &&
    "${as_root[@]}" env DEBIAN_FRONTEND=noninteractive \
      apt-get install --quiet --yes --no-install-recommends "${missing[@]}"
}

# need_packages PACKAGE...: installs what is missing, or fails.
need_packages() {
  if ! command -v apt-get >/dev/null; then
    fail "this system has no apt-get. Install (by their Debian names): $*. Then build with CMake as README.md says."
  fi
  install_packages "$@" || fail "these packages could not be installed. As root: apt-get install ${missing[*]}"
}

# want_packages PACKAGE...: likewise for what can be done without.
want_packages() {
  install_packages "$@" || say "Going on without ${missing[*]}"
}

# configure_and_build DIR [-DOPTION=VALUE]... [TARGET]...: configures the checkout into DIR with the options and builds
# the targets, or all where none is named.
configure_and_build() {
  local dir=$1 argument options=() targets=()
  shift
  for argument in "$@"; do
    case $argument in
      -*) options+=("$argument") ;;
      *) targets+=("$argument") ;;
    esac
  done
  [ ${#targets[@]} -gt 0 ] || targets=(all)
  say "Configuring $dir"
  cmake -S "$top" -B "$dir" -G Ninja "${options[@]}"
  say "Building $dir with $jobs jobs"
  cmake --build "$dir" --parallel "$jobs" --target "${targets[@]}"
}
