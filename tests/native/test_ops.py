"""The operators against plain torch in float64: every option, form, size, instruction set."""

import itertools
import os

import pytest
import torch

from hvd_lbt import ops

EPS = 2.0**-24  # half a unit in the last place of 1.0: the error of one rounding to float32
FORMS = [torch.float32, torch.float16, torch.bfloat16]
# Nothing, one, a vector less or more than whole, and more than a thread's least share (32768).
SIZES = [0, 1, 31, 64, 32768 + 1, 70001]
HUGE = os.environ.get("HVD_LBT_TEST_HUGE") == "1"


def instruction_sets() -> list[str]:
    try:
        ops.cpu_isa("none of these")
    except ValueError as error:
        return str(error).splitlines()[0].rpartition("has ")[2].split(", ")
    raise AssertionError("an unknown instruction set was taken")


@pytest.fixture(params=instruction_sets())
def isa(request):
    before = ops.cpu_isa()
    yield ops.cpu_isa(request.param)
    ops.cpu_isa(before)


def tensors(sizes, dtype=torch.float32, *, seed=0, offset=0) -> list[torch.Tensor]:
    """Random tensors that begin `offset` elements into their memory: then vectors are unaligned."""
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(n + offset, generator=generator).to(dtype)[offset:] for n in sizes]


def clones(lists):
    return [[t.clone() for t in one] for one in lists]


def assert_within(actual, exact, bound):
    for i, (a, e, b) in enumerate(zip(actual, exact, bound, strict=True)):
        excess = (a.double() - e).abs() - b
        assert not (excess > 0).any(), (
            f"tensor {i}, {ops.cpu_isa()}: {excess.max().item():.3g} above the bound"
        )


OPTIONS = list(
    itertools.product((0.0, 0.9), (0.0, 1e-2), (False, True), (False, True), (None, 1024.0))
)


@pytest.fixture
def each_isa():
    """Sets the instruction sets one after the other, for what is compared with one reference."""
    before = ops.cpu_isa()

    def each():
        for name in instruction_sets():
            ops.cpu_isa(name)
            yield name

    yield each
    ops.cpu_isa(before)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("offset", [0, 3])
def test_one_update_is_that_of_float64(each_isa, form, offset):
    first_params = tensors(SIZES, seed=1, offset=offset)
    grads = tensors(SIZES, form, seed=2, offset=offset)
    first_momenta = tensors(SIZES, seed=3, offset=offset)

    def copied(lists):  # at the same place in memory: unaligned where they were
        return [torch.cat([one.new_zeros(offset), one])[offset:] for one in lists]

    for momentum, weight_decay, nesterov, maximize, scale in OPTIONS:
        if nesterov and momentum == 0:
            continue
        options = {"momentum": momentum, "weight_decay": weight_decay, "nesterov": nesterov}
        options |= {"lr": 0.1, "maximize": maximize}
        given = None if scale is None else torch.tensor(scale)
        exact_params = [t.double() for t in first_params]
        exact_momenta = [t.double() for t in first_momenta] if momentum else []
        # Every rounding errs by at most EPS of what it rounds; 8 of them, of at most this size:
        bound = [
            8
            * EPS
            * (
                p.abs()
                + (1 + momentum) * (g.abs().double() / (scale or 1) + weight_decay * p.abs())
                + (momentum * m.abs() if momentum else 0)
            )
            for p, g, m in zip(exact_params, grads, exact_momenta or exact_params, strict=True)
        ]
        ops.fused_sgd_reference(exact_params, grads, exact_momenta, grad_scale=given, **options)
        for _ in each_isa():
            params, momenta = copied(first_params), copied(first_momenta if momentum else [])
            ops.fused_sgd_(params, grads, momenta, grad_scale=given, **options)
            assert_within(params, exact_params, bound)
            assert_within(momenta, exact_momenta, bound if momenta else [])


