"""A bus with a systemd on it, for tests: it speaks D-Bus over a socket, and does what a test tells it."""

import contextlib
import socket
import threading
from pathlib import Path
from typing import Any

from jeepney import MessageType, new_error, new_method_return
from jeepney.low_level import Parser


class FakeSystemd:
    """Units are [load, active, sub, invocation]; `calls` is what was ordered; `mute`: answer nothing."""

    def __init__(self, folder: Path) -> None:
        self.units: dict[str, list[str]] = {}
        self.calls: list[tuple[str, str]] = []
        self.mute = False
        self.refuse = False
        self.garbage = False
        self.path = folder / "bus"
        self._links: list[socket.socket] = []
        self._listener = socket.socket(socket.AF_UNIX)
        self._listener.bind(str(self.path))
        self._listener.listen()
        threading.Thread(target=self._accept, daemon=True).start()

    @property
    def address(self) -> str:
        return f"unix:path={self.path}"

    def close(self) -> None:
        self._listener.close()
        self.cut()

    def cut(self) -> None:
        """End all connections, as a restart of the bus does."""
        for link in self._links:
            with contextlib.suppress(OSError):
                link.shutdown(socket.SHUT_RDWR)
        self._links.clear()

    def _accept(self) -> None:
        with contextlib.suppress(OSError):
            while True:
                link, _ = self._listener.accept()
                self._links.append(link)
                threading.Thread(target=self._serve, args=(link,), daemon=True).start()

    def _serve(self, link: socket.socket) -> None:
        with contextlib.suppress(OSError):
            text = b""
            while b"BEGIN\r\n" not in text:
                if not (more := link.recv(4096)):
                    return
                text += more
                if b"AUTH" in text:
                    text = text[text.index(b"AUTH") + 4 :]
                    link.sendall(b"OK 0123456789abcdef0123456789abcdef\r\n")
                if b"NEGOTIATE" in text:
                    text = b""
                    link.sendall(b"ERROR\r\n")
            parser = Parser()
            parser.add_data(text.split(b"BEGIN\r\n", 1)[1])
            while True:
                while (message := parser.get_next_message()) is not None:
                    if message.header.message_type is MessageType.method_call:
                        self._answer(link, message)
                if not (more := link.recv(4096)):
                    return
                parser.add_data(more)

    def _answer(self, link: socket.socket, message: Any) -> None:
        method = str(message.header.fields[3])
        if method != "Hello" and self.mute:
            return
        if method != "Hello" and self.garbage:
            link.sendall(b"x" * 64)
            return
        if method == "Hello":
            reply = new_method_return(message, "s", (":1.1",))
        elif method == "ListUnitsByNames":
            rows = []
            for name in message.body[0]:
                load, active, sub, _ = self.units.get(name, ["not-found", "inactive", "dead", ""])
                path = "/unit/" + name.replace(".", "_2e").replace("-", "_2d")
                rows.append((name, name, load, active, sub, "", path, 0, "", "/"))
            reply = new_method_return(message, "a(ssssssouso)", (rows,))
        elif method == "Get":
            path = str(message.header.fields[1])
            name = path.removeprefix("/unit/").replace("_2e", ".").replace("_2d", "-")
            reply = new_method_return(message, "v", (("ay", bytes.fromhex(self.units[name][3])),))
        elif self.refuse:
            reply = new_error(message, "org.freedesktop.DBus.Error.AccessDenied", "s", ("Permission denied",))
        else:
            self.calls.append((method, message.body[0]))
            self.ordered(method, message.body)
            reply = new_method_return(message, "o", ("/job/1",))
        link.sendall(reply.serialise(serial=1))

    def ordered(self, method: str, body: tuple[Any, ...]) -> None:
        """Do as systemd would, at once."""
        unit = self.units.get(body[0])
        if unit is None:
            return
        if method == "StartUnit" and unit[1] != "active":
            unit[1:] = ["active", "running", f"{int(unit[3], 16) + 1:032x}"]
        elif method == "StopUnit":
            unit[1:3] = ["inactive", "dead"]
        elif method == "KillUnit" and unit[1] == "active":
            unit[1:3] = ["activating", "auto-restart"]
        elif method == "ResetFailedUnit" and unit[1] == "failed":
            unit[1:3] = ["inactive", "dead"]
