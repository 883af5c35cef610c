"""`python -m varcli` in a process that has torch already: a third of the suite's time was importing it.

A server imports the package and forks for each command. What stands for Python is a script of a few lines: it gives
the server its arguments, folder, environment and streams, passes on signals, and ends as the forked process does.
Processes that a command starts, as `--nproc` does, come from the server too. Whatever is about how a process starts,
or about torchrun, uses Python itself.
"""

import atexit
import functools
import json
import os
import selectors
import signal
import socket
import subprocess
import sys
import tempfile
from contextlib import suppress
from pathlib import Path

MODULES = ("torch._dynamo", "torch.nn.parallel", "torchvision", "torch_fidelity", "varcli.cli")
CLIENT = f"""#!{sys.executable} -SE
import json, os, signal, socket, sys

with socket.socket(socket.AF_UNIX) as server:
    server.connect(os.path.join(os.path.dirname(sys.argv[0]), "server"))
    socket.send_fds(server, [b"+"], [0, 1, 2])
    server.sendall(json.dumps([sys.argv[1:], os.getcwd(), dict(os.environ)]).encode() + b"\\n")
    answers = server.makefile()
    pid = int(answers.readline())
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, lambda number, frame: os.kill(pid, number))
    code = int(answers.readline())
if code < 0:
    signal.signal(-code, signal.SIG_DFL)
    os.kill(os.getpid(), -code)
os._exit(code)
"""


@functools.cache
def python():
    """Return what stands for `sys.executable` where tests run `-m varcli`; on other systems than Linux that itself."""
    if sys.platform != "linux":  # where libraries survive a fork
        return sys.executable
    folder = tempfile.TemporaryDirectory(prefix="varcli-tests-")
    client, address = Path(folder.name) / "python", Path(folder.name) / "server"
    client.write_text(CLIENT)
    client.chmod(0o700)
    # Both are read when torch is imported; ranks get the second.
    environment = os.environ | {"OMP_NUM_THREADS": "1", "TORCH_CPP_LOG_LEVEL": "ERROR"}
    server = subprocess.Popen(
        [sys.executable, __file__, address, client], env=environment, stdout=subprocess.PIPE, stdin=subprocess.DEVNULL
    )
    assert server.stdout.readline() == b"ready\n"
    atexit.register(folder.cleanup)
    atexit.register(server.terminate)
    return str(client)


def serve(address, client):
    """Fork a process for each client, as long as the tests run."""
    import importlib

    for name in MODULES:
        importlib.import_module(name)
    import varcli

    for file in Path(varcli.__file__).parent.glob("*/*.py"):
        if file.parent.name in ("commands", "pipelines", "training", "evaluation"):
            importlib.import_module(f"varcli.{file.parent.name}.{file.stem}")
    sys.executable = client
    listener = socket.socket(socket.AF_UNIX)
    listener.bind(address)
    listener.listen(64)
    os.write(1, b"ready\n")
    clients, parent = {}, os.getppid()
    with selectors.DefaultSelector() as ready:
        ready.register(listener, selectors.EVENT_READ)
        while os.getppid() == parent:
            for key, _ in ready.select(0.01 if clients else 1):
                if key.fileobj is listener:
                    connection = listener.accept()[0]
                    clients[connection] = begin(connection)
                    ready.register(connection, selectors.EVENT_READ)
                else:  # it was killed
                    os.kill(clients[key.fileobj], signal.SIGKILL)
                    ready.unregister(key.fileobj)
            for connection, pid in list(clients.items()):
                ended, status = os.waitpid(pid, os.WNOHANG)
                if ended:
                    with suppress(OSError):
                        connection.sendall(b"%d\n" % os.waitstatus_to_exitcode(status))
                    with suppress(KeyError):
                        ready.unregister(connection)
                    connection.close()
                    del clients[connection]


def begin(connection):
    """Fork the process that a client asks for; return its number."""
    _, streams, _, _ = socket.recv_fds(connection, 1, 3)
    with connection.makefile() as lines:
        arguments, folder, environment = json.loads(lines.readline())
    pid = os.fork()
    if pid == 0:
        become(arguments, folder, environment, streams)
    for stream in streams:
        os.close(stream)
    connection.sendall(b"%d\n" % pid)
    return pid


def become(arguments, folder, environment, streams):
    """Run a command line in this process, as Python would, and end it."""
    import runpy

    from varcli import collector

    code = 1
    try:
        os.setsid()
        os.chdir(folder)
        os.environ.clear()
        os.environ.update(environment)
        for number, stream in enumerate(streams):
            os.dup2(stream, number)
        os.closerange(3, 256)
        signal.signal(signal.SIGINT, signal.default_int_handler)
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        sys.stdin, sys.stdout = os.fdopen(0, closefd=False), os.fdopen(1, "w", closefd=False)
        sys.stderr = os.fdopen(2, "w", buffering=1, closefd=False, errors="backslashreplace")
        collector.pause = lambda: None  # torch is here, and so nothing would resume it
        assert arguments[:2] == ["-m", "varcli"], arguments
        sys.argv = arguments[1:]
        runpy.run_module("varcli", run_name="__main__", alter_sys=True)
        code = 0
    except SystemExit as end:
        code = end.code if isinstance(end.code, int) else int(end.code is not None)
    except BaseException:
        sys.excepthook(*sys.exc_info())
    finally:
        with suppress(BaseException):
            atexit._run_exitfuncs()
        for stream in (sys.stdout, sys.stderr):
            with suppress(OSError, ValueError):
                stream.flush()
        os._exit(code)


if __name__ == "__main__":
    serve(*sys.argv[1:])
