"""Processes that have not imported gyroquant, forked from a server that has imported what takes seconds.

`run` is `python -c` in a tenth of its time. The server is this file as a program: it imports modules of other packages,
then forks a child for each line that it reads.
"""

from __future__ import annotations

import atexit
import gc
import importlib
import json
import os
import subprocess
import sys
import tempfile
import traceback
from collections.abc import Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import Any

PACKAGES = (
    "torch",
    "torch._dynamo",
    "torch.distributed.tensor",
    "torch.distributed.fsdp",
    "scipy.optimize",
    "tokenizers",
)
"""What transformers imports of others, for children that care when transformers is imported."""
TRANSFORMERS = (*PACKAGES, "transformers.modeling_utils", "transformers.models.auto.modeling_auto")
TRANSFORMERS += ("transformers.models.llama.modeling_llama", "transformers.generation.utils")


def run(
    code: str,
    *arguments: object,
    imported: Sequence[str] = TRANSFORMERS,
    folder: Path | None = None,
    environment: Mapping[str, str] | None = None,
    given: str = "",
) -> subprocess.CompletedProcess[str]:
    """What `python -c code arguments` prints, in `folder`, when `given` is its input.

    The modules in `imported` are imported already.
    """
    command = [sys.executable, "-c", code, *map(str, arguments)]
    environment = dict(os.environ if environment is None else environment)
    if not hasattr(os, "fork"):
        options: dict[str, Any] = {"cwd": folder, "env": environment, "input": given, "check": False}
        return subprocess.run(command, **options, capture_output=True, text=True)
    with tempfile.TemporaryDirectory() as place:
        shown = [Path(place) / name for name in ("stdout", "stderr")]
        (Path(place) / "stdin").write_text(given)
        asked = {"code": code, "arguments": command[3:], "place": place}
        asked |= {"folder": str(folder or Path.cwd()), "environment": environment}
        server = _server(tuple(imported))
        assert server.stdin is not None
        assert server.stdout is not None
        server.stdin.write(json.dumps(asked) + "\n")
        server.stdin.flush()
        status = int(server.stdout.readline())
        return subprocess.CompletedProcess(command, status, *(path.read_text() for path in shown))


@cache
def _server(imported: tuple[str, ...]) -> subprocess.Popen[str]:
    """The server that has imported these modules. It ends with this process."""
    environment = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"} | {"OMP_NUM_THREADS": "1"}
    command = [sys.executable, __file__, *imported]
    server = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment)
    atexit.register(server.kill)
    return server


def _serve() -> None:
    sys.path[0] = ""
    for name in sys.argv[1:]:
        importlib.import_module(name)
    gc.collect()
    gc.freeze()
    for line in sys.stdin:
        child = os.fork()
        if not child:
            os._exit(_child(json.loads(line)))
        sys.stdout.write(f"{os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])}\n")
        sys.stdout.flush()


def _child(asked: dict[str, Any]) -> int:
    """Does what `python -c` would; returns its exit status."""
    for number, name in enumerate(("stdin", "stdout", "stderr")):
        os.dup2(os.open(f"{asked['place']}/{name}", os.O_WRONLY | os.O_CREAT if number else os.O_RDONLY), number)
    sys.stdin = os.fdopen(0, encoding="utf-8")  # the server has read ahead in its own
    os.chdir(asked["folder"])
    os.environ.clear()
    os.environ.update(asked["environment"])
    sys.path[1:1] = [path for path in os.environ.get("PYTHONPATH", "").split(os.pathsep) if path]
    sys.argv = ["-c", *asked["arguments"]]
    try:
        exec(compile(asked["code"], "<string>", "exec"), {"__name__": "__main__"})
    except SystemExit as done:
        if isinstance(done.code, str):
            sys.stderr.write(f"{done.code}\n")
        return done.code if isinstance(done.code, int) else int(bool(done.code))
    except BaseException:  # whatever it is, an interpreter would print it
        traceback.print_exc()
        return 1
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
    return 0


if __name__ == "__main__":
    _serve()
