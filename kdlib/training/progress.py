"""What a person sees of a training, and where its time goes."""

from __future__ import annotations

import os
import time
from collections.abc import Sequence

from tqdm.auto import tqdm

from kdlib.training.state import RunState


def summary(states: Sequence[RunState]) -> str:
    """Mean loss and validation Dice of the runs' last epoch, in words."""
    last = [{row["name"]: row["value"] for row in state.history} for state in states]
    dice = [rows["val_dice"] for rows in last]
    text = f"loss {sum(rows['loss'] for rows in last) / len(last):.3f}, validation Dice {min(dice):.3f}"
    return text + (f" to {max(dice):.3f}" if len(dice) > 1 else "")


class Progress:
    """A bar in a terminal and in JupyterLab; one plain line per epoch where `KDLIB_PROGRESS` is "plain"."""

    def __init__(self, what: str, epochs: int, steps: int, done: int = 0, silent: bool = False):
        self.what, self.epochs = what, epochs
        self.plain = os.environ.get("KDLIB_PROGRESS") == "plain"
        self.begin = time.perf_counter()
        hidden = self.plain or silent
        self.bar = tqdm(total=epochs * steps, initial=done, desc=what, unit="step", disable=hidden, leave=False)

    def epoch(self, epoch: int, states: Sequence[RunState]) -> None:
        text = summary(states)
        self.bar.set_postfix_str(text)
        if self.plain:
            seconds = time.perf_counter() - self.begin
            print(f"{self.what}: epoch {epoch}/{self.epochs}, {text}, {seconds:.0f} s", flush=True)


class Clock:
    """Shares the time that passes among the runs, and saves them from time to time."""

    def __init__(self):
        self.mark = self.saved = time.perf_counter()  # never set back, as the time of day can be

    def share(self, states: Sequence[RunState]) -> None:
        now = time.perf_counter()
        for state in states:
            state.seconds += (now - self.mark) / len(states)
        self.mark = now

    def save(self, states: Sequence[RunState], every: float = 0.0) -> None:
        """Saves the runs where the last time is at least `every` seconds ago."""
        if self.mark - self.saved >= every:
            for state in states:
                state.save()
            self.saved = self.mark
