"""How a command ends: the one place where errors become a line on stderr and an exit code.

A known error prints its own line and exits with the code of ``runtime.problems``; wrong arguments exit 2; Ctrl-C exits
130; a reader that went away (``| head``) exits 1 and says nothing (Typer sees to that). Anything else is a defect: one
line, exit 70, and the traceback in the log (or on stderr with GENI_VIOLIN_DEBUG=1).
"""

import os
import sys
import traceback
from collections.abc import Sequence
from pathlib import Path
from tempfile import gettempdir

import typer
from typer._click.exceptions import ClickException, UsageError  # typer exports only their child BadParameter

from geni_violin.core.errors import GeniViolinError
from geni_violin.runtime.problems import UNEXPECTED_EXIT_CODE, mapping_of

INTERRUPTED = 130


class Interrupted(Exception):
    """Ctrl-C came; the text says what goes on nevertheless, or what was undone."""


def run(app: typer.Typer, arguments: Sequence[str]) -> int:
    """Run one command and give back the exit code. Whatever went wrong has been said on stderr."""
    try:
        result = app(list(arguments), standalone_mode=False, prog_name="geni-violin")
    except ClickException as error:
        return _usage(error)
    except GeniViolinError as error:
        complain(str(error))
        return mapping_of(error).exit_code
    except Interrupted as error:
        return _interrupted(str(error))
    except (KeyboardInterrupt, typer.Abort):
        return _interrupted("")
    except Exception as error:
        return _defect(error)
    if result == INTERRUPTED:
        return _interrupted("")
    return result if isinstance(result, int) else 0


def complain(text: str) -> None:
    """One clear line on stderr."""
    sys.stderr.write(f"error: {' '.join(text.split())}\n")


def _interrupted(what: str) -> int:
    sys.stderr.write("interrupted" + (f": {what}" if what else "") + "\n")
    return INTERRUPTED


def _usage(error: ClickException) -> int:
    context = error.ctx if isinstance(error, UsageError) else None
    if not error.format_message():  # "geni-violin slice" alone: its help has been shown
        return error.exit_code
    command = context.command_path if context else "geni-violin"
    complain(f"{error.format_message().rstrip('.')}; see {command} --help")
    return error.exit_code


def _defect(error: Exception) -> int:
    text = "".join(traceback.format_exception(error))
    if os.environ.get("GENI_VIOLIN_DEBUG") == "1":
        sys.stderr.write(text)
        where = "the traceback is above"
    else:
        where = _keep(text)
    complain(f"{type(error).__name__}: {error}; this is a defect of geni-violin, {where}")
    return UNEXPECTED_EXIT_CODE


def _keep(text: str) -> str:
    """Append a traceback to the first log that can be written; says where it went."""
    state_dir = Path(os.environ.get("GENI_VIOLIN_STATE_DIR", "/var/lib/geni-violin"))
    for folder in (state_dir / "log", Path(gettempdir())):
        path = folder / "geni-violin-command.log"
        try:
            with path.open("a") as file:
                file.write(text)
        except OSError:
            continue
        return f"its traceback is in {path}"
    return "set GENI_VIOLIN_DEBUG=1 to see the traceback"
