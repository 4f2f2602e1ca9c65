"""What `bench profile` makes of its timings: a, b and c of exact ones, and never a negative one."""

import pytest
from small_disk import small_disk

from hvd_lbt.bench import profile
from hvd_lbt.bench.profile import Timed, fit, overlap_of
from hvd_lbt.cli import main
from hvd_lbt.errors import UserError


def timed(size, samples, seconds, micro_batch=64):
    return Timed(image_size=size, samples=samples, micro_batch=micro_batch, seconds=seconds)


def test_exact_timings_give_their_a_b_and_c_again():
    b = {128: 1e-3, 224: 3e-3}
    points = [
        timed(size, samples, 0.02 + 0.004 * forwards + b[size] * samples)
        for size in b
        for samples, forwards in ((16, 1), (32, 1), (64, 1), (128, 2))
    ]
    fixed, of_micro_batch, of_sample = fit(points)
    assert fixed == pytest.approx(0.02)
    assert of_micro_batch == pytest.approx(0.004)
    assert of_sample == pytest.approx(b)


def test_what_would_be_negative_is_zero():
    fixed, of_micro_batch, of_sample = fit(
        [timed(32, 16, 0.010), timed(32, 32, 0.025), timed(32, 64, 0.055), timed(32, 128, 0.12)]
    )
    assert fixed == 0
    assert of_micro_batch >= 0
    assert 0.0006 < of_sample[32] < 0.00095


def test_timings_that_do_not_grow_are_all_counted_as_samples():
    fixed, of_micro_batch, of_sample = fit(
        [timed(8, 8, 0.1), timed(8, 16, 0.05), timed(8, 32, 0.02)]
    )
    assert (fixed, of_micro_batch) == (0, 0)
    assert of_sample == {8: pytest.approx(0.17 / 56)}


def test_the_overlap_is_of_the_small_update_and_the_share_of_the_large_one():
    # b = 1 ms: backward of 16 samples hides 8 ms of the 50 ms sum, that of 64 hides 30 ms
    assert overlap_of([(16, 0.008), (64, 0.030)], 1e-3, 0.050) == pytest.approx((0.5, 0.6))
    assert overlap_of([(16, -0.01), (64, -0.02)], 1e-3, 0.050) == (0.0, 0.0)  # sums slow it down
    assert overlap_of([(16, 0.08), (64, 0.08)], 1e-3, 0.050) == (1.0, 1.0)


def test_a_profile_that_does_not_fit_its_disk_leaves_the_one_before(tmp_path):
    with small_disk(tmp_path / "disk", "16k"):
        out = tmp_path / "disk/speed.yaml"
        out.write_text("before")
        (tmp_path / "disk/fill").write_bytes(bytes(12_288))
        with pytest.raises(UserError, match=r"--out .*speed.yaml: it cannot be written \(No space"):
            profile._write(out, "after")
        assert out.read_text() == "before"
        assert sorted(file.name for file in out.parent.iterdir()) == ["fill", "speed.yaml"]


@pytest.mark.parametrize(
    ("words", "named"),
    [
        (["no_such"], "Recipe no_such: there is no shipped recipe"),
        (["digits", "--minutes", "0"], "--minutes: 0"),
        (["digits", "--image-sizes", "0"], "--image-sizes: 0"),
        (["digits", "--micro-batch", "x"], "--micro-batch: x"),
        (["digits", "--out", "/dev/null/x"], "--out /dev/null/x: it cannot be written"),
        (["digits", "--out", __file__], "it exists and is no speed profile"),
        (["digits", "--data", "synthetic"], "--data synthetic: "),
        (["digits", "--data", "/nowhere"], "--data /nowhere: there is no such folder"),
    ],
)
def test_what_cannot_be_measured_is_named(words, named, capsys):
    assert main(["bench", "profile", *words]) == 2
    assert named in capsys.readouterr().err.splitlines()[-1]
