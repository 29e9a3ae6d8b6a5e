"""The `moebius` command: fills the marked part of photos, converts checkpoints and describes models."""

import gc
import logging
import os
import sys
import warnings
from typing import Annotated, NoReturn

import typer

from .batch import batch
from .convert import convert
from .demo import demo
from .export import export
from .info import info
from .inpaint import inpaint
from .messages import note, one_line
from .push import push
from .space import space
from .study import study

app = typer.Typer(
    name="moebius",
    help="Fill the marked part of photos with the Moebius inpainting model.",
    add_completion=False,
    rich_markup_mode=None,
    context_settings={"help_option_names": ["-h", "--help"]},
)
for command in (inpaint, batch, convert, export, info, demo, push):
    app.command()(command)
app.add_typer(study, name="study")
app.add_typer(space)


def _show_version(value: bool) -> None:
    if value:
        from .. import __version__

        print(f"moebius {__version__}")
        raise typer.Exit()


@app.callback()
def _moebius(
    version: Annotated[
        bool, typer.Option("--version", callback=_show_version, is_eager=True, help="Show the version and exit.")
    ] = False,
) -> None:
    pass


def main(arguments: list[str] | None = None) -> NoReturn:
    """
    Runs the `moebius` command and exits: 0 if all is done, 1 if some photos of a folder are not, 2 on a bad argument,
    130 when interrupted. An error is one line on standard error.

    Args:
        arguments (`list[str]`, *optional*): Command-line arguments; those of the process if not given.
    """
    try:
        with warnings.catch_warnings():
            # What the libraries below say is nothing that the command's user can change; errors say what is wrong.
            os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
            logging.disable(logging.WARNING)
            warnings.simplefilter("ignore")
            warnings.filterwarnings("default", module="diffusers_moebius")
            warnings.showwarning = lambda message, *_args, **_kwargs: note(f"warning: {one_line(message)}")
            words = sys.argv[1:] if arguments is None else arguments
            code = app(args=words or ["--help"], prog_name="moebius", standalone_mode=False) or 0
        sys.stdout.flush()
    except (BrokenPipeError, SystemExit):
        # Nobody reads the output any more, for which Typer exits. What is left in the buffer would raise once more.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.__stdout__.fileno())
        code = 130
    except (KeyboardInterrupt, typer.Abort):
        code = 130
    except Exception as error:
        # Usage errors have a message of their own; all else that users can cause is a ValueError or an OSError.
        if hasattr(error, "format_message"):
            message = error.format_message()
        elif isinstance(error, (ValueError, OSError)):
            message = error
        else:
            raise
        note(f"error: {one_line(message)}")
        code = 2
    finally:
        gc.enable()
        if arguments is not None:  # the process goes on; else it ends sooner without a last collection
            gc.unfreeze()
        logging.disable(logging.NOTSET)
    sys.exit(code)
