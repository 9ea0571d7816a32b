"""2,000 random defects at the reader: never an error from inside a library, never a defect accepted without a word.

Whatever the index accepts is judged again by nibabel, json and the standard library, and must become slices.
"""

from __future__ import annotations

import gzip
import json
import os
import resource
import shutil
import signal
import socket
import struct
from pathlib import Path

import hypothesis.strategies as st
import nibabel as nib
import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings

from kdlib.config import InputError, Preprocessing
from kdlib.data import build_bank, index, split_file, splits

NAMES = ("a0", "a1", "a2", "odd")
LABELS = {"0": "background", "1": "spleen", "3": "veins, portal"}
SHAPE = (5, 4, 3)
AFFINE = np.array([[-1.5, 0, 0, 3], [0, 1.5, 0, -2], [0, 0, 3, 7], [0, 0, 0, 1]])
VIEW = Preprocessing(size=16, spacing=4.0)
FIELDS = nib.nifti1.header_dtype


def cases(count: int):
    return settings(
        max_examples=count, deadline=None, derandomize=True, database=None, suppress_health_check=list(HealthCheck)
    )


@pytest.fixture(autouse=True)
def little_memory_and_time():
    """One GiB more than now, and two minutes: what sets aside what a header claims, or waits for a pipe, is stopped."""

    def waited(*_):
        raise TimeoutError("a case hangs")

    pages = int(Path("/proc/self/statm").read_text().split()[0]) if os.path.exists("/proc/self/statm") else None
    before = resource.getrlimit(resource.RLIMIT_AS)
    if pages:
        resource.setrlimit(resource.RLIMIT_AS, (pages * resource.getpagesize() + 2**30, before[1]))
    handler = signal.signal(signal.SIGALRM, waited)
    signal.alarm(120)
    yield
    signal.alarm(0)
    signal.signal(signal.SIGALRM, handler)
    resource.setrlimit(resource.RLIMIT_AS, before)


def header(shape=SHAPE, code=4, **fields) -> np.ndarray:
    """The 348 bytes of a whole NIfTI-1 header, with `fields` put in unchecked."""
    found = np.zeros((), FIELDS)
    found["sizeof_hdr"], found["magic"], found["vox_offset"], found["xyzt_units"] = 348, b"n+1", 352, 2
    found["dim"] = [len(shape), *shape, *[1] * (7 - len(shape))]
    found["datatype"], found["bitpix"] = code, 8 * nib.nifti1.data_type_codes.dtype[code].itemsize
    found["pixdim"], found["sform_code"] = [1, 1.5, 1.5, 3, 1, 1, 1, 1], 1
    found["srow_x"], found["srow_y"], found["srow_z"] = AFFINE[:3]
    for name, value in fields.items():
        found[name] = value
    return found


def packed(head: np.ndarray, voxels: np.ndarray, order="<", flag=bytes(4), extension=b"") -> bytes:
    """A `.nii.gz` file; voxels begin behind the extension, wherever the header says that they do."""
    content = head.astype(FIELDS.newbyteorder(order)).tobytes() + flag + extension
    return gzip.compress(content + voxels.astype(voxels.dtype.newbyteorder(order)).tobytes(order="F"), 1, mtime=0)


def ramp(dtype=np.int16) -> np.ndarray:
    return (np.arange(60) % 7).reshape(SHAPE).astype(dtype)


def annotation(dtype=np.uint8) -> np.ndarray:
    return (ramp() % 2 * 3).astype(dtype)


IMAGE = packed(header(), ramp())
LABEL = packed(header(code=2), annotation())


def describe(**changes) -> dict:
    training = [{"image": f"./imagesTr/{name}.nii.gz", "label": f"./labelsTr/{name}.nii.gz"} for name in NAMES]
    return {"name": "Toy", "modality": {"0": "CT"}, "labels": LABELS, "training": training} | changes


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    return tmp_path_factory.mktemp("fuzz") / "Task99_Toy"


