"""Download: resumed, checked, and never half unpacked; against a server on this machine."""

from __future__ import annotations

import gzip
import hashlib
import http.server
import io
import json
import tarfile
import threading
from contextlib import contextmanager
from functools import partial

import nibabel as nib
import numpy as np
import pytest

import kdlib.data.fetch as fetch
from kdlib.config import InputError
from kdlib.data import download, index

TASK = "Task99_Toy"


class Ranges(http.server.BaseHTTPRequestHandler):
    """Serves `server.blob` with Range; breaks off after `server.stop` bytes of the first answer."""

    def do_GET(self):
        server = self.server
        server.requests.append(self.headers.get("Range"))
        start = int(self.headers["Range"].removeprefix("bytes=").removesuffix("-")) if "Range" in self.headers else 0
        if start >= len(server.blob):
            self.send_error(416)
            return
        self.send_response(206 if start else 200)
        self.send_header("Content-Length", str(len(server.blob) - start))
        if start:
            self.send_header("Content-Range", f"bytes {start}-{len(server.blob) - 1}/{len(server.blob)}")
        self.end_headers()
        stop, server.stop = server.stop, None
        self.wfile.write(server.blob[start:stop])

    def log_message(self, *_):
        pass


class NoRanges(http.server.SimpleHTTPRequestHandler):
    """The standard library's own, which ignores Range."""

    def do_GET(self):
        self.server.requests.append(self.headers.get("Range"))
        super().do_GET()

    def log_message(self, *_):
        pass


@contextmanager
def serve(handler, blob=b"", stop=None):
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        server.blob, server.stop, server.requests = blob, stop, []
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        server.url = f"http://127.0.0.1:{server.server_port}/{TASK}.tar"
        try:
            yield server
        finally:
            server.shutdown()
            thread.join()


def toy_files():
    """A data set of two cases, with noise, so that its archive is larger than one chunk of a transfer."""
    files = {}
    for name in ("a", "b"):
        noise = np.random.default_rng(ord(name)).normal(size=(96, 80, 40)).astype(np.float32)
        image, label = nib.Nifti1Image(noise, np.eye(4)), nib.Nifti1Image((noise > 1).astype(np.uint8), np.eye(4))
        files[f"imagesTr/{name}.nii.gz"] = gzip.compress(image.to_bytes(), 1)
        files[f"labelsTr/{name}.nii.gz"] = gzip.compress(label.to_bytes(), 1)
    description = {"name": "Toy", "modality": {"0": "CT"}, "labels": {"1": "spleen"}, "training": []}
    return files | {"dataset.json": json.dumps(description).encode()}


def pack(files, extra=(), top=TASK):
    stream = io.BytesIO()
    with tarfile.open(fileobj=stream, mode="w") as tar:
        for name, content in files.items():
            member = tarfile.TarInfo(f"{top}/{name}" if top else name)
            member.size = len(content)
            tar.addfile(member, io.BytesIO(content))
        for member in extra:
            tar.addfile(member)
    return stream.getvalue()


FILES = toy_files()
BLOB = pack(FILES)


def md5(blob):
    return hashlib.md5(blob).hexdigest()


def listing(folder):
    return sorted(path.name for path in folder.iterdir() if not path.name.endswith(".lock"))


def test_downloads_unpacks_and_returns_at_once(tmp_path):
    with serve(Ranges, BLOB) as server:
        folder = download(TASK, tmp_path / "new" / "data", server.url, md5(BLOB))
        assert folder == tmp_path / "new" / "data" / TASK and listing(folder.parent) == [TASK, f"{TASK}.tar"]
        assert {name: (folder / name).read_bytes() for name in FILES} == FILES
        assert len(index(folder).cases) == 2
        assert download(TASK, folder.parent, server.url, md5(BLOB)) == folder
        assert server.requests == [None]
    assert download(TASK, folder.parent, server.url, md5(BLOB)) == folder  # no network


