"""Where the network's weights come from: flags, environment, cache, and a download that goes on where it stopped."""

import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import numpy as np
import pytest

from evaluations import files

CONTENT = np.random.default_rng(0).bytes(3 * files.BLOCK + 12345)


class Server(BaseHTTPRequestHandler):
    """Serves CONTENT, in ranges if asked; breaks the first connections off after `breaks` bytes."""

    breaks, ranges = [], []

    def do_GET(self):
        asked = self.headers.get("Range")
        self.ranges.append(asked)
        start = int(asked.removeprefix("bytes=").rstrip("-")) if asked else 0
        if start >= len(CONTENT):
            self.send_error(416)
            return
        self.send_response(206 if asked else 200)
        self.send_header("Content-Length", str(len(CONTENT) - start))
        self.end_headers()
        stop = start + self.breaks.pop() if self.breaks else len(CONTENT)
        self.wfile.write(CONTENT[start:stop])

    def log_message(self, *args):
        pass


@pytest.fixture
def url(monkeypatch, tmp_path):
    monkeypatch.setattr(Server, "breaks", [])
    monkeypatch.setattr(Server, "ranges", [])
    monkeypatch.delenv("INCEPTION_V3_PATH", raising=False)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    with ThreadingHTTPServer(("127.0.0.1", 0), Server) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}/graph.pb"
        server.shutdown()


def test_the_download_happens_once(url):
    path = files.find_inception(url=url)
    assert path == files.cache_folder() / "classify_image_graph_def.pb" and path.read_bytes() == CONTENT
    assert files.find_inception(url=url) == path and len(Server.ranges) == 1
    assert [file.name for file in path.parent.iterdir()] == [path.name]


def test_a_broken_download_goes_on_where_it_stopped(url):
    Server.breaks.extend([files.BLOCK, 2 * files.BLOCK])
    with pytest.raises(ValueError, match=r"cannot be downloaded .* put it at .*cache/masked_diffusion/classify_image"):
        files.find_inception(url=url)
    assert not (files.cache_folder() / files.INCEPTION_NAME).exists()
    with pytest.raises(ValueError, match="cannot be downloaded"):
        files.find_inception(url=url)
    assert files.find_inception(url=url).read_bytes() == CONTENT
    assert Server.ranges == [None, f"bytes={2 * files.BLOCK}-", f"bytes={3 * files.BLOCK}-"]


def test_a_part_of_something_else_is_thrown_away(url):
    part = files.cache_folder() / f"{files.INCEPTION_NAME}.part"
    part.parent.mkdir(parents=True)
    part.write_bytes(bytes(len(CONTENT) + 1))
    assert files.find_inception(url=url).read_bytes() == CONTENT


def test_offline_one_sentence_says_what_to_fetch(url):
    with pytest.raises(ValueError) as error:
        files.find_inception(url="http://127.0.0.1:9/graph.pb")
    assert "fetch http://127.0.0.1:9/graph.pb elsewhere and put it at" in str(error.value)
    assert len(str(error.value).splitlines()) == 1


def test_named_files_come_first(url, tmp_path, monkeypatch):
    flag, variable = tmp_path / "flag.pb", tmp_path / "variable.pb"
    flag.write_bytes(b"1")
    monkeypatch.setenv("INCEPTION_V3_PATH", str(variable))
    assert files.find_inception(flag) == flag
    with pytest.raises(ValueError, match=r"INCEPTION_V3_PATH names .*variable\.pb, which does not exist"):
        files.find_inception()
    variable.write_bytes(b"2")
    assert files.find_inception() == variable and Server.ranges == []


def test_a_file_appears_whole_or_not_at_all(tmp_path):
    with pytest.raises(KeyboardInterrupt), files.atomic_write(tmp_path / "a.json") as file:
        file.write(b"half")
        raise KeyboardInterrupt
    assert list(tmp_path.iterdir()) == []
    files.write_json(tmp_path / "a.json", {"a": 1})
    assert files.file_hash(tmp_path / "a.json") == files.hashlib.sha256(b'{\n  "a": 1\n}\n').hexdigest()
