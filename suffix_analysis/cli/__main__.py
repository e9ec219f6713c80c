"""``python -m suffix_analysis.cli``."""

from suffix_analysis.cli import main

main()
