"""`kdlib`, also `python -m kdlib`: see `kdlib.apps.cli`."""

import signal
import sys

from kdlib.apps.cli import main
from kdlib.apps.notebooks import Stopped


def _stop(number: int, frame: object) -> None:
    raise Stopped(number)


def run() -> None:
    """The command line of this process."""
    sys.stdout.reconfigure(line_buffering=True)  # a log shows each line when it is printed
    signal.signal(signal.SIGTERM, _stop)  # a cluster's stop ends this as Ctrl-C does
    sys.exit(main(sys.argv[1:]))


if __name__ == "__main__":
    run()
