"""A study of volumes in small: the same runs, tables, masks and exports as of slices; bad input is one line."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
import torch
from small_training import CPU, boxes, same
from torch import nn

import kdlib
from kdlib import PROTOCOLS, Run, comparison_losses, distiller, override_profile, study, thesis_recipe
from kdlib.apps.cli import main
from kdlib.apps.explore import load_run
from kdlib.config import InputError, Optimisation, Preprocessing, Recipe, Term
from kdlib.data import VolumeBank, best_dice, build_bank, index
from kdlib.evaluation.cases import evaluate
from kdlib.evaluation.masks import on_file_grid, predict_cases
from kdlib.experiments import Setting, baseline, distillation
from kdlib.experiments.dry_run import past_runs, steps_of
from kdlib.experiments.illustrate import pairs
from kdlib.experiments.store import key_facts, run_folder
from kdlib.experiments.tables import teacher_agreement
from kdlib.inference.student import Student, load_student, write_student
from kdlib.models import Output, build_model, cost
from kdlib.training import loop
from kdlib.training.checkpoint import Checkpoint, save_tensors
from kdlib.training.loop import train_cohort
from kdlib.training.state import RunState, new_model
from kdlib.training.validation import volume_logits

CHANGES = {"dimensions": 3, "size": 16, "spacing": 16.0}
TINY = dict(width=0.125, folds=3, teacher_epochs=2, student_epochs=2, teacher_steps=2, student_steps=2)


def profile_of(**changes):
    how = Optimisation(lr=2e-3, batch=2, target_share=0.5)
    return dataclasses.replace(override_profile("quick", CHANGES | TINY | changes), teacher=how, student=how)


def run_of(model="S1", **fields) -> Run:
    return Run(**(dict(data="phantom", target="spleen", model=model, profile=profile_of()) | fields))


def blobs(cases=2, seed=0) -> VolumeBank:
    """Noise with a bright box in each volume of 16 x 20 x 16 voxels."""
    generator = torch.Generator().manual_seed(seed)
    images, labels = [], []
    for _ in range(cases):
        label = torch.zeros(16, 20, 16, dtype=torch.uint8)
        first = torch.randint(3, 7, (3,), generator=generator).tolist()
        label[tuple(slice(f, f + 7) for f in first)] = 1
        noise = torch.randint(0, 80, label.shape, generator=generator, dtype=torch.uint8)
        images.append(noise + 120 * label)
        labels.append(label)
    names = tuple(f"c{i}" for i in range(cases))
    parts = tuple(images), tuple(labels), names, ("blob",), 16, dict.fromkeys(names), tuple(range(cases))
    return VolumeBank(*parts)


def train(runs, teachers=None, checkpoints=(), steps=2, epochs=2):
    return train_cohort(runs, blobs(3), blobs(1, seed=9), steps, CPU, teachers, epochs, checkpoints)


@pytest.fixture(scope="module")
def done(phantom_of, tmp_path_factory) -> tuple[Path, list[Run], kdlib.Results]:
    """The main comparison on a phantom: T1, S1 and E1 on all and half of the labels, and both distilled from T1."""
    results, data = tmp_path_factory.mktemp("volumes"), str(phantom_of(9))
    runs = [run_of("T1", data=data)]
    runs += [run_of(model, data=data, fraction=f) for f in (1.0, 0.5) for model in ("S1", "E1")]
    runs += [run_of(m, data=data, fraction=0.5, teacher="T1", recipe=thesis_recipe(m)) for m in ("S1", "E1")]
    return results, runs, study(runs, results, "cpu")


@pytest.mark.slow
def test_the_main_comparison_leaves_the_same_folders_and_tables(done):
    results, runs, found = done
    test = {case for case in found.cases["case"]}
    assert len(test) == 3 and len(found.cases) == len(runs) * 3 * 9
    assert found.cases["value"].notna().any() and set(found.runs["role"]) == {"teacher", "baseline", "distilled"}
    for run in runs:
        names = {path.name for path in run_folder(run, results).iterdir()}
        assert names >= {"best.safetensors", "last.safetensors", "history.csv", "metrics.csv", "slices.npz"}
        assert key_facts(run, results)["preprocessing"]["dimensions"] == 3
    assert all(image.shape == (16, 16) for image in found.examples["image"])
    shown = found.examples[found.examples["run"] == found.examples["run"].iloc[0]]
    assert all(truth.any() for truth in shown["truth"]), "the slice with the most target"
    terms = found.history[(found.history["role"] == "distilled") & found.history["name"].str.startswith("grad/")]
    assert (terms["value"] > 0).all(), "every term passes a gradient"
    assert set(past_runs(results)["dims"]) == {3} and steps_of(runs[0], results) == 4
    taught = [run for run in runs if run.teacher]
    tables = teacher_agreement(taught, runs[0], results, "cpu")
    assert [table["value" if "value" in table else "count"].notna().any() for table in tables] == [True] * 3


@pytest.mark.slow
def test_a_stopped_study_is_done_and_the_explorer_and_pairs_say_that_they_show_slices(done):
    results, runs, found = done
    assert study(runs, results, "cpu").cases.equals(found.cases)
    key = run_folder(runs[-1], results).name
    with pytest.raises(InputError, match="is a run of volumes, and the explorer shows slices: choose a 2D study"):
        load_run(results, key, device="cpu")
    with pytest.raises(InputError, match="is a run of volumes, and pairs are shown on slices"):
        pairs(runs[-1], results)


def test_slices_keep_their_keys_and_a_profile_names_its_networks(phantom_of, tmp_path):
    flat = Run(str(phantom_of(9)), "spleen", "S1", profile=override_profile("quick", TINY))
    assert set(key_facts(flat, tmp_path)["preprocessing"]) == {
        "size", "spacing", "channels", "window", "percentiles", "published"
    }  # fmt: skip
    setting = Setting(profile="hippocampus3d")
    found = {(run.model, run.fraction, run.teacher) for run in distillation(setting)}
    alone = {("T1", 1.0, None)} | {(m, f, None) for m in ("S1", "E1") for f in (1.0, 0.5)}
    assert {(run.model, run.fraction, run.teacher) for run in baseline(setting)} == alone
    assert found == alone | {("S1", 0.5, "T1"), ("E1", 0.5, "T1")}
    assert {run.model for run in baseline(Setting())} == {"T1", "T2", "S1", "S2", "E1"}


# ------------------------------------------------------------------------------------------------ windows and file grid


def test_a_window_as_large_as_the_volume_is_the_network_itself_and_windows_join_without_seams():
    torch.manual_seed(0)
    network = build_model("S1", 3, 1, 2).eval()
    image = torch.randint(0, 256, (16, 16, 16), dtype=torch.uint8)
    with torch.no_grad():
        expected = network(image[None, None] / 255).segmentation
        found = volume_logits(lambda x: network(x).segmentation, image, 16)
    torch.testing.assert_close(found.transpose(0, 1)[None], expected, atol=1e-5, rtol=1e-4)
    image = torch.randint(0, 256, (21, 37, 16), dtype=torch.uint8)
    found = volume_logits(lambda x: torch.cat([2 * x - 1, x], 1), image, 16)
    expected = torch.stack([2 * (image / 255) - 1, image / 255], 1)
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-4)


class Reader(nn.Module):
    """Finds what is brighter than a half."""

    def __init__(self):
        super().__init__()
        self.gain = nn.Parameter(torch.tensor(200.0))

    def forward(self, x, reconstruct=True):
        assert x.shape[1:] == (1, 16, 16, 16) and not torch.is_grad_enabled()
        return Output(self.gain * (x - 0.5), None)


@pytest.mark.parametrize("spacing", [1.0, 1.7])
def test_evaluation_is_on_the_grid_of_the_label_file(tmp_path, spacing):
    dataset, view = index(boxes(tmp_path)), Preprocessing(16, spacing, dimensions=3)
    bank = build_bank(dataset, {"near": 1}, view)
    bank = dataclasses.replace(bank, images=tuple(255 * own for own in bank.labels))
    table, examples = evaluate(Reader(), bank, dataset, bank.cases)
    dice = table[table["metric"] == "dice"].set_index("case")["value"]
    volumes = table[table["metric"] == "truth_volume"].set_index("case")["value"]
    for case in dataset.cases:
        assert dice[case.name] == pytest.approx(best_dice(dataset, case, {"near": 1}, view)["near"])
        assert dice[case.name] > 0.9
        assert volumes[case.name] == pytest.approx(8 * 15 * 6 * 12 / 1000)  # voxels of 1.5 x 2 x 4 mm
    assert all(np.array_equal(each["truth"], each["prediction"]) for each in examples)


# ------------------------------------------------------------------------------------------------------------- training


@pytest.mark.slow
def test_every_loss_teaches_in_three_dimensions():
    teacher = {"T1": new_model(run_of("T1"), 1).eval().requires_grad_(False)}
    recipes = [distiller(loss, "S1") for loss in comparison_losses()]
    runs = [run_of(fraction=0.5, teacher="T1", recipe=recipe) for recipe in recipes]
    states = train(runs, teacher, steps=1, epochs=1)
    assert {state.run.recipe.name: state.failure for state in states} == dict.fromkeys(comparison_losses())


@pytest.mark.slow
def test_a_training_of_volumes_resumes_to_the_bit(tmp_path, monkeypatch):
    memory = Recipe("memory", terms=(Term("B-B", "supcon", 0.2, 0.1, options={"memory": 64, "same_patient": True}),))
    runs = [run_of(fraction=0.5, teacher="T1", recipe=recipe) for recipe in (thesis_recipe("S1"), memory)]
    teacher = {"T1": new_model(run_of("T1"), 1).eval().requires_grad_(False)}
    whole, steps, original = train(runs, teacher), [], loop.training_step

    def stop(*args):
        if len(steps) == 5:
            raise SystemExit(143)
        steps.append(args)
        return original(*args)

    kept = [Checkpoint(tmp_path / str(i), {"run": i}, "0123456789abcdef") for i in range(2)]
    with monkeypatch.context() as patch:
        patch.setattr(loop, "training_step", stop)
        with pytest.raises(SystemExit):
            train(runs, teacher, kept)
    for one, other in zip(train(runs, teacher, kept), whole, strict=True):
        assert one.sessions[-1]["from_step"] > 0 and one.history == other.history
        assert same(one.model.state_dict(), other.model.state_dict()) and same(one.best, other.best)


@pytest.mark.slow
@pytest.mark.parametrize("model", ["T1", "E1"])
def test_a_training_of_volumes_does_not_depend_on_what_memory_held_before(model):
    def after(value: float) -> RunState:
        junk = [torch.full((count,), value) for count in (300, 1000, 5000, 20_000, 100_000, 400_000) for _ in range(4)]
        del junk  # what is freed is what the training's own arrays are made of
        return train([run_of(model)])[0]

    one, other = after(0.0), after(float("nan"))
    assert one.failure is other.failure is None
    assert one.history == other.history and same(one.model.state_dict(), other.model.state_dict())


def test_costs_are_those_of_patches(timed_shortly):
    table = cost(0.125, 16, models=["S1"], dims=3).set_index("size")
    flat = cost(0.125, 16, models=["S1"]).set_index("size")
    assert table.loc["study", "parameters"] == sum(p.numel() for p in build_model("S1", 3, 1).parameters())
    assert table.loc["study", "gflops"] > 10 * flat.loc["study", "gflops"]
    assert table.loc["thesis", "gflops"] == flat.loc["thesis", "gflops"], "the thesis's network takes slices"


# --------------------------------------------------------------------------------------------------- predict and export


def student_folder(folder: Path, model: str, classes: tuple[str, ...], view: Preprocessing) -> nn.Module:
    """An untrained student of volumes, whose masks are speckled, so that a voxel out of place shows."""
    torch.manual_seed(1)
    network = build_model(model, view.dimensions, view.input_shape[0], len(classes)).eval()
    head = network.get_submodule(network.scales["logits"])
    with torch.no_grad():
        logits = network(torch.rand(2, *view.input_shape), reconstruct=False).segmentation
        head.weight *= 20
        head.bias.copy_(20 * (head.bias - logits.transpose(0, 1).flatten(1).mean(1)))
    student = Student("student", model, 1, classes, "CT", view)
    write_student(student, folder, lambda made: save_tensors(network.state_dict(), made / "model.safetensors"))
    return network


@pytest.mark.parametrize("number", [0, 1])
def test_a_mask_is_what_the_evaluation_gives_to_the_voxel(tmp_path, number):
    dataset, view = index(boxes(tmp_path / "data")), Preprocessing(16, 1.3, dimensions=3)
    network = student_folder(tmp_path / "s1", "S1", ("near", "far"), view)
    case = dataset.cases[number]
    bank = build_bank(dataset, {"near": 1, "far": 2}, view).select([case.name])
    expected = on_file_grid(predict_cases(network, bank)[case.name], bank, case.name)
    mask = kdlib.predict(tmp_path / "s1", case.image, device="cpu")
    np.testing.assert_array_equal(np.asarray(mask.dataobj), expected)
    assert set(np.unique(expected)) == {0, 1, 2} and mask.shape == case.shape


@pytest.mark.slow
@pytest.mark.parametrize("to", ["onnx", "openvino", "openvino-int8", "bundle"])
def test_a_run_is_exported_with_its_patch_and_segments_a_scan(done, tmp_path, to):
    results, runs, _ = done
    run, data = run_folder(runs[-1], results), Path(runs[-1].data)
    assert main(["export", str(run), "--to", to, "-o", str(tmp_path / to), "--data", str(data)]) == 0
    card = (tmp_path / to / "README.md").read_text()
    assert "patches: 16 x 16 x 16 voxels, spacing 16.0 mm" in card and "by a sliding window" in card
    assert load_student(tmp_path / to).preprocessing.dimensions == 3
    scan, masks = data / "imagesTr" / "phantom_000.nii.gz", []
    for student in (run, tmp_path / to):
        assert main(["predict", str(student), str(scan), "-o", str(tmp_path / "mask.nii.gz"), "--overwrite"]) == 0
        masks.append(np.asarray(nib.load(tmp_path / "mask.nii.gz").dataobj))
    assert np.count_nonzero(masks[0] != masks[1]) <= (0.02 if to == "openvino-int8" else 1e-4) * masks[0].size
    if to == "onnx":
        import onnxruntime

        session = onnxruntime.InferenceSession(tmp_path / to / "model.onnx", providers=["CPUExecutionProvider"])
        assert session.get_inputs()[0].shape[1:] == [1, 16, 16, 16]
    if to == "bundle":
        image = json.loads((tmp_path / to / "configs" / "metadata.json").read_text())["network_data_format"]["inputs"]
        assert image["image"]["spatial_shape"] == [16, 16, 16] and image["image"]["num_channels"] == 1


# ------------------------------------------------------------------------------------------------------------ bad input


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"spacing": None}, "dimensions 3: volumes need one spacing in mm along all three axes"),
        ({"channels": "neighbours"}, "dimensions 3: channels 'neighbours' are of slices, and volumes have one"),
        ({"size": 40}, "patch size 40: .*multiple of 16; try 32"),
        ({"dimensions": 4}, "dimensions 4: give a whole number from 2 and up to 3"),
    ],
)
def test_a_profile_that_cannot_be_is_one_line(changes, message):
    with pytest.raises(InputError, match=message):
        override_profile("quick", CHANGES | changes)


def test_bf16_of_volumes_on_a_cpu_is_one_line(tmp_path, phantom_of):
    how = dataclasses.replace(profile_of().teacher, precision="bf16")
    run = run_of("T1", data=str(phantom_of(9)), profile=dataclasses.replace(profile_of(), teacher=how))
    with pytest.raises(InputError, match="precision bf16: on a CPU volumes have no sound gradients in it; give 'auto'"):
        study([run], tmp_path, "cpu")


def test_a_protocol_and_a_loss_option_of_slices_are_refused(tmp_path):
    with pytest.raises(InputError, match="dimensions 3: the published conversion makes slices"):
        run_of(protocol=PROTOCOLS["thesis"])
    term = Term("x", "reviewkd", 1.0, options={"dims": 2}, student_layers=("encoder2", "bottleneck"))
    run = run_of(fraction=0.5, teacher="T1", recipe=Recipe("flat", terms=(term,)))
    with pytest.raises(InputError, match="term x: loss 'reviewkd' has no option dims; it has width"):
        study([run], tmp_path, "cpu")


def test_weights_of_volumes_and_slices_are_not_mixed_up(tmp_path, capsys):
    for dims, other in ((2, 3), (3, 2)):
        view = {2: Preprocessing(16, 1.3), 3: Preprocessing(16, 1.3, dimensions=3)}
        folder = tmp_path / str(dims)
        student_folder(folder, "S1", ("near",), view[dims])
        record = json.loads((folder / "student.json").read_text())
        record["preprocessing"]["dimensions"] = other
        (folder / "student.json").write_text(json.dumps(record))
        boxes(tmp_path / "data")
        scan = tmp_path / "data" / "imagesTr" / "box_1.nii.gz"
        assert main(["predict", str(folder), str(scan), "-o", str(tmp_path / "mask.nii.gz")]) == 2
        said = capsys.readouterr().err.strip()
        kinds = {2: "slices (2D)", 3: "volumes (3D)"}
        assert f"are of {kinds[dims]}, and this UNet takes {kinds[other]}: use the weights of a run" in said
        assert len(said.splitlines()) == 1 and not (tmp_path / "mask.nii.gz").exists()


def test_a_scan_of_one_slice_or_too_small_a_scan_is_one_line(tmp_path, capsys):
    student_folder(tmp_path / "s1", "S1", ("near",), Preprocessing(32, 1.0, dimensions=3))
    rng = np.random.default_rng(0)
    for shape, status, said in (
        ((40, 40, 1), 2, "one slice, of shape (40, 40, 1); give the whole volume"),
        ((40, 40, 9), 0, "9 x 40 x 40 voxels of 1 mm: most of a patch of 32 x 32 x 32 would be padding"),
    ):
        nib.save(nib.Nifti1Image(rng.normal(0, 300, shape).astype(np.int16), np.eye(4)), tmp_path / "scan.nii.gz")
        words = ["predict", str(tmp_path / "s1"), str(tmp_path / "scan.nii.gz"), "-o", str(tmp_path / "mask.nii.gz")]
        assert main(words) == status
        lines = capsys.readouterr().err.strip().splitlines()
        assert len(lines) == 1 and said in lines[0]
