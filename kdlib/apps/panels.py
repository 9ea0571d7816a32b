"""The panels of `notebooks/explore.ipynb`: widgets that call `kdlib.apps.explore` and show what it returns."""

from __future__ import annotations

import gzip
import html
import io
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

import anywidget
import ipywidgets as widgets
import nibabel as nib
import numpy as np
import traitlets
from ipyniivue import NiiVue, ShowRender, SliceType, Volume
from matplotlib.colors import to_rgba_array
from matplotlib.figure import Figure

from kdlib.analysis.figures.style import ERRORS
from kdlib.apps import drawing, explore, gradients
from kdlib.config import TEACHERS, InputError, TrainingError, lookup
from kdlib.metrics import METRICS


def _legend(colours: Mapping[str, str]) -> str:
    """What each colour of an overlay means."""
    box = '<span style="display:inline-block;width:.9em;height:.9em;background:{};margin:0 .3em 0 1em"></span>{}'
    return "".join(box.format(colour, html.escape(name)) for name, colour in colours.items())


def _dropdown(name: str, options=()) -> widgets.Dropdown:
    return widgets.Dropdown(options=options, description=name, layout=widgets.Layout(width="36em"))


def _slider(name: str, kind: type = widgets.IntSlider, **layout) -> widgets.Widget:
    return kind(description=name, continuous_update=False, layout=widgets.Layout(**layout))


@contextmanager
def _silent(widget: widgets.Widget, observer: Callable) -> Iterator[None]:
    """The widget's value changes without its observer being told."""
    widget.unobserve(observer, "value")
    yield
    widget.observe(observer, "value")


def _number(value: float, name: str, step: float) -> widgets.FloatText:
    style = {"description_width": "7em"}
    return widgets.FloatText(value, description=name, step=step, style=style, layout=widgets.Layout(width="14em"))


class Panel(widgets.VBox):
    """Widgets with a picture and a line of text, which says the errors of a `with self.errors_said()`."""

    def __init__(self):
        self.message, self.image = widgets.HTML(), widgets.Image(layout=widgets.Layout(max_width="100%"))
        self.show_picture(None)
        super().__init__()

    def show_picture(self, figure: Figure | None) -> None:
        """Shows a figure; None takes no room, and shows no broken icon."""
        png = io.BytesIO()
        if figure is not None:
            figure.savefig(png, dpi=110)
        self.image.value, self.image.layout.display = png.getvalue(), "none" if figure is None else ""

    @contextmanager
    def errors_said(self) -> Iterator[None]:
        """Errors that a user can correct are shown in one line."""
        self.message.value = ""
        try:
            yield
        except (InputError, TrainingError) as error:
            self.message.value = f"<b>{html.escape(str(error))}</b>"

    def watch(self, pick: Picker, show: Callable[[], None], *children: widgets.Widget) -> None:
        """Shows `children`, and calls `show` now and after each choice; blank where there is nothing to choose."""
        self.pick = pick
        if not pick.empty:
            self.children = children
            pick.observe(lambda _: show(), "chosen")
            show()


