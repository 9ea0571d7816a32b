"""Synthetic abdominal CT in Decathlon layout: a data set that any machine can make, hard where real CT is hard.

Organs are ellipsoids under a smooth random deformation, drawn with soft edges (partial volume) and correlated noise.
Spleen, liver, full stomach and full bowel share HU and texture, so only the place in the body tells them apart. It is
for trying things out and for tests: no number from it says anything about patients.
"""

from __future__ import annotations

import gzip
import json
import os
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import nibabel as nib
import numpy as np
from scipy.ndimage import gaussian_filter

from kdlib.config import InputError
from kdlib.files import write_folder

LABELS = {"spleen": 1, "liver": 2, "right kidney": 3, "left kidney": 4, "stomach": 5}
SHAPE = (80, 80, 24)
SPACING = (5.0, 5.0, 6.0)  # mm
COLON = (  # centre and half axes, mm: as large as a spleen, and as bright when full
    ((-95, -10, -55), (24, 42, 36)),
    ((97, -14, -58), (24, 44, 36)),
    ((100, 25, -14), (22, 34, 26)),
    ((-80, 45, -40), (34, 24, 26)),
    ((20, 62, -22), (52, 20, 22)),
)
VERSION = 1  # of the anatomy: raise it when the same seed gives other volumes


def make_phantom(folder: str | Path, patients: int = 20, seed: int = 0) -> Path:
    """Write a phantom data set, or return at once the one that is there.

    The same seed gives the same files to the bit, and its first patients do not depend on how many there are.
    Volumes are stored LAS, as most clinical CT. Every fifth patient has no contrast agent.

    Args:
        folder: made by this function; it must not exist, or hold a phantom of the same patients and seed.
        patients: number of volumes, one per patient.
        seed: of all random numbers, at least 0.

    Returns: The folder, for `index`.

    Raises: InputError: no patient, a negative seed, or a folder that holds something else.
    """
    if patients < 1 or seed < 0:
        raise InputError(f"phantom of {patients} patients with seed {seed}: at least 1 patient and a seed from 0 on")
    folder = Path(folder)
    names = [f"phantom_{number:03d}.nii.gz" for number in range(patients)]
    about = {
        "name": "Phantom",
        "description": f"Synthetic abdominal CT, version {VERSION}, {patients} patients, seed {seed}",
        "licence": "Apache-2.0", "tensorImageSize": "3D", "modality": {"0": "CT"},
        "labels": {"0": "background", **{str(value): name for name, value in LABELS.items()}},
        "numTraining": patients, "numTest": 0,
        "training": [{"image": f"./imagesTr/{name}", "label": f"./labelsTr/{name}"} for name in names], "test": [],
    }  # fmt: skip
    if _is_there(folder, about):
        return folder

    def fill(draft: Path) -> None:
        for part in ("imagesTr", "labelsTr"):
            (draft / part).mkdir()

        def save_patient(number: int) -> None:
            image, label = make_patient(np.random.default_rng([seed, number]), contrast=number % 5 != 4)
            _save(draft / "imagesTr" / names[number], image)
            _save(draft / "labelsTr" / names[number], label)

        with ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as pool:  # NumPy and SciPy let go of the interpreter
            list(pool.map(save_patient, range(patients)))
        (draft / "dataset.json").write_text(json.dumps(about, indent=1))

    try:
        write_folder(folder, fill)
    except InputError:
        if not _is_there(folder, about):  # a second job was faster
            raise
    return folder


def make_patient(rng: np.random.Generator, contrast: bool) -> tuple[np.ndarray, np.ndarray]:
    """One patient: image int16 in HU and label uint8, both of SHAPE, axes to the left, anterior and superior.

    Args:
        rng: all that is random about the patient.
        contrast: portal venous phase, else no contrast agent.
    """
    image = np.full(SHAPE, -1000.0, np.float32)
    label = np.zeros(SHAPE, np.uint8)
    for distance, hu, value in _anatomy(rng, _coordinates(rng), rng.uniform(0.75, 1.2) if contrast else 0.0):
        cover = np.clip(0.5 - distance / SPACING[0], 0, 1)  # the part of the voxel inside, if the surface is flat
        image += cover * (hu - image)
        label[cover > 0.5] = value
    image = gaussian_filter(image, (0.5, 0.5, 0.2))  # the scanner's point spread
    quantum, streaks = _field(rng, (0.7, 0.7, 0.4)), _field(rng, (12.0, 1.5, 0.5))
    image += rng.uniform(11, 20) * quantum + 6 * streaks
    return np.rint(image.clip(-1024, 3071)).astype(np.int16), label


