import oracle
import pytest
import snntorch
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from snntorch import surrogate as framework

from sltt_ext import functional
from sltt_ext.errors import BackendError, ConfigurationError, InputError
from sltt_ext.surrogate import Surrogate

SURROGATES = {
    "atan": (Surrogate("atan", (2.0,)), framework.atan(2.0)),
    "fast_sigmoid": (Surrogate("fast_sigmoid", (25.0,)), framework.fast_sigmoid(25)),
    "sigmoid": (Surrogate("logistic", (5.0,)), framework.sigmoid(5)),
    "straight_through": (Surrogate("leaky_spike", (1.0,)), framework.straight_through_estimator()),
    "triangular": (Surrogate("leaky_k_relu", (0.5, -0.5)), framework.triangular(0.5)),
}
RESETS = ["subtract", "zero", "none"]
STEP = (4, 3, 2)


def currents(seed, time_steps=6, shape=STEP, dtype=torch.float32):
    generator = torch.Generator().manual_seed(seed)
    return 1.5 * torch.randn(time_steps, *shape, generator=generator, dtype=dtype) + 0.4


def parameter(kind, low, seed):
    generator = torch.Generator().manual_seed(seed)
    shape = {"number": (), "scalar": (), "channel": (3, 1), "neuron": (3, 2)}[kind]
    value = low + 0.5 * torch.rand(shape, generator=generator)
    return value.item() if kind == "number" else value


def learned(value, learn):
    return value.clone().requires_grad_() if learn and isinstance(value, torch.Tensor) else value


def original(
    x_seq, mem, beta, threshold, reset_mechanism, reset_delay, heaviside, weights, through_time=False
):
    """snnTorch's own neuron stepping, its state detached by hand or not, one backward for all steps."""
    lif = snntorch.Leaky(
        beta=beta,
        threshold=threshold,
        spike_grad=heaviside,
        learn_beta=isinstance(beta, torch.Tensor) and beta.requires_grad,
        learn_threshold=isinstance(threshold, torch.Tensor) and threshold.requires_grad,
        reset_mechanism=reset_mechanism,
        reset_delay=reset_delay,
    )
    steps = []
    for x in x_seq:
        spikes, mem = lif(x, mem if through_time else mem.detach())
        steps.append((spikes, mem))
    spikes, mem_seq = map(torch.stack, zip(*steps))
    ((spikes * weights[0]).sum() + (mem_seq * weights[1]).sum()).backward()
    return spikes, mem_seq, [value.grad for value in (lif.beta, lif.threshold) if value.requires_grad]


