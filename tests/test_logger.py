"""ADM's logger: outputs by name, levels, scopes; and what the disk refuses is a sentence."""

import json
import os

import numpy as np
import pytest
import torch

from masked_diffusion import logger
from masked_diffusion.utils.errors import UserError
from masked_diffusion.utils.files import atomic_write, disk_errors


@pytest.fixture(autouse=True)
def own_logger(monkeypatch):
    monkeypatch.setattr(logger, "_current", logger.Logger())
    for name in (*logger.RANK_VARIABLES, "OPENAI_LOGDIR", "OPENAI_LOG_FORMAT"):
        monkeypatch.delenv(name, raising=False)


def kinds(folder):
    return sorted("events" if name.startswith("events") else name for name in os.listdir(folder))


@pytest.mark.parametrize(
    ("formats", "files"),
    [
        (None, ["events", "log.txt", "progress.csv", "progress.jsonl"]),
        (["stdout"], []),
        (["log", "csv"], ["log.txt", "progress.csv"]),
        (["json"], ["progress.jsonl"]),
        (["tensorboard"], ["events"]),
    ],
)
def test_formats_choose_the_outputs(formats, files, tmp_path, capsys):
    logger.configure(str(tmp_path), formats)
    logger.log("a line")
    logger.logkvs({"step": 3, "loss": 0.25})
    assert logger.getkvs() == {"step": 3, "loss": 0.25}
    assert logger.dumpkvs() == {"step": 3, "loss": 0.25} and not logger.getkvs()
    assert kinds(tmp_path) == files
    out = capsys.readouterr().out
    if formats is None:
        assert out == "a line\n"  # training says its rows in lines of its own
    else:
        assert out == ("a line\nstep 3, loss 0.25\n" if "stdout" in formats else "")
    logger.reset()
    assert logger.get_dir() is None


def test_the_environment_chooses_the_outputs_where_the_script_does_not(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("OPENAI_LOG_FORMAT", "log,csv")
    for folder, formats in (("env", None), ("script", ["json"])):
        logger.configure(str(tmp_path / folder), formats)
        logger.log("a line")
        logger.logkv("a", 1)
        logger.dumpkvs()
    assert kinds(tmp_path / "env") == ["log.txt", "progress.csv"] and kinds(tmp_path / "script") == ["progress.jsonl"]
    assert (tmp_path / "env" / "progress.csv").read_text().split() == ["a", "1"] and capsys.readouterr().out == ""
    monkeypatch.setenv("RANK", "1")
    logger.configure(str(tmp_path / "quiet"))
    logger.log("nothing")
    assert not (tmp_path / "quiet").exists()


def test_adms_positions_and_suffix(tmp_path):
    logger.configure(str(tmp_path), ["csv", "log", "json"], None, "-1")
    logger.log("one")
    logger.logkv("a", 1)
    logger.dumpkvs()
    assert kinds(tmp_path) == ["log-1.txt", "progress-1.csv", "progress-1.jsonl"]
    own = logger.Logger(str(tmp_path / "own"), ["csv"], None)
    own.logkv("a", 1)
    assert own.dumpkvs() == {"a": 1} and kinds(tmp_path / "own") == ["progress.csv"]
    with pytest.raises(UserError, match=r"\['csv', 'xml'\] are not all known: choose some of stdout, log"):
        logger.configure(str(tmp_path), ["csv", "xml"])
    with pytest.raises(UserError, match="no MPI communicator"):
        logger.configure(str(tmp_path), None, object())


def test_other_ranks_are_quiet(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("RANK", "1")
    assert logger.get_rank_without_mpi_import() == 1
    logger.configure(str(tmp_path / "a"))
    logger.log("nothing")
    logger.logkv("a", 1)
    logger.dumpkvs()
    assert not (tmp_path / "a").exists() and capsys.readouterr().out == ""
    logger.configure(str(tmp_path / "a"), quiet=False)
    logger.log("something")
    assert capsys.readouterr().out == "something\n" and logger.get_dir() == str(tmp_path / "a")


def test_levels(capsys):
    for write in (logger.debug, logger.info, logger.warn, logger.error):
        write("said by", write.__name__)
    logger.log("low", level=logger.DEBUG)
    logger.set_level(logger.ERROR)
    logger.warn("no")
    logger.error("yes")
    logger.set_level(logger.DISABLED)
    logger.error("no")
    assert capsys.readouterr().out == "said by info\nsaid by warn\nsaid by error\nyes\n"


def test_a_scope_has_a_logger_of_its_own(tmp_path):
    logger.configure(str(tmp_path / "outer"), ["csv"])
    outer = logger.get_current()
    with pytest.raises(KeyError), logger.scoped_configure(str(tmp_path / "inner"), ["log"]):
        assert logger.get_dir() == str(tmp_path / "inner")
        logger.log("inside")
        raise KeyError
    assert logger.get_current() is outer and "inside" in (tmp_path / "inner" / "log.txt").read_text()


def test_profiles_add_up(monkeypatch):
    clock = iter([10.0, 12.0, 20.0, 23.0])
    monkeypatch.setattr(logger.time, "time", lambda: next(clock))

    @logger.profile("work")
    def work(x):
        return x + 1

    with logger.profile_kv("work"):
        pass
    assert work(1) == 2 and logger.getkvs() == {"wait_work": 5.0}


def test_tensors_and_words_are_logged(tmp_path):
    logger.configure(str(tmp_path))
    logger.logkv("loss", torch.tensor(0.5))
    logger.record_tabular("count", np.int64(3))
    logger.logkv("note", "warm")
    assert logger.dump_tabular() == {"loss": 0.5, "count": 3, "note": "warm"}
    assert json.loads((tmp_path / "progress.jsonl").read_text()) == {"loss": 0.5, "count": 3, "note": "warm"}


def test_a_directory_that_cannot_be_made_is_a_sentence(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match=r"file/log could not be written \(Not a directory\): free some disk space, or"):
        logger.configure(str(tmp_path / "file" / "log"))


@pytest.mark.parametrize("address", ["gs://bucket/run", "s3://bucket/run", "https://a.blob.core.windows.net/b"])
def test_a_remote_directory_is_refused(address, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("OPENAI_LOGDIR", address)
    for given in (address, None):
        with pytest.raises(UserError, match=rf"written to {address}, a remote address: .*set --log_dir .*mount"):
            logger.configure(given)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("full", "named"),
    [("log.txt", "log.txt"), ("progress.tmp", "progress.csv"), ("progress.jsonl", "progress.jsonl")],
)
def test_a_full_disk_is_a_sentence(full, named, tmp_path):
    logger.configure(str(tmp_path), ["log", "csv", "json"])
    (tmp_path / full).symlink_to("/dev/full")  # the table is written beside itself
    logger.logkv("a", 1)
    with pytest.raises(
        UserError, match=rf"{named} could not be written \(No space left on device\): free some disk space"
    ):
        logger.dumpkvs()


def test_disk_errors_keep_other_errors():
    with pytest.raises(KeyError), disk_errors("a"):
        raise KeyError
    with pytest.raises(RuntimeError, match="ours"), disk_errors("a"):
        raise RuntimeError("ours")
    with pytest.raises(UserError, match=r"^inner could"), disk_errors("outer"), disk_errors("inner"):
        raise OSError("full")
    with pytest.raises(OSError, match=r"^a/b could not be written \(No such file or directory\)"), atomic_write("a/b"):
        pass