def test_default_url_and_md5_are_monais(tmp_path, monkeypatch):
    from monai.apps import DecathlonDataset

    asked = []

    def retrieve(url, known_hash, *_, **__):
        asked.extend((url, known_hash))
        raise OSError("no network")

    monkeypatch.setattr(fetch.pooch, "retrieve", retrieve)
    with pytest.raises(InputError, match="Task09_Spleen.tar: no network; what has arrived is kept"):
        download("Task09_Spleen", tmp_path)
    assert asked == [DecathlonDataset.resource["Task09_Spleen"], "md5:" + DecathlonDataset.md5["Task09_Spleen"]]


@pytest.mark.parametrize("given", [{}, {"url": "http://127.0.0.1:9/x.tar"}, {"md5": "0" * 32}])
def test_unknown_task_lists_the_known(tmp_path, given):
    with pytest.raises(InputError, match="task 'Task09_Splen': choose from Task01_BrainTumour, .*, Task10_Colon"):
        download("Task09_Splen", tmp_path / "data", **given)
    assert not (tmp_path / "data").exists()


# ---- transfer --------------------------------------------------------------------------------------------------------


def test_broken_transfer_is_resumed(tmp_path):
    with serve(Ranges, BLOB, stop=2_000_000) as server:
        with pytest.raises(InputError, match="run again to resume") as error:
            download(TASK, tmp_path, server.url, md5(BLOB))
        assert server.url in str(error.value) and "\n" not in str(error.value)
        part = tmp_path / f"{TASK}.tar.part"
        arrived = part.stat().st_size
        assert 0 < arrived <= 2_000_000 and part.read_bytes() == BLOB[:arrived]
        assert listing(tmp_path) == [part.name]

        download(TASK, tmp_path, server.url, md5(BLOB))
        assert server.requests == [None, f"bytes={arrived}-"]
    assert (tmp_path / f"{TASK}.tar").read_bytes() == BLOB and listing(tmp_path) == [TASK, f"{TASK}.tar"]
    assert (tmp_path / TASK / "imagesTr/a.nii.gz").read_bytes() == FILES["imagesTr/a.nii.gz"]


def test_only_the_rest_is_sent(tmp_path):
    """The part on disk is used: with a wrong first byte, the checksum fails."""
    (tmp_path / f"{TASK}.tar.part").write_bytes(b"X" + BLOB[1:1000])
    with serve(Ranges, BLOB) as server:
        with pytest.raises(InputError, match="does not match"):
            download(TASK, tmp_path, server.url, md5(BLOB))
        assert listing(tmp_path) == []  # and a bad part is not kept
        assert download(TASK, tmp_path, server.url, md5(BLOB)).is_dir()
        assert server.requests == ["bytes=1000-", None]


def test_server_without_range_starts_from_zero(tmp_path):
    (tmp_path / "www").mkdir()
    (tmp_path / "www" / f"{TASK}.tar").write_bytes(BLOB)
    data = tmp_path / "data"
    data.mkdir()
    (data / f"{TASK}.tar.part").write_bytes(BLOB[:1000])
    with serve(partial(NoRanges, directory=tmp_path / "www")) as server:
        download(TASK, data, server.url, md5(BLOB))
        assert server.requests == ["bytes=1000-"]
    assert (data / f"{TASK}.tar").read_bytes() == BLOB


def test_whole_part_is_used(tmp_path):
    """Stopped after the last byte: the server has nothing more to send (416)."""
    (tmp_path / f"{TASK}.tar.part").write_bytes(BLOB)
    with serve(Ranges, BLOB) as server:
        assert (download(TASK, tmp_path, server.url, md5(BLOB)) / "dataset.json").is_file()


def test_archive_at_hand_is_not_fetched_again(tmp_path):
    (tmp_path / f"{TASK}.tar").write_bytes(BLOB)
    with serve(Ranges, BLOB) as server:
        assert len(index(download(TASK, tmp_path, server.url, md5(BLOB))).cases) == 2
        assert server.requests == []


def test_wrong_checksum_names_url_and_both_hashes(tmp_path):
    with serve(Ranges, BLOB) as server:
        with pytest.raises(InputError) as error:
            download(TASK, tmp_path, server.url, "0" * 32)
        for text in (server.url, "0" * 32, md5(BLOB)):
            assert text in str(error.value)
        assert "\n" not in str(error.value) and listing(tmp_path) == []