@pytest.mark.parametrize("form", FORMS)
def test_all_instruction_sets_give_the_same_bits(form):
    before = ops.cpu_isa()
    results = []
    for name in instruction_sets():
        ops.cpu_isa(name)
        params, momenta = tensors(SIZES, seed=1), tensors(SIZES, seed=3)
        scale, overflow = torch.tensor(3.0), torch.zeros(1)
        options = {"lr": 0.1, "momentum": 0.9, "weight_decay": 1e-2, "nesterov": True}
        ops.fused_sgd_(
            params,
            tensors(SIZES, form, seed=2),
            momenta,
            maximize=False,
            grad_scale=scale,
            **options,
        )
        wire = torch.empty(sum(SIZES), dtype=form)
        wires = wire.split(SIZES)
        ops.pack_wire_(wires, params, scale, overflow)
        back = [torch.empty_like(p) for p in params]
        ops.unpack_wire_(back, wires, scale)
        results.append([*params, *momenta, wire, *back])
    ops.cpu_isa(before)
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))


@pytest.mark.parametrize("options", [{}, {"nesterov": True}, {"weight_decay": 1e-3}])
def test_hundreds_of_updates_stay_with_torch(isa, options):
    shapes = [(3, 4, 5, 5), (17,), (40, 13), (1,)]
    torch.manual_seed(0)
    ours = [torch.randn(shape) for shape in shapes]
    theirs = [torch.nn.Parameter(p.clone()) for p in ours]
    momenta = [torch.zeros_like(p) for p in ours]
    peer = torch.optim.SGD(theirs, lr=0.01, momentum=0.9, foreach=False, **options)
    settings = {"weight_decay": 0.0, "nesterov": False} | options
    updates = 300
    for _ in range(updates):
        grads = [torch.randn_like(p) for p in ours]
        for p, g in zip(theirs, grads, strict=True):
            p.grad = g.clone()
        peer.step()
        ops.fused_sgd_(ours, grads, momenta, lr=0.01, momentum=0.9, maximize=False, **settings)
    # torch may contract a multiplication and an addition to one rounding: 4 roundings an update of
    # values below 32 (weights and buffers are sums of some 10 normal numbers)
    bound = 4 * updates * EPS * 32 * 0.1
    for p, q in zip(ours, theirs, strict=True):
        assert (p - q).abs().max() <= bound


@pytest.mark.parametrize("step", [1, 4])
def test_an_overflow_leaves_every_bit(isa, step):
    params, momenta = tensors(SIZES, seed=1), [torch.zeros(n) for n in SIZES]
    options = {"lr": 0.1, "momentum": 0.9, "weight_decay": 0.1, "nesterov": True, "maximize": False}
    for _ in range(step - 1):
        ops.fused_sgd_(params, tensors(SIZES, seed=2), momenta, **options)
    written = [params, momenta]
    before = clones(written)
    bad = [torch.full((n,), float("nan")) for n in SIZES]
    ops.fused_sgd_(params, bad, momenta, found_inf=torch.tensor(1.0), **options)
    for one, other in zip(written, before, strict=True):
        assert all(torch.equal(a, b) for a, b in zip(one, other, strict=True))
    ops.fused_sgd_(params, bad, momenta, found_inf=torch.tensor(0.0), **options)
    assert all(p.isnan().all() for p in params)


# -- the wire -------------------------------------------------------------------------------------


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("offset", [0, 1])
def test_the_wire_rounds_as_torch_does(isa, form, offset):
    sources = tensors(SIZES, seed=1, offset=offset)
    wire = torch.empty(sum(SIZES) + offset, dtype=form)[offset:]
    scale, overflow = torch.tensor(2.0**7), torch.zeros(())
    ops.pack_wire_(wire.split(SIZES), sources, scale, overflow)
    assert torch.equal(wire, (torch.cat(sources) * scale).to(form))
    assert overflow == 0
    targets = [torch.empty_like(s) for s in sources]
    ops.unpack_wire_(targets, wire.split(SIZES), scale)
    assert torch.equal(torch.cat(targets), wire.float() / scale)


