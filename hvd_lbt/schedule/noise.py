"""The noise scale of SGD: the quantity that is scheduled (pure).

Source: S. L. Smith, P.-J. Kindermans, C. Ying, Q. V. Le, "Don't Decay the Learning Rate, Increase
the Batch Size", ICLR 2018, sections 2 to 4.
"""


def noise_scale(lr: float, momentum: float, train_samples: int, global_batch: int) -> float:
    """g ≈ ε·N / (B·(1−m)), the form in which a schedule is written.

    lr: ε > 0; momentum: m in [0, 1); train_samples: N; global_batch: B, both in samples.
    """
    return lr * train_samples / (global_batch * (1 - momentum))


def exact_noise_scale(lr: float, momentum: float, train_samples: int, global_batch: int) -> float:
    """g = ε/(1−m) · (N/B − 1), arguments as above; 0 from B = N on, where no noise is left."""
    return lr / (1 - momentum) * max(0.0, train_samples / global_batch - 1)


def batch_of_equal_noise(
    global_batch: int, *, lr: float, momentum: float, new_lr: float, new_momentum: float
) -> float:
    """B' = B · (ε'/ε) · (1−m)/(1−m'), not yet rounded: g stays when ε and m are changed."""
    return global_batch * (new_lr / lr) * (1 - momentum) / (1 - new_momentum)
