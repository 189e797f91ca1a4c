"""systemd's notification protocol, sd_notify(3): a datagram to the socket that the environment names."""

import array
import os
import socket

# The first descriptor that systemd hands over, sd_listen_fds(3).
_FIRST = 3


class Notifier:
    """Tells systemd how it goes. Does nothing where nobody listens."""

    def __init__(self, environment: "os._Environ[str] | dict[str, str]" = os.environ) -> None:
        """Reads NOTIFY_SOCKET and WATCHDOG_USEC."""
        self._address = environment.get("NOTIFY_SOCKET", "")
        if self._address.startswith("@"):
            self._address = "\0" + self._address[1:]
        self._socket = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) if self._address else None
        usec = environment.get("WATCHDOG_USEC", "")
        # For how many seconds systemd may hear nothing; None: it does not watch us.
        self.usual_s = int(usec) / 1e6 if usec.isascii() and usec.isdigit() and int(usec) else None
        self._patience_s = self.usual_s

        self._own = environment.get("LISTEN_PID", "") == str(os.getpid())
        self._names = environment.get("LISTEN_FDNAMES", "").split(":")

    def inherited(self, name: str) -> socket.socket | None:
        """Return the socket that a former life of this service has left with systemd under this name. Call it once."""
        if not self._own or name not in self._names:
            return None
        return socket.socket(fileno=_FIRST + self._names.index(name))

    def keep(self, name: str, kept: socket.socket) -> None:
        """Leave a socket with systemd, so that whoever connects during a restart waits for the end of it."""
        self.send(f"FDSTOREREMOVE=1\nFDNAME={name}")
        rights = array.array("i", [kept.fileno()])
        self.send(f"FDSTORE=1\nFDNAME={name}", [(socket.SOL_SOCKET, socket.SCM_RIGHTS, rights)])

    def send(self, text: str, extra: "list[tuple[int, int, array.array[int]]] | None" = None) -> None:
        """Send an assignment or more, one per line."""
        if self._socket is not None:
            try:
                self._socket.sendmsg([text.encode()], extra or [], 0, self._address)
            except OSError:
                # systemd is being restarted; the next will do.
                return

    def feed(self, patience_s: float) -> None:
        """Say that the loop goes on, and for how long systemd may hear nothing now."""
        if self.usual_s is None:
            return
        if self._patience_s is None or abs(patience_s - self._patience_s) > 0.05:
            self._patience_s = patience_s
            self.send(f"WATCHDOG_USEC={round(patience_s * 1e6)}\nWATCHDOG=1")
        else:
            self.send("WATCHDOG=1")