def test_the_wire_is_laid_out_as_the_gradient_and_gaps_between_wires_stay():
    sources = [
        torch.randn(8, 3, 5, 5).to(memory_format=torch.channels_last),
        torch.randn(3, 7).t(),
        torch.randn(16, 4, 1, 1),
    ]
    bucket = torch.full((1000,), 7.0, dtype=torch.float16)
    starts = (0, 608, 640)
    wires = [
        bucket.as_strided(source.shape, source.stride(), start)
        for source, start in zip(sources, starts, strict=True)
    ]
    ops.pack_wire_(wires, sources, torch.tensor(4.0), torch.zeros(1))
    for source, start, wire in zip(sources, starts, wires, strict=True):
        assert torch.equal(wire, (source * 4).half())
        in_memory = source.as_strided((source.numel(),), (1,))
        assert torch.equal(bucket[start : start + source.numel()], (in_memory * 4).half())
    filled = torch.zeros(1000, dtype=torch.bool)
    for source, start in zip(sources, starts, strict=True):
        filled[start : start + source.numel()] = True
    assert (bucket[~filled] == 7).all()
    back = [torch.empty_like(source) for source in sources]
    ops.unpack_wire_(back, wires, torch.tensor(4.0))
    assert all(torch.equal(b, w.float() / 4) for b, w in zip(back, wires, strict=True))


@pytest.mark.parametrize("form", [torch.float16, torch.bfloat16])
def test_every_value_of_a_form_and_every_tie_between_them(isa, form):
    bits = torch.arange(-(2**15), 2**15, dtype=torch.int32).to(torch.int16)
    values = bits.view(form).float()
    values = values[~values.isnan()]
    finite = values[values.isfinite()].sort().values
    ties = (finite[1:] + finite[:-1]) / 2  # exact in float32
    near = torch.cat(
        [ties, ties.nextafter(torch.tensor(9e38)), ties.nextafter(-torch.tensor(9e38))]
    )
    tiny = torch.tensor([1e-45, -1e-45, 1e-40, 2.0**-149, 2.0**-26, 2.0**-25, 3e-8])
    source = torch.cat([values, near, tiny])
    wire = torch.empty(len(source), dtype=form)
    ops.pack_wire_([wire], [source], torch.tensor(1.0), torch.zeros(()))
    assert torch.equal(wire.view(torch.int16), source.to(form).view(torch.int16))
    back = torch.empty_like(values)
    ops.unpack_wire_([back], [values.to(form)], torch.tensor(1.0))
    assert torch.equal(back.view(torch.int32), values.view(torch.int32))


@pytest.mark.parametrize(
    ("form", "scale", "value", "flag"),
    [
        (torch.float16, 1.0, 65519.99, 0),
        (torch.float16, 1.0, 65520.0, 1),
        (torch.float16, 1024.0, -64.0, 1),
        (torch.float16, 1.0, float("inf"), 2),
        (torch.float16, 1.0, float("-inf"), 2),
        (torch.float16, 1.0, float("nan"), 2),
        (torch.bfloat16, 1.0, 3.3e38, 0),
        (torch.bfloat16, 1.0, 3.4e38, 1),
        (torch.float32, 4.0, 3e38, 1),
        (torch.float32, 1.0, float("nan"), 2),
    ],
)
@pytest.mark.parametrize("place", [0, 40, 100_000 - 1])
def test_the_flag_tells_too_large_from_broken(isa, form, scale, value, flag, place):
    source = torch.zeros(100_000)
    source[place] = value
    overflow = torch.zeros(1)
    wire = torch.empty(100_000, dtype=form)
    ops.pack_wire_([wire], [source], torch.tensor(scale), overflow)
    assert overflow.item() == flag
    raised = torch.full((1,), 2.0)
    ops.pack_wire_([wire], [torch.zeros(100_000)], torch.tensor(scale), raised)
    assert raised.item() == 2  # never lowered


@pytest.mark.parametrize(
    ("form", "value", "summands", "flag"),
    [
        (torch.float16, 32000.0, 1, 0),
        (torch.float16, 16379.0, 2, 0),
        (torch.float16, 16381.0, 2, 1),
        (torch.float16, 31.9, 1024, 0),
        (torch.float16, 32.0, 1024, 1),
        (torch.float32, 1e38, 2, 1),
        (torch.float32, 1e37, 2, 0),
    ],
)
def test_the_flag_keeps_room_for_a_sum(isa, form, value, summands, flag):
    for pack in (ops.pack_wire_, ops.pack_wire_reference):
        overflow = torch.zeros(1)
        wire, source = torch.empty(3, dtype=form), torch.tensor([0.0, -value, 1.0])
        pack([wire], [source], torch.tensor(1.0), overflow, summands=summands)
        assert overflow.item() == flag
        assert torch.equal(wire, source.to(form))