def written(root: Path, names) -> Path:
    """Clean cases of these names."""
    shutil.rmtree(root, ignore_errors=True)
    for part, blob in (("imagesTr", IMAGE), ("labelsTr", LABEL)):
        (root / part).mkdir(parents=True)
        for name in names:
            (root / part / f"{name}.nii.gz").write_bytes(blob)
    listed = [pair for name, pair in zip(NAMES, describe()["training"], strict=True) if name in names]
    (root / "dataset.json").write_text(json.dumps(describe(training=listed)))
    return root


@pytest.fixture
def clean(root):
    """Four clean cases; `odd` is the one that the tests write over."""
    return written(root, NAMES)


@pytest.fixture
def beside_one(root):
    """`odd`, and one clean case beside it: all that many trials need."""
    return written(root, ("a0", "odd"))


def put(root: Path, image: bytes = IMAGE, label: bytes = LABEL) -> None:
    (root / "imagesTr/odd.nii.gz").write_bytes(image)
    (root / "labelsTr/odd.nii.gz").write_bytes(label)


def judge(root: Path) -> bool:
    """Whether the index accepts `odd`; what it accepts must be sound, what it refuses must be named."""
    dataset = index(root, on_defect="drop")
    names = [case.name for case in dataset.cases]
    others = [name for name in NAMES[:3] if (root / f"imagesTr/{name}.nii.gz").exists()]
    assert names[: len(others)] == others != [], "a clean case was refused"
    if "odd" not in names:
        rows = dataset.defects.query("case == 'odd'")
        assert len(rows) and rows["defect"].str.len().min() > 3 and rows["remedy"].str.len().min() > 3
        assert rows["defect"].str.len().max() < 300
        return False
    assert dataset.defects.empty
    case = dataset.case("odd")
    image, label = nib.load(case.image), nib.load(case.label)
    voxels, values = (np.asarray(file.dataobj, np.float64) for file in (image, label))
    assert voxels.ndim == 3 and voxels.shape == values.shape == case.shape and voxels.size
    assert np.isfinite(voxels.astype(np.float32)).all()
    assert set(np.unique(values)) <= {0, *dataset.labels.values()} and values.any()
    assert np.isfinite(image.affine).all() and np.linalg.cond(image.affine[:3, :3] / case.spacing) < 10
    corners = np.array(np.meshgrid(*[(0, size - 1) for size in case.shape], [1])).reshape(4, -1)
    assert np.abs((image.affine - label.affine) @ corners).max() <= 0.1 * min(case.spacing)
    assert np.allclose(case.spacing, np.linalg.norm(image.affine[:3, :3], axis=0))
    for path in (case.image, case.label):
        content = gzip.decompress(path.read_bytes())
        order = "<" if struct.unpack_from("<i", content)[0] == 348 else ">"
        dims = struct.unpack_from(f"{order}8h", content, 40)
        bits, sizes = struct.unpack_from(f"{order}h", content, 72)[0], struct.unpack_from(f"{order}8f", content, 76)
        offset, slope = struct.unpack_from(f"{order}2f", content, 108)
        codes = struct.unpack_from(f"{order}2h", content, 252)
        assert struct.unpack_from(f"{order}i", content)[0] == 348 and content[344:348] == b"n+1\0"
        assert dims[0] == 3 and dims[1:4] == case.shape
        assert offset >= 352 and len(content) == offset + np.prod(dims[1:4], dtype=int) * bits // 8
        assert min(sizes[1:4]) > 0 and np.isfinite(sizes[1:4]).all() and not np.isinf(slope)
        assert max(codes) in range(1, 6) and min(codes) >= 0 and content[123] % 8 in (0, 2)
    bank = build_bank(dataset, dataset.classes("all"), VIEW)
    assert bank.cases == (*others, "odd") and bank.labels.max() <= 2
    return True


# ---------------------------------------------------------------------------------------------------------- headers

