"""Print as JSON which servers HAProxy on this node would use, by backend: `- <admin socket>`."""

import csv
import json
import socket
import sys

with socket.socket(socket.AF_UNIX) as admin:
    admin.settimeout(5)
    admin.connect(sys.argv[1])
    admin.sendall(b"show stat\n")
    text = b"".join(iter(lambda: admin.recv(65536), b"")).decode()
usable: dict[str, list[str]] = {}
for row in csv.DictReader(text.lstrip("# ").splitlines()):
    if row["svname"] not in ("FRONTEND", "BACKEND"):
        usable.setdefault(row["pxname"], [])
        if row["status"].startswith(("UP", "no check")):
            usable[row["pxname"]].append(row["svname"])
print(json.dumps(usable))
