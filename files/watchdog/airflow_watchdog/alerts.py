"""Tells hooks of every event: a command, a webhook, e-mail. In a thread of its own: nothing here delays the loop.

Each hook has its own queue, so that one that hangs does not hold up the others. A hook that fails is tried again with
growing pauses, then the event is given up; of a flood, all beyond `per_minute` are summed up in one event.
"""

import contextlib
import json
import logging
import queue
import subprocess
import threading
import time
from collections import Counter
from collections.abc import Callable
from email.message import EmailMessage
from typing import Literal

from airflow_watchdog.config import Alerts, Email, read_secret
from airflow_watchdog.events import Event

MINUTE_S = 60.0
Outcome = Literal["sent", "failed", "dropped", "summed_up"]
log = logging.getLogger(__name__)


class AlertError(Exception):
    """A hook did not take the event; str() says why, without any secret."""


def run_command(command: tuple[str, ...], event: Event, timeout_s: float) -> None:
    """Run the command with the event as JSON on its standard input. Raises AlertError."""
    try:
        # No shell, and its own process group: nothing of it is left after the time-out.
        process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, process_group=0
        )
    except OSError as error:
        raise AlertError(f"{command[0]}: {error.strerror}") from None
    try:
        process.communicate(_text(event), timeout=timeout_s)
    except subprocess.TimeoutExpired:
        raise AlertError(f"{command[0]}: not done after {timeout_s:g} s") from None
    finally:
        if process.poll() is None:
            _kill_group(process)
    if process.returncode != 0:
        raise AlertError(f"{command[0]}: exit code {process.returncode}")


def _kill_group(process: subprocess.Popen[bytes]) -> None:
    import os
    import signal

    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()


def post_webhook(url: str, event: Event, timeout_s: float) -> None:
    """POST the event as JSON; anything but a 2xx is an error. Raises AlertError, which never names the URL."""
    # Here, since most sites use one hook of the three.
    import http.client
    import urllib.error
    import urllib.request

    class NoRedirect(urllib.request.HTTPRedirectHandler):
        """The URL is as good as a password: it goes nowhere else."""

        def redirect_request(self, *_args: object) -> None:
            return None

    if not url.startswith(("https://", "http://")):
        raise AlertError("webhook: not an http(s) URL")
    try:
        request = urllib.request.Request(url, _text(event), {"Content-Type": "application/json"})
        with urllib.request.build_opener(NoRedirect).open(request, timeout=timeout_s) as answer:
            answer.read(1024)
    except urllib.error.HTTPError as error:
        raise AlertError(f"webhook: status {error.code}") from None
    except urllib.error.URLError as error:
        raise AlertError(f"webhook: {type(error.reason).__name__}") from None
    except (OSError, ValueError, http.client.HTTPException) as error:
        raise AlertError(f"webhook: {type(error).__name__}") from None


def send_mail(settings: Email, event: Event, timeout_s: float) -> None:
    """Send the event by e-mail. Raises AlertError."""
    import smtplib
    import ssl

    mail = EmailMessage()
    mail["From"], mail["To"] = settings.sender, ", ".join(settings.to)
    # A line break would be a new header.
    mail["Subject"] = " ".join(f"[airflow-watchdog] {event.severity}: {event.message}".split())[:200]
    details = "\n".join(f"{key}: {value}" for key, value in event.as_dict().items())
    mail.set_content(f"{event.message}\n\n{details}\n")
    try:
        relay = smtplib.SMTP(settings.smtp, settings.port, timeout=timeout_s)
        try:
            if settings.starttls:
                relay.starttls(context=ssl.create_default_context())
            relay.send_message(mail)
        finally:
            # A mail that was taken is not sent again because of a bad farewell.
            with contextlib.suppress(OSError, smtplib.SMTPException):
                relay.quit()
            relay.close()
    except (OSError, smtplib.SMTPException) as error:
        raise AlertError(f"e-mail by {settings.smtp}: {type(error).__name__}") from None