numbers = st.sampled_from([0.0, -0.0, 1.0, -1.0, 1.5, 3.0, 1e-45, 1e-20, 1e20, 3e38, np.nan, np.inf, -np.inf, 1000.0])
shorts = st.one_of(st.sampled_from([-32768, -1, 0, 1, 2, 3, 4, 5, 32767]), st.integers(-32768, 32767))
rows = st.one_of(
    st.lists(numbers, min_size=4, max_size=4),
    st.sampled_from(
        [[-1.5, 0, 0, 3], [0, 1.5, 0, -2], [0, 0, 3, 7], [0, 0, 3.0001, 7], [0, 0, 3, 8], [1.5, 1.5, 3, 0]]
    ),
)
whole = st.tuples(*[st.sampled_from([size, 1, 0, -size]) for size in SHAPE]).map(lambda shape: [3, *shape, 1, 1, 1, 1])
DEFECTS = {
    "sizeof_hdr": st.sampled_from([0, 348, 540, -1, 1543569408]),
    "magic": st.one_of(st.sampled_from([b"n+1", b"ni1", b"n+2", b""]), st.binary(min_size=4, max_size=4)),
    "dim": st.one_of(whole, st.lists(shorts, min_size=8, max_size=8), st.sampled_from([
        [4, *SHAPE, 1, 1, 1, 1], [4, *SHAPE, 2, 1, 1, 1], [3, 32767, 32767, 32767, 1, 1, 1, 1], [0] * 8,
        [7, *SHAPE, 1, 1, 1, 1], [8, *SHAPE, 1, 1, 1, 1], [-1, *SHAPE, 1, 1, 1, 1], [3, -1, 1, 1, 1, 1, 1, 1],
        [3, 27307, 1, 6, 1, 1, 1, 1], [3, 4, 5, 3, 1, 1, 1, 1], [2, 15, 4, 1, 1, 1, 1, 1], [3, 5, 4, 2, 1, 1, 1, 1],
    ])),
    "datatype": st.one_of(shorts, st.sampled_from(sorted(nib.nifti1.data_type_codes.value_set("code")))),
    "bitpix": st.sampled_from([0, 1, 8, 16, 32, 64, -16]),
    "vox_offset": st.sampled_from([0, 16, 348, 351, 352, 352.5, 353, 368, 400, -352, 1e9, 1e30, np.nan, np.inf]),
    "pixdim": st.lists(numbers, min_size=8, max_size=8),
    "scl_slope": numbers, "scl_inter": numbers,
    "qform_code": st.sampled_from([0, 1, 2, 4, 5, 6, -1, 300]),
    "sform_code": st.sampled_from([0, 1, 2, 4, 5, 6, -1, 300]),
    "srow_x": rows, "srow_y": rows, "srow_z": rows, "quatern_b": numbers, "quatern_c": numbers, "quatern_d": numbers,
    "qoffset_x": numbers, "xyzt_units": st.integers(0, 255), "glmin": st.sampled_from([0, -1, 60, 2**31 - 1]),
    "cal_max": numbers, "intent_code": shorts, "slice_duration": numbers, "aux_file": st.binary(max_size=24),
}  # fmt: skip
damage = st.lists(st.sampled_from(sorted(DEFECTS)), min_size=1, max_size=3, unique=True).flatmap(
    lambda names: st.fixed_dictionaries({name: DEFECTS[name] for name in names})
)


@cases(700)
@given(
    damage, st.sampled_from(["image", "label", "both"]), st.sampled_from("<>"), st.booleans(),
    st.one_of(st.just(b""), st.binary(min_size=16, max_size=16), st.just(struct.pack("<2i", 16, 2) + b"not DICOM")),
)  # fmt: skip
def test_a_header_is_sound_or_refused(beside_one, fields, where, order, ascending, extension):
    flag, begin = (b"\1\0\0\0", {"vox_offset": 352 + len(extension)}) if extension else (bytes(4), {})
    voxels = np.sort(ramp(), axis=None).reshape(SHAPE) if ascending else ramp()
    image = packed(header(**begin | fields), voxels, order, flag, extension)
    label = packed(header(code=2, **begin | fields), annotation(), order, flag, extension)
    put(beside_one, IMAGE if where == "label" else image, LABEL if where == "image" else label)
    judge(beside_one)


