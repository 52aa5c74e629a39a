"""What stands between a browser and the page: sizes, origins, uploads, sessions that listen, and what may be shown."""

import html
import json
import math
import re
import socket
import threading
import time
from collections.abc import Awaitable, Callable, Iterator, MutableMapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, urlsplit

from PIL import Image, UnidentifiedImageError
from starlette.requests import ClientDisconnect
from starlette.responses import PlainTextResponse

from masked_diffusion import logger
from masked_diffusion.utils.errors import UserError

MAX_UPLOAD = 64 * 2**20  # bytes of one request
MAX_STORED = 8 * MAX_UPLOAD  # bytes of uploads and pictures
STORED_SECONDS = 3600
PATIENCE = 5.0  # seconds that a job runs without anybody who listens
UNHEARD = "nobody waits for these images any more"
MAX_CANCEL = 4096  # bytes of a request to cancel
SAFE_METHODS = ("GET", "HEAD", "OPTIONS")

Scope = MutableMapping[str, Any]
App = Callable[[Scope, Callable, Callable], Awaitable[None]]

# ---------------------------------------------------------------- texts


def escape(text: str) -> str:
    """A text of one line that Markdown and HTML show as it is."""
    shown = html.escape(re.sub(r"\s", " ", text), quote=False)
    return re.sub(r"([!-%'-/:<-@\[-`{-~])", r"\\\1", shown)


# ---------------------------------------------------------------- pictures


def check_pictures(paths: list[str], most: int) -> None:
    """Refuse pictures by their headers, before any of them is decoded.

    :param most: pixels of all of them together.
    :raises UserError: for a file that is no picture, and for too many pixels.
    """
    pixels = 0
    for path in paths:
        try:
            with Image.open(path) as picture:
                pixels += math.prod(picture.size)
        except (OSError, UnidentifiedImageError, Image.DecompressionBombError) as error:
            raise UserError("the picture cannot be read, or is far too large: upload another one") from error
    if pixels > most:
        raise UserError(f"the pictures have {pixels} pixels: at most {most} are taken")


# ---------------------------------------------------------------- requests


class Guard:
    """ASGI middleware for HTTP requests. Subclasses say what they refuse.

    :param app: what serves the requests that are let through.
    """

    def __init__(self, app: App) -> None:
        self.app = app

    async def __call__(self, scope: Scope, receive: Callable, send: Callable) -> None:
        answer = self.refuse(scope) if scope["type"] == "http" else None
        await (answer or self.app)(scope, receive, send)

    def refuse(self, scope: Scope) -> PlainTextResponse | None:
        """The answer to a request that is refused, else None."""
        raise NotImplementedError


def headers_of(scope: Scope) -> dict[bytes, bytes]:
    return dict(scope.get("headers", ()))


class BodyLimit(Guard):
    """Refuses requests whose body is larger than `MAX_UPLOAD`, or of a size that they do not tell."""

    def refuse(self, scope: Scope) -> PlainTextResponse | None:
        headers = headers_of(scope)
        length = headers.get(b"content-length", b"0")
        if b"transfer-encoding" in headers or not length.isdigit() or int(length) > MAX_UPLOAD:
            return PlainTextResponse(f"at most {MAX_UPLOAD} bytes", status_code=413)
        return None


class OriginCheck(Guard):
    """Refuses what a page of another site asks a browser to send here.

    Browsers say where a request comes from; other programs send neither header. A proxy has to keep the header Host.
    """

    def refuse(self, scope: Scope) -> PlainTextResponse | None:
        if scope["method"] in SAFE_METHODS:
            return None
        headers = headers_of(scope)
        site, origin = headers.get(b"sec-fetch-site", b"none"), headers.get(b"origin")
        same = origin is None or urlsplit(origin).netloc.lower() == headers.get(b"host", b"").lower()
        if same and site in (b"none", b"same-origin"):
            return None
        return PlainTextResponse("this page takes no requests from other sites", status_code=403)


class UploadLimit:
    """Keeps the folder of uploads and pictures within `MAX_STORED` and `STORED_SECONDS`: the oldest files go first.

    It looks at the folder before every upload and every job, whose pictures come on top.

    :param folder: that gradio writes to.
    """

    def __init__(self, app: App, folder: str | Path) -> None:
        self.app, self.folder, self.coming = app, folder, 0

    async def __call__(self, scope: Scope, receive: Callable, send: Callable) -> None:
        if scope["type"] != "http" or not scope["path"].endswith(("/upload", "/queue/join")):
            await self.app(scope, receive, send)
            return
        length = int(headers_of(scope).get(b"content-length", b"0"))  # `BodyLimit` saw to it that it is a number
        if self.coming + length > MAX_STORED:
            await PlainTextResponse("too many uploads at once", status_code=503)(scope, receive, send)
            return
        self.coming += length
        try:
            trim(self.folder, MAX_STORED - self.coming, STORED_SECONDS)
            await self.app(scope, receive, send)
        except ClientDisconnect:
            pass  # a browser that breaks an upload off waits for no answer
        finally:
            self.coming -= length


