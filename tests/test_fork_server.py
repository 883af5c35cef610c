"""The server that runs `var` for other tests does it as Python would."""

import os
import signal
import subprocess
import sys

import pytest

from support import small
from support.fork_server import python

pytestmark = [pytest.mark.slow, pytest.mark.skipif(sys.platform != "linux", reason="Python itself is used")]


def test_streams_folder_environment_and_exit_code_are_those_of_python(tmp_path):
    small.save(tmp_path / "small.safetensors")
    environment = os.environ | {"VAR_CHECKPOINT": "small.safetensors"}
    answers = []
    for executable in (sys.executable, python()):
        command = [executable, "-m", "varcli", "sample", "--class", "-", "--out", "-", "--device", "cpu"]
        done = subprocess.run(
            command, input=b"207\n999\n", cwd=tmp_path, env=environment, capture_output=True, check=False
        )
        answers.append((done.returncode, done.stdout, done.stderr))
    assert answers[0] == answers[1]
    assert answers[0][0] == 3 and answers[0][1].startswith(b"207-golden_retriever") and b"999" in answers[0][2]


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGKILL])
def test_a_signal_ends_the_process_too(number, tmp_path):
    small.save(tmp_path / "small.safetensors")
    command = [python(), "-m", "varcli", "sample", "-c", "-", "-m", "small.safetensors", "-o", "-"]
    with subprocess.Popen(command, cwd=tmp_path, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as process:
        process.stdin.write(b"207\n")
        process.stdin.flush()
        assert process.stdout.read(4) == b"207-"
        process.send_signal(number)
        process.stdout.read()  # ends when the process behind it has, which holds the stream too
    assert process.returncode == -number