class Picker(Panel):
    """Three lists: study, run, case. What is chosen stands in `run`, `teachers` and `case`; panels watch it.

    Where nothing has been trained yet, `empty` is True and a message says how to make a study; panels then stay blank.

    Args:
        results: folder that keeps runs and studies.
        data: folder of the runs' data set, or "phantom".
        study: the newest whose runs are kept where empty.
        run: key of a run; empty for the first distilled student, else the first run.
        case: the first of the test part where empty.
        device: auto, cpu or cuda.

    Raises: InputError: a name that is not there.
    """

    chosen = traitlets.Int(0)  # counts the choices
    _filling = False  # while a list is filled by us, not changed by the user

    def __init__(self, results, data="phantom", study="", run="", case="", device="auto"):
        super().__init__()
        self.results, self.data, self.device = Path(results).resolve(), data, device
        self.study_list, self.run_list, self.case_list = map(_dropdown, ("study", "run", "case"))
        names, self.children = [], [self.message]
        with self.errors_said():
            names = explore.studies(self.results)
        self.empty = not names
        if self.empty:
            return
        self.children = [self.study_list, self.run_list, self.case_list, self.message]
        self._fill(self.study_list, dict(zip(names, names, strict=True)), study or names[0])
        self._list_runs(run)
        self._list_cases(case)
        self._settle()
        self.study_list.observe(lambda _: self._try(self._list_runs, self._list_cases), "value")
        self.run_list.observe(lambda _: self._try(self._list_cases), "value")
        self.case_list.observe(lambda _: self._try(), "value")

    def _try(self, *steps: Callable[[], None]) -> None:
        """Fills the lists below the one that was changed, then tells the panels; an error is said in one line."""
        if self._filling:
            return
        with self.errors_said():
            try:
                for step in steps:
                    step()
            except BaseException:  # lists and panels go on showing what was chosen before
                self.table, self.labels, self.run, self.teachers = self._before
                self._filling = True
                for chooser, options, value in self._lists:
                    chooser.options, chooser.value = options, value
                self._filling = False
                raise
            self._settle()
            self.chosen += 1

    def _settle(self) -> None:
        """What a choice that fails falls back to."""
        self._before = self.table, self.labels, self.run, self.teachers
        choosers = self.study_list, self.run_list, self.case_list
        self._lists = [(chooser, chooser.options, chooser.value) for chooser in choosers]

    def _fill(self, chooser: widgets.Dropdown, labels: Mapping[str, str], key: str) -> None:
        """A list of labels, at that of `key`. Raises: InputError: no such key."""
        lookup(chooser.description, key, labels)
        self._filling = True
        chooser.options, chooser.value = [(label, name) for name, label in labels.items()], key
        self._filling = False

    def _list_runs(self, run: str = "") -> None:
        self.table = explore.finished_runs(self.results, self.study_list.value)
        self.labels = self.table.set_index("run")["label"].to_dict()
        distilled = self.table.loc[self.table["role"] == "distilled", "run"].tolist()
        students = self.table.loc[~self.table["model"].isin(TEACHERS), "run"].tolist()
        self._fill(self.run_list, self.labels, run or [*distilled, *students, *self.labels][0])

    def _list_cases(self, case: str = "") -> None:
        self.run = explore.load_run(self.results, self.run_list.value, self.data, self.device)
        self.teachers = explore.teachers_of(self.run, self.table, self.data, self.device)
        rows = explore.cases(self.run).itertuples()
        labels = {r.case: f"{r.case}, {r.part}" + (f", Dice {r.dice:.3f}" if r.dice == r.dice else "") for r in rows}
        kept = self.case_list.value if self.case_list.value in labels else next(iter(labels))
        self._fill(self.case_list, labels, case or kept)

    @property
    def case(self) -> str:
        return self.case_list.value


# ------------------------------------------------------------------------------------------------------------- viewer


class WebGL(anywidget.AnyWidget):
    """Asks the browser whether it draws volumes; stays `None` where there is no browser."""

    _esm = """
    export default {
      render({ model }) {
        const context = document.createElement("canvas").getContext("webgl2");
        model.set("there", context !== null);
        model.save_changes();
        context?.getExtension("WEBGL_lose_context")?.loseContext();
      },
    };
    """
    there = traitlets.Bool(None, allow_none=True).tag(sync=True)


def _nifti(voxels: np.ndarray, affine: np.ndarray) -> bytes:
    return gzip.compress(nib.Nifti1Image(voxels, affine).to_bytes(), compresslevel=1)


def _volume(name: str, mask: np.ndarray, affine: np.ndarray, colours: Mapping[str, str]) -> Volume:
    """A mask to lay over the image, in the plain colours of its labels; hidden at first."""
    volume = Volume(data=_nifti(mask, affine), name=f"{name}.nii.gz", opacity=0.0, colorbar_visible=False)
    shades = [(0, 0, 0, 0), *(to_rgba_array(list(colours.values())) * 255).astype(int).tolist()]
    channels = dict(zip("RGBA", map(list, zip(*shades, strict=True)), strict=True))
    volume.set_colormap_label(channels | dict(I=list(range(len(shades))), labels=["", *colours]))
    return volume


