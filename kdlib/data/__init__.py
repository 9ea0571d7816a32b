"""From a folder of scans to slices on the device: index, splits, slice bank, augmentation, phantom."""

# ruff: noqa: F401
from kdlib.data.augment import augment
from kdlib.data.decathlon import Case, Dataset, DataWarning, DefectError, index
from kdlib.data.fetch import download
from kdlib.data.phantom import make_phantom
from kdlib.data.roundtrip import best_dice, check_view, target_in_view
from kdlib.data.slices import SliceBank, restore
from kdlib.data.splits import Fold, split_file, splits
from kdlib.data.summary import case_table, largest_slices, split_table, warning_table
from kdlib.data.volumes import Bank, VolumeBank, build_bank
