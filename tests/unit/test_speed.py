"""The model of an update's time, and the files that fill it in."""

from dataclasses import replace

import pytest

from hvd_lbt.errors import UserError
from hvd_lbt.schedule.speed import Link, SpeedProfile, Work, fit_line, update_time
from hvd_lbt.speed_profile import load_profile, profile_text

PROFILE = SpeedProfile(
    name="mine",
    workers_per_node=4,
    update_seconds=0.01,
    micro_batch_seconds=0.001,
    sample_seconds={128: 0.001, 256: 0.004},
    gradient_bytes=100_000_000,
    messages=4,
    within_node=Link(bandwidth=1e10, latency=1e-5),
    between_nodes=Link(bandwidth=1e9, latency=1e-4),
    input_images_per_second=2000.0,
)
WORK = Work(workers=8, samples=64, micro_batches=2, last_micro_batch=32, image_size=128)


def test_an_update_is_compute_and_the_sum_by_hand():
    time = update_time(PROFILE, WORK)
    assert time.compute == pytest.approx(0.01 + 2 * 0.001 + 64 * 0.001)
    within = 2 * 3 / 4 * 1e8 / 1e10 + 2 * 3 * 4 * 1e-5
    between = 2 * 1 / 2 * 1e8 / 1e9 + 2 * 1 * 4 * 1e-4
    assert time.sum == time.exposed_sum == pytest.approx(within + between)
    assert time.input == pytest.approx(4 * 64 / 2000)
    assert time.total == pytest.approx(time.compute + time.sum)
    assert time.bottleneck == "sums"


def test_the_sum_hides_behind_the_last_micro_batch_only():
    whole = update_time(PROFILE, WORK).sum
    hidden = update_time(replace(PROFILE, overlap=0.5), WORK)
    assert hidden.exposed_sum == pytest.approx(whole - 0.5 * 32 * 0.001)
    last_message = update_time(replace(PROFILE, overlap=0.5, hidden_share=0.1), WORK)
    assert last_message.exposed_sum == pytest.approx(0.9 * whole)
    alone = update_time(PROFILE, replace(WORK, workers=1))
    assert (alone.sum, alone.exposed_sum) == (0.0, 0.0)


def test_the_input_is_the_bottleneck_where_it_is_slower():
    slow = update_time(replace(PROFILE, input_images_per_second=100.0), WORK)
    assert (slow.total, slow.bottleneck) == (4 * 64 / 100, "input")


@pytest.mark.parametrize(
    ("missing", "word"),
    [
        ({"gradient_bytes": None}, "gradient_bytes"),
        ({"within_node": None}, "within_node"),
        ({"between_nodes": None}, "between_nodes"),
    ],
)
def test_what_is_not_measured_is_named_and_not_guessed(missing, word):
    time = update_time(replace(PROFILE, **missing), WORK)
    assert time.total is None
    assert time.exposed_sum is None
    assert word in " ".join(time.unknown)


def test_an_image_size_that_was_not_measured_is_scaled_by_its_pixels():
    assert PROFILE.unmeasured_size(128) is None
    assert PROFILE.unmeasured_size(160) == 128
    assert PROFILE.seconds_a_sample(160) == pytest.approx(0.001 * (160 / 128) ** 2)


def test_two_batches_give_fixed_and_per_sample_seconds():
    assert fit_line([(10, 0.3), (20, 0.5), (40, 0.9)]) == pytest.approx((0.1, 0.02))
    assert fit_line([(10, 0.3), (10, 0.5)]) == pytest.approx((0.0, 0.04))
    assert fit_line([(10, 0.1), (20, 0.4)])[0] == 0.0
    assert fit_line([(10, 0.4), (20, 0.1)]) == (0.25, 0.0)
    with pytest.raises(ValueError, match="above 0"):
        fit_line([(0, 1.0)])


def test_a_profile_reads_back_as_it_was_written(tmp_path):
    file = tmp_path / "mine.yaml"
    file.write_text(profile_text(PROFILE))
    assert load_profile(file) == PROFILE


@pytest.mark.parametrize(
    ("old", "new", "words"),
    [
        ("update_seconds: 0.01", "update_seconds: -1", "update_seconds: -1 is not allowed"),
        ("update_seconds: 0.01", "update_seconds: .nan", "update_seconds: nan is not allowed"),
        ("update_seconds: 0.01", "update_second: 1", "Did you mean update_seconds?"),
        ("update_seconds: 0.01\n", "", "update_seconds: it is missing"),
        ("workers_per_node: 4", "workers_per_node: 0", "workers_per_node: 0 is not allowed"),
        ("workers_per_node: 4", "workers_per_node: true", "workers_per_node: True"),
        ("{bandwidth: 1000000000.0", "{bandwidth: 0", "between_nodes.bandwidth: 0"),
        ("128: 0.001", "big: 0.001", "image size: 'big' is not allowed"),
        ("128: 0.001", "128: 0.0", "sample_seconds[128]: 0.0 is not allowed"),
        ("overlap: 0.0", "overlap: 1.5", "overlap: 1.5 is not allowed"),
        ("messages: 4", "messages: null", "messages: None is not allowed"),
    ],
)
def test_a_bad_file_is_named_with_key_and_value(tmp_path, old, new, words):
    text = profile_text(PROFILE)
    assert old in text
    file = tmp_path / "mine.yaml"
    file.write_text(text.replace(old, new))
    with pytest.raises(UserError) as error:
        load_profile(file)
    assert words in str(error.value)
    assert str(file) in str(error.value)


def test_what_is_no_file_is_said_once(tmp_path):
    with pytest.raises(UserError) as error:
        load_profile(tmp_path)
    assert str(error.value) == (
        f"Speed profile {tmp_path}: it is a folder, and must be a regular file."
    )


def test_an_unknown_name_lists_what_there_is():
    with pytest.raises(UserError, match=r"no shipped profile and no file of this name"):
        load_profile("v100_infinband")
