"""The web page: crafted requests over HTTP, and a real browser that picks a class, draws, and paints."""

import contextlib
import http.client
import http.server
import itertools
import os
import re
import shutil
import socket
import sys
import threading
import time
from importlib.util import find_spec
from urllib.parse import quote
from urllib.request import urlopen

import numpy as np
import pytest
import web_guards
import web_requests
from helpers import HOLE, IMAGE, REPO, free_port, sample_config
from page_server import DRAW, MANY_STEPS, file_of, pixels_of, serving, wait
from PIL import Image

from masked_diffusion import script_util
from masked_diffusion.sampling.build import load_weights

pytestmark = pytest.mark.skipif(not find_spec("gradio"), reason="the page needs gradio: pip install -e '.[web]'")


@pytest.fixture(scope="module")
def server(named_checkpoint, tmp_path_factory):
    with serving(named_checkpoint, tmp_path_factory.mktemp("page"), tmp_path_factory.mktemp("temporary")) as server:
        yield server


@pytest.fixture(scope="module")
def drawn(named_checkpoint):
    """What the library draws for `DRAW`."""
    config = sample_config(named_checkpoint)
    request = web_requests.check_request(web_requests.Limits(), 3, *DRAW)
    *_, last = web_requests.draw(config, load_weights(config), request)
    return last.images


# ---------------------------------------------------------------- requests


def test_it_listens_here_alone_and_asks_nobody_outside(server):
    with socket.socket() as probe:
        assert probe.connect_ex(("127.0.0.2", server.port)) != 0
    assert server.status("/", headers={"Host": f"localhost:{server.port}"}) == 200
    assert server.status("/", headers={"Host": "elsewhere.example"}) == 400
    config = server.config
    assert not config["analytics_enabled"] and not config["run_history"] and config["footer_links"] == []
    page = server.get("/").decode() + server.get("/theme.css").decode()
    assert re.findall(r"""(?:src|href)=["']?https?://|@import|url\(["']?https?://""", page) == []


def test_images_come_as_they_form_and_can_be_downloaded(server, drawn):
    messages = server.call(7, DRAW, "draws")
    steps = [m for m in messages if m["msg"] == "process_generating"]
    assert len(steps) > 10
    view, line, download, images = messages[-1]["output"]["data"]
    assert line.startswith("4 x **2  two**, seed 7: 30 steps in ") and images is None, "images stay on the server"

    picture = pixels_of(server.get(f"/gradio_api/file={quote(view['path'])}"))
    assert np.abs(picture - web_requests.view_of(drawn)).max() <= 1
    file = download["value"]
    sheet = pixels_of(server.get(f"/gradio_api/file={quote(file['path'])}"))
    assert file["orig_name"] == "class2_seed7.png" and np.abs(sheet - web_requests.make_grid(drawn, 2)).max() <= 1


@pytest.mark.parametrize(
    "place, value, message",
    [
        (0, 3, "not in the list of choices"),
        (0, "../two", "not in the list of choices"),
        (1, 17, "greater than maximum value 16"),
        (1, 1.5, "images is 1.5: it must be a whole number from 1 to 16"),
        (2, -1, "less than minimum value 0"),
        (2, 2**40, "seed is 1099511627776: it must be a whole number from 0 to 2147483647"),
        (2, None, "seed is None"),
        (3, "euler_a", "not in the list of choices"),
        (4, 10**9, "greater than maximum value 250"),
        (4, "30", "The values are of another form than this page sends"),
        (5, 21, "greater than maximum value 20"),
        (6, {"a": 1}, "The values are of another form than this page sends"),
        (1, "<img src=x>", "another form"),
    ],
)
def test_what_the_widgets_do_not_offer_is_refused(server, place, value, message):
    assert message in server.error(7, [*DRAW[:place], value, *DRAW[place + 1 :]], f"wrong{place}{value}")