@settings(max_examples=200)
@given(
    time_steps=st.integers(1, 6),
    beta=st.sampled_from(["number", "scalar", "channel", "neuron"]),
    threshold=st.sampled_from(["number", "scalar", "channel", "neuron"]),
    learn_beta=st.booleans(),
    learn_threshold=st.booleans(),
    reset_mechanism=st.sampled_from(RESETS),
    reset_delay=st.booleans(),
    surrogate=st.sampled_from(sorted(SURROGATES)),
    losses=st.sampled_from(["spikes", "membrane", "both", "last membrane"]),
    single_step=st.booleans(),
    through_time=st.booleans(),
    seed=st.integers(0, 1000),
)
def test_spikes_membrane_and_gradients_are_snntorchs(
    time_steps, beta, threshold, learn_beta, learn_threshold, reset_mechanism, reset_delay, surrogate, losses,
    single_step, through_time, seed,
):  # fmt: skip
    x, start = currents(seed, time_steps), currents(seed + 1, 1)[0]
    weights = [torch.zeros_like(x), torch.zeros_like(x)]
    if losses in ("spikes", "both"):
        weights[0] = currents(seed + 2, time_steps)
    if losses != "spikes":
        weights[1] = currents(seed + 3, time_steps)
    if losses == "last membrane":
        weights[1][:-1] = 0
    row, heaviside = SURROGATES[surrogate]
    beta, threshold = parameter(beta, 0.6, seed), parameter(threshold, 0.2, seed + 4)

    want_x, want_start = x.clone().requires_grad_(), start.clone().requires_grad_()
    *expected, expected_learned = original(
        want_x, want_start, learned(beta, learn_beta), learned(threshold, learn_threshold),
        reset_mechanism, reset_delay, heaviside, weights, through_time,
    )  # fmt: skip

    got_x, got_start = x.clone().requires_grad_(), start.clone().requires_grad_()
    mem = got_start
    beta, threshold = learned(beta, learn_beta), learned(threshold, learn_threshold)
    options = {
        "beta": beta,
        "threshold": threshold,
        "reset_mechanism": reset_mechanism,
        "reset_delay": reset_delay,
        "surrogate": row,
        "through_time": through_time,
    }
    if single_step:
        steps = []
        for frame in got_x:
            steps.append(functional.multi_step_leaky(frame, mem, single_step=True, **options))
            mem = steps[-1][1]
        spikes, mem_seq = map(torch.stack, zip(*steps))
    elif losses == "last membrane":
        spikes, mem = functional.multi_step_leaky(got_x, mem, **options)
        mem_seq = torch.cat([expected[1][:-1].detach(), mem.unsqueeze(0)])
    else:
        spikes, mem_seq = functional.multi_step_leaky(got_x, mem, return_mem_seq=True, **options)
    ((spikes * weights[0]).sum() + (mem_seq * weights[1]).sum()).backward()

    assert torch.equal(spikes, expected[0])
    assert torch.equal(mem_seq, expected[1])
    assert oracle.relative_error(got_x.grad, want_x.grad) < 1e-6
    assert (got_start.grad is None) == (want_start.grad is None) == (not through_time)
    if through_time:
        assert oracle.relative_error(got_start.grad, want_start.grad) < 1e-6
    learned_gradients = [
        value.grad for value in (beta, threshold) if isinstance(value, torch.Tensor) and value.requires_grad
    ]
    for got, want in zip(learned_gradients, expected_learned, strict=True):
        magnitude = sum(weight.abs().sum() for weight in weights)  # of the terms that were summed
        torch.testing.assert_close(got, want, rtol=1e-6, atol=1e-6 * magnitude.item())


@pytest.mark.parametrize("reset_mechanism", RESETS)
@pytest.mark.parametrize("reset_delay", [True, False])
@pytest.mark.parametrize("learn", [True, False])
@pytest.mark.parametrize("through_time", [True, False])
def test_gradients_in_float64(reset_mechanism, reset_delay, learn, through_time):
    """The same equations under autograd, where no rounding hides anything."""

    def heaviside(u):  # snnTorch's own returns float32
        smooth = u / (1 + 25 * u.abs())
        return (u > 0).to(u.dtype) + smooth - smooth.detach()

    x, start = currents(0, dtype=torch.float64), currents(1, 1, dtype=torch.float64)[0]
    weights = currents(2, dtype=torch.float64), currents(3, dtype=torch.float64)
    fused = {"surrogate": Surrogate("fast_sigmoid", (25.0,)), "return_mem_seq": True}
    results = []
    for run, options in (
        (functional.multi_step_leaky, fused),
        (oracle.leaky_by_autograd, {"heaviside": heaviside}),
    ):
        x_seq = x.clone().requires_grad_()
        beta = (0.6 + 0.1 * torch.arange(3, dtype=torch.float64).reshape(3, 1)).requires_grad_(learn)
        threshold = (0.3 + 0.2 * torch.arange(2, dtype=torch.float64)).requires_grad_(learn)
        given = {"beta": beta, "threshold": threshold, "reset_mechanism": reset_mechanism}
        mem = start.clone().requires_grad_(through_time)
        given |= {"reset_delay": reset_delay, "through_time": through_time}
        s_seq, mem_seq = run(x_seq, mem, **given, **options)
        ((s_seq * weights[0]).sum() + (mem_seq * weights[1]).sum()).backward()
        gradients = [leaf.grad for leaf in (x_seq, mem, beta, threshold) if leaf.requires_grad]
        results.append([s_seq, mem_seq, *gradients])
    for got, want in zip(*results, strict=True):
        torch.testing.assert_close(got, want, rtol=1e-11, atol=1e-11)


