import threading
import time

import numpy as np
import pytest
import torch

from varcli.distributed import ProcessGroup
from varcli.errors import InputError
from varcli.evaluation import feature_pass
from varcli.evaluation.extractors import Features
from varcli.evaluation.feature_pass import FeaturePass, fingerprint
from varcli.evaluation.statistics import EvalPlan, FeatureShape

COUNT, WIDTH, CLASSES = 41, 6, 5
SHAPE = FeatureShape(pool=WIDTH, classes=CLASSES)
PLAN = EvalPlan(count=COUNT, metrics=("fid", "is", "kid"), classes=3)


@pytest.fixture(autouse=True)
def narrow(monkeypatch):
    """Let rounds be short."""
    monkeypatch.setattr(feature_pass, "ROUNDS", {"cpu": 8})


class Sums:
    """A network whose features follow from the pixels of each image."""

    device = torch.device("cpu")

    def features(self, pixels_BHW3):
        """Return them."""
        level_B = torch.from_numpy(pixels_BHW3).double().mean((1, 2, 3))[:, None]
        return Features(
            (level_B * torch.arange(1, WIDTH + 1)).sin().float(), (level_B * torch.arange(1, CLASSES + 1)).cos().float()
        )


def make(ranks, batch=3):
    """Yield images whose pixels follow from their rank, in batches, the last ones first."""
    for start in range(0, len(ranks), batch):
        own = ranks[start : start + batch][::-1]
        yield own, np.array([[[[rank, 2 * rank, 3]]] for rank in own], np.uint8), [rank % 3 for rank in own]


def sums(found):
    return {name: tensor.double().numpy() for name, tensor in found.statistics.tensors().items()}


def assert_equal(found, expected):
    for name, values in sums(expected).items():
        assert np.allclose(sums(found)[name], values, rtol=1e-12, atol=1e-14), name


@pytest.fixture
def whole():
    """The measurement of all images in one go."""
    done = FeaturePass(PLAN, SHAPE, "same")
    done.run(make, Sums())
    assert done.statistics.count == COUNT
    return done


def killing(after, error=KeyboardInterrupt):
    """Return what makes images, until it has made so many."""
    left = [after]

    def made(ranks):
        for batch in make(ranks):
            left[0] -= len(batch[0])
            if left[0] < 0:
                raise error
            yield batch

    return made


# --- going on --------------------------------------------------------------------------------------


@pytest.mark.parametrize("error", [KeyboardInterrupt, InputError("an image"), MemoryError()])
def test_a_run_that_ended_early_goes_on_to_the_same_figures(tmp_path, whole, error):
    path = tmp_path / "kept" / "measurement.safetensors"
    first = FeaturePass(PLAN, SHAPE, "same", path)
    with pytest.raises(error if isinstance(error, type) else type(error)):
        first.run(killing(20, error), Sums())
    assert first.statistics.count == 16  # the rounds that were finished
    second, asked = FeaturePass(PLAN, SHAPE, "same", path), []
    assert second.statistics.count == 16 and not second.notice
    second.run(lambda ranks: (asked.extend(ranks), make(ranks))[1], Sums())
    assert sorted(asked) == list(range(16, COUNT))
    assert_equal(second, whole)
    third = FeaturePass(PLAN, SHAPE, "same", path)
    third.run(killing(0), Sums())  # nothing is left to be made
    assert_equal(third, whole)


def test_one_killed_between_saves_goes_on_from_the_last(tmp_path, whole, monkeypatch):
    path = tmp_path / "measurement.safetensors"
    monkeypatch.setattr(feature_pass, "SAVE_IMAGES", 16)
    with monkeypatch.context() as killed, pytest.raises(KeyboardInterrupt):
        first = FeaturePass(PLAN, SHAPE, "same", path)
        killed.setattr(first, "save", lambda save=first.save: save() if first._unsaved >= 16 else None)
        first.run(killing(30), Sums())
    second = FeaturePass(PLAN, SHAPE, "same", path)
    assert second.statistics.count == 16
    second.run(make, Sums())
    assert_equal(second, whole)


def test_time_too_makes_it_save(tmp_path, monkeypatch):
    path, seen = tmp_path / "measurement.safetensors", []
    monkeypatch.setattr(feature_pass, "SAVE_SECONDS", 0)
    FeaturePass(PLAN, SHAPE, "same", path).run(make, Sums(), lambda count: seen.append((count, path.exists())))
    assert seen == [(8, False), (8, True), (8, True), (8, True), (8, True), (1, True)]


def test_half_added_sums_are_not_saved(tmp_path, monkeypatch):
    path = tmp_path / "measurement.safetensors"
    first = FeaturePass(PLAN, SHAPE, "same", path)

    def interrupted(row_B, pool_BN):
        raise KeyboardInterrupt

    monkeypatch.setattr(first.statistics, "_add_classes", interrupted)
    with pytest.raises(KeyboardInterrupt):
        first.run(make, Sums())
    assert not path.exists()