def test_what_is_sound_is_accepted_in_both_byte_orders_with_and_without_an_extension(clean):
    for order in "<>":
        for code, dtype in ((2, "u1"), (4, "i2"), (8, "i4"), (16, "f4"), (64, "f8"), (256, "i1"), (512, "u2")):
            put(
                clean,
                packed(header(code=code), ramp(dtype), order),
                packed(header(code=code), annotation(dtype), order),
            )
            assert judge(clean), (order, dtype)
        extended = header(vox_offset=368)
        put(clean, packed(extended, ramp(), order, b"\1\0\0\0", struct.pack(f"{order}2i", 16, 6) + b"note    "))
        assert judge(clean)


# ----------------------------------------------------------------------------------------------------------- voxels

TYPES = {2: "u1", 4: "i2", 8: "i4", 16: "f4", 64: "f8", 256: "i1", 512: "u2", 768: "u4", 1024: "i8", 1280: "u8"}
ODD_TYPES = {32: "c8", 1792: "c16", 128: "(3,)u1", 2304: "(4,)u1", 1536: "g"}
extremes = st.sampled_from(
    [0, 1, 3, 2, -1, 0.5, 1e300, -1e300, 3e38, 4e38, 2**31, 2**53, 2**63, np.nan, np.inf, 1e-310]
)


@cases(350)
@given(
    st.sampled_from(sorted(TYPES | ODD_TYPES)), st.lists(st.integers(0, 5), min_size=1, max_size=5), st.booleans(),
    st.lists(extremes, max_size=4), st.sampled_from("<>"), st.sampled_from([0, 1, 2, 0.5, -1, 1e38, 1 / 3, np.nan]),
    st.sampled_from([0, 1, -3, 1e38]), st.booleans(),
)  # fmt: skip
def test_voxels_are_numbers_and_labels_are_declared_or_refused(
    beside_one, code, shape, plain, values, order, slope, inter, label
):
    shape = SHAPE if plain else tuple(shape)
    voxels = (np.arange(np.prod(shape, dtype=int)) % 2).reshape(shape)
    with np.errstate(all="ignore"):
        if code in ODD_TYPES:  # colours are bytes in a row
            voxels = np.zeros(shape, ODD_TYPES[code])
        else:
            voxels = voxels.astype(TYPES[code])
            values = values[: voxels.size]
            voxels.flat[: len(values)] = np.array(values, np.float64).astype(TYPES[code])
    head = header(shape, code, scl_slope=slope, scl_inter=inter)
    put(beside_one, **{"label" if label else "image": packed(head, voxels, order)})
    assert not (judge(beside_one) and code in ODD_TYPES)


# ------------------------------------------------------------------------------------------------------------ bytes


def spoil(blob: bytes, how: str, at: int, garbage: bytes) -> bytes:
    at %= len(blob)
    return {
        "cut": blob[:at], "flip": blob[:at] + bytes([blob[at] ^ (1 + len(garbage))]) + blob[at + 1 :],
        "insert": blob[:at] + garbage + blob[at:], "append": blob + garbage, "garbage": garbage,
        "gzip of garbage": gzip.compress(garbage), "gzip twice": gzip.compress(blob), "no gzip": gzip.decompress(blob),
        "content cut": gzip.compress(gzip.decompress(blob)[: at * 2]), "two members": blob + gzip.compress(garbage),
        "content longer": gzip.compress(gzip.decompress(blob) + garbage),
        "split": b"".join(map(gzip.compress, (gzip.decompress(blob)[:at], gzip.decompress(blob)[at:]))),
        "header of a bomb": gzip.compress(gzip.decompress(blob) + bytes(3_000_000)),
    }[how]  # fmt: skip


HOW = ("cut", "flip", "insert", "append", "garbage", "gzip of garbage", "gzip twice", "no gzip", "content cut",
       "two members", "content longer", "split", "header of a bomb")  # fmt: skip


@cases(350)
@given(st.sampled_from(HOW), st.integers(0, 10**6), st.binary(max_size=60), st.booleans())
def test_bytes_are_the_same_volume_or_refused(beside_one, how, at, garbage, label):
    blob = LABEL if label else IMAGE
    damaged = spoil(blob, how, at, garbage)
    put(beside_one, **{"label" if label else "image": damaged})
    if judge(beside_one):  # the very content, however it was packed: the checksum leaves no other
        assert gzip.decompress(damaged) == gzip.decompress(blob)
    else:
        assert how != "split" and damaged != blob