def test_beta_is_clamped_and_then_has_no_gradient():
    x = currents(0)
    for value, effective in ((1.4, 1.0), (-0.3, 0.0)):
        beta = torch.tensor(value, requires_grad=True)
        s_seq, mem = functional.multi_step_leaky(x, beta=beta)
        expected = functional.multi_step_leaky(x, beta=effective)
        assert torch.equal(s_seq, expected[0])
        assert torch.equal(mem, expected[1])
        mem.sum().backward()
        assert beta.grad == 0


@pytest.mark.parametrize("reset_mechanism", RESETS)
@pytest.mark.parametrize("reset_delay", [True, False])
def test_potential_exactly_at_the_threshold(reset_mechanism, reset_delay):
    x = (4 * currents(5)).round() / 4
    x[0, 0, 0, 0] = 1.0
    mem = torch.ones(STEP)
    for surrogate in sorted(SURROGATES):
        row, heaviside = SURROGATES[surrogate]
        got_x, want_x = x.clone().requires_grad_(), x.clone().requires_grad_()
        weights = currents(6), currents(7)
        expected = original(want_x, mem, 0.5, 1.0, reset_mechanism, reset_delay, heaviside, weights)
        s_seq, mem_seq = functional.multi_step_leaky(
            got_x, mem, beta=0.5, reset_mechanism=reset_mechanism, reset_delay=reset_delay,
            surrogate=row, return_mem_seq=True,
        )  # fmt: skip
        ((s_seq * weights[0]).sum() + (mem_seq * weights[1]).sum()).backward()
        assert torch.equal(s_seq, expected[0])
        assert torch.equal(mem_seq, expected[1])
        assert oracle.relative_error(got_x.grad, want_x.grad) < 1e-6


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("reset_mechanism", RESETS)
@pytest.mark.parametrize("reset_delay", [True, False])
def test_half_precision_computes_in_float32(dtype, reset_mechanism, reset_delay):
    x, weight = currents(0).to(dtype), currents(1).to(dtype)
    results = []
    for run_dtype in (dtype, torch.float32):
        x_seq, beta = x.detach().clone().to(run_dtype).requires_grad_(), torch.tensor(0.8, requires_grad=True)
        s_seq, mem_seq = functional.multi_step_leaky(
            x_seq, beta=beta, reset_mechanism=reset_mechanism, reset_delay=reset_delay, return_mem_seq=True
        )
        ((s_seq * weight.to(run_dtype)).sum() + mem_seq.sum()).backward()
        results.append((s_seq, mem_seq, x_seq.grad, beta.grad))
    (s_seq, mem_seq, grad, beta_grad), (s_seq32, mem_seq32, grad32, beta_grad32) = results
    assert s_seq.dtype == grad.dtype == dtype
    assert mem_seq.dtype == torch.float32
    assert torch.equal(s_seq.float(), s_seq32)
    assert torch.equal(mem_seq, mem_seq32)
    eps = torch.finfo(dtype).eps
    torch.testing.assert_close(grad.float(), grad32, rtol=4 * eps, atol=eps / 100)
    torch.testing.assert_close(beta_grad, beta_grad32, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("layout", ["transposed", "channels_last", "strided", "repeated_over_time"])
def test_any_memory_layout(layout):
    base = currents(0, 3, (4, 6, 5, 2))
    x = {
        "transposed": base.transpose(1, 3),
        "channels_last": base.permute(0, 1, 4, 2, 3),
        "strided": currents(0, 6, (4, 12))[::2, :, ::3],
        "repeated_over_time": currents(0, 4, (6,)).expand(3, 4, 6),
    }[layout]
    results = []
    for x_seq in (x.detach().requires_grad_(), x.detach().contiguous().requires_grad_()):
        s_seq, mem_seq = functional.multi_step_leaky(x_seq, beta=0.9, return_mem_seq=True)
        ((s_seq * torch.arange(x.shape[-1])).sum() + mem_seq.square().sum()).backward()
        results.append((s_seq, mem_seq, x_seq.grad))
    for got, want in zip(*results):
        torch.testing.assert_close(got, want, rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("shape", [(8, 5000), (3, 16, 32, 32), (300, 200), (1, 50000)])
@pytest.mark.parametrize("return_mem_seq", [True, False])
@pytest.mark.parametrize("reset_delay", [True, False])
def test_steps_large_enough_to_be_split(shape, return_mem_seq, reset_delay):
    x_seq, mem = currents(0, 3, shape), currents(1, 1, shape)[0]
    options = {"beta": 0.9, "reset_delay": reset_delay, "return_mem_seq": return_mem_seq}
    s_seq, membrane = functional.multi_step_leaky(x_seq, mem, **options)
    lif, steps = snntorch.Leaky(beta=0.9, reset_delay=reset_delay), []
    for x in x_seq:
        spikes, mem = lif(x, mem)
        steps.append((spikes, mem))
    assert torch.equal(s_seq, torch.stack([spikes for spikes, _ in steps]))
    assert torch.equal(membrane, torch.stack([mem for _, mem in steps]) if return_mem_seq else mem)


def saved_bytes(run):
    saved = {}

    def pack(tensor):
        saved[tensor.data_ptr()] = tensor.nbytes
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        kept = run()
    return sum(saved.values()), kept


@pytest.mark.parametrize("return_mem_seq", [True, False])
@pytest.mark.parametrize("through_time", [True, False])
def test_saves_one_tensor_per_step(return_mem_seq, through_time):
    x_seq, options = currents(0).requires_grad_(), {"beta": 0.9, "return_mem_seq": return_mem_seq}
    saved, _ = saved_bytes(lambda: functional.multi_step_leaky(x_seq, through_time=through_time, **options))
    assert saved == x_seq.nbytes + 4 + 4 * through_time  # and the threshold, and beta


def test_a_single_step_saves_the_membrane_potential_it_returns():
    x = currents(0)[0].requires_grad_()
    saved, (_, mem) = saved_bytes(lambda: functional.multi_step_leaky(x, beta=0.9, single_step=True))
    assert saved == mem.nbytes + 4


def test_keeps_nothing_without_gradients():
    spikes, mem = functional.multi_step_leaky(currents(0), beta=0.9)
    assert spikes.grad_fn is None
    assert mem.grad_fn is None


def test_spikes_may_be_modified_in_place():
    x = currents(0).requires_grad_()
    grads = []
    for factor in (1, 3):
        s_seq, _ = functional.multi_step_leaky(x, beta=0.9)
        s_seq.mul_(factor).sum().backward()
        grads.append(x.grad)
        x.grad = None
    torch.testing.assert_close(grads[1], 3 * grads[0])


CASES = {
    "plain": ((), False, "subtract", True),
    "learned": ((), True, "subtract", True),
    "per_channel": ((3, 1), True, "zero", True),
    "at_once": ((), True, "subtract", False),
    "zero_at_once": ((2,), True, "zero", False),
    "none": ((), False, "none", True),
}


@pytest.mark.parametrize("case", sorted(CASES))
@pytest.mark.parametrize("return_mem_seq", [True, False])
def test_opcheck(case, return_mem_seq):
    shape, learn, reset_mechanism, reset_delay = CASES[case]
    beta, threshold = torch.full(shape, 0.9), torch.full(shape, 0.8)
    x_seq, mem = currents(0, 3).requires_grad_(), currents(1, 1)[0]
    fields = (reset_mechanism, reset_delay, False, "atan", (2.0,))
    learned_ones = beta.requires_grad_(learn), threshold.requires_grad_(learn)
    arguments = (x_seq, mem, *learned_ones, *fields, return_mem_seq, True)
    torch.library.opcheck(torch.ops.sltt_ext.leaky.default, arguments)
    with torch.no_grad():
        _, returned, h_seq = torch.ops.sltt_ext.leaky(*arguments)
    h_seq = h_seq if h_seq.numel() else returned
    grad_mem = torch.randn(3 if return_mem_seq else 1, *STEP)
    tensors = (currents(2, 3), grad_mem, h_seq, mem, threshold.detach())
    backward = (*tensors, *fields, shape if learn else None, learn)
    torch.library.opcheck(torch.ops.sltt_ext.leaky_backward.default, backward)


@pytest.mark.parametrize("case", sorted(CASES))
@pytest.mark.parametrize("return_mem_seq", [True, False])
def test_opcheck_through_time(case, return_mem_seq):
    shape, learn, reset_mechanism, reset_delay = CASES[case]
    beta, threshold = torch.full(shape, 0.9), torch.full(shape, 0.8)
    x_seq, mem = currents(0, 3).requires_grad_(), currents(1, 1)[0].requires_grad_()
    fields = (reset_mechanism, reset_delay, True, "atan", (2.0,))
    learned_ones = beta.requires_grad_(learn), threshold.requires_grad_(learn)
    arguments = (x_seq, mem, *learned_ones, *fields, return_mem_seq, True)
    torch.library.opcheck(torch.ops.sltt_ext.leaky.default, arguments)
    with torch.no_grad():
        _, returned, h_seq = torch.ops.sltt_ext.leaky(*arguments)
    h_seq = h_seq if h_seq.numel() else returned
    constants = [tensor.detach() for tensor in (mem, beta, threshold)]
    for grads in ((currents(2, 3), torch.randn(3 if return_mem_seq else 1, *STEP)), (currents(2, 3), None)):
        backward = (*grads, h_seq, *constants, *fields, learn, learn)
        torch.library.opcheck(torch.ops.sltt_ext.leaky_backward_through_time.default, backward)


@pytest.mark.parametrize("single_step", [False, True])
@pytest.mark.parametrize("through_time", [False, True])
@pytest.mark.parametrize(("reset_mechanism", "reset_delay"), [("subtract", True), ("zero", False)])
def test_compiles_without_graph_break(single_step, through_time, reset_mechanism, reset_delay):
    def loss(x_seq, mem, beta, threshold):
        s_seq, mem = functional.multi_step_leaky(
            x_seq, mem, beta=beta, threshold=threshold, reset_mechanism=reset_mechanism, reset_delay=reset_delay,
            single_step=single_step, through_time=through_time,
        )  # fmt: skip
        return (s_seq * x_seq.detach()).sum() + mem.sum()

    results = []
    for run in (loss, torch.compile(loss, backend="aot_eager", fullgraph=True)):
        x_seq = currents(0).requires_grad_()
        beta, threshold = (torch.tensor(value, requires_grad=True) for value in (0.8, 0.7))
        mem = torch.full_like(x_seq if single_step else x_seq[0], 0.3).detach().requires_grad_(through_time)
        run(x_seq, mem, beta, threshold).backward()
        leaves = (x_seq, mem, beta, threshold)
        results.append([leaf.grad for leaf in leaves if leaf.requires_grad])
    torch.testing.assert_close(results[0], results[1])


@pytest.mark.parametrize("through_time", [False, True])
def test_second_derivatives_are_refused(through_time):
    x_seq, weight = currents(0).requires_grad_(), currents(1).requires_grad_()
    loss = (functional.multi_step_leaky(x_seq, beta=0.9, through_time=through_time)[0] * weight).sum()
    (grad,) = torch.autograd.grad(loss, x_seq, create_graph=True)
    with pytest.raises(ConfigurationError, match="cannot be differentiated again"):
        grad.sum().backward()


@pytest.mark.parametrize(
    ("x_seq", "options", "error", "message"),
    [
        (torch.zeros(0, 3), {}, InputError, "T >= 1"),
        (torch.zeros(2, 3, dtype=torch.long), {}, InputError, r"x_seq\.float\(\)"),
        (torch.zeros(2, 3), {"mem": torch.zeros(4)}, InputError, r"mem has shape \[4\].*\[3\]"),
        (torch.zeros(2, 3), {"beta": torch.zeros(4)}, InputError, r"beta of shape \[4\] does not broadcast"),
        (torch.zeros(2, 3), {"threshold": torch.zeros(2, 1)}, InputError, r"threshold of shape \[2, 1\]"),
        (torch.zeros(2, 3), {"reset_mechanism": "hard"}, ConfigurationError, "subtract, zero, none"),
        (torch.zeros(2, 3), {"backend": "cuda"}, BackendError, "'auto'"),
    ],
)
def test_bad_input(x_seq, options, error, message):
    with pytest.raises(error, match=message):
        functional.multi_step_leaky(x_seq, **{"beta": 0.9, **options})