def trim(folder: str | Path, most: int, seconds: float) -> None:
    """Remove the files of a folder that are older than `seconds`, and then the oldest, until `most` bytes are left."""
    found, now = [], time.time()
    for path in Path(folder).rglob("*"):
        try:
            if path.is_file():
                found.append((path.stat().st_mtime, path.stat().st_size, path))
        except FileNotFoundError:  # gradio clears the folder, too
            continue
    total = sum(size for _, size, _ in found)
    for modified, size, path in sorted(found):
        if total <= most and now - modified <= seconds:
            break
        path.unlink(missing_ok=True)
        total -= size


class CancelCheck:
    """Lets a session cancel its own jobs alone.

    :param session_of: a function from the id of a job to its session, or None if there is no such job.
    """

    def __init__(self, app: App, session_of: Callable[[str], str | None]) -> None:
        self.app, self.session_of = app, session_of

    async def __call__(self, scope: Scope, receive: Callable, send: Callable) -> None:
        if scope["type"] != "http" or not scope["path"].endswith("/cancel") or scope["method"] != "POST":
            await self.app(scope, receive, send)
            return
        body, more = b"", True
        while more and len(body) <= MAX_CANCEL:
            message = await receive()
            body, more = body + message.get("body", b""), message.get("more_body", False)
        try:
            asked = json.loads(body[: MAX_CANCEL + 1])
            session = self.session_of(asked["event_id"])
            own = session is not None and session == asked["session_hash"]
        except (KeyError, TypeError, ValueError):
            own = False
        if not own:
            answer = PlainTextResponse("this is no job of yours, or it has ended", status_code=403)
            await answer(scope, receive, send)
            return
        unread = [{"type": "http.request", "body": body, "more_body": False}]

        async def receive_again() -> Any:
            return unread.pop() if unread else await receive()

        await self.app(scope, receive_again, send)


# ---------------------------------------------------------------- jobs


class Listeners:
    """Which sessions listen to what their jobs say."""

    def __init__(self) -> None:
        self._lock, self._open = threading.Lock(), {}

    @contextmanager
    def listening(self, session: str) -> Iterator[None]:
        """A session listens during the block."""
        with self._lock:
            self._open[session] = self._open.get(session, 0) + 1
        try:
            yield
        finally:
            with self._lock:
                self._open[session] -= 1
                if not self._open[session]:
                    del self._open[session]

    def __contains__(self, session: str) -> bool:
        return session in self._open


class ListenerCount:
    """Tells `Listeners` of the requests that wait for messages of a session."""

    def __init__(self, app: App, listeners: Listeners) -> None:
        self.app, self.listeners = app, listeners

    async def __call__(self, scope: Scope, receive: Callable, send: Callable) -> None:
        sessions = ()
        if scope["type"] == "http" and scope["path"].endswith("/queue/data"):
            sessions = parse_qs(scope.get("query_string", b"").decode("latin-1")).get("session_hash", ())
        if not sessions:
            await self.app(scope, receive, send)
            return
        with self.listeners.listening(sessions[0]):
            await self.app(scope, receive, send)


class Jobs:
    """The jobs that run, each of which asks before every step whether it is to go on."""

    def __init__(self, listeners: Listeners) -> None:
        self.listeners, self.ending, self._idle = listeners, threading.Event(), threading.Condition()
        self._running = 0

    @contextmanager
    def running(self, session: str | None) -> Iterator[Callable[[], None]]:
        """A job runs during the block.

        :param session: who waits for it; None: nobody needs to.
        :return: what the job calls before every step; it raises `UserError` when the job is to end.
        :raises UserError: when the page ends already.
        """
        heard = time.monotonic()

        def check() -> None:
            nonlocal heard
            if session is None or session in self.listeners:
                heard = time.monotonic()
            if self.ending.is_set():
                raise UserError("the page is being closed")
            if time.monotonic() - heard > PATIENCE:
                logger.log(f"a job was ended: {UNHEARD}")
                raise UserError(UNHEARD)

        check()
        with self._idle:
            self._running += 1
        try:
            yield check
        finally:
            with self._idle:
                self._running -= 1
                self._idle.notify_all()

    def end(self, seconds: float) -> bool:
        """End all jobs; whether they have ended after so many seconds."""
        self.ending.set()
        with self._idle:
            return self._idle.wait_for(lambda: not self._running, seconds)


# ---------------------------------------------------------------- the address


def find_port(host: str, port: int) -> int:
    """The port to listen on: `port`, or a free one for 0.

    :raises UserError: when the address cannot be had.
    """
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        with socket.socket(family, kind, protocol) as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            probe.bind(address)
            return probe.getsockname()[1]
    except OSError as error:
        raise UserError(
            f"--port {port} of --host {host} cannot be had ({error.strerror or error}): choose another --port, or a "
            "--host of this machine"
        ) from error
