"""Our errors under a launcher: the traceback once per machine, and the message last, where people look first.

Every rank of a job raises the same error, so a launcher prints as many tracebacks as there are ranks, then its own,
and then a summary without the message. torch's launcher (`torchrun`, and `accelerate launch`, which calls it) gives
each of its processes the path of a file and shows what the process has written there at the very end. Imports nothing.
"""

from __future__ import annotations

import hashlib
import json
import os
import sys
import time
from pathlib import Path
from types import TracebackType

ENV_VARIABLE = "TORCHELASTIC_ERROR_FILE"  # torch.distributed.elastic.multiprocessing.errors

_PACKAGE = __name__.partition(".")[0]


def is_ours(trace: TracebackType | None) -> bool:
    """Whether the error was raised by a line of this package."""
    last = trace
    while last is not None and last.tb_next is not None:
        last = last.tb_next
    name = "" if last is None else str(last.tb_frame.f_globals.get("__name__"))
    return name.partition(".")[0] == _PACKAGE


def _is_first(file: Path, message: str) -> bool:
    """Whether no other process of this machine and this attempt has shown `message` yet.

    torch keeps one folder for each attempt, and in it one folder for each process, in which `file` lies.
    """
    digest = hashlib.sha256(message.encode()).hexdigest()[:16]
    try:
        (file.parent.parent / f"{_PACKAGE}-{digest}").touch(exist_ok=False)
    except FileExistsError:
        return False
    except OSError:  # a folder that cannot be written to: better twice than never
        return True
    return True


def report_errors() -> None:
    """Put our errors into the file of torch's launcher, and let one process for each machine show the traceback.

    Errors of others are left to the hook that is installed already, and so is a file that is written already, as by
    `torch.distributed.elastic.multiprocessing.errors.record`. Without a launcher nothing is changed.
    """
    path = os.environ.get(ENV_VARIABLE)
    if not path:
        return
    file, before = Path(path), sys.excepthook

    def hook(kind: type[BaseException], error: BaseException, trace: TracebackType | None) -> None:
        if not is_ours(trace) or not issubclass(kind, Exception):
            before(kind, error, trace)
            return
        message = f"{kind.__name__}: {error}"
        if _is_first(file, message):
            before(kind, error, trace)
        if not file.exists():
            text = {"message": message, "extraInfo": {"timestamp": str(int(time.time()))}}
            try:
                file.write_text(json.dumps({"message": text}))
            except OSError:  # then the traceback is all there is
                before(kind, error, trace)

    sys.excepthook = hook