def test_no_such_archive(tmp_path):
    with serve(partial(NoRanges, directory=tmp_path)) as server:
        with pytest.raises(InputError, match="404.*run again to resume") as error:
            download(TASK, tmp_path, server.url, md5(BLOB))
        assert "\n" not in str(error.value)
        url = server.url
    with pytest.raises(InputError, match="run again to resume") as error:  # nobody listens any more
        download(TASK, tmp_path, url, md5(BLOB))
    assert "\n" not in str(error.value)
    with pytest.raises(InputError, match="no-scheme/x.tar: Invalid URL"):
        download(TASK, tmp_path, "no-scheme/x.tar", md5(BLOB))
    (tmp_path / "file").write_text("x")
    with pytest.raises(InputError, match="exists"):
        download(TASK, tmp_path / "file", url, md5(BLOB))


@pytest.mark.parametrize(("progress", "shown"), [("plain", False), ("bars", True)])
def test_progress(tmp_path, monkeypatch, capsys, progress, shown):
    monkeypatch.setenv("KDLIB_PROGRESS", progress)
    with serve(Ranges, BLOB) as server:
        download(TASK, tmp_path, server.url, md5(BLOB))
    assert ("100%" in capsys.readouterr().err) == shown


# ---- archives --------------------------------------------------------------------------------------------------------


def member(name, kind=tarfile.REGTYPE, link=""):
    info = tarfile.TarInfo(name)
    info.type, info.linkname = kind, link
    return info


HOSTILE = {
    "absolute": member("/tmp/kdlib_hostile"),
    "parent": member("../hostile"),
    "hidden parent": member(f"{TASK}/imagesTr/../../../hostile"),
    "link out": member(f"{TASK}/link", tarfile.SYMTYPE, "../../hostile"),
    "absolute link": member(f"{TASK}/link", tarfile.SYMTYPE, "/etc"),
    "hard link out": member(f"{TASK}/link", tarfile.LNKTYPE, "../hostile"),
    "device": member(f"{TASK}/null", tarfile.CHRTYPE),
    "pipe": member(f"{TASK}/pipe", tarfile.FIFOTYPE),
}


@pytest.mark.parametrize("kind", HOSTILE)
def test_hostile_archive_unpacks_nothing(tmp_path, kind):
    blob = pack(FILES, [HOSTILE[kind]])
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / f"{TASK}.tar").write_bytes(blob)
    with pytest.raises(InputError, match="leaves the folder or is no plain file, so nothing was unpacked") as error:
        download(TASK, tmp_path / "data", "http://127.0.0.1:9/", md5(blob))
    assert HOSTILE[kind].name in str(error.value) and f"{TASK}.tar" in str(error.value)
    assert listing(tmp_path / "data") == [f"{TASK}.tar"] and listing(tmp_path) == ["data"]


def sparse(size):
    """A file of zeros that takes no room in its archive."""
    info = tarfile.TarInfo(f"{TASK}/sparse.nii.gz")
    info.pax_headers = {"GNU.sparse.major": "0", "GNU.sparse.minor": "1", "GNU.sparse.map": "0,0",
                        "GNU.sparse.name": info.name, "GNU.sparse.size": str(size)}  # fmt: skip
    return info


def named(name):
    """A name that only an extended header can hold."""
    info = tarfile.TarInfo("x")
    info.pax_headers = {"path": name}
    return info


def nested(name, inner):
    """A file, and another that needs a folder of the same name."""
    return {f"{name}": b"x", f"{name}/{inner}": b"y"}