class Viewer(Panel):
    """The case as a volume (NiiVue: scroll, click, drag) or, where the browser has no WebGL, slice by slice.

    Args:
        pick: what to show.

    `place` is the slice, row and column of the network's slices that was clicked last.
    """

    place = traitlets.Tuple()

    def __init__(self, pick: Picker):
        super().__init__()
        self.webgl = WebGL()
        self.mode = widgets.ToggleButtons(options=["slices", "volume"], value="slices")
        self.masks = widgets.HBox(layout=widgets.Layout(flex_flow="row wrap"))
        # three planes alone: a rendering in 3D takes a browser without a GPU many times as long
        planes = dict(multiplanar_show_render=ShowRender.NEVER, back_color=(0, 0, 0, 1), crosshair_width=0.3)
        self.volume = NiiVue(height=480, **planes)
        self.volume.set_slice_type(SliceType.MULTIPLANAR)
        self.volume.set_radiological_convention(True)  # the patient's right on the left, as in the slices
        self.volume.on_location_change(self._clicked)
        self.number = _slider("slice", width="90%")
        self.legend, self.body = widgets.HTML(), widgets.VBox()
        self.webgl.observe(lambda change: setattr(self.mode, "value", "volume" if change["new"] else "slices"), "there")
        self.mode.observe(lambda _: self._lay_out(), "value")
        self.number.observe(self._draw, "value")
        self.watch(pick, self.show, self.webgl, self.mode, self.body)

    def show(self) -> None:
        self.seen = explore.look(self.pick.run, self.pick.teachers, self.pick.case)
        self.place, depth = explore.on_target(self.seen), self.seen.geometry.depth
        with _silent(self.number, self._draw):
            self.number.max, self.number.value = depth - 1, self.place[0]
        self.loaded = False
        self._lay_out()

    def _lay_out(self) -> None:
        if self.mode.value == "volume":
            if not self.loaded:
                self._load()
            self.body.children = [self.masks, self.volume, self.legend]
        else:
            self._draw()
            self.body.children = [self.number, self.image]

    def _draw(self, change: object = None) -> None:
        if self.mode.value == "slices":
            self.show_picture(drawing.draw_slice(self.seen, self.number.value))
        self.place = (self.number.value, *self.place[1:])

    def _load(self) -> None:
        seen = self.seen
        image = Volume(
            data=_nifti(seen.image, seen.affine), name=f"{seen.case}.nii.gz", colormap="gray", colorbar_visible=False,
            cal_min=seen.shown[0], cal_max=seen.shown[1],
        )  # fmt: skip
        colours = drawing.legend(seen)
        self.legend.value = _legend(colours)
        classes, errors = {name: colours[name] for name in seen.classes}, {kind: colour for colour, kind in ERRORS}
        layers = {name: _volume(name, mask, seen.affine, classes) for name, mask in seen.masks.items()}
        layers |= {name: _volume(name, mask, seen.affine, errors) for name, mask in seen.differences().items()}
        self.volume.load_volumes([image, *layers.values()])
        shown = [box.value for box in self.masks.children]  # the same ones as before, whatever the run is called
        if len(shown) != len(layers):
            shown = [name == f"{list(seen.masks)[-1]} against truth" for name in layers]
        look = dict(indent=False, layout=widgets.Layout(width="auto"))
        boxes = [widgets.Checkbox(False, description=name, **look) for name in layers]
        for box, layer, checked in zip(boxes, layers.values(), shown, strict=True):
            box.observe(lambda change, layer=layer: setattr(layer, "opacity", 0.6 if change["new"] else 0.0), "value")
            box.value = checked
        self.masks.children = boxes
        self.loaded = True

    def _clicked(self, location: dict) -> None:
        voxel = [int(v) for v in location["vox"][:3]]
        if all(0 <= v < side for v, side in zip(voxel, self.seen.geometry.shape, strict=True)):
            self.place = explore.place(self.seen.geometry, tuple(voxel))


# ---------------------------------------------------------------------------------------------------------- gradients


HEADERS = {  # of the table of gradients, for readers
    "value": "loss (unweighted)", "grad_norm": "gradient norm in the region",
    "share_in_region": "share of its gradient in the region", "vs_segmentation": "relative to the segmentation loss",
    "cosine": "cosine with the segmentation loss",
}  # fmt: skip


class GradientPanel(Panel):
    """The terms' gradients in a region, which follows the viewer's last click.

    Args:
        pick: which student and case; viewer: where the region's middle is taken from.
    """

    def __init__(self, pick: Picker, viewer: Viewer):
        super().__init__()
        self.viewer, self.table = viewer, widgets.HTML()
        self.number = _slider("slice")
        self.rows, self.columns = (_slider(name, widgets.IntRangeSlider) for name in ("rows", "columns"))
        self.button = widgets.Button(description="show gradients", button_style="primary")
        self.button.on_click(lambda _: self.show())
        viewer.observe(lambda _: self._follow(), "place")
        settings = self.number, self.rows, self.columns, self.button
        self.watch(pick, self._clear, *settings, self.message, self.image, self.table)
        if not pick.empty:
            self._follow()

    def _clear(self) -> None:
        """What is shown is of another run or case."""
        self.message.value, self.table.value = "", ""
        self.show_picture(None)

    def _follow(self) -> None:
        """The region: a quarter of the slice's side about the place that was clicked."""
        geometry, (number, row, column) = self.viewer.seen.geometry, self.viewer.place
        self.number.max, self.number.value = geometry.depth - 1, number
        half = geometry.size // 8
        for slider, middle in ((self.rows, row), (self.columns, column)):
            slider.max = geometry.size
            slider.value = (max(middle - half, 0), min(middle + half, geometry.size))

    def show(self) -> None:
        if self.pick.empty:
            return
        region = (*self.rows.value, *self.columns.value)
        with self.errors_said():
            self.message.value = "one forward and backward pass ..."
            run, teachers, case = self.pick.run, self.pick.teachers, self.pick.case
            found = gradients.term_gradients(run, teachers, case, self.number.value, region)
            self.show_picture(drawing.draw_gradients(found))
            how = dict(index=False, float_format="{:.3g}".format, border=0, classes="terms")
            table = found.table.rename(columns=HEADERS).to_html(**how)
            self.table.value = f"<style>.terms :is(td, th) {{ padding: 0 .8em; text-align: right }}</style>{table}"
            self.message.value = ""