def test_one_job_runs_at_a_time(server):
    results = {}
    threads = [
        threading.Thread(target=lambda name=name: results.update({name: server.call(7, DRAW, name)}))
        for name in ("first", "second", "third")
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    times = {}
    for name, messages in results.items():
        steps = [m["time"] for m in messages if m["msg"] == "process_generating"]
        times[name] = steps[0], steps[-1]
        assert messages[-1]["success"]
    spans = sorted(times.values())
    assert all(before[1] < after[0] for before, after in itertools.pairwise(spans)), spans


# ---------------------------------------------------------------- files


@pytest.fixture
def painted(server):
    """What the editor sends of an image and a hole."""
    return server.upload_painting()


def fill_with(painted, **parts):
    return [painted | {"composite": None} | parts, 2, *DRAW]


def test_an_uploaded_image_is_filled(server, painted):
    last = server.call(9, fill_with(painted), "fills")[-1]
    assert last["success"] and last["output"]["data"][1].endswith(" s")
    view = pixels_of(server.get(f"/gradio_api/file={quote(last['output']['data'][0]['path'])}"))
    side = view.shape[0] // 2
    for row, column in np.ndindex(2, 2):
        tile = view[row * side : (row + 1) * side, column * side : (column + 1) * side][2:-2:32, 2:-2:32]
        assert (tile[~HOLE] == IMAGE[~HOLE]).all() and (tile[HOLE] != IMAGE[HOLE]).mean() > 0.9


@pytest.fixture(scope="module")
def listener():
    """A web server elsewhere; the paths it was asked for."""
    asked = []

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self):
            asked.append(self.path)
            self.send_error(404)

        def log_message(self, *args):
            pass

    with http.server.HTTPServer(("127.0.0.1", 0), Handler) as elsewhere:
        thread = threading.Thread(target=elsewhere.serve_forever)
        thread.start()
        yield f"http://127.0.0.1:{elsewhere.server_port}/image.png", asked
        elsewhere.shutdown()
        thread.join()


def test_no_path_and_no_address_of_a_request_is_opened(server, painted, listener, tmp_path):
    secret, (address, asked) = tmp_path / "secret.png", listener
    Image.fromarray(IMAGE).save(secret)
    uploaded = painted["background"]["path"]
    outside = [secret, address, f"{uploaded}/../../../{secret.relative_to('/')}", "/etc/hostname", "", "."]
    outside += [os.path.dirname(os.path.dirname(uploaded)), os.path.relpath(secret, REPO)]
    for i, path in enumerate(outside):
        for part in ("background", "composite"):
            error = server.error(9, fill_with(painted, **{part: file_of(path)}), f"path{i}{part}")
            assert error == "This page opens no paths and no addresses."
        assert "opens no paths" in server.error(9, fill_with(painted, layers=[file_of(path)]), f"layer{i}")
        assert "opens no paths" in server.error(7, [file_of(path), *DRAW[1:]], f"class{i}")
        assert "opens no paths" in server.error(7, [*DRAW[:6], {"deep": [{"in": file_of(path)}]}], f"deep{i}")
    assert "opens no paths" in server.error(7, [painted["background"], *DRAW[1:]], "upload elsewhere")
    assert "another form" in server.error(9, fill_with(painted, background={"path": uploaded}), "without meta")
    assert "another form" in server.error(9, fill_with(painted, background=str(secret)), "bare")
    assert asked == []


@pytest.mark.parametrize("path", ["/etc/hostname", "{secret}", "{checkpoint}/config.json", "../../etc/hostname"])
def test_no_file_is_served_but_the_pages_own(server, named_checkpoint, tmp_path, path):
    (tmp_path / "secret.png").write_text("secret")
    path = path.format(secret=tmp_path / "secret.png", checkpoint=named_checkpoint)
    assert server.status(f"/gradio_api/file={quote(path)}") in (403, 404)
    assert server.status(f"/file={quote(path)}") in (403, 404)


def test_large_and_strange_bodies_are_refused(server, painted):
    for headers in ({"Content-Length": str(2**30)}, {"Transfer-Encoding": "chunked"}, {"Content-Length": "-1"}):
        assert server.status("/gradio_api/upload", "POST", headers) in (400, 413)
    editor = next(c["id"] for c in server.config["components"] if c["type"] == "imageeditor")
    body = {"data": {}, "component_id": editor, "fn_name": "accept_blobs", "session_hash": "fills"}
    with pytest.raises(OSError, match="404"):
        server.post("/gradio_api/component_server", body)
    wide = server.upload(np.zeros((1, 40_000_000, 3), np.uint8), "wide.png")
    assert "far too large" in server.error(9, fill_with(painted, background=wide), "bomb")
    assert "several layers" in server.error(9, fill_with(painted, layers=painted["layers"] * 60), "layers")
    for i, value in enumerate((7, [], "x", {"layers": 3}, {"layers": {"a": 1}})):
        assert server.error(9, [value, 2, *DRAW], f"editor{i}")
    for i, data in enumerate(([], DRAW[:3], [*DRAW, 1])):
        assert "another form" in server.error(7, data, f"number{i}")
    small = server.upload(np.zeros((8, 8, 3), np.uint8), "small.png")
    assert "the paint is" in server.error(9, fill_with(painted, background=small), "small")
    assert "there is no image" in server.error(9, [None, 2, *DRAW], "empty")


