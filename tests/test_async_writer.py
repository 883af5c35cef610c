"""Images on their way into a sink: in order, only so many at a time, and no error lost."""

import os
import threading
import time
import tracemalloc
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest

from support.provenances import image, listing, made
from varcli.errors import RunError
from varcli.images.provenance import Provenance
from varcli.outputs import async_writer
from varcli.outputs.async_writer import AsyncWriter
from varcli.outputs.open import open_sink
from varcli.outputs.sinks import Sink


@dataclass(frozen=True)
class Item:
    provenance: Provenance


class Slow(Sink):
    """Encodes the first images last, and counts what it was given."""

    def __init__(self):
        self.prepared, self.written, self.lock = 0, [], threading.Lock()

    def prepare(self, pixels, made):
        time.sleep(0.02 if made.seed % 4 == 0 else 0)
        with self.lock:
            self.prepared += 1
        return made.seed

    def put(self, prepared, made):
        assert prepared == made.seed
        self.written.append(made.seed)
        return Path(f"{made.seed}.png")


def write(output, seeds, told, ahead=4):
    with AsyncWriter(output, lambda item, path: told.append((item.provenance.seed, path)), ahead) as writer:
        for seed in seeds:
            item = Item(made(seed))
            writer.put(item, writer.prepare(item, image(seed)))
    return told


def test_all_come_in_order_and_are_told():
    output = Slow()
    assert write(output, range(40), []) == [(seed, Path(f"{seed}.png")) for seed in range(40)]
    assert output.written == list(range(40)) and output.prepared == 40


def test_what_another_process_prepared_is_taken_as_it_is():
    output = Slow()
    with AsyncWriter(output, lambda item, path: None, 4) as writer:
        writer.put(Item(made(3)), 3)
    assert output.written == [3] and output.prepared == 0


def test_waiting_ends_when_all_are_there():
    output = Slow()
    with AsyncWriter(output, lambda item, path: None, 4) as writer:
        for seed in range(8):
            item = Item(made(seed))
            writer.put(item, writer.prepare(item, image(seed)))
            if seed % 4 == 3:
                writer.wait()
                assert output.written == list(range(seed + 1))


def test_only_so_many_are_under_way():
    """The thread that makes images waits while none can be written."""
    output, free, given = Slow(), threading.Event(), []
    put = output.put
    output.put = lambda prepared, made: free.wait() and put(prepared, made)

    def make():
        with AsyncWriter(output, lambda item, path: None, 4) as writer:
            for seed in range(20):
                item = Item(made(seed))
                writer.put(item, writer.prepare(item, image(seed)))
                given.append(seed)

    maker = threading.Thread(target=make)
    maker.start()
    time.sleep(0.3)
    assert len(given) <= 4 + 2  # those that wait, the one being written, the one being given
    free.set()
    maker.join()
    assert output.written == list(range(20))


@pytest.mark.parametrize("step", ["prepare", "put", "told"])
def test_an_error_in_a_thread_is_raised_in_the_main_one(step):
    output = Slow()

    def fail(*_):
        raise RunError("no space")

    if step != "told":
        setattr(output, step, fail)
    with pytest.raises(RunError, match="no space"), AsyncWriter(output, fail, 4) as writer:
        for seed in range(100):
            item = Item(made(seed))
            writer.put(item, writer.prepare(item, image(seed)))
            time.sleep(0.01)
        raise AssertionError("not noticed until the end")


def test_an_error_of_the_last_image_is_raised_too():
    output = Slow()
    output.put = lambda prepared, made: 1 / 0
    with pytest.raises(ZeroDivisionError):
        write(output, [0], [])


@pytest.mark.parametrize("out", ["o", "x.npz", "x.tar"])
def test_an_interrupted_run_keeps_what_was_made(tmp_path, monkeypatch, out):
    monkeypatch.chdir(tmp_path)
    with (
        pytest.raises(KeyboardInterrupt),
        open_sink(out, several=True) as output,
        AsyncWriter(output, lambda item, path: None, 4) as writer,
    ):
        for seed in range(10):
            item = Item(made(seed))
            writer.put(item, writer.prepare(item, image(seed)))
        raise KeyboardInterrupt
    with open_sink(out, several=True, resume=True) as output:
        assert all(output.has(made(seed)) for seed in range(10))
    assert listing(tmp_path) == [out]
    assert not [thread for thread in threading.enumerate() if thread.name == "writer"]


def test_one_image_asked_for_many_times_is_one_file(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with open_sink("o", several=True) as output, AsyncWriter(output, lambda item, path: None, 4) as writer:
        for _ in range(100):
            writer.put(Item(made()), writer.prepare(Item(made()), image()))
    assert len(listing(tmp_path / "o")) == 1


def test_an_interrupted_run_ends_though_nobody_takes_its_images(monkeypatch):
    """With a full queue behind an image that is stuck, as in a pipe whose reader has stopped."""
    monkeypatch.setattr(async_writer, "_GRACE", 0.2)
    output, stuck, free, left = Slow(), threading.Event(), threading.Event(), threading.Event()
    output.put = lambda prepared, made: stuck.set() or free.wait()

    def make():
        with pytest.raises(KeyboardInterrupt), AsyncWriter(output, lambda item, path: None, 2) as writer:
            writer.put(Item(made(0)), 0)
            stuck.wait()
            for seed in (1, 2):
                writer.put(Item(made(seed)), seed)
            assert writer._waiting.full()
            raise KeyboardInterrupt
        left.set()

    maker = threading.Thread(target=make, daemon=True)
    maker.start()
    ended = left.wait(20)
    free.set()
    assert ended


@pytest.mark.skipif(os.name == "nt", reason="no named pipes")
def test_a_pipe_whose_reader_has_stopped_can_be_left(tmp_path, monkeypatch):
    monkeypatch.setattr(async_writer, "_GRACE", 0.2)
    pipe, left = tmp_path / "pipe", threading.Event()
    os.mkfifo(pipe)
    reader = os.open(pipe, os.O_RDONLY | os.O_NONBLOCK)

    def make():
        with (
            pytest.raises(KeyboardInterrupt),
            open_sink(str(pipe), several=True) as output,
            AsyncWriter(output, lambda item, path: None, 4) as writer,
        ):
            writer.put(Item(made(0)), bytes(2**22))  # more than any pipe holds
            time.sleep(0.2)
            raise KeyboardInterrupt
        left.set()

    maker = threading.Thread(target=make, daemon=True)
    maker.start()
    ended = left.wait(20)
    os.close(reader)
    assert ended


@pytest.mark.slow
@pytest.mark.parametrize("out", ["o", "x.npz", "x.tar"])
def test_memory_stays_flat(tmp_path, monkeypatch, out):
    monkeypatch.chdir(tmp_path)
    pixels = image(0, 64, 64)

    def peak(count):
        with open_sink(out, several=True) as output:
            tracemalloc.start()
            with AsyncWriter(output, lambda item, path: None, 4) as writer:
                for seed in range(count):
                    item = Item(made(seed))
                    writer.put(item, writer.prepare(item, pixels ^ np.uint8(seed % 2)))
            found = tracemalloc.get_traced_memory()[1]
            tracemalloc.stop()
        return found

    peak(20)
    assert peak(600) < peak(20) + 2**19  # 600 of them are 7.2 MB
