"""`hvd_lbt plan` on the command line."""

from hvd_lbt.cli import main


def test_planned_hours_follow_from_the_speed(capsys):
    assert main(["plan", "digits", "--images-per-second", "1437"]) == 0
    # 20 epochs of 1,437 images, one epoch a second
    assert "0.01 hours at 1,437 images/s" in capsys.readouterr().out
    assert main(["plan", "digits", "--images-per-second", "0"]) == 2
    assert (
        "argument --images-per-second: 0 is not allowed; it must be a number above 0"
        in capsys.readouterr().err
    )