def _field(rng: np.random.Generator, sigma: tuple[float, float, float]) -> np.ndarray:
    """Smooth random field of SHAPE with unit variance; sigma in voxels."""
    field = gaussian_filter(rng.standard_normal(SHAPE, np.float32), sigma, mode="wrap")
    return field / field.std()


def _coordinates(rng: np.random.Generator) -> np.ndarray:
    """[3,X,Y,Z] place of each voxel in the template's body, mm to the left, anterior and superior of its middle."""
    axes = [(np.arange(n) - (n - 1) / 2) * mm for n, mm in zip(SHAPE, SPACING, strict=True)]
    grid = np.stack(np.meshgrid(*axes, indexing="ij")).astype(np.float32)
    bend = np.stack([_field(rng, tuple(28 / mm for mm in SPACING)) for _ in range(3)])
    build, shift = rng.uniform((0.9, 0.88, 0.88), (1.1, 1.12, 1.12)), rng.uniform(-1, 1, 3) * (10, 10, 14)
    angle = np.deg2rad(rng.uniform(-6, 6))
    turn = np.array([[np.cos(angle), -np.sin(angle), 0], [np.sin(angle), np.cos(angle), 0], [0, 0, 1]])
    grid = np.einsum("ij,jxyz->ixyz", turn, grid - shift[:, None, None, None])
    return (grid / build[:, None, None, None] + 4 * bend).astype(np.float32)


def _ellipsoid(place: np.ndarray, centre, axes, turn: float = 0.0) -> np.ndarray:
    """Distance in mm (negative inside, first order) to an ellipsoid turned by `turn` degrees in the axial plane."""
    x, y, z = (place[i] - np.float32(centre[i]) for i in range(3))
    cos, sin = np.cos(np.deg2rad(turn)), np.sin(np.deg2rad(turn))
    along = np.stack([cos * x + sin * y, cos * y - sin * x, z]) / np.array(axes, np.float32)[:, None, None, None]
    reach = np.sqrt((along**2).sum(0)) + 1e-6
    slope = np.sqrt(((along / np.array(axes, np.float32)[:, None, None, None]) ** 2).sum(0)) + 1e-6
    return reach * (reach - 1) / slope


