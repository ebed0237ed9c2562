"""The command line: `cairn`. Nothing heavy is imported until a command that needs it runs.

Exit codes: 0 done; 1 a resource failed; 2 bad input (value, key, file, option); 130 interrupted. A mistake ends in one
line on stderr, `cairn: <what, and how to mend it>`, and never in a traceback.
"""

import errno
import os
import sys
from pathlib import Path
from typing import Annotated, cast

import typer

from cairn import __version__
from cairn.cli.bench import app as bench
from cairn.cli.blend import app as blend
from cairn.cli.cluster import app as cluster
from cairn.cli.codec import app as codec
from cairn.cli.config import app as config
from cairn.cli.demo import demo
from cairn.cli.doctor import doctor
from cairn.cli.events import app as events
from cairn.cli.index import index
from cairn.cli.inspect import inspect
from cairn.cli.metrics import app as metrics
from cairn.cli.node import node
from cairn.cli.output import help_if_alone
from cairn.cli.plan import plan
from cairn.cli.register import register
from cairn.cli.serve import serve
from cairn.cli.up import status, up
from cairn.cli.version import version
from cairn.errors import CairnError, ConfigError, GeometryError, InputError

# typer carries its own copy of click and exports only some of its exceptions; this is the root of those for bad usage.
_UsageError = cast(type[typer.BadParameter], typer.BadParameter.__bases__[0])
_EXTRA = dict.fromkeys(("accelerate", "gguf", "torch", "transformers"), "demo") | {"matplotlib": "plot"}
_EXTRA |= {"zmq": "fleet"} | dict.fromkeys(("fastapi", "grpc", "google", "httptools", "uvicorn", "jinja2"), "index")
#: What a write to the standard output ends with where its disk is full, or it is none that can be written.
_UNWRITABLE = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EIO, errno.EBADF}
_BAD_INPUT = (ConfigError, GeometryError, InputError)

app = typer.Typer(name="cairn", rich_markup_mode=None, pretty_exceptions_enable=False)
app.command()(demo)
app.command()(node)
app.add_typer(bench, name="bench")
app.command()(plan)
app.command()(inspect)
app.add_typer(events, name="events")
app.command()(index)
app.command()(serve)
app.command()(up)
app.command()(status)
app.command()(doctor)
app.add_typer(cluster, name="cluster")
app.command()(register)
app.add_typer(codec, name="codec")
app.add_typer(blend, name="blend")
app.add_typer(config, name="config")
app.add_typer(metrics, name="metrics")
app.command()(version)


@app.callback(invoke_without_command=True)
def cairn(
    context: typer.Context,
    show_version: Annotated[bool, typer.Option("--version", help="Show the version and exit.")] = False,
) -> None:
    """Keeps the KV cache of LLM inference alive beyond one GPU: prefill once, reuse anywhere."""
    if show_version:
        typer.echo(f"cairn {__version__}")
        raise typer.Exit
    help_if_alone(context)


def main() -> None:
    """Runs `cairn` on sys.argv and exits."""
    try:
        code = app(prog_name="cairn", standalone_mode=False)
        if sys.stdout:
            sys.stdout.flush()  # or the interpreter tells of it, after this
    except CairnError as error:
        code = _complain(str(error), 2 if isinstance(error, _BAD_INPUT) else 1)
    except _UsageError as error:
        command = error.ctx.command_path if error.ctx else "cairn"
        code = _complain(f"{error.format_message().rstrip('.')}; see `{command} --help`", 2)
    except ModuleNotFoundError as error:
        if error.name not in _EXTRA:
            raise
        code = _complain(f"{error.name} is not installed; pip install 'cairn-kv[{_EXTRA[error.name]}]' brings it", 1)
    except typer.Abort:
        code = _complain("aborted", 130)
    except OSError as error:
        if error.filename is not None or error.errno not in _UNWRITABLE:
            raise
        code = _complain(f"the output cannot be written: {error.strerror}; send it elsewhere", 1)
        _forget_output()
    sys.exit(code)


def _forget_output() -> None:
    """What waits to be written would fail once more at the end, in the interpreter's own words."""
    with Path(os.devnull).open("wb") as nowhere:
        os.dup2(nowhere.fileno(), sys.stdout.fileno())


def _complain(message: str, code: int) -> int:
    typer.echo(f"cairn: {' '.join(message.split())}", err=True)
    return code