@pytest.mark.parametrize(
    ("blob", "message"),
    [
        (pack(FILES, [sparse(2**40)]), "sparse.nii.gz' makes it unpack to more than a hundred times its size"),
        (gzip.compress(pack({"zeros": bytes(30_000_000)})), "zeros' makes it unpack to more than a hundred times"),
        (pack(FILES, [member(f"{TASK}/dataset.json")]), "dataset.json' stands in it twice, so nothing was unpacked"),
        (pack(FILES, [member(f"{TASK}/./imagesTr//a.nii.gz")]), "a.nii.gz' stands in it twice"),
        (pack(FILES | nested("readme", "more")), "run again to resume"),
        (pack(FILES, [member(f"{TASK}/{'x' * 300}")]), "run again to resume"),
        (pack(FILES, [named(f"{TASK}/a\0b")]), r"a\\x00b' leaves the folder or is no plain file"),
    ],
    ids=["sparse", "zeros", "twice", "twice by another path", "file and folder", "long name", "NUL"],
)  # fmt: skip
def test_an_archive_that_floods_or_overwrites_is_no_task(tmp_path, blob, message):
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / f"{TASK}.tar").write_bytes(blob)
    with pytest.raises(InputError, match=message) as error:
        download(TASK, tmp_path / "data", "http://127.0.0.1:9/", md5(blob))
    assert "\n" not in str(error.value) and listing(tmp_path) == ["data"]
    assert not (tmp_path / "data" / TASK).exists()


def test_modes_of_an_archive_are_not_taken_over(tmp_path):
    danger = member(f"{TASK}/imagesTr/run.sh")
    danger.mode, danger.uid, danger.gid = 0o6777, 0, 0
    blob = pack(FILES, [danger])
    (tmp_path / f"{TASK}.tar").write_bytes(blob)
    folder = download(TASK, tmp_path, "http://127.0.0.1:9/", md5(blob))
    assert (folder / "imagesTr/run.sh").stat().st_mode & 0o7022 == 0


@pytest.mark.parametrize(
    ("blob", "message"),
    [
        (b"no archive" * 100, "not a whole tar archive"),
        (BLOB[: len(BLOB) // 2], "not a whole tar archive"),
        (pack({"readme.txt": b"x"}), "holds 0 dataset.json"),
        (pack({"A/dataset.json": b"{}", "B/dataset.json": b"{}"}, top=""), "holds 2 dataset.json"),
    ],
)
def test_archive_that_is_no_task(tmp_path, blob, message):
    (tmp_path / f"{TASK}.tar").write_bytes(blob)
    with pytest.raises(InputError, match=message):
        download(TASK, tmp_path, "http://127.0.0.1:9/", md5(blob))
    assert not (tmp_path / TASK).exists()


@pytest.mark.parametrize("top", ["", "./Other", TASK])
def test_any_top_folder_will_do(tmp_path, top):
    blob = pack(FILES, top=top)
    (tmp_path / f"{TASK}.tar").write_bytes(blob)
    assert len(index(download(TASK, tmp_path, "http://127.0.0.1:9/", md5(blob))).cases) == 2
    assert listing(tmp_path) == [TASK, f"{TASK}.tar"]


def test_killed_extraction_leaves_no_half_data_set(tmp_path, monkeypatch):
    (tmp_path / f"{TASK}.tar").write_bytes(BLOB)
    asked = (TASK, tmp_path, "http://127.0.0.1:9/", md5(BLOB))
    extractall = tarfile.TarFile.extractall

    def killed(self, path, **options):
        extractall(self, path, members=self.getmembers()[:3], **options)
        raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(tarfile.TarFile, "extractall", killed)
        download(*asked)
    assert not (tmp_path / TASK).exists()
    (leftover,) = (path for path in tmp_path.iterdir() if path.is_dir())
    (leftover / TASK / "imagesTr" / "torn.nii.gz").write_bytes(b"x")
    assert len(index(download(*asked)).cases) == 2
    assert listing(tmp_path) == [TASK, f"{TASK}.tar"]


def test_foreign_folder_is_not_overwritten(tmp_path):
    (tmp_path / TASK).mkdir()
    (tmp_path / TASK / "mine.txt").write_text("x")
    with pytest.raises(InputError, match=f"{TASK}: exists but holds no dataset.json; move it away"):
        download(TASK, tmp_path, "http://127.0.0.1:9/", md5(BLOB))
    assert (tmp_path / TASK / "mine.txt").read_text() == "x"