# --------------------------------------------------------------------------------------------------------- comparison


class ComparisonPanel(Panel):
    """The chosen run against another of its study, by test case."""

    def __init__(self, pick: Picker):
        super().__init__()
        self.other = _dropdown("against")
        self.metric = _dropdown("metric", [(name, key) for key, (name, *_) in METRICS.items()])
        for chooser in (self.other, self.metric):
            chooser.observe(self.show, "value")
        self.watch(pick, self._list, self.other, self.metric, self.message, self.image)

    def _list(self) -> None:
        table, mine = self.pick.table, self.pick.run.run
        table = table[(table["fold"] == mine.fold) & (table["run"] != self.pick.run.key)]
        own = {"model": mine.model, "fraction": mine.fraction, "length": mine.length, "protocol": mine.protocol.name}
        alike = table[list(own)] == list(own.values())
        same = table[(table["role"] == "baseline") & alike.all(axis=1)]
        with _silent(self.other, self.show):
            self.other.options = list(zip(table["label"], table["run"], strict=True))
            if not same.empty:  # the same student without a teacher
                self.other.value = same["run"].iloc[0]
        self.show()

    def show(self, change: object = None) -> None:
        self.show_picture(None)
        if self.other.value is None:
            self.message.value = "no other run of this fold"
            return
        with self.errors_said():
            other = explore.load_run(self.pick.results, self.other.value, self.pick.data, self.pick.device)
            table = explore.compare(self.pick.run, other, self.metric.value)
            labels = [self.pick.labels[run.key] for run in (self.pick.run, other)]
            self.show_picture(drawing.draw_comparison(table, *labels, self.metric.value))


# ------------------------------------------------------------------------------------------------------------ training


class TrainingPanel(Panel):
    """A small training in place: weights and temperatures by term, live curves, the one before beside it."""

    def __init__(self, pick: Picker):
        super().__init__()
        self.terms, self.printed = widgets.VBox(), widgets.Output()
        self.epochs = widgets.BoundedIntText(5, min=1, max=1000, description="epochs")
        self.steps = widgets.BoundedIntText(20, min=1, max=10000, description="steps each")
        self.button = widgets.Button(description="train", button_style="primary")
        self.button.on_click(lambda _: self.train())
        length = widgets.HBox([self.epochs, self.steps, self.button])
        self.watch(pick, self._list, self.terms, length, self.message, self.printed, self.image)

    def _list(self) -> None:
        """One row per term: weight and temperature."""
        self.histories: dict = {}
        self.show_picture(None)
        terms = ()
        with self.errors_said():
            terms = explore.distillation_run(self.pick.run, self.pick.teachers).recipe.terms
        self.button.disabled = not terms
        self.weights = {t.name: _number(t.weight, "weight", 0.05) for t in terms}
        warm = [t for t in terms if t.temperature is not None]
        self.temperatures = {t.name: _number(t.temperature, "temperature", 0.1) for t in warm}
        rows = []
        for term in terms:
            parts = [widgets.Label(f"{term.name} ({term.loss})", layout=widgets.Layout(width="12em"))]
            parts += [found[term.name] for found in (self.weights, self.temperatures) if term.name in found]
            rows.append(widgets.HBox(parts))
        self.terms.children = rows

    def train(self) -> None:
        """Trains with the weights and temperatures as they stand."""
        if self.pick.empty:
            return
        asked = [{name: box.value for name, box in boxes.items()} for boxes in (self.weights, self.temperatures)]
        asked += self.epochs.value, self.steps.value
        before = dict(list(self.histories.items())[-1:])
        title = f"training {len(self.histories) + 1}"

        def draw(history) -> None:
            self.histories[title] = history
            self.show_picture(drawing.draw_history({title: history, **before}))

        self.button.disabled = True
        try:
            with self.errors_said():
                self.message.value = "training ..."
                with self.printed:
                    explore.train_small(self.pick.run, self.pick.teachers, *asked, draw)
                self.message.value = "not a result: nothing was saved, and no test case was seen"
        finally:
            self.button.disabled = False