class _Hook:
    """One hook with its queue and thread."""

    def __init__(
        self,
        name: str,
        send: Callable[[Event], None],
        settings: Alerts,
        count: Callable[[str, Outcome], None],
        stopping: threading.Event,
    ) -> None:
        self.name, self._send, self._settings, self._count, self._stopping = name, send, settings, count, stopping
        self._queue: queue.Queue[Event | None] = queue.Queue(settings.queue)
        self._minute, self._sent, self._held = time.monotonic(), 0, Counter[str]()
        self._last: Event | None = None
        self._thread = threading.Thread(target=self._run, name=f"alerts-{name}", daemon=True)
        self._thread.start()

    def put(self, event: Event) -> None:
        try:
            self._queue.put_nowait(event)
        except queue.Full:
            self._count(self.name, "dropped")

    def close(self, timeout_s: float) -> None:
        with contextlib.suppress(queue.Full):
            self._queue.put_nowait(None)
        self._thread.join(timeout_s)

    def _run(self) -> None:
        while True:
            wait_s = max(0.0, self._minute + MINUTE_S - time.monotonic()) if self._held else None
            try:
                event = self._queue.get(timeout=wait_s)
            except queue.Empty:
                self._new_minute()
                continue
            if event is None:
                self._new_minute()
                return
            if time.monotonic() - self._minute >= MINUTE_S:
                self._new_minute()
            if self._sent >= self._settings.per_minute:
                self._held[event.kind] += 1
                self._last = event
                self._count(self.name, "summed_up")
            else:
                self._sent += 1
                self._deliver(event)

    def _new_minute(self) -> None:
        self._minute, self._sent = time.monotonic(), 0
        if self._held and self._last:
            what = ", ".join(f"{kind}: {number}" for kind, number in self._held.most_common(5))
            message = f"{self._held.total()} more events in the last minute ({what}); the last: {self._last.message}"
            self._held.clear()
            self._sent = 1
            self._deliver(Event("summary", self._last.node, message, severity=self._last.severity, at=self._last.at))

    def _deliver(self, event: Event) -> None:
        pause_s = self._settings.retry_s
        for attempt in range(1, self._settings.attempts + 1):
            try:
                self._send(event)
            except AlertError as error:
                log.warning("alert %s, attempt %d of %d: %s", event.kind, attempt, self._settings.attempts, error)
            except Exception as error:
                # The type alone: the text may hold what is secret.
                log.warning("alert %s by %s: %s", event.kind, self.name, type(error).__name__)
            else:
                self._count(self.name, "sent")
                return
            if attempt == self._settings.attempts or self._stopping.wait(pause_s):
                break
            pause_s *= 2
        self._count(self.name, "failed")


class Alerter:
    """All hooks of a configuration. `count` gets the hook's name and what became of an event, in any thread."""

    def __init__(self, settings: Alerts, count: Callable[[str, Outcome], None] = lambda _hook, _outcome: None) -> None:
        self._stopping = threading.Event()
        hooks: dict[str, Callable[[Event], None]] = {}
        timeout_s = settings.timeout_s
        if command := settings.command:
            hooks["command"] = lambda event: run_command(command, event, timeout_s)
        if url_file := settings.webhook_url_file:
            # Read each time: it may be replaced while we run.
            hooks["webhook"] = lambda event: post_webhook(read_secret(url_file), event, timeout_s)
        if email := settings.email:
            hooks["email"] = lambda event: send_mail(email, event, timeout_s)
        self._hooks = [_Hook(name, send, settings, count, self._stopping) for name, send in hooks.items()]

    def tell(self, event: Event) -> None:
        """Hand an event to all hooks; returns at once. What finds a full queue is dropped and counted."""
        for hook in self._hooks:
            hook.put(event)

    def close(self, timeout_s: float = 2.0) -> None:
        """Send what is queued, without further attempts, for so long in all; the rest is lost."""
        self._stopping.set()
        deadline = time.monotonic() + timeout_s
        for hook in self._hooks:
            hook.close(max(0.0, deadline - time.monotonic()))


def _text(event: Event) -> bytes:
    return json.dumps(event.as_dict()).encode() + b"\n"