def test_a_clicked_image_goes_to_the_editor(server, drawn):
    server.call(7, DRAW, "clicks")
    side = web_requests.view_of(drawn).shape[0] // 2
    last = server.call(1, [None], "clicks", {"index": [side + 5, side + 5], "value": None})[-1]
    taken = pixels_of(server.get(f"/gradio_api/file={quote(last['output']['data'][0]['background']['path'])}"))
    assert np.abs(taken - drawn[3].repeat(64, axis=0).repeat(64, axis=1)).max() <= 1
    for i, place in enumerate(([9999, 0], ["/etc", 0], [], "ab")):
        assert "the click is" in server.error(1, [None], "clicks", {"index": place, "value": i})
    for event in (None, {}, [1], "ab"):
        assert "the click is None" in server.error(1, [None], "clicks", event)
    assert "no images yet" in server.error(1, [None], "somebody else", {"index": [0, 0], "value": None})


@pytest.mark.parametrize(
    "headers, status",
    [
        ({"Origin": "http://elsewhere.example"}, 403),
        ({"Origin": "null"}, 403),
        ({"Origin": "http://127.0.0.1:1"}, 403),
        ({"Sec-Fetch-Site": "cross-site"}, 403),
        ({"Sec-Fetch-Site": "same-site", "Origin": "{url}"}, 403),
        ({"Sec-Fetch-Site": "same-origin", "Origin": "{url}"}, 200),
        ({}, 200),
    ],
    ids=str,
)
def test_other_sites_can_send_nothing(server, headers, status):
    headers = {name: value.format(url=server.url) for name, value in headers.items()}
    body = b'--edge\r\nContent-Disposition: form-data; name="files"; filename="a.png"\r\n\r\nx\r\n--edge--\r\n'
    kind = {"Content-Type": "multipart/form-data; boundary=edge"}
    assert server.status("/gradio_api/upload", "POST", headers | kind, body) == status
    assert server.status("/", headers=headers) == 200  # a link from elsewhere


def test_a_session_stops_its_own_jobs_alone(server):
    job = server.join(7, MANY_STEPS, "owner")
    with contextlib.closing(server.stream("owner")) as stream:
        next(line for line in stream if b"Step " in line)
        assert server.cancel(7, job, "somebody else") == 403
        assert server.cancel(7, "no such job", "owner") == 403
        for body in (b"", b"[]", b'{"event_id": []}', b"x" * 10**5):
            assert server.status("/gradio_api/cancel", "POST", {}, body) == 403
        next(line for line in stream if b"Step " in line)  # it goes on
        assert server.cancel(7, job, "owner") == 200
        assert b"process_completed" in b"".join(stream)
    assert server.call(7, DRAW, "after that")[-1]["success"]


def test_a_job_that_nobody_waits_for_is_ended(server, painted):
    before = server.log.read_text().count("nobody waits for these images any more")
    longest = [painted | {"composite": None}, 10, 2, 16, 7, "ddpm", 250, 2.0, 1.0]  # 2,500 evaluations of 16 images
    server.join(9, longest, "leaves")
    assert server.call(7, DRAW, "waits")[-1]["success"]
    assert server.log.read_text().count("nobody waits for these images any more") == before + 1