def _anatomy(rng: np.random.Generator, place: np.ndarray, contrast: float) -> Iterator[tuple[np.ndarray, float, int]]:
    """(distance in mm, HU, label value) of every structure, the later painted over the earlier.

    Args:
        place: from `_coordinates`.
        contrast: strength of the enhancement, 0 without contrast agent, 1 in a typical portal venous phase.
    """
    x, y, z = place

    def organ(centre, axes, turn=0.0, wander=5.0, rough=2.5):
        """An ellipsoid whose place, axes, direction and surface vary by patient."""
        centre = np.array(centre) + rng.normal(0, wander, 3)
        surface = rough * _field(rng, tuple(14 / mm for mm in SPACING))
        return _ellipsoid(place, centre, np.array(axes) * rng.uniform(0.88, 1.14, 3), turn + rng.normal(0, 8)) + surface

    def tissue(plain, enhanced, spread=4.0):
        return plain + contrast * enhanced + rng.normal(0, spread)

    fat = -100.0
    skin = _ellipsoid(place, (0, 0, 0), (148, 107, 900))
    muscle = skin + 3 + rng.uniform(7, 20) * (1 + 0.25 * y / 100)
    wall = rng.uniform(10, 14)
    cavity = muscle + wall
    ribs = np.maximum(np.abs(muscle + wall * 0.6) - 4, 11 * (0.6 - np.cos(2 * np.pi * (z + 0.7 * y) / 34)))
    dome = np.minimum(*[((x - side) ** 2 + (y - 5) ** 2) / 160 for side in (-58, 58)])
    parenchyma = tissue(54, 58)  # one HU for liver, spleen and what imitates them
    # two draws are spare: without them every later number, and so the volumes of version 1, would be others
    liver_hu, stomach_hu, spleen_hu, bowel_hu, *_ = (parenchyma + rng.normal(0, 5, 6)).tolist()

    yield skin, 30.0, 0
    yield skin + 3, fat, 0
    yield muscle, tissue(55, 8), 0
    yield np.maximum(ribs, -y - 75), 350.0, 0
    for side in (-1, 1):
        yield organ((side * 32, -78, 0), (27, 15, 900), side * 15, 2), tissue(55, 8), 0
    yield cavity, fat, 0
    yield np.maximum(cavity, rng.uniform(52, 66) - dome - z), -850.0, 0
    yield _ellipsoid(place, (0, -48, 0), (24, 20, 900)), 190.0, 0  # vertebrae
    yield _ellipsoid(place, (0, -49, 0), (20, 16, 900)), 140.0, 0
    yield _ellipsoid(place, (0, -86, 0), (7, 18, 900)), 250.0, 0
    yield _ellipsoid(place, (0, -73, 0), (10, 8, 900)), 25.0, 0
    for side in (-1, 1):
        yield organ((side * 31, -50, -75), (15, 17, 70), 0, 3), tissue(55, 8), 0
    inside = cavity + rng.uniform(0, 3)
    yield np.maximum(organ((20, 20, 88), (48, 42, 32)), inside), tissue(42, 100), 0  # heart
    small = tuple((rng.uniform((-75, 5, -75), (75, 60, -15)).tolist(), (24, 18, 18)) for _ in range(6))
    for centre, axes in COLON + small:  # bowel: a wall, contents, gas above them
        loop = np.maximum(organ(centre, axes, rng.uniform(-40, 40), 7), inside)
        yield loop, tissue(40, 35), 0
        yield loop + 4, rng.choice([bowel_hu, 15.0, parenchyma], p=[0.5, 0.2, 0.3]), 0
        yield np.maximum(loop + 4, rng.uniform(-10, 40) + centre[1] - y), -900.0, 0
    liver = np.minimum(organ((-56, 4, 18), (68, 70, 60)), organ((-2, 42, 28), (66, 28, 30), -10))
    yield np.maximum(liver, inside), liver_hu, LABELS["liver"]
    yield organ((9, -22, 0), (10, 10, 900), 0, 2, 1), tissue(42, 110), 0  # aorta
    yield organ((-18, -22, 0), (12, 10, 900), 0, 2, 1), tissue(42, 85), 0  # inferior vena cava
    yield organ((22, 2, -2), (50, 10, 13), 15), tissue(40, 55), 0  # pancreas
    # the spleen lies against the wall and its neighbours make room, in a third of the patients without fat between
    gap = rng.choice([0.0, 6.0, 9.0])
    spleen = np.maximum(organ((92, -26, 22), (34, 56, 50), 20, 5), inside)
    for side, name in ((-1, "right kidney"), (1, "left kidney")):
        kidney = organ((side * 55, -44, -22 + side * 6), (27, 24, 52), side * -25, 4)
        kidney = np.maximum(kidney, gap - spleen)
        yield kidney, tissue(33, 120, 10), LABELS[name]
        yield np.maximum(kidney + 14, -side * (side * 52 - x)), -20.0, LABELS[name]  # sinus
    stomach = np.maximum(np.maximum(organ((52, 36, 22), (48, 34, 46), -25, 6), inside), gap - spleen)
    yield stomach, tissue(42, 40), LABELS["stomach"]
    yield stomach + 6, stomach_hu, LABELS["stomach"]
    yield np.maximum(stomach + 6, rng.uniform(35, 65) - y), -900.0, LABELS["stomach"]  # gas rises
    yield spleen, spleen_hu, LABELS["spleen"]


def _is_there(folder: Path, about: dict) -> bool:
    """Whether `folder` is this very phantom; an error if it is anything else."""
    if not folder.exists():
        return False
    try:
        found = json.loads((folder / "dataset.json").read_text())
    except (OSError, ValueError):
        found = None
    if found != about or not all((folder / file).is_file() for pair in about["training"] for file in pair.values()):
        instead = "delete it, or give a folder that does not exist yet"
        raise InputError(f"{folder}: is not {about['description']!r}; {instead}")
    return True


def _save(path: Path, volume: np.ndarray) -> None:
    """Stored LAS, as the arrays are; no time in the gzip header, so that equal volumes are equal files."""
    affine = np.diag([-SPACING[0], SPACING[1], SPACING[2], 1.0])
    affine[:3, 3] = [(n - 1) / 2 * mm * sign for n, mm, sign in zip(SHAPE, SPACING, (1, -1, -1), strict=True)]
    image = nib.Nifti1Image(volume, affine)
    image.header.set_xyzt_units("mm")
    path.write_bytes(gzip.compress(image.to_bytes(), mtime=0))