@pytest.mark.parametrize("claim", [(32767, 32767, 32767), (32767, 32767, 1), (2000, 1000, 1000)])
def test_a_header_that_claims_more_than_its_file_holds_sets_nothing_aside(clean, claim):
    put(clean, packed(header(claim, 64), ramp(np.float64)))
    assert not judge(clean)
    defect = index(clean, on_defect="drop").defects["defect"].item()
    assert f"claims {352 + 8 * int(np.prod(claim, dtype=np.int64)):,} bytes" in defect


def test_zeros_behind_the_volume_are_not_unpacked(clean):
    import tracemalloc

    put(clean, gzip.compress(gzip.decompress(IMAGE) + bytes(200_000_000), 1))
    tracemalloc.start()
    assert not judge(clean)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 20_000_000


# ------------------------------------------------------------------------------------------------------ descriptions

words = st.one_of(
    st.text(max_size=8), st.sampled_from(["..", "../../x", "/etc/x", "a\0b", "a\nb", "\u202egnp", "x" * 300, "", " "])
)
anything = st.recursive(
    st.one_of(st.none(), st.booleans(), st.integers(), st.just(10**400), st.floats(), words),
    lambda inner: st.one_of(st.lists(inner, max_size=3), st.dictionaries(words, inner, max_size=3)),
    max_leaves=6,
)
paths = st.one_of(
    words, st.sampled_from([
        "imagesTr/odd.nii.gz", "./imagesTr/odd.nii.gz", "labelsTr/a0.nii.gz", "imagesTr/../../x.nii.gz", "imagesTr",
        ".", "/imagesTr/a0.nii.gz", "imagesTr/\0.nii.gz", "imagesTr/new.nii.gz", "imagesTr/a0.mha", "imagesTr/.nii.gz",
        "imagesTr/" + "y" * 250 + ".nii.gz", "imagesTr\\a0.nii.gz", "~/x.nii.gz", "imagesTr/$(id).nii.gz",
    ]), st.none(), st.integers(),
)  # fmt: skip
values = st.one_of(st.sampled_from(["0", "1", "3", "-1", "1.0", "1_0", " 3", "٣", "1e3", "", "99999999999"]), words)
changes = st.one_of(
    st.fixed_dictionaries({}, optional=dict.fromkeys(("name", "modality", "labels", "training"), anything)),
    st.fixed_dictionaries({"labels": st.dictionaries(values, st.one_of(words, anything), max_size=4).map(
        lambda labels: LABELS | labels)}),
    st.fixed_dictionaries({"training": st.lists(st.fixed_dictionaries({"image": paths, "label": paths}), max_size=3)}),
    st.fixed_dictionaries({"name": words, "modality": st.dictionaries(words, words, max_size=2)}),
)  # fmt: skip
sound = st.sampled_from(["Milz", "spleen", "left kidney", "Ä/b", "../up", "-rf", "$(id)", "a" * 90, "con", "x,y"])
nearly = st.fixed_dictionaries({
    "name": sound, "modality": st.sampled_from([{"0": "CT"}, {"0": "mri"}, {"0": "T1", "1": "T2"}, {"0": " ct "}]),
    "labels": st.lists(sound, min_size=1, max_size=4, unique=True).flatmap(
        lambda names: st.permutations([1, 3, 65535, 65536, 200]).map(
            lambda order: {"0": "background", "1": "organ", "3": "other"}
            | dict(zip(map(str, order), names, strict=False)))),
    "training": st.lists(st.sampled_from(describe()["training"]), max_size=4),
    "numTraining": anything,
})  # fmt: skip
texts = st.one_of(
    nearly.map(lambda changed: json.dumps(describe(**changed), ensure_ascii=False).encode()),
    nearly.map(lambda changed: json.dumps(describe(**changed)).encode()),
    changes.map(lambda changed: json.dumps(describe(**changed)).encode()),
    st.lists(st.sampled_from(["name", "modality", "labels", "training"]), min_size=1).map(
        lambda gone: json.dumps({key: value for key, value in describe().items() if key not in gone}).encode()
    ),
    anything.map(lambda value: json.dumps(value).encode()),
    st.binary(max_size=40),
    st.integers(0, 400).map(lambda at: json.dumps(describe()).encode()[:at]),
    st.sampled_from(["utf-16", "utf-8-sig", "latin-1"]).map(
        lambda code: json.dumps(describe(name="Milz Ä"), ensure_ascii=False).encode(code)
    ),
    st.sampled_from([b"[" * 100_000, b'{"a":' * 100_000, b'{"name": ' + b"9" * 10_000 + b"}", b"{}", b"NaN", b'""']),
    st.sampled_from(["name", "modality", "labels", "training"]).map(
        lambda key: json.dumps(describe()).replace("{", f'{{"{key}": 1, ', 1).encode()
    ),
    st.just(json.dumps(describe()).replace('"3": ', '"1": ').encode()),
)