def test_a_password_is_asked_for(named_checkpoint, tmp_path, monkeypatch):
    import page

    # Without capsys: uvicorn closes all handlers of `logging`, and that of absl then closes its stream, unless that is
    # sys.stderr at that moment: it may be pytest's own file for standard error.
    lines = []
    monkeypatch.setattr(page.logger, "log", lines.append)
    monkeypatch.setattr(page.os, "environ", dict(os.environ) | {"GRADIO_TEMP_DIR": str(tmp_path)})
    config, jobs = sample_config(named_checkpoint), web_guards.Jobs(web_guards.Listeners())
    studio = page.Studio(config, web_requests.Limits(), load_weights(config), tmp_path, jobs)
    port = free_port()
    for password, warned in ((None, 1), ("open sesame", 0)):
        built = page.build_page(studio)
        lines.clear()
        page.launch(built, page.PageConfig(host="0.0.0.0", port=port, password=password), jobs.listeners)
        try:
            assert "".join(lines).count("everyone who reaches 0.0.0.0 may use this page") == warned
            connection = http.client.HTTPConnection("127.0.0.1", port, timeout=30)

            def ask(path, body=None, connection=connection, **headers):
                connection.request("GET" if body is None else "POST", path, body, headers)
                answer = connection.getresponse()
                answer.read()
                return answer

            assert ask("/config").status == (401 if password else 200)
            if password:
                form = {"Content-Type": "application/x-www-form-urlencoded"}
                assert ask("/login", "username=me&password=wrong", **form).status == 400
                entered = ask("/login", f"username=me&password={quote(password)}", **form)
                cookies = "; ".join(c.split(";")[0] for c in entered.headers.get_all("set-cookie"))
                assert entered.status == 200 and ask("/config", Cookie=cookies).status == 200
            connection.close()
        finally:
            built.close(verbose=False)


def test_a_port_that_is_taken_is_named(named_checkpoint, monkeypatch, capsys):
    import page

    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        words = ["page.py", "--model_path", str(named_checkpoint), "--port", str(port)]
        monkeypatch.setattr(sys, "argv", words)
        with pytest.raises(SystemExit):
            script_util.run(page.main)
    assert f"error: --port {port} of --host 127.0.0.1 cannot be had (Address already in use)" in capsys.readouterr().err


@pytest.mark.parametrize(
    "others, message",
    [
        (
            ["--host", "203.0.113.1"],
            "--port 7860 of --host 203.0.113.1 cannot be had (Cannot assign requested address)",
        ),
        (["--port", 70000], "--port is 70000: it must be at least 0 and at most 65535"),
        (["--password="], "--password is ''"),
        (["--max_images", 0], "--max_images is 0: it must be at least 1"),
        (["--num_sampling_steps", 300], "steps is 300: it must be a whole number from 1 to 250"),
        (["--num_sampling_steps", "10,15"], "steps is '10,15'"),
        (["--seed", -1], "--seed is -1: it must be at least 0"),
        (["--use_ddim", True, "--solver", "heun"], "--use_ddim True and --solver heun contradict"),
    ],
    ids=str,
)
def test_wrong_flags_end_in_one_sentence(named_checkpoint, others, message, monkeypatch, capsys):
    import page

    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", Image.MAX_IMAGE_PIXELS)
    monkeypatch.setattr(page.os, "environ", dict(os.environ))
    monkeypatch.setattr(sys, "argv", ["page.py", "--model_path", str(named_checkpoint), *map(str, others)])
    with pytest.raises(SystemExit) as stop:
        script_util.run(page.main)
    error = capsys.readouterr().err.strip().splitlines()[-1]
    assert stop.value.code == 2 and error.startswith("error: ") and message in error


def test_the_page_takes_the_precision_that_is_faster_here(named_checkpoint, monkeypatch):
    import page

    monkeypatch.setattr(sys, "argv", ["page.py", "--model_path", str(named_checkpoint)])
    assert page.parse_flags().sample.weights.precision == "auto"


# ---------------------------------------------------------------- a browser

BROWSER, DRIVER = shutil.which("chromium") or shutil.which("google-chrome"), shutil.which("chromedriver")
SWITCHES = (
    "--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-sync",
    "--disable-background-networking", "--disable-component-update", "--window-size=1300,1190",
)  # fmt: skip


@pytest.fixture
def browser(tmp_path):
    webdriver = pytest.importorskip("selenium.webdriver")
    if not (BROWSER and DRIVER):
        pytest.skip("there is no chromium with its chromedriver: apt-get install chromium chromium-driver")
    options = webdriver.ChromeOptions()
    options.binary_location = BROWSER
    options.add_experimental_option("prefs", {"download.default_directory": str(tmp_path / "downloads")})
    for switch in (*SWITCHES, f"--user-data-dir={tmp_path / 'profile'}"):
        options.add_argument(switch)
    driver = webdriver.Chrome(options=options, service=webdriver.ChromeService(DRIVER))
    yield driver
    driver.quit()