@pytest.mark.parametrize("content", [b"", b"{}", b"x" * 500])
def test_a_damaged_file_is_said_and_made_anew(tmp_path, whole, content):
    path = tmp_path / "measurement.safetensors"
    path.write_bytes(content)
    again = FeaturePass(PLAN, SHAPE, "same", path)
    assert again.notice == f"{path} is damaged: measuring from the start"
    again.run(make, Sums())
    assert_equal(again, whole)
    assert FeaturePass(PLAN, SHAPE, "same", path).statistics.count == COUNT


def test_a_truncated_file_is_said(tmp_path):
    path = tmp_path / "measurement.safetensors"
    FeaturePass(PLAN, SHAPE, "same", path).run(make, Sums())
    path.write_bytes(path.read_bytes()[:-9])
    assert FeaturePass(PLAN, SHAPE, "same", path).notice == f"{path} is damaged: measuring from the start"


@pytest.mark.parametrize(
    ("plan", "identity"), [(PLAN, "another"), (EvalPlan(count=COUNT), "same"), (EvalPlan(count=COUNT + 1), "same")]
)
def test_another_measurements_file_is_not_gone_on_with(tmp_path, plan, identity):
    path = tmp_path / "measurement.safetensors"
    FeaturePass(PLAN, SHAPE, "same", path).run(make, Sums())
    other = FeaturePass(plan, SHAPE, identity, path)
    assert other.notice == f"{path} is of another measurement: measuring from the start"
    assert other.statistics.count == 0


def test_fingerprints_tell_facts_apart():
    assert fingerprint(a=1, b="x") == fingerprint(b="x", a=1)
    assert len({fingerprint(a=1), fingerprint(a=2), fingerprint(b=1), fingerprint(a="1")}) == 4


@pytest.mark.parametrize("folder", ["folder", "file/x"])
def test_without_a_folder_to_keep_it_nothing_is_kept(whole, tmp_path, folder):
    (tmp_path / "folder").mkdir()
    (tmp_path / "file").touch()
    found = FeaturePass(PLAN, SHAPE, "same", tmp_path / folder)
    assert found.notice.startswith("measuring without saving progress: ")
    assert found.path is None
    found.run(make, Sums())
    assert_equal(found, whole)


# --- images --------------------------------------------------------------------------------------


def test_images_that_cannot_be_had_are_left_out(whole):
    found = FeaturePass(PLAN, SHAPE, "same")
    found.run(lambda ranks: make([rank for rank in ranks if rank != 5]), Sums())
    assert found.statistics.count == COUNT - 1
    assert not found.statistics.present[5]


def test_the_time_is_counted(whole):
    found = FeaturePass(PLAN, SHAPE, "same")

    def slow(ranks):
        time.sleep(0.01)
        yield from make(ranks)

    found.run(slow, Sums())
    assert found.seconds["images"] >= 0.05
    assert found.seconds["features"] > 0


@pytest.mark.parametrize("unit", [1, 4, 5])
def test_what_belongs_together_is_made_together(whole, unit):
    asked, found = [], FeaturePass(PLAN, SHAPE, "same")
    found.run(lambda ranks: (asked.append(ranks), make(ranks))[1], Sums(), unit=unit)
    assert all(ranks[0] % unit == 0 for ranks in asked)
    assert_equal(found, whole)


# --- several processes -----------------------------------------------------------------------------


class Threads(ProcessGroup):
    """Threads in place of processes."""

    meeting, said = threading.Barrier(2), [None, None]

    def exchanged(self, item):
        """Return what both say."""
        self.meeting.wait()
        self.said[self.rank] = item
        self.meeting.wait()
        return list(self.said)

    def broadcast(self, item):
        """Return what the first one says."""
        return self.exchanged(item)[0]

    def sum(self, tensors):
        """Return the sum of both."""
        both = self.exchanged(tensors)
        return {name: both[0][name] + both[1][name] for name in tensors}


@pytest.mark.parametrize("unit", [1, 4])
def test_two_processes_find_what_one_finds(tmp_path, whole, unit):
    path, asked = tmp_path / "measurement.safetensors", [[], []]
    with pytest.raises(KeyboardInterrupt):
        FeaturePass(PLAN, SHAPE, "same", path).run(killing(10), Sums())
    both = [FeaturePass(PLAN, SHAPE, "same", path, Threads(rank, 2)) for rank in (0, 1)]
    threads = [
        threading.Thread(
            target=each.run,
            args=(lambda ranks, own=own: (own.extend(ranks), make(ranks))[1], Sums()),
            kwargs={"unit": unit},
        )
        for each, own in zip(both, asked, strict=True)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert all(asked) and sorted(asked[0] + asked[1]) == list(range(8, COUNT))
    assert_equal(both[0], whole)
    assert both[1].statistics.count == 0  # the first one has them
