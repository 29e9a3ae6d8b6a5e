"""What the command says beside its results: one line each, on standard error."""

import sys


def note(text: str) -> None:
    """Says something, above the progress bar if there is one."""
    if "tqdm" in sys.modules:
        from tqdm import tqdm

        tqdm.write(f"moebius: {text}", file=sys.stderr)
    else:
        print(f"moebius: {text}", file=sys.stderr)


def one_line(error: Exception | str) -> str:
    """What an error says, as one line."""
    return " ".join(str(error).split()) or type(error).__name__