def test_references_agree_with_the_operators():
    params, grads, momenta = tensors(SIZES, seed=1), tensors(SIZES, seed=2), tensors(SIZES, seed=3)
    twins = clones([params, grads, momenta])
    options = {"lr": 0.1, "momentum": 0.9, "weight_decay": 0.0, "nesterov": False}
    ops.fused_sgd_(params, grads, momenta, maximize=False, **options)
    ops.fused_sgd_reference(*twins, maximize=False, **options)
    torch.testing.assert_close(params, twins[0], rtol=0, atol=16 * EPS)
    wires = [torch.empty(sum(SIZES), dtype=torch.float16) for _ in range(2)]
    flags = [torch.zeros(1) for _ in range(2)]
    for function, wire, flag in zip(
        (ops.pack_wire_, ops.pack_wire_reference), wires, flags, strict=True
    ):
        function(wire.split(SIZES), params, torch.tensor(2.0**15), flag)
    assert torch.equal(wires[0], wires[1])
    assert flags[0].item() == flags[1].item() == 1
    targets = [[torch.empty_like(p) for p in params] for _ in range(2)]
    for function, target in zip(
        (ops.unpack_wire_, ops.unpack_wire_reference), targets, strict=True
    ):
        function(target, wires[0].split(SIZES), torch.tensor(8.0))
    assert all(torch.equal(a, b) for a, b in zip(*targets, strict=True))


# -- what is refused ------------------------------------------------------------------------------


def call(**changes):
    given = {
        "params": tensors([4, 6], seed=1),
        "grads": tensors([4, 6], seed=2),
        "momenta": tensors([4, 6], seed=3),
    } | changes
    options = {"lr": 0.1, "momentum": 0.9, "weight_decay": 0.0, "nesterov": False}
    ops.fused_sgd_(maximize=False, **(options | given))


SHARED = torch.zeros(8)


TENSORS = ("params", "grads", "momenta")


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"grads": tensors([4])}, ValueError, "there are 1 grads for 2 params"),
        ({"momenta": []}, ValueError, "there are 0 momenta for 2 params"),
        (
            {"grads": tensors([4, 5])},
            ValueError,
            r"grads\[1\] has sizes \[5\], params\[1\] has \[6\]",
        ),
        ({"grads": tensors([4, 6], torch.float64)}, TypeError, r"grads\[0\] is Double"),
        ({"params": tensors([4, 6], torch.float16)}, TypeError, r"params\[0\] is Half"),
        ({"momenta": tensors([4, 6], torch.float16)}, TypeError, r"momenta\[0\] is Half"),
        ({"grad_scale": torch.ones(2)}, ValueError, r"grad_scale has sizes \[2\]"),
        ({"found_inf": torch.ones(1).double()}, TypeError, "found_inf is Double"),
        ({"momentum": 0.0, "nesterov": True, "momenta": []}, ValueError, "nesterov needs momenta"),
        (
            {"momenta": [SHARED[:4], SHARED[2:8]]},
            ValueError,
            r"momenta\[0\] and momenta\[1\] overlap in memory",
        ),
        (
            {name: [torch.zeros(2, 2), torch.zeros(4, 3)[:, :2]] for name in TENSORS},
            ValueError,
            r"params\[1\] .* has gaps",
        ),
        (
            {name: [torch.zeros(2, 3)] for name in TENSORS} | {"grads": [torch.zeros(3, 2).t()]},
            ValueError,
            r"grads\[0\] has strides \[1, 2\], params\[0\] has \[3, 1\]",
        ),
        (
            {"grads": [torch.zeros(4).to_sparse(), torch.zeros(6)]},
            (ValueError, RuntimeError, NotImplementedError),
            "[Ss]parse",
        ),
    ],
)  # fmt: skip
def test_bad_input_is_named(changes, error, message):
    with pytest.raises(error, match=message):
        call(**changes)


