"""How long `suffix-analysis --help` and `import suffix_analysis` take: the best and the median of several processes."""

from __future__ import annotations

import statistics
import subprocess
import sys
import time

import cyclopts

ASKED = {"suffix-analysis --help": 0.3, "import suffix_analysis": 0.2}


def main(times: int = 9) -> None:
    """Seconds of the whole process, Python's own start included; torch must not have been loaded."""
    commands = {
        "suffix-analysis --help": ["-m", "suffix_analysis.cli", "--help"],
        "import suffix_analysis": ["-c", "import sys, suffix_analysis; sys.exit('torch' in sys.modules)"],
    }
    for name, words in commands.items():
        taken = []
        for _ in range(times):
            started = time.perf_counter()
            subprocess.run([sys.executable, *words], check=True, capture_output=True)
            taken.append(time.perf_counter() - started)
        print(f"{name}: best {min(taken):.3f} s, median {statistics.median(taken):.3f} s (asked {ASKED[name]} s)")


if __name__ == "__main__":
    cyclopts.run(main)
