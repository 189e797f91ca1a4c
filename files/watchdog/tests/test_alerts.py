"""Hooks: real commands, a real web server and a real mail relay; good, failing, hanging, and flooded."""

import json
import logging
import socket
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from typing import Any

import pytest
from airflow_watchdog import alerts
from airflow_watchdog.alerts import Alerter, AlertError, post_webhook, run_command, send_mail
from airflow_watchdog.config import Alerts, Email
from airflow_watchdog.events import Event
from servers import eventually, free_port

EVENT = Event("takeover", "airflow1", "airflow1 took over\nfrom airflow2", severity="critical", at=1.5)


# --- the command ---


def test_a_command_gets_the_event_as_json(tmp_path: Path) -> None:
    run_command((sys.executable, "-c", f"open({str(tmp_path / 'out')!r}, 'w').write(input())"), EVENT, 10)
    assert json.loads((tmp_path / "out").read_text()) == EVENT.as_dict()


@pytest.mark.parametrize(
    ("command", "why"),
    [
        (("/no/such/program",), "No such file"),
        (("/bin/false",), "exit code 1"),
        (("/etc/passwd",), "Permission denied"),
    ],
)
def test_a_command_that_fails_says_why(command: tuple[str, ...], why: str) -> None:
    with pytest.raises(AlertError, match=why):
        run_command(command, EVENT, 5)


def test_a_command_that_hangs_is_ended_with_all_its_children(tmp_path: Path) -> None:
    left = tmp_path / "left"
    before = time.monotonic()
    with pytest.raises(AlertError, match=r"not done after 0\.3 s"):
        run_command(("/bin/sh", "-c", f"(sleep 2; touch {left}) & sleep 60"), EVENT, 0.3)
    assert time.monotonic() - before < 2
    time.sleep(2.2)
    assert not left.exists()


# --- the webhook ---


class Web:
    """Takes what is posted to it, and answers as told."""

    def __init__(self) -> None:
        self.got: list[Any] = []
        self.status = 200
        outer = self

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                outer.got.append(json.loads(self.rfile.read(int(self.headers["Content-Length"]))))
                self.send_response(outer.status)
                self.send_header("Location", f"{outer.url}/elsewhere")
                self.end_headers()

            def log_message(self, *_args: Any) -> None:
                pass

        self.server = HTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.server.server_port}/hook/token-123"
        threading.Thread(target=lambda: self.server.serve_forever(0.02), daemon=True).start()


@pytest.fixture
def hook() -> Iterator[Web]:
    served = Web()
    yield served
    served.server.shutdown()
    served.server.server_close()


def test_a_webhook_gets_the_event(hook: Web) -> None:
    post_webhook(hook.url, EVENT, 5)
    assert hook.got == [EVENT.as_dict()]


def test_a_webhook_that_refuses_or_redirects_is_an_error_without_the_url(hook: Web) -> None:
    for hook.status in (500, 404, 302):
        with pytest.raises(AlertError, match=f"status {hook.status}") as caught:
            post_webhook(hook.url, EVENT, 5)
        assert "token" not in str(caught.value)
    # A redirect was not followed.
    assert len(hook.got) == 3


@pytest.mark.parametrize(
    "url", ["https://127.0.0.1:1/token-123", "ftp://host/token-123", "token-123", "http://[token-123", "http://", ""]
)
def test_a_webhook_that_is_not_there_is_an_error_without_the_url(url: str) -> None:
    with pytest.raises(AlertError) as caught:
        post_webhook(url, EVENT, 2)
    assert "token-123" not in str(caught.value)


def test_a_webhook_that_says_nothing_or_nonsense_is_an_error() -> None:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        url = f"http://127.0.0.1:{listener.getsockname()[1]}/token-123"
        with pytest.raises(AlertError, match="webhook: "):
            post_webhook(url, EVENT, 0.2)
        threading.Thread(target=lambda: listener.accept()[0].sendall(b"nonsense\r\n\r\n"), daemon=True).start()
        with pytest.raises(AlertError, match="webhook: "):
            post_webhook(url, EVENT, 0.5)


# --- e-mail ---


class Relay:
    """Speaks SMTP as far as a mail needs it."""

    def __init__(self, greeting: bytes = b"220 relay\r\n") -> None:
        self.mails: list[str] = []
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.port = self._listener.getsockname()[1]
        self._greeting = greeting
        threading.Thread(target=self._serve, daemon=True).start()

    def _serve(self) -> None:
        connection, _ = self._listener.accept()
        with connection, connection.makefile("rwb") as stream:
            stream.write(self._greeting)
            stream.flush()
            for line in stream:
                if line.upper().startswith(b"DATA"):
                    stream.write(b"354 go on\r\n")
                    stream.flush()
                    text = b""
                    while not (part := stream.readline()).startswith(b".\r\n"):
                        text += part
                    self.mails.append(text.decode())
                stream.write(b"250 well\r\n")
                stream.flush()