def test_bad_wires_are_named():
    one, overflow = torch.tensor(1.0), torch.zeros(1)
    with pytest.raises(ValueError, match="there are 1 wires for 2 sources"):
        ops.pack_wire_([torch.zeros(4)], [torch.zeros(2)] * 2, one, overflow)
    with pytest.raises(ValueError, match=r"wires\[0\] has sizes \[4\], sources\[0\] has \[3\]"):
        ops.pack_wire_([torch.zeros(4)], [torch.zeros(3)], one, overflow)
    with pytest.raises(TypeError, match=r"wires\[0\] is Int"):
        ops.pack_wire_([torch.zeros(4, dtype=torch.int32)], [torch.zeros(4)], one, overflow)
    with pytest.raises(TypeError, match=r"wires\[1\] is Half, wires\[0\] Float"):
        ops.pack_wire_([torch.zeros(4), torch.zeros(4).half()], tensors([4, 4]), one, overflow)
    with pytest.raises(ValueError, match=r"sources\[0\] .* has gaps"):
        ops.pack_wire_([torch.zeros(2, 2)], [torch.zeros(2, 4)[:, ::2]], one, overflow)
    with pytest.raises(
        ValueError, match=r"wires\[0\] has strides \[3, 1\], sources\[0\] has \[1, 2\]"
    ):
        ops.pack_wire_([torch.zeros(2, 3)], [torch.zeros(3, 2).t()], one, overflow)
    with pytest.raises(ValueError, match="overlap in memory"):
        ops.pack_wire_([SHARED[:4], SHARED[2:6]], tensors([4, 4]), one, overflow)
    with pytest.raises(ValueError, match="overlap in memory"):
        ops.unpack_wire_([SHARED[:4], SHARED[:4]], tensors([4, 4]), one)


def test_empty_lists_do_nothing():
    ops.fused_sgd_(
        [], [], [], lr=1.0, momentum=0.9, weight_decay=0.0, nesterov=False, maximize=False
    )
    overflow = torch.zeros(1)
    ops.pack_wire_([], [], torch.tensor(1.0), overflow)
    ops.unpack_wire_([], [], torch.tensor(1.0))
    assert overflow.item() == 0


# -- torch's own machinery ------------------------------------------------------------------------


def test_opcheck():
    params, grads, momenta = tensors([4, 33], seed=1), tensors([4, 33], seed=2), tensors([4, 33])
    torch.library.opcheck(
        torch.ops.hvd_lbt.fused_sgd_.default,
        (params, grads, momenta),
        {
            "lr": 0.1,
            "momentum": 0.9,
            "weight_decay": 0.01,
            "nesterov": True,
            "maximize": False,
            "grad_scale": torch.tensor(2.0),
            "found_inf": torch.tensor(0.0),
        },
    )
    wires, one = tensors([4, 33], torch.float16), torch.tensor(1.0)
    given = (wires, params, one, torch.zeros(1))
    torch.library.opcheck(torch.ops.hvd_lbt.pack_wire_.default, given)
    torch.library.opcheck(torch.ops.hvd_lbt.unpack_wire_.default, (params, wires, one))


@pytest.mark.skipif(not HUGE, reason="13 GB of memory: HVD_LBT_TEST_HUGE=1 runs it")
def test_more_than_2_to_the_31_elements():
    count = 2**31 + 5
    source = torch.zeros(count)
    source[-1], source[2**31] = 3.0, 5.0
    wire = torch.empty(count, dtype=torch.float16)
    ops.pack_wire_([wire], [source], torch.tensor(2.0), torch.zeros(1))
    assert wire[-1] == 6
    assert wire[2**31] == 10
    ops.unpack_wire_([source], [wire], torch.tensor(4.0))
    assert source[-1] == 1.5
    options = {"momentum": 0.0, "weight_decay": 0.0, "nesterov": False, "maximize": False}
    ops.fused_sgd_([source], [wire], [], lr=1.0, **options)
    assert source[-1] == -4.5


def test_a_device_without_kernels_is_refused_before_anything_runs():
    ops.require_on(torch.device("cpu"))
    with pytest.raises(ops.UserError, match="has no XLA kernels"):
        ops.require_on(torch.device("xla"))