def once(pairs):
    assert len(dict(pairs)) == len(pairs)
    return dict(pairs)


@cases(350)
@given(text=texts)
def test_a_description_is_sound_or_refused(clean, tmp_path_factory, text):
    put(clean)
    (clean / "dataset.json").write_bytes(text)
    try:
        dataset = index(clean, on_defect="drop")
    except InputError as error:
        assert str(clean) in str(error) and len(str(error)) < 20_000 and str(error).splitlines()[0].isprintable()
        return
    found = json.loads(text.decode("utf-8"), object_pairs_hook=once)
    assert dataset.name == found["name"] and dataset.name.isprintable() and dataset.modality in ("CT", "MR")
    assert sorted(dataset.labels.values()) == sorted(int(value) for value in found["labels"] if int(value))
    assert all(name.isprintable() and 0 < value < 2**16 for name, value in dataset.labels.items())
    for pair in found["training"]:
        for path in pair.values():
            assert os.path.realpath(clean / path).startswith(os.path.realpath(clean)) and "\0" not in path
    for case in dataset.cases:
        assert case.image.parent == clean / "imagesTr" and case.label.parent == clean / "labelsTr"
        assert set(np.unique(nib.load(case.label).dataobj)) <= {0, *dataset.labels.values()}
    if len(dataset.cases) == 4:
        results = tmp_path_factory.getbasetemp() / "splits"
        path = split_file(results, dataset, dataset.labels, 2)
        assert path.parent == results and path.resolve().parent == results.resolve()
        shutil.rmtree(results, ignore_errors=True)
        parts = splits(dataset, dataset.labels, 2, path)
        assert sorted(parts[0].test + parts[1].test) == list(NAMES) and parts == splits(
            dataset, dataset.labels, 2, path
        )
        build_bank(dataset, dataset.labels, VIEW)


# ----------------------------------------------------------------------------------------------------- split records


@st.composite
def edits(draw):
    """One entry, anywhere in a record, taken out or replaced."""

    def edit(node):
        if isinstance(node, (dict, list)) and node and draw(st.integers(0, 5)):
            key = draw(st.sampled_from(sorted(node) if isinstance(node, dict) else range(len(node))))
            children = dict(node) if isinstance(node, dict) else list(node)
            if draw(st.integers(0, 5)):
                children[key] = edit(children[key])
            else:
                del children[key]
            return children
        return draw(st.one_of(anything, st.sampled_from([*NAMES, [*NAMES], 0, 2, [], {}])))

    def shuffle(record):
        """Folds taken out, doubled and mixed; now and then a case is lost or stands twice."""
        folds = [draw(st.sampled_from(record["parts"])) for _ in range(draw(st.integers(0, 3)))]
        for number in range(len(folds)):
            if draw(st.booleans()):
                order = draw(st.permutations([*NAMES, *draw(st.lists(st.sampled_from(NAMES), max_size=1))]))
                order = order[draw(st.integers(0, 1)) * draw(st.integers(0, 1)) :]
                folds[number] = {"train": order[:1], "val": order[1:2], "test": order[2:]}
        return record | {"parts": folds}

    return shuffle if draw(st.booleans()) else edit


