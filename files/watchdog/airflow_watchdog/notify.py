"""systemd's notification protocol, sd_notify(3): a datagram to the socket that the environment names."""

import os
import socket


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

    def send(self, text: str) -> None:
        """Send an assignment or more, one per line."""
        if self._socket is not None:
            try:
                self._socket.sendto(text.encode(), self._address)
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