class Window:
    """The page in a browser."""

    def __init__(self, driver, url):
        self.driver = driver
        driver.get(url)
        wait(lambda: driver.find_elements("css selector", "#draw"))

    def find(self, selector):
        return self.driver.find_element("css selector", selector)

    def view(self):
        """The address of the picture that is shown, or None."""
        return self.driver.execute_script("return document.querySelector('#view img')?.src")

    def pick(self, text):
        from selenium.webdriver import Keys

        search = self.find("#class input")
        search.click()
        search.send_keys(Keys.CONTROL, "a")
        search.send_keys(text)
        # Only once the list is filtered does Enter choose from it.
        wait(lambda: len(self.driver.find_elements("css selector", "[role='option']")) == 1)
        search.send_keys(Keys.ENTER)
        wait(lambda: search.get_attribute("value") != text)
        return search.get_attribute("value")

    def set(self, slider, number):
        from selenium.webdriver import Keys

        box = self.find(f"{slider} input[type=number]")
        box.click()
        box.send_keys(Keys.CONTROL, "a")
        box.send_keys(str(number), Keys.TAB)

    def press(self, button, line):
        """Press a button, and look on until the text under the view says `line`; the views, first to last."""
        views = [self.view()]
        self.find(button).click()

        def done():
            views.append(self.view())
            return line in self.find("#status").text

        wait(done)
        time.sleep(0.3)  # the view is painted after the text
        return [*views, self.view()]

    def images(self):
        """The four 8x8 images that are shown."""
        with urlopen(self.view(), timeout=30) as response:
            sheet = pixels_of(response.read())
        side = sheet.shape[0] // 2
        return sheet.reshape(2, side, 2, side, 3).swapaxes(1, 2).reshape(4, side, side, 3)[:, 2:-2:32, 2:-2:32]

    def click_first_image(self):
        from selenium.webdriver import ActionChains

        ActionChains(self.driver).move_to_element_with_offset(self.find("#view img"), -100, -100).click().perform()
        wait(lambda: "Click one of the images" not in self.find("#painting").text)
        time.sleep(0.5)  # the canvas is painted after that

    def paint(self):
        from selenium.webdriver import ActionChains

        brush = ActionChains(self.driver).move_to_element(self.find("#painting canvas")).click_and_hold()
        brush.move_by_offset(40, 20).move_by_offset(-60, 20).release().perform()
        time.sleep(0.3)


def test_a_class_is_picked_drawn_saved_and_painted_over_in_a_browser(server, browser, drawn, tmp_path):
    page = Window(browser, server.url)
    assert page.view() is None and page.pick("tw") == "2  two"
    page.set("#steps", 250)  # long enough to be seen on its way
    views = page.press("#draw", "4 x 2 two, seed 7: 250 steps in")
    assert len(set(views)) > 3, "images are seen as they form"
    page.set("#steps", 30)
    page.press("#draw", "4 x 2 two, seed 7: 30 steps in")
    assert np.abs(page.images() - drawn).max() <= 1
    page.find("#download").click()
    saved = tmp_path / "downloads" / "class2_seed7.png"
    wait(saved.exists)
    assert np.abs(pixels_of(saved.read_bytes()) - web_requests.make_grid(drawn, 2)).max() <= 1

    page.click_first_image()
    page.paint()
    page.press("#fill", "4 x 2 two, seed 7: 90 steps in")
    browser.save_screenshot(str(tmp_path / "page.png"))
    filled, rim = page.images(), np.ones((8, 8), dtype=bool)
    rim[1:-1, 1:-1] = False
    assert np.abs(filled[:, rim] - drawn[0][rim]).max() <= 1
    assert (np.abs(filled - drawn[0]).max(axis=(0, 3)) > 20).sum() >= 4

    loaded = browser.execute_script("return performance.getEntriesByType('resource').map(entry => entry.name)")
    assert len(loaded) > 20 and {name for name in loaded if not name.startswith((server.url, "blob:"))} == set()

    page.set("#steps", 250)
    page.find("#fill").click()
    wait(lambda: "Step " in page.find("#status").text)
    page.find("#stop").click()
    wait(lambda: "Stopped." in page.find("#status").text)
    page.set("#steps", 30)
    page.press("#draw", "4 x 2 two, seed 7: 30 steps in")
    assert np.abs(page.images() - drawn).max() <= 1
