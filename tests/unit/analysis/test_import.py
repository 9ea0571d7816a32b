from __future__ import annotations

import subprocess
import sys


def test_tables_and_figures_need_no_torch():
    code = "import sys, kdlib.analysis.statistics, kdlib.analysis.figures, kdlib.analysis.cards; "
    code += "print(sorted({'torch', 'monai', 'lightning'} & set(sys.modules)), "
    code += (
        "sorted(name for name in sys.modules if name.startswith('kdlib.') and not name.startswith('kdlib.a')))"
    )
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert found.stdout == "[] ['kdlib.config', 'kdlib.files']\n"
