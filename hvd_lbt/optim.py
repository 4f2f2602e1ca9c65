"""SGD with momentum, the whole update in one pass over memory."""

from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from inspect import unwrap
from typing import Any

import torch
from torch import Tensor
from torch.optim.optimizer import Optimizer, ParamsT

from hvd_lbt import ops

# torch wraps these so that the first call imports all of torch.compile, 843 modules: a quarter of
# the CPU time that a rank takes to start, for methods that nothing here compiles.
_add_param_group = unwrap(Optimizer.add_param_group)
_state_dict = unwrap(Optimizer.state_dict)
_load_state_dict = unwrap(Optimizer.load_state_dict)


@dataclass(frozen=True, kw_only=True)
class StepGradients:
    """What one update is made of, when it does not come from `p.grad`.

    grads: gradient of each parameter that has one, float32, float16 or bfloat16, laid out as the
    parameter (views into wire buckets); grad_scale: one float32 that the gradients were multiplied
    by; found_inf: one float32, not 0 = skip this update.
    """

    grads: Mapping[Tensor, Tensor]
    grad_scale: Tensor | None = None
    found_inf: Tensor | None = None


class FusedSGD(Optimizer):
    """torch.optim.SGD's update: g += weight_decay·w; b = momentum·b + g; w -= lr·b.

    (nesterov: w -= lr·(g + momentum·b); maximize: -g before the decay.) Weights and momentum are
    float32 and dense; gradients float32, float16 or bfloat16. `state_dict` is torch.optim.SGD's,
    each loads the other's. Momentum begins as zeros, so an update skipped by `found_inf`, the first
    one too, leaves no trace. torch.amp.GradScaler hands its scale over and need not unscale.

    Refused: dampening (it would make the first update a special case), sparse gradients, weights of
    another type or with gaps in memory, `differentiable`. Raises ValueError or TypeError.
    """

    _step_supports_amp_scaling = True  # GradScaler then sets grad_scale and found_inf for a step

    def __init__(
        self,
        params: ParamsT,
        lr: float | Tensor = 1e-3,
        momentum: float = 0.0,
        *,
        weight_decay: float = 0.0,
        nesterov: bool = False,
        maximize: bool = False,
        dampening: float = 0.0,
    ) -> None:
        ops.require()
        if isinstance(lr, Tensor) and lr.numel() != 1:
            raise ValueError("Tensor lr must be 1-element")
        # The keys after maximize are torch.optim.SGD's: it needs them to load our state.
        defaults = {
            "lr": lr,
            "momentum": momentum,
            "weight_decay": weight_decay,
            "nesterov": nesterov,
            "maximize": maximize,
            "dampening": dampening,
            "foreach": None,
            "differentiable": False,
            "fused": None,
        }
        self._gradient_source: Callable[[], StepGradients] | None = None
        super().__init__(params, defaults)

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """As torch's; the group's settings and weights are checked."""
        _add_param_group(self, param_group)
        number = len(self.param_groups) - 1
        try:
            self._check_group(number)
            for i, param in enumerate(self.param_groups[-1]["params"]):
                name = f"parameter {i} of group {number}"
                if param.dtype != torch.float32:
                    raise TypeError(f"{name} is {param.dtype}; FusedSGD updates float32 weights")
                if not torch.ops.aten.is_non_overlapping_and_dense(param):
                    raise ValueError(f"{name} has gaps in its memory (strides {param.stride()})")
        except (TypeError, ValueError):
            self.param_groups.pop()
            raise

    def state_dict(self) -> dict[str, Any]:
        """As torch's."""
        return _state_dict(self)

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """As torch's."""
        _load_state_dict(self, state_dict)

    def _check_group(self, number: int) -> None:
        group = self.param_groups[number]
        for key, name in (
            ("lr", "learning rate"),
            ("momentum", "momentum value"),
            ("weight_decay", "weight_decay value"),
        ):
            if group[key] < 0:
                raise ValueError(f"Invalid {name}: {group[key]} (group {number}); it must be ≥ 0")
        if group["dampening"] != 0:
            raise ValueError(
                f"group {number} has dampening {group['dampening']}: FusedSGD has none. With "
                "dampening d the first update is an exception; scale lr by 1 - d instead."
            )
        if group["differentiable"]:
            raise ValueError(f"group {number} is differentiable: FusedSGD cannot be")
        if group["nesterov"] and group["momentum"] <= 0:
            raise ValueError(f"nesterov in group {number} needs a momentum above 0")

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        # A pickled optimizer left it behind: it belongs to the process.
        self.__dict__.setdefault("_gradient_source", None)
        for number, group in enumerate(self.param_groups):
            for key, value in self.defaults.items():
                group.setdefault(key, value)
            self._check_group(number)

    @torch.no_grad()
    def make_momenta(self) -> None:
        """Allocate all momentum buffers now, as zeros, instead of in the first step."""
        for group in self.param_groups:
            if group["momentum"] != 0:
                self._momenta(group["params"])

    def set_gradient_source(self, source: Callable[[], StepGradients] | None) -> None:
        """Take gradients from `source()`, called once at the start of each step; None: p.grad."""
        self._gradient_source = source

    @torch.no_grad()
    def rescale_momentum(self, factor: float) -> None:
        """Multiply every momentum buffer by `factor`.

        A constant gradient g brings the buffer to g/(1-m), after some 1/(1-m) updates. When m
        changes to m', the old buffer is (1-m')/(1-m) times what m' would have settled at; with
        factor = (1-m)/(1-m') it is there at once, without the settle time in which updates are too
        short (m' > m) or too long (Smith et al., 2018, section 4: the cost of a large m).
        """
        for state in self.state.values():
            if state.get("momentum_buffer") is not None:
                state["momentum_buffer"].mul_(factor)

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Make one update; returns the loss if `closure` computes one."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        grad_scale, found_inf = getattr(self, "grad_scale", None), getattr(self, "found_inf", None)
        if self._gradient_source is not None:
            if grad_scale is not None or found_inf is not None:
                raise ValueError("GradScaler and a gradient source both scale: use one of them")
            given = self._gradient_source()
        else:
            given = StepGradients(
                grads=self._own_gradients(), grad_scale=grad_scale, found_inf=found_inf
            )
        for group in self.param_groups:
            self._update_group(group, given)
        return loss

    def _own_gradients(self) -> dict[Tensor, Tensor]:
        grads = {}
        for number, group in enumerate(self.param_groups):
            for i, param in enumerate(group["params"]):
                if param.grad is None:
                    continue
                if param.grad.layout != torch.strided:
                    raise RuntimeError(
                        f"the gradient of parameter {i} of group {number} is sparse: FusedSGD "
                        "updates every weight. Use a dense gradient (sparse=False) or torch's SGD."
                    )
                grads[param] = ops.laid_out_as(param.grad, param)
        return grads

    def _update_group(self, group: dict[str, Any], given: StepGradients) -> None:
        calls: defaultdict[torch.device, list[Tensor]] = defaultdict(list)
        for param in group["params"]:
            if param in given.grads:
                calls[param.device].append(param)
        for device, params in calls.items():
            ops.fused_sgd_(
                params,
                [given.grads[param] for param in params],
                self._momenta(params) if group["momentum"] != 0 else (),
                lr=float(group["lr"]),
                momentum=group["momentum"],
                weight_decay=float(group["weight_decay"]),
                nesterov=group["nesterov"],
                maximize=group["maximize"],
                grad_scale=_flag_on(given.grad_scale, device),
                found_inf=_flag_on(given.found_inf, device),
            )

    def _momenta(self, params: Iterable[Tensor]) -> list[Tensor]:
        momenta = []
        for param in params:
            state = self.state[param]
            if state.get("momentum_buffer") is None:
                state["momentum_buffer"] = torch.zeros_like(param)
            momenta.append(state["momentum_buffer"])
        return momenta


def _flag_on(flag: Tensor | None, device: torch.device) -> Tensor | None:
    """A scale or flag where the parameters are (GradScaler's live on one device)."""
    return None if flag is None else flag.to(device=device, dtype=torch.float32)
