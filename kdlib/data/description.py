"""dataset.json: as the Medical Segmentation Decathlon writes it, or as nnU-Net does."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

from kdlib.config import UNLABELLED, InputError
from kdlib.data.nifti import SUFFIXES, stem

HIGHEST = 65535  # label value: a table of all values is made
EXAMPLE = "./imagesTr/case_01.nii.gz"


@dataclass(frozen=True)
class Description:
    """What dataset.json says.

    Args:
        name: of the data set.
        modality: "CT" or "MR".
        labels: label names -> values in the label files, background left out.
        training: case -> (image, label) as listed; empty where dataset.json has no list, as nnU-Net's.
    """

    name: str
    modality: str
    labels: dict[str, int]
    training: dict[str, tuple[str, str]]


def read_description(root: Path) -> Description:
    """The description of the data set in `root`.

    nnU-Net's dataset.json (`channel_names`, labels by name, `file_ending`) has no name: the folder's is taken.

    Raises: InputError, in one line, for a file that is missing, malformed, or describes what cannot be read.
    """
    path = root / "dataset.json"
    try:
        if not path.is_file():  # a pipe would be waited for
            raise FileNotFoundError
        if path.stat().st_size > 2**26:
            raise ValueError("larger than 64 MiB")
        entries = json.loads(path.read_text(encoding="utf-8"), object_pairs_hook=_each_once)
        if nnunet := "channel_names" in entries:
            entries = _from_nnunet(entries, root, path)
        name, modalities, named = (entries[key] for key in ("name", "modality", "labels"))
        modality_names = [text.strip().upper() for text in modalities.values()]
        labels = {text.strip(): int(value) for value, text in named.items() if int(value) != 0}
        listed = [(PurePosixPath(pair["image"]), PurePosixPath(pair["label"])) for pair in entries["training"]]
        files = [file for pair in listed for file in pair]
        for text in (text for text in (name, *labels, *map(str, files)) if not is_plain(text)):
            raise ValueError(f"{ascii(text)[:100]} is no name: give up to 200 printable characters")
    except OSError:
        folder = "the folder of a Decathlon task or a raw folder of nnU-Net, which holds it"
        raise InputError(f"{path}: cannot be read; give {folder}") from None
    except KeyError as error:
        raise InputError(f"{path}: no entry {error}; it must give name, modality, labels and training") from None
    except InputError:
        raise
    except (ValueError, TypeError, AttributeError, RecursionError) as error:
        raise InputError(f"{path}: malformed ({str(error)[:200]}); restore the task's own file") from None
    if set(modality_names) == {"CT"}:
        modality = "CT"
    elif any(token in text for text in modality_names for token in ("MR", "T1", "T2", "FLAIR")):
        modality = "MR"
    else:
        raise InputError(f"{path}: modality {modalities} is neither CT nor MR; these two are supported")
    if not labels or len(set(labels.values())) != sum(int(value) != 0 for value in named):
        example = '{"background": 0, "spleen": 1}' if nnunet else '{"0": "background", "1": "spleen"}'
        raise InputError(f"{path}: labels {named} must name each value once, like {example}")
    digits = all(value.isascii() and value.isdigit() for value in named)  # int() also takes "-1", " 1" and "1_0"
    if not digits or len(labels) >= UNLABELLED or max(labels.values()) > HIGHEST:
        raise InputError(
            f"{path}: labels must be at most {UNLABELLED - 1}, with values from 1 to {HIGHEST}; renumber them"
        )
    for file in (file for file in files if file.is_absolute() or ".." in file.parts):
        raise InputError(f"{path}: {file} leaves the folder; list files like {EXAMPLE}")
    listed = [pair for pair in listed if not pair[0].name.startswith(".")]
    training = {stem(image.name) or image.name: (str(image), str(label)) for image, label in listed}
    if not all(image.name for image, _ in listed):
        raise InputError(f"{path}: an entry of training names a folder; list files like {EXAMPLE}")
    if len({*listed}) > len(training):
        raise InputError(f"{path}: an image stands twice in training, with two labels; list it once")
    return Description(name, modality, labels, training)


def _from_nnunet(entries: dict, root: Path, path: Path) -> dict:
    """nnU-Net's entries as the Decathlon writes them."""
    channels, ending = entries["channel_names"], entries.get("file_ending", ".nii.gz")
    if len(channels) != 1:
        raise InputError(f"{path}: {len(channels)} channels; one is supported: keep one in a copy of the folder")
    if ending.lower() not in SUFFIXES:
        raise InputError(f"{path}: file_ending {ending!r}; convert the files to {' or '.join(SUFFIXES)}")
    values = [str(value) for value in entries["labels"].values() if isinstance(value, int)]
    if len(values) < len(entries["labels"]) or "ignore" in entries["labels"]:
        raise InputError(f"{path}: regions and ignored labels of nnU-Net are not supported; give each label one value")
    if len(set(values)) < len(values):
        raise InputError(f"{path}: labels {entries['labels']} must name each value once")
    labels = dict(zip(values, entries["labels"], strict=True))
    return {"name": root.resolve().name, "training": []} | entries | {"modality": channels, "labels": labels}


def _each_once(pairs: list[tuple[str, object]]) -> dict:
    """A JSON object whose names are all different: of two entries with one name, json would drop the first."""
    found = dict(pairs)
    if len(found) < len(pairs):
        raise ValueError(f"an entry stands twice among {ascii([name for name, _ in pairs][:20])}")
    return found


def is_plain(name: str) -> bool:
    """Whether a name can stand in tables, messages and file names: no control, direction or undecodable character."""
    return name.isprintable() and 0 < len(name.encode()) <= 200
