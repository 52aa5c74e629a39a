"""The page in a process of its own, as a browser's requests reach it."""

import contextlib
import http.client
import io
import json
import os
import subprocess
import sys
import time
from urllib.parse import quote
from urllib.request import Request, urlopen

import numpy as np
from helpers import HOLE, IMAGE, REPO, free_port, painting
from PIL import Image

DRAW = [2, 4, 7, "ddim", 30, 2.0, 1.0]  # class, images, seed, solver, steps, scale, power
MANY_STEPS = [2, 16, 7, "heun", 250, 2.0, 1.0]


INITIAL = ("--seed", 7, "--num_sampling_steps", 30, "--cfg_scale", 2, "--scale_pow", 1, "--precision", "fp32")


def start(checkpoint, port, output, temporary):
    """The page in a process of its own; hostile variables in the environment change nothing."""
    command = [
        sys.executable,
        REPO / "scripts" / "web" / "page.py",
        "--model_path",
        checkpoint,
        "--port",
        port,
        *INITIAL,
    ]
    hostile = {"GRADIO_SHARE": "True", "GRADIO_ALLOWED_PATHS": "/", "GRADIO_SERVER_NAME": "0.0.0.0"}
    return subprocess.Popen(
        [str(word) for word in command], stdout=output, stderr=subprocess.STDOUT,
        env={**os.environ, **hostile, "OMP_NUM_THREADS": "1", "TMPDIR": str(temporary)},
    )  # fmt: skip


class Server:
    """The page, as a browser's requests reach it."""

    def __init__(self, port, log):
        self.port, self.url, self.log = port, f"http://127.0.0.1:{port}", log
        self.config = json.loads(self.get("/config"))
        self.functions = {len(fn["inputs"]): fn["id"] for fn in self.config["dependencies"] if fn["backend_fn"]}

    def get(self, path):
        with urlopen(self.url + path, timeout=60) as response:
            return response.read()

    def post(self, path, body, kind="application/json"):
        data = body if isinstance(body, bytes) else json.dumps(body).encode()
        with urlopen(Request(self.url + path, data, {"Content-Type": kind}), timeout=60) as response:
            return json.loads(response.read())

    def status(self, path, method="GET", headers=None, body=None):
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=60)
        with contextlib.closing(connection):
            connection.request(method, path, body, headers or {})
            return connection.getresponse().status

    def join(self, num_inputs, data, session, event_data=None):
        """Press the button of so many inputs; the id of the job."""
        job = {"data": data, "fn_index": self.functions[num_inputs], "session_hash": session, "event_data": event_data}
        return self.post("/gradio_api/queue/join", job)["event_id"]

    def call(self, num_inputs, data, session, event_data=None):
        """Press the button of so many inputs; the messages until it is done, each with the time it came."""
        self.join(num_inputs, data, session, event_data)
        return self.listen(session)

    def cancel(self, num_inputs, event_id, session):
        """Stop a job; the status of the answer."""
        asked = {"session_hash": session, "fn_index": self.functions[num_inputs], "event_id": event_id}
        headers = {"Content-Type": "application/json"}
        return self.status("/gradio_api/cancel", "POST", headers, json.dumps(asked).encode())

    def stream(self, session):
        return urlopen(f"{self.url}/gradio_api/queue/data?session_hash={quote(session)}", timeout=60)

    def listen(self, session):
        messages = []
        with self.stream(session) as stream:
            for line in stream:
                if line.startswith(b"data: "):
                    messages.append(json.loads(line[6:]) | {"time": time.monotonic()})
                    if messages[-1]["msg"] == "process_completed":
                        return messages
        raise AssertionError(messages)

    def error(self, *call):
        """What a call is refused with."""
        last = self.call(*call)[-1]
        assert not last["success"], last
        return last["output"]["error"]

    def upload(self, pixels, name="image.png"):
        """Send a picture as the editor does; what refers to it then."""
        buffer = io.BytesIO()
        Image.fromarray(pixels).save(buffer, format="png")
        head = f'--edge\r\nContent-Disposition: form-data; name="files"; filename="{name}"\r\n\r\n'
        body = head.encode() + buffer.getvalue() + b"\r\n--edge--\r\n"
        (path,) = self.post("/gradio_api/upload", body, "multipart/form-data; boundary=edge")
        return file_of(path)

    def upload_painting(self):
        """Send an image and a hole; what the editor says of them."""
        parts = painting(IMAGE, HOLE.astype(np.uint8) * 255, scale=32)
        return {"background": self.upload(parts["background"]), "layers": [self.upload(parts["layers"][0])]}


def file_of(path):
    return {"path": str(path), "meta": {"_type": "gradio.FileData"}}


def pixels_of(data):
    return np.asarray(Image.open(io.BytesIO(data)).convert("RGB")).astype(int)


def wait(condition, seconds=60):
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, f"not true within {seconds} s"
        time.sleep(0.02)


@contextlib.contextmanager
def serving(checkpoint, folder, temporary):
    """A `Server` during the block; at the end a job runs, which changes nothing about how the page ends."""
    port, log = free_port(), folder / "log.txt"
    with log.open("w") as output:
        process = start(checkpoint, port, output, temporary)
        try:
            deadline = time.monotonic() + 240
            while f"open http://127.0.0.1:{port} " not in log.read_text():
                assert process.poll() is None and time.monotonic() < deadline, log.read_text()
                time.sleep(0.2)
            page = Server(port, log)
            yield page
            page.join(7, MANY_STEPS, "ends with the page")
            with page.stream("ends with the page") as stream:
                next(line for line in stream if b"Step " in line)  # it computes
                process.terminate()
                process.wait(60)
        finally:
            process.terminate()
            process.wait(60)
    assert "Traceback" not in log.read_text(), log.read_text()
    left = [path for path in temporary.rglob("*") if path.is_file()]
    assert process.returncode == 0 and left == [], "uploads and pictures go with the page"
