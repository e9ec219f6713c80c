"""The command line: the composition root, and the only package that prints results.

stdout carries results, stderr progress. Exit codes: 0 ok, 1 failed, 2 usage, 3 partly done, 130 interrupted.
"""

from __future__ import annotations

import os
import sys

from cyclopts import CycloptsError

from suffix_analysis.cli import findings, models, stages  # their commands join the application
from suffix_analysis.cli.common import app
from suffix_analysis.console import any_character, tell
from suffix_analysis.errors import UserError, first_line
from suffix_analysis.settings import sources

__all__ = ["app", "findings", "main", "models", "stages"]


def main() -> None:
    """Run a command; a user's mistake is one sentence on stderr and an exit code, never a traceback."""
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "true")
    os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")
    any_character()
    try:
        app.config = sources(sys.argv[1:])
        app(sys.argv[1:], exit_on_error=False, print_error=False)
    except CycloptsError as error:
        tell(f"suffix-analysis: {error}")
        sys.exit(2)
    except UserError as error:
        tell(f"suffix-analysis: {error}")
        sys.exit(error.exit_code)
    except BrokenPipeError:  # nobody reads any more, as behind `| head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # or Python complains when it ends
        sys.exit(1)
    except KeyboardInterrupt:
        tell("suffix-analysis: interrupted; what was finished is kept, the same command goes on from there")
        sys.exit(130)
    except OSError as error:
        tell(f"suffix-analysis: {error.filename or 'a file'} cannot be used: {error.strerror or first_line(error)}.")
        sys.exit(1)
    except Exception as error:
        from attacks import AttackError
        from attacks.memory import is_out_of_memory

        if isinstance(error, RuntimeError) and is_out_of_memory(error):
            tell(
                f"suffix-analysis: there was not enough memory ({first_line(error)}); what was finished is kept. Take "
                "--dtype bfloat16 or --four-bit, spread the model with --device auto, or use fewer or shorter prompts."
            )
        elif isinstance(error, AttackError):
            tell(f"suffix-analysis: {error}")
        elif os.environ.get("SUFFIX_ANALYSIS_DEBUG"):
            raise
        else:
            tell(
                f"suffix-analysis: unexpected {type(error).__name__}: {first_line(error)}; what was finished is kept. "
                "Please report it with what SUFFIX_ANALYSIS_DEBUG=1 and `suffix-analysis env` print."
            )
        sys.exit(1)
    finally:
        app.config = None  # the next call in this process has other words
