#!/usr/bin/env bash
# Installs Wattshift on this node as a systemd service, or upgrades it. Safe to run again.
#
#   deploy/install.sh [--start] [--uninstall [--purge]]
#
#   --start      enable the service and start it (or restart the daemon: no job is touched)
#   --uninstall  remove what was installed; configuration, state and the user stay
#   --purge      with --uninstall: remove those, too
#
# Environment: DESTDIR (stage the files there, touch nothing else), PREFIX (default /opt/wattshift),
# PYTHON (a Python 3.11 to 3.13 that every user can run; default: the system's newest).
#
# Each run makes a release of its own, PREFIX/releases/<n>, and then turns PREFIX/current over to it, so that
# a running daemon never sees half an upgrade and a failed one changes nothing.
set -euo pipefail
# Without it a failure inside $(...) goes unseen.
shopt -s inherit_errexit
umask 022

SOURCE="$(dirname "$(dirname "$(readlink -f "${BASH_SOURCE[0]}")")")"
DESTDIR="${DESTDIR:-}"
PREFIX="${PREFIX:-/opt/wattshift}"
UNITS=(wattshift.service wattshift-launcher.socket wattshift-launcher.service)
# The daemon may run from the last but one until it is restarted, and a launcher for as long as its jobs do.
RELEASES_KEPT=3
NOBODY_ID=65534

BIN="$DESTDIR/usr/local/bin"
ETC="$DESTDIR/etc/wattshift"
STATE="$DESTDIR/var/lib/wattshift"
UNIT_DIR="$DESTDIR/etc/systemd/system"
SYSUSERS="$DESTDIR/etc/sysusers.d/wattshift.conf"
TMPFILES="$DESTDIR/etc/tmpfiles.d/wattshift.conf"
SHARE="$DESTDIR/usr/local/share"
COMPLETIONS=(
  "bash:$SHARE/bash-completion/completions/wattshift"
  "zsh:$SHARE/zsh/site-functions/_wattshift"
  "fish:$SHARE/fish/vendor_completions.d/wattshift.fish"
)

say() { echo "install: $*"; }
fail() {
  echo "install: $*" >&2
  exit 1
}
# Whether there is a systemd here that the files are meant for.
has_systemd() { [ -z "$DESTDIR" ] && [ -d /run/systemd/system ]; }

