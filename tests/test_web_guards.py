"""The page's guards without a server: texts, pictures by their headers, the folder of uploads, jobs that end."""

import asyncio
import os
import re
import time
from types import SimpleNamespace

import numpy as np
import pytest
import web_guards
import web_requests
from helpers import sample_config
from PIL import Image

from masked_diffusion.sampling.build import load_weights
from masked_diffusion.utils.errors import UserError

NAMES = [
    '<img src="http://elsewhere.example/x.png">', "![x](http://elsewhere.example/x.png)", "a*b*_c_`d`", "# head",
    "[link](http://elsewhere.example)", "two\n\n# lines", "Arctic fox, white fox", "&lt;b&gt; & <b>", "é_ñ 学 1.5",
    "http://elsewhere.example", "$$x$$", "\\*",
]  # fmt: skip


@pytest.mark.parametrize("name", NAMES)
def test_a_name_is_shown_as_it_is(name):
    MarkdownIt = pytest.importorskip("markdown_it").MarkdownIt
    rendered = MarkdownIt("commonmark").render(f"4 x **{web_guards.escape(name)}**, seed")
    plain = rendered.removeprefix("<p>4 x <strong>").removesuffix("</strong>, seed</p>\n")
    assert "<" not in plain and ">" not in plain
    unescaped = plain.replace("&quot;", '"').replace("&lt;", "<").replace("&gt;", ">").replace("&amp;", "&")
    assert unescaped == re.sub(r"\s", " ", name)


def test_class_names_of_a_checkpoint_are_no_markdown(named_checkpoint, tmp_path):
    page = pytest.importorskip("page")
    config = sample_config(named_checkpoint)
    weights = load_weights(config)._replace(class_names=NAMES[:3])
    jobs = web_guards.Jobs(web_guards.Listeners())
    studio = page.Studio(config, web_requests.Limits(), weights, tmp_path, jobs)
    *_, (_, line, _, _) = studio.draw(SimpleNamespace(session_hash=None), 0, 1, 7, "ddim", 2, 2.0, 1.0)
    assert line.startswith(r"1 x **0  &lt;img src\=") and "<" not in line
    assert studio.class_choices()[0] == (f"0  {NAMES[0]}", 0)  # the list shows text, not Markdown


def test_pixels_are_counted_before_they_are_decoded(tmp_path, monkeypatch):
    paths = [str(tmp_path / f"{i}.png") for i in range(2)]
    for path in paths:
        Image.fromarray(np.zeros((30, 20, 3), np.uint8)).save(path)
    web_guards.check_pictures(paths, 1200)
    monkeypatch.setattr(Image.Image, "load", lambda self: pytest.fail("it was decoded"))
    with pytest.raises(UserError, match="the pictures have 1200 pixels: at most 1199 are taken"):
        web_guards.check_pictures(paths, 1199)
    (tmp_path / "0.png").write_text("no picture")
    for path in (paths[0], str(tmp_path), str(tmp_path / "missing.png")):
        with pytest.raises(UserError, match="the picture cannot be read"):
            web_guards.check_pictures([path], 1200)


# ---------------------------------------------------------------- the folder


def write(folder, name, size, age):
    path = folder / name
    path.parent.mkdir(exist_ok=True)
    path.write_bytes(bytes(size))
    os.utime(path, (time.time() - age,) * 2)
    return path


def test_the_oldest_files_go_first(tmp_path):
    sizes = {"a/0": (10, 50), "b/1": (20, 40), "c/2": (30, 30), "d/3": (40, 20)}
    for name, (size, age) in sizes.items():
        write(tmp_path, name, size, age)
    left = lambda: sorted(str(path.relative_to(tmp_path)) for path in tmp_path.rglob("*") if path.is_file())  # noqa: E731
    web_guards.trim(tmp_path, 100, 100)
    assert left() == ["a/0", "b/1", "c/2", "d/3"]
    web_guards.trim(tmp_path, 90, 100)
    assert left() == ["b/1", "c/2", "d/3"]
    web_guards.trim(tmp_path, 1000, 35)
    assert left() == ["c/2", "d/3"]
    web_guards.trim(tmp_path, 39, 100)
    assert left() == []
    web_guards.trim(tmp_path / "missing", 0, 0)


def ask(guard, path, method="POST", body=b"", length=None):
    """The status of the answer to a request."""
    sent, left = [], [{"type": "http.request", "body": body}]

    async def send(message):
        sent.append(message)

    async def receive():
        return left.pop()

    headers = [(b"content-length", str(len(body) if length is None else length).encode())]
    asyncio.run(guard({"type": "http", "path": path, "method": method, "headers": headers}, receive, send))
    return sent[0]["status"]


def test_uploads_make_room_for_themselves(tmp_path, monkeypatch):
    monkeypatch.setattr(web_guards, "MAX_STORED", 100)
    old, new = write(tmp_path, "a", 50, 20), write(tmp_path, "b", 40, 10)
    inner = []

    async def app(scope, receive, send):
        if not inner:
            inner.append(ask_within())
        await send({"type": "http.response.start", "status": 200, "headers": []})

    def ask_within():
        return guard.coming, old.exists(), new.exists()

    guard = web_guards.UploadLimit(app, tmp_path)
    assert ask(guard, "/gradio_api/upload", length=60) == 200
    assert inner == [(60, False, True)] and guard.coming == 0
    assert ask(guard, "/gradio_api/upload", length=101) == 503 and new.exists()
    assert ask(guard, "/config", length=101) == 200
    write(tmp_path, "c", 200, 0)
    assert ask(guard, "/gradio_api/queue/join", length=10) == 200 and not (tmp_path / "c").exists()


# ---------------------------------------------------------------- jobs


def test_a_job_goes_on_while_somebody_listens(monkeypatch, capsys):
    monkeypatch.setattr(web_guards, "PATIENCE", 0.05)
    listeners = web_guards.Listeners()
    jobs = web_guards.Jobs(listeners)
    with jobs.running("a") as check:
        with listeners.listening("a"), listeners.listening("a"):
            time.sleep(0.1)
            check()
            time.sleep(0.1)
            check()
        check()
        time.sleep(0.1)
        with listeners.listening("b"), pytest.raises(UserError, match="nobody waits"):
            check()
    assert "a job was ended: nobody waits" in capsys.readouterr().out
    with jobs.running(None) as check:
        time.sleep(0.1)
        check()


def test_jobs_end_with_the_page():
    jobs = web_guards.Jobs(web_guards.Listeners())
    with jobs.running(None) as check:
        assert not jobs.end(0.01)
        with pytest.raises(UserError, match="the page is being closed"):
            check()
    assert jobs.end(0)
    with pytest.raises(UserError, match="the page is being closed"), jobs.running(None):
        pytest.fail("a job began")


def test_a_check_comes_before_every_step():
    seen = []
    steps = ({"sample": i, "pred_xstart": i} for i in range(5))
    watched = web_requests.watch(steps, 5, lambda images: images, lambda: seen.append(len(seen)))
    assert [progress.done for progress in watched] == [1, 2, 3, 4, 5] and seen == list(range(6))
