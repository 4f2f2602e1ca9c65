"""Write a checkpoint's weights alone, for other programs, and the class of each output."""

import argparse
from pathlib import Path

import torch

from hvd_lbt.checkpoint import averages_in, load_trained, reason_of
from hvd_lbt.errors import UserError
from hvd_lbt.terminal import printable


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The arguments of `hvd_lbt export`."""
    parser.add_argument("checkpoint", type=Path, help="RUN/checkpoints/update-NNNNNNNN.pt")
    parser.add_argument(
        "--weights",
        choices=("ema", "model"),
        help="the moving average [if the run has one] or the weights themselves",
    )
    parser.add_argument("--out", type=Path, help="the file to write [RECIPE.pth]")


def main(args: argparse.Namespace) -> int:
    """Write a checkpoint's weights alone, and the class names in the order of the outputs.

    The weights are torch.save of a state_dict with torchvision's names.
    """
    state, recipe = load_trained(args.checkpoint)
    averages = averages_in(state)
    if args.weights == "ema" and not averages:
        raise UserError(
            f"--weights ema: the checkpoint {args.checkpoint} holds no averaged weights; "
            "its recipe has no ema.decay. Leave --weights out."
        )
    averaged = bool(averages) and args.weights != "model"
    weights = {**state["model"], **averages} if averaged else state["model"]
    out = args.out or Path(f"{recipe.name}.pth")
    names = out.with_name(f"{out.stem}.classes.txt")
    try:
        torch.save({name: tensor.contiguous() for name, tensor in weights.items()}, out)
        lines = "".join(f"{name}\n" for name in state["classes"])
        names.write_bytes(lines.encode("utf-8", "surrogateescape"))
    except (OSError, RuntimeError) as error:
        raise UserError(f"--out {out}: it could not be written ({reason_of(error)}).") from error
    print(
        f"{printable(out)}: the {'moving average of the ' if averaged else ''}weights after "
        f"{state['update']:,} updates, for "
        "model.load_state_dict"
    )
    classes = state["classes"]
    shown = ", ".join(f"{label} {printable(name)}" for label, name in enumerate(classes[:12]))
    more = f", … {len(classes) - 1}" if len(classes) > 12 else ""
    print(f"{printable(names)}: the class of each output, one a line: {shown}{more}")
    return 0