main() {
  local start=no uninstall=no purge=no
  while [ $# -gt 0 ]; do
    case "$1" in
      --start) start=yes ;;
      --uninstall) uninstall=yes ;;
      --purge) purge=yes ;;
      -h | --help) sed -n '2,/^set /{/^#/s/^# \{0,1\}//p}' "${BASH_SOURCE[0]}" && exit ;;
      *) fail "unknown option $1; see --help" ;;
    esac
    shift
  done
  case "$PREFIX" in
    /*/*) ;;
    *) fail "PREFIX must be an absolute path below a directory of the system, is $PREFIX" ;;
  esac
  [ -n "$DESTDIR" ] || [ "$(id -u)" -eq 0 ] || fail "must run as root (or with DESTDIR, to stage the files)"
  if [ "$uninstall" = yes ]; then
    uninstall "$purge"
  else
    [ "$purge" = no ] || fail "--purge belongs to --uninstall"
    install_all "$start"
  fi
}

install_all() {
  local release
  # A variable of its own: `local x=$(...)` would hide a failure.
  release="$(make_release)"
  install_files "$release"
  activate "$release"
  if has_systemd; then
    systemd-sysusers "$SYSUSERS"
    systemd-tmpfiles --create "$TMPFILES"
    systemctl daemon-reload
  fi
  forget_old_releases
  say "$(wattshift_of "$release" version) is in $PREFIX"
  if [ "$1" = yes ] && has_systemd; then
    systemctl enable --quiet wattshift-launcher.socket wattshift.service
    systemctl start wattshift-launcher.socket
    systemctl restart wattshift.service
    say "wattshift.service runs; see: systemctl status wattshift"
  elif has_systemd && systemctl is-active --quiet wattshift.service; then
    say "the old version still runs; no job is touched by: systemctl restart wattshift"
  else
    say "to start it: systemctl enable --now wattshift-launcher.socket wattshift.service"
  fi
}

# A virtual environment with everything in it. Prints its place.
make_release() {
  local python number release
  python="$(find_python)"
  number="$(releases | tail -n 1)"
  release="$DESTDIR$PREFIX/releases/$((${number:-0} + 1))"
  mkdir -p "$release"
  # Half a release is none.
  trap 'rm -rf "'"$release"'"' EXIT
  "$python" -m venv "$release" >&2
  # From a copy: the build compiles protos into its tree, and root's files don't belong into a checkout.
  mkdir "$release/source"
  (cd "$SOURCE" && cp -R pyproject.toml LICENSE proto scheduler "$release/source/")
  "$release/bin/python" -m pip install --quiet --disable-pip-version-check "$release/source" >&2
  rm -rf "$release/source"
  if [ -n "$DESTDIR" ]; then
    # Scripts name their interpreter by the path that it was made under.
    grep -rlI -- "$release" "$release/bin" "$release/pyvenv.cfg" | xargs -r sed -i "s|$DESTDIR$PREFIX|$PREFIX|g"
  fi
  install -D -m 0755 "$SOURCE/deploy/make-gpu-nodes" "$release/libexec/make-gpu-nodes"
  mkdir -p "$release/doc"
  cp -R "$SOURCE/docs/operating" "$SOURCE/deploy/prometheus" "$SOURCE/deploy/wattshift.toml" \
    "$SOURCE/CHANGELOG.md" "$SOURCE/LICENSE" "$release/doc/"
  trap - EXIT
  echo "$release"
}

# The command of a release that may still be staged, where its script doesn't find its interpreter.
wattshift_of() {
  local release="$1"
  shift
  "$release/bin/python" -I -c 'from scheduler.cli import main; main()' "$@"
}

# The service runs as a user of its own: a Python below somebody's home directory would be out of its reach.
find_python() {
  local candidate
  for candidate in ${PYTHON:-python3.13 python3.12 python3.11 python3}; do
    candidate="$(PATH=/usr/local/bin:/usr/bin:/bin:$PATH command -v "$candidate")" || continue
    if can_serve "$candidate"; then
      echo "$candidate"
      return
    fi
  done
  fail "no Python 3.11 to 3.13 with venv that every user can run (tried: ${PYTHON:-python3.13 python3.12 python3.11 python3});" \
    "Debian: apt-get install python3 python3-venv; or name one: PYTHON=/usr/bin/python3.12"
}

can_serve() {
  local as_nobody=()
  if [ "$(id -u)" -eq 0 ]; then
    as_nobody=(setpriv --reuid "$NOBODY_ID" --regid "$NOBODY_ID" --clear-groups)
  fi
  (cd / && "${as_nobody[@]}" "$1" -I -c '
import ensurepip, sys, venv
sys.exit(not (3, 11) <= sys.version_info < (3, 14))') 2>/dev/null
}

install_files() {
  local release="$1" unit completion
  install -d "$UNIT_DIR" "$BIN"
  for unit in "${UNITS[@]}"; do
    sed "s|/opt/wattshift|$PREFIX|g" "$SOURCE/deploy/$unit" >"$UNIT_DIR/$unit.new"
    chmod 0644 "$UNIT_DIR/$unit.new"
    mv "$UNIT_DIR/$unit.new" "$UNIT_DIR/$unit"
  done
  install -D -m 0644 "$SOURCE/deploy/wattshift.sysusers" "$SYSUSERS"
  install -D -m 0644 "$SOURCE/deploy/wattshift.tmpfiles" "$TMPFILES"
  if [ ! -e "$ETC/wattshift.toml" ]; then
    install -D -m 0640 "$SOURCE/deploy/wattshift.toml" "$ETC/wattshift.toml"
  fi
  for completion in "${COMPLETIONS[@]}"; do
    install -d "$(dirname "${completion#*:}")"
    wattshift_of "$release" completion "${completion%%:*}" >"${completion#*:}"
  done
}

# From here on new starts are of the new release.
activate() {
  ln -sfn "${1#"$DESTDIR"}" "$DESTDIR$PREFIX/current.new"
  mv -T "$DESTDIR$PREFIX/current.new" "$DESTDIR$PREFIX/current"
  ln -sfn "$PREFIX/current/bin/wattshift" "$BIN/wattshift"
}

# Their numbers, oldest first.
releases() {
  mkdir -p "$DESTDIR$PREFIX/releases"
  find "$DESTDIR$PREFIX/releases" -mindepth 1 -maxdepth 1 -type d -printf '%f\n' | sort -n
}

forget_old_releases() {
  local number
  for number in $(releases | head -n "-$RELEASES_KEPT"); do
    rm -rf "$DESTDIR$PREFIX/releases/$number"
  done
}

uninstall() {
  local unit completion
  if has_systemd; then
    if systemctl is-active --quiet wattshift-launcher.service; then
      fail "the launcher may hold jobs, which would end; if that is meant, first:" \
        "systemctl stop wattshift.service wattshift-launcher.socket wattshift-launcher.service"
    fi
    systemctl disable --quiet --now wattshift.service wattshift-launcher.socket 2>/dev/null || true
  fi
  for unit in "${UNITS[@]}"; do rm -f "$UNIT_DIR/$unit"; done
  for completion in "${COMPLETIONS[@]}"; do rm -f "${completion#*:}"; done
  rm -f "$SYSUSERS" "$TMPFILES" "$BIN/wattshift"
  rm -rf "$DESTDIR$PREFIX/releases" "$DESTDIR$PREFIX/current"
  rmdir "$DESTDIR$PREFIX" 2>/dev/null || true
  if has_systemd; then systemctl daemon-reload; fi
  if [ "$1" = no ]; then
    say "removed; configuration (/etc/wattshift), state (/var/lib/wattshift) and the user wattshift stay"
    return
  fi
  rm -rf "$ETC" "$STATE" "$DESTDIR/run/wattshift"
  if [ -z "$DESTDIR" ] && getent passwd wattshift >/dev/null; then userdel wattshift; fi
  say "removed, with configuration, state and the user wattshift"
}

main "$@"
