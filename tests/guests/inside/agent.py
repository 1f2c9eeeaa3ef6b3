"""The guest's agent: runs what the test asks for over the second serial port, one request and one answer a line.

{"run": "shell command"}                    -> {"code": 0, "output": "…"}
{"start": "name", "program": ["python3"…]}  -> {}          started in the background
{"report": "name"}                          -> {"report": …, "running": true}   its last line of output, JSON
"""

import json
import os
import subprocess
import termios
import tty

PORT = "/dev/ttyS1"
started = {}


def handle(request):
    if "run" in request:
        done = subprocess.run(
            ["/usr/bin/busybox", "sh", "-c", request["run"]],
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            errors="replace",
        )
        return {"code": done.returncode, "output": done.stdout}
    if "start" in request:
        output = open(f"/tmp/{request['start']}.out", "w")
        started[request["start"]] = subprocess.Popen(request["program"], stdout=output, stderr=subprocess.STDOUT)
        return {}
    name = request["report"]
    running = started[name].poll() is None
    with open(f"/tmp/{name}.out", "rb") as output:
        output.seek(max(output.seek(0, os.SEEK_END) - 4096, 0))
        told = output.read()
    # A line that is being written may be there in part.
    lines = told[: told.rfind(b"\n") + 1].decode(errors="replace").splitlines()
    try:
        report = json.loads(lines[-1]) if lines else None
    except ValueError:
        report = {"error": "\n".join(lines[-20:])} if not running else None
    return {"report": report, "running": running}


port = os.open(PORT, os.O_RDWR | os.O_NOCTTY)
tty.setraw(port, termios.TCSANOW)
requests = os.fdopen(os.dup(port), "rb", buffering=0)
waiting = b""


def say(answer):
    data = json.dumps(answer).encode() + b"\n"
    while data:
        data = data[os.write(port, data) :]


say({"ready": True})
while True:
    while b"\n" not in waiting:
        waiting += os.read(port, 4096)
    line, _, waiting = waiting.partition(b"\n")
    try:
        say(handle(json.loads(line)))
    except Exception as error:
        say({"error": f"{type(error).__name__}: {error}"})