@cases(250)
@given(edits())
def test_a_split_record_is_a_partition_or_refused(clean, tmp_path_factory, edit):
    dataset = index(clean)
    path = tmp_path_factory.getbasetemp() / "record.json"
    path.unlink(missing_ok=True)
    before = splits(dataset, dataset.labels, 2, path)
    record = json.loads(path.read_text())
    path.write_text(json.dumps(edit(record)))
    try:
        after = splits(dataset, dataset.labels, 2, path)
    except InputError as error:
        assert str(path) in str(error)
        return
    assert len(after) == len(before) and all(fold.groups == before[0].groups for fold in after)
    assert sorted(after[0].test + after[1].test) == list(NAMES)
    for fold in after:
        assert sorted(fold.train + fold.val + fold.test) == list(NAMES) and fold.train and fold.val and fold.test
        assert fold.subset(1.0)


# ------------------------------------------------------------------------------------------------------- other files


LINKS = {"broken link": "nowhere", "link to zeros": "/dev/zero", "link to memory": "/proc/self/mem"}


def make(kind: str, path: Path) -> None:
    if kind == "folder":
        path.mkdir()
    elif kind == "pipe":
        os.mkfifo(path)
    elif kind == "socket":
        socket.socket(socket.AF_UNIX).bind(os.path.relpath(path))
    elif kind == "unreadable":
        path.write_bytes(IMAGE)
        path.chmod(0)
    elif kind == "huge hole":
        with path.open("wb") as file:
            file.truncate(2**42)
    elif kind == "huge hole with a header":
        with path.open("wb") as file:
            file.write(IMAGE)
            file.truncate(2**42)
    else:
        path.symlink_to(LINKS.get(kind, path))


KINDS = ("folder", "pipe", "socket", "unreadable", "link to itself", "broken link", "link to zeros", "link to memory",
         "huge hole", "huge hole with a header")  # fmt: skip


@pytest.mark.parametrize("place", ["imagesTr/odd.nii.gz", "labelsTr/odd.nii.gz", "dataset.json", "labelsTr"])
@pytest.mark.parametrize("kind", KINDS)
def test_what_is_no_plain_file_is_refused_at_once(clean, monkeypatch, kind, place):
    if kind == "unreadable" and os.geteuid() == 0:
        pytest.skip("root reads everything")
    if kind == "link to memory" and not os.path.exists("/proc/self/mem"):
        pytest.skip("needs Linux")
    monkeypatch.chdir(clean)  # the address of a socket is short
    path = clean / place
    shutil.rmtree(path) if path.is_dir() else path.unlink()
    try:
        make(kind, path)
    except OSError as error:
        pytest.skip(f"this file system has none: {error}")
    if place.endswith(".gz"):
        assert not judge(clean)
        return
    said = f"{place}: (cannot be read|no such folder|malformed)"
    if (kind, place) == ("folder", "labelsTr"):
        said = "image without a label"
    with pytest.raises(InputError, match=said):
        index(clean)


@pytest.mark.parametrize(
    "name", ["a\nb", "\u202egz", "\x1b[2J", b"\xff\xfe".decode("utf-8", "surrogateescape"), "n" * 210]
)
def test_a_file_name_that_cannot_be_printed_is_refused(clean, name):
    for part in ("imagesTr", "labelsTr"):
        shutil.copy(clean / part / "a0.nii.gz", clean / part / f"{name}.nii.gz")
    defects = index(clean, on_defect="drop").defects
    assert len(defects) == 1 and "rename" in defects["remedy"].item() and defects["case"].item().isascii()
    with pytest.raises(InputError, match="1 defects in 1 of 5 cases") as error:
        index(clean)
    assert all(line.isprintable() for line in str(error.value).splitlines())


@pytest.mark.parametrize("name", ["-rf", "$(touch x)", "`x`", "a;touch x", "a b", "é", "con", "'", '"', "{x}", "=1+1"])
def test_a_file_name_that_a_shell_would_take_amiss_is_a_name(clean, name):
    for part in ("imagesTr", "labelsTr"):
        shutil.move(clean / part / "odd.nii.gz", clean / part / f"{name}.nii.gz")
    (clean / "dataset.json").write_text(json.dumps(describe(training=[])))
    dataset = index(clean)
    assert dataset.case(name).group == name and name in build_bank(dataset, dataset.labels, VIEW).geometry