def test_a_mail_says_what_happened_and_has_one_subject() -> None:
    relay = Relay()
    send_mail(Email(smtp="127.0.0.1", port=relay.port, sender="a@x.org", to=("b@x.org", "c@x.org")), EVENT, 5)
    (mail,) = relay.mails
    assert "Subject: [airflow-watchdog] critical: airflow1 took over from airflow2" in mail
    assert "To: b@x.org, c@x.org" in mail
    assert "kind: takeover" in mail


def test_a_mail_that_cannot_be_sent_is_an_error() -> None:
    for port, starttls in ((free_port(), False), (Relay(b"554 no\r\n").port, False), (Relay().port, True)):
        settings = Email(smtp="127.0.0.1", port=port, sender="a@x.org", to=("b@x.org",), starttls=starttls)
        with pytest.raises(AlertError, match=r"e-mail by 127\.0\.0\.1"):
            send_mail(settings, EVENT, 1)


# --- queues ---


class Sink:
    """An alerter whose one hook is a function of the test's."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, send: Callable[[Event], None], **settings: Any) -> None:
        self.counts: Counter[str] = Counter()
        monkeypatch.setattr(alerts, "run_command", lambda _command, event, _timeout_s: send(event))
        values = {"command": ("x",), "retry_s": 0.01, **settings}
        self.alerter = Alerter(Alerts(**values), lambda _hook, outcome: self.counts.update([outcome]))

    def tell(self, *messages: str) -> None:
        for message in messages:
            self.alerter.tell(Event("kind", "node", message))


def test_a_hook_that_fails_is_tried_again_with_growing_pauses(monkeypatch: pytest.MonkeyPatch) -> None:
    times: list[float] = []

    def send(_event: Event) -> None:
        times.append(time.monotonic())
        if len(times) < 3:
            raise AlertError("not yet")

    sink = Sink(monkeypatch, send, retry_s=0.1)
    sink.tell("one")
    eventually(lambda: sink.counts["sent"])
    assert len(times) == 3
    assert times[1] - times[0] > 0.09
    assert times[2] - times[1] > 0.19
    sink.alerter.close()


def test_a_hook_that_never_works_is_given_up_for_that_event(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def send(event: Event) -> None:
        raise AlertError("no") if event.message == "known" else RuntimeError("https://secret")

    sink = Sink(monkeypatch, send, attempts=2)
    with caplog.at_level(logging.WARNING):
        sink.tell("known", "unknown")
        eventually(lambda: sink.counts["failed"] == 2)
    assert "secret" not in caplog.text
    assert "RuntimeError" in caplog.text
    sink.alerter.close()


def test_a_hook_that_hangs_blocks_nobody_and_its_overflow_is_counted(monkeypatch: pytest.MonkeyPatch) -> None:
    go = threading.Event()
    sink = Sink(monkeypatch, lambda _event: bool(go.wait(10)) and None, queue=2)
    before = time.monotonic()
    sink.tell("first")
    eventually(lambda: sink.alerter._hooks[0]._queue.empty())
    sink.tell(*"abcde")
    assert time.monotonic() - before < 1
    assert sink.counts == {"dropped": 3}
    sink.alerter.close(timeout_s=0.05)
    go.set()
    eventually(lambda: sink.counts["sent"] == 3)


def test_a_flood_is_summed_up(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(alerts, "MINUTE_S", 0.3)
    got: list[str] = []
    sink = Sink(monkeypatch, lambda event: got.append(event.message), per_minute=3)
    sink.tell(*"abcdefghij")
    eventually(lambda: len(got) == 4)
    assert got[:3] == ["a", "b", "c"]
    assert got[3] == "7 more events in the last minute (kind: 7); the last: j"
    assert sink.counts == {"sent": 4, "summed_up": 7}
    time.sleep(0.35)
    sink.tell("later")
    eventually(lambda: got[-1] == "later")
    sink.tell(*"klmno")
    sink.alerter.close()
    # What was held back is told at the end, too.
    assert got[-1].startswith("3 more events")


def test_all_hooks_of_a_configuration_are_told(tmp_path: Path, hook: Web) -> None:
    url = tmp_path / "url"
    url.write_text(hook.url + "\n")
    relay = Relay()
    script = f"open({str(tmp_path / 'out')!r}, 'w').write(input())"
    settings = Alerts(
        command=(sys.executable, "-c", script),
        webhook_url_file=url,
        email=Email(smtp="127.0.0.1", port=relay.port, sender="a@x.org", to=("b@x.org",)),
    )
    counts: Counter[tuple[str, str]] = Counter()
    alerter = Alerter(settings, lambda name, outcome: counts.update([(name, outcome)]))
    alerter.tell(EVENT)
    alerter.close(timeout_s=10)
    assert counts == {("command", "sent"): 1, ("webhook", "sent"): 1, ("email", "sent"): 1}
    assert len(hook.got) == len(relay.mails) == 1


def test_without_hooks_nothing_runs() -> None:
    before = threading.active_count()
    alerter = Alerter(Alerts())
    alerter.tell(EVENT)
    assert threading.active_count() == before
    alerter.close()
