import math

import oracle
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from spikingjelly.activation_based import surrogate as framework

from sltt_ext import functional
from sltt_ext.errors import BackendError, ConfigurationError, InputError
from sltt_ext.functional.lif_operator import lif_settings
from sltt_ext.functional.schema import flat, packed
from sltt_ext.kernels.lif import LIFSettings
from sltt_ext.surrogate import Surrogate

SURROGATES = {
    "sigmoid": (Surrogate("sigmoid", (4.0,)), framework.Sigmoid(4.0)),
    "atan": (Surrogate("atan", (2.0,)), framework.ATan(2.0)),
    "triangle": (Surrogate("piecewise_quadratic", (1.0,)), framework.PiecewiseQuadratic(1.0)),
}
if hasattr(framework, "Rect"):
    SURROGATES["rectangle"] = (Surrogate("rectangle", (1.0,)), framework.Rect(1.0))


def run_fused(kind, x_seq, v, w, tau, decay_input, **options):
    if kind == "if":
        return functional.multi_step_if(x_seq, v, **options)
    if kind == "lif":
        return functional.multi_step_lif(x_seq, v, tau=tau, decay_input=decay_input, **options)
    return functional.multi_step_plif(x_seq, w, v, decay_input=decay_input, **options)


@settings(max_examples=150)
@given(
    kind=st.sampled_from(["if", "lif", "plif"]),
    time_steps=st.integers(1, 6),
    shape=st.lists(st.integers(1, 4), max_size=3),
    tau=st.floats(1.05, 20),
    decay_input=st.booleans(),
    v_threshold=st.floats(0.1, 2),
    v_reset=st.one_of(st.none(), st.floats(-0.9, 0.05)),
    detach_reset=st.booleans(),
    surrogate=st.sampled_from(sorted(SURROGATES)),
    losses=st.sampled_from(["spikes", "state", "both"]),
    through_time=st.booleans(),
    single_step=st.booleans(),
    seed=st.integers(0, 1000),
)
def test_spikes_state_and_gradients_are_those_of_the_equations(
    kind, time_steps, shape, tau, decay_input, v_threshold, v_reset, detach_reset, surrogate, losses, through_time,
    single_step, seed,
):  # fmt: skip
    generator = torch.Generator().manual_seed(seed)
    x = 2 * torch.randn(time_steps, *shape, generator=generator, dtype=torch.float64) + 0.5
    start = torch.randn(shape, generator=generator, dtype=torch.float64)
    weight = torch.randn(x.shape, generator=generator, dtype=torch.float64)
    row, heaviside = SURROGATES[surrogate]

    def loss_gradients(run):
        x_seq, w = x.clone().requires_grad_(), torch.tensor(0.3, dtype=torch.float64, requires_grad=True)
        v = start.clone().requires_grad_()
        s_seq, v_next = run(x_seq, v, w)
        loss = 0 * w.double()
        if losses != "state":
            loss = loss + (s_seq * weight).sum()
        if losses != "spikes":
            loss = loss + (v_next * weight[0]).sum()
        loss.backward()
        return s_seq.detach(), v_next.detach(), x_seq.grad, w.grad, v.grad

    def expected(x_seq, v, w):
        decay = {"if": None, "lif": 1 / tau, "plif": w.sigmoid()}[kind]
        return oracle.lif_by_autograd(
            x_seq, v, decay, decay_input, v_threshold, v_reset, detach_reset, heaviside, through_time
        )

    def actual(x_seq, v, w):
        options = {
            "v_threshold": v_threshold,
            "v_reset": v_reset,
            "detach_reset": detach_reset,
            "surrogate": row,
            "through_time": through_time,
        }
        if not single_step:
            return run_fused(kind, x_seq, v, w, tau, decay_input, **options)
        spikes = []
        for x in x_seq:
            s, v = run_fused(kind, x, v, w, tau, decay_input, single_step=True, **options)
            spikes.append(s)
        return torch.stack(spikes), v

    for got, want in zip(loss_gradients(actual), loss_gradients(expected)):
        if got is None or want is None:
            assert got is want
        else:
            scale = max(1.0, want.abs().max().item())
            torch.testing.assert_close(got, want, rtol=1e-9, atol=1e-9 * scale)


def test_loss_on_the_state_alone():
    x_seq = torch.tensor([[0.3], [0.4]], requires_grad=True)
    _, v = functional.multi_step_lif(x_seq, tau=2.0, v_threshold=math.inf)
    v.sum().backward()
    torch.testing.assert_close(x_seq.grad, torch.tensor([[0.0], [0.5]]))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("kind", ["if", "lif", "plif"])
@pytest.mark.parametrize("through_time", [False, True])
def test_half_precision_computes_in_float32(kind, dtype, through_time):
    torch.manual_seed(0)
    x = torch.randn(5, 40).to(dtype)
    weight = torch.randn(5, 40).to(dtype)
    results = []
    for run_dtype in (dtype, torch.float32):
        x_seq = x.detach().clone().to(run_dtype).requires_grad_()
        w = torch.tensor(0.2, requires_grad=True)
        s_seq, v = run_fused(kind, x_seq, None, w, 2.0, True, through_time=through_time)
        (s_seq * weight.to(run_dtype)).sum().backward()
        results.append((s_seq, v, x_seq.grad, w.grad))
    (s_seq, v, grad, w_grad), (s_seq32, v32, grad32, w_grad32) = results
    assert s_seq.dtype == grad.dtype == dtype
    assert v.dtype == torch.float32
    assert torch.equal(s_seq.float(), s_seq32)
    assert torch.equal(v, v32)
    eps = torch.finfo(dtype).eps
    torch.testing.assert_close(grad.float(), grad32, rtol=4 * eps, atol=eps / 100)
    if kind == "plif":
        torch.testing.assert_close(w_grad, w_grad32, rtol=0.02, atol=0.02)


def layouts():
    base = torch.randn(3, 4, 6, 5, 2)
    return {
        "transposed": base.transpose(1, 3),
        "channels_last": base.permute(0, 1, 4, 2, 3),
        "strided": torch.randn(6, 4, 12)[::2, :, ::3],
        "repeated_over_time": torch.randn(4, 6).expand(3, 4, 6),
    }


@pytest.mark.parametrize("through_time", [False, True])
@pytest.mark.parametrize("layout", sorted(layouts()))
def test_any_memory_layout(layout, through_time):
    x = layouts()[layout]
    got = x.detach().requires_grad_()
    want = x.detach().contiguous().requires_grad_()
    weight = torch.randn(x.shape)
    spikes = []
    for x_seq in (got, want):
        s_seq, _ = functional.multi_step_lif(x_seq, through_time=through_time)
        (s_seq * weight).sum().backward()
        spikes.append(s_seq)
    assert torch.equal(*spikes)
    torch.testing.assert_close(got.grad, want.grad, rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("detach_reset", [False, True])
@pytest.mark.parametrize("v_reset", [None, 0.0, 0.25])
@pytest.mark.parametrize("kind", ["if", "lif", "plif"])
@pytest.mark.parametrize("chunks", [(1, 1, 1, 1), (2, 1, 3)])
def test_carrying_the_charged_potential_changes_nothing(kind, v_reset, detach_reset, chunks):
    x, weight = 2 * torch.randn(sum(chunks), 40) + 0.5, torch.randn(sum(chunks), 40)
    reset = {"v_reset": v_reset, "detach_reset": detach_reset}
    results = []
    for charged in (False, True):
        x_seq, w, v = x.clone().requires_grad_(), torch.tensor(0.3, requires_grad=True), None
        for part, part_weight in zip(x_seq.split(chunks), weight.split(chunks)):
            s_seq, carried = run_fused(kind, part, v, w, 1.3, True, charged=charged, **reset)
            potential = functional.after_reset(carried, **reset) if charged else carried
            ((s_seq * part_weight).sum() + (potential * part_weight[0]).sum()).backward()
            v = carried.detach()
        results.append([s_seq, potential, x_seq.grad, *([w.grad] if kind == "plif" else [])])
    for got, want in zip(*results, strict=True):
        torch.testing.assert_close(got, want, rtol=1e-6, atol=1e-6)
    assert torch.equal(results[0][1], results[1][1])


def test_the_charged_potential_is_what_backward_reads():
    saved = []

    def pack(tensor):
        saved.append(tensor.untyped_storage().data_ptr())
        return tensor

    x = torch.randn(100, requires_grad=True)
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        _, h = functional.multi_step_lif(x, single_step=True, charged=True)
    assert [at for at in saved if at] == [h.untyped_storage().data_ptr()]


def test_a_number_to_start_from_is_not_reset():
    _, h = functional.multi_step_if(torch.zeros(1, 3), 2.0, charged=True)
    assert h.tolist() == [2.0] * 3


def test_single_step_is_a_sequence_of_one():
    x, v, weight = torch.randn(30), torch.randn(30), torch.rand(30)
    results = []
    for single_step in (False, True):
        given = (x if single_step else x.unsqueeze(0)).clone().requires_grad_()
        s, v_next = functional.multi_step_lif(given, v, single_step=single_step)
        ((s * weight).sum() + v_next.sum()).backward()
        assert s.shape == given.shape
        results.append([tensor.reshape(30) for tensor in (s, v_next, given.grad)])
    assert all(torch.equal(*pair) for pair in zip(*results))


def test_spikes_may_be_modified_in_place():
    x = torch.randn(30, requires_grad=True)
    for single_step in (True, False):
        s, _ = functional.multi_step_lif(x if single_step else x.unsqueeze(0), single_step=single_step)
        x.grad = None
        s.mul_(3).sum().backward()
        tripled, x.grad = x.grad, None
        functional.multi_step_lif(x, single_step=True)[0].sum().backward()
        torch.testing.assert_close(tripled, 3 * x.grad)


@pytest.mark.parametrize("through_time", [False, True])
def test_saves_one_tensor_per_step(through_time):
    saved = []

    def pack(tensor):
        saved.append(tensor.nbytes)
        return tensor

    x_seq = torch.randn(4, 100, requires_grad=True)
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        functional.multi_step_lif(x_seq, through_time=through_time)
    assert sum(saved) == x_seq.nbytes


@pytest.mark.parametrize("through_time", [False, True])
def test_the_initial_state_has_a_gradient_through_time_alone(through_time):
    v = torch.randn(20, requires_grad=True)
    s_seq, v_next = functional.multi_step_lif(torch.randn(3, 20), v, through_time=through_time)
    assert s_seq.requires_grad == v_next.requires_grad == through_time


def test_keeps_nothing_without_gradients():
    x_seq = torch.randn(4, 100)
    spikes, v = functional.multi_step_lif(x_seq)
    assert spikes.grad_fn is None
    assert v.grad_fn is None


RESET = {"v_threshold": 1.0, "v_reset": 0.0, "detach_reset": False}
SETTINGS = {
    "lif": {"tau": 2.0, "decay_input": True, "surrogate": Surrogate("sigmoid", (4.0,)), **RESET},
    "lif_soft": {
        "tau": 1.1, "surrogate": Surrogate("piecewise_quadratic", (1.0,)), "v_threshold": 1.0, "v_reset": None,
        "detach_reset": True,
    },
    "if": {**RESET, "surrogate": Surrogate("atan", (2.0,)), "v_reset": -0.1},
    "plif": {"decay_input": True, "surrogate": Surrogate("sigmoid", (4.0,)), **RESET},
}  # fmt: skip


def settings_of(kind, charged=False, through_time=False):
    return flat(lif_settings(charged=charged, through_time=through_time, **SETTINGS[kind]))


@pytest.mark.parametrize("kind", sorted(SETTINGS))
@pytest.mark.parametrize("time_steps", [1, 3])
@pytest.mark.parametrize("charged", [False, True])
@pytest.mark.parametrize("start", ["tensor", "number"])
def test_opcheck(kind, time_steps, charged, start):
    decay = torch.tensor(0.4, requires_grad=True) if kind == "plif" else None
    x_seq = torch.randn(time_steps, 4, requires_grad=True)
    v = torch.randn(4) if start == "tensor" else None
    arguments = (x_seq, v, 0.2, decay, *settings_of(kind, charged), True, decay is not None)
    torch.library.opcheck(torch.ops.sltt_ext.lif.default, arguments)
    with torch.no_grad():
        _, v, derivatives, h, slopes = torch.ops.sltt_ext.lif(*arguments)
        saved = derivatives, v if charged else h, slopes
        constant_decay = None if decay is None else decay.detach()
        tensors = (torch.randn(time_steps, 4), torch.randn_like(v), *saved, constant_decay)
    torch.library.opcheck(torch.ops.sltt_ext.lif_backward.default, (*tensors, *settings_of(kind, charged)))


@pytest.mark.parametrize("kind", sorted(SETTINGS))
@pytest.mark.parametrize("time_steps", [1, 3])
@pytest.mark.parametrize("start", ["tensor", "number"])
def test_opcheck_through_time(kind, time_steps, start):
    decay = torch.tensor(0.4, requires_grad=True) if kind == "plif" else None
    x_seq = torch.randn(2, time_steps, 4).transpose(0, 1).requires_grad_()
    v = torch.randn(2, 4, requires_grad=True) if start == "tensor" else None
    fields = settings_of(kind, through_time=True)
    arguments = (x_seq, v, 0.2, decay, *fields, True, decay is not None)
    torch.library.opcheck(torch.ops.sltt_ext.lif.default, arguments)
    with torch.no_grad():
        s_seq, v, _, h_seq, slopes = torch.ops.sltt_ext.lif(*arguments)
    constant_decay = None if decay is None else decay.detach()
    for grads in ((torch.randn_like(s_seq), torch.randn_like(v)), (None, torch.randn_like(v))):
        backward = (*grads, h_seq, slopes, constant_decay, *fields)
        torch.library.opcheck(torch.ops.sltt_ext.lif_backward_through_time.default, backward)


@pytest.mark.parametrize("kind", sorted(SETTINGS))
def test_settings_keep_their_form(kind):
    settings = lif_settings(**SETTINGS[kind])
    assert packed(LIFSettings, *flat(settings)) == settings


@pytest.mark.parametrize("through_time", [False, True])
def test_eager_and_registered_operator_agree(through_time):
    x_seq, v = torch.randn(3, 50, requires_grad=True), torch.randn(50, requires_grad=through_time)
    weight = torch.randn(3, 50)
    (functional.multi_step_lif(x_seq, v, through_time=through_time)[0] * weight).sum().backward()
    eager, x_seq.grad, v.grad = (x_seq.grad, v.grad), None, None
    fields = settings_of("lif", through_time=through_time)
    outputs = torch.ops.sltt_ext.lif(x_seq, v, 0.0, None, *fields, True, False)
    (outputs[0] * weight).sum().backward()
    assert torch.equal(x_seq.grad, eager[0])
    assert not through_time or torch.equal(v.grad, eager[1])


@pytest.mark.parametrize("single_step", [False, True])
@pytest.mark.parametrize("through_time", [False, True])
def test_compiles_without_graph_break(single_step, through_time):
    def loss(x_seq, v, w):
        s_seq, v = functional.multi_step_plif(x_seq, w, v, single_step=single_step, through_time=through_time)
        return (s_seq * x_seq.detach()).sum() + v.sum()

    results = []
    for run in (loss, torch.compile(loss, backend="aot_eager", fullgraph=True)):
        torch.manual_seed(0)
        x_seq, w = torch.randn(3, 20, requires_grad=True), torch.tensor(0.1, requires_grad=True)
        v = torch.randn(x_seq.shape if single_step else 20, requires_grad=True)
        run(x_seq, v, w).backward()
        results.append((x_seq.grad, w.grad, *([v.grad] if through_time else [])))
    torch.testing.assert_close(results[0], results[1])


@pytest.mark.parametrize("through_time", [False, True])
def test_second_derivatives_are_refused(through_time):
    x_seq, weight = torch.randn(3, 20, requires_grad=True), torch.randn(3, 20, requires_grad=True)
    loss = (functional.multi_step_lif(x_seq, through_time=through_time)[0] * weight).sum()
    (grad,) = torch.autograd.grad(loss, x_seq, create_graph=True)
    with pytest.raises(ConfigurationError, match="cannot be differentiated again"):
        grad.sum().backward()


def test_second_derivatives_are_refused_where_the_first_reads_constants_alone():
    x_seq = torch.randn(3, 20, requires_grad=True)
    s_seq, h = functional.multi_step_lif(x_seq, charged=True)
    for loss in (s_seq.sum(), functional.after_reset(h).sum()):
        (grad,) = torch.autograd.grad(loss, x_seq, create_graph=True)
        with pytest.raises(ConfigurationError, match="cannot be differentiated again"):
            grad.square().sum().backward(retain_graph=True)


def test_a_graph_of_the_gradient_changes_nothing_of_it():
    gradients = []
    for create_graph in (False, True):
        x_seq = torch.linspace(-1, 2, 12).view(3, 4).requires_grad_()
        loss = functional.multi_step_lif(x_seq)[0].sum()
        gradients.append(torch.autograd.grad(loss, x_seq, create_graph=create_graph)[0].detach())
    assert torch.equal(*gradients)


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda: functional.multi_step_if(torch.zeros(0, 3)), InputError, "T >= 1"),
        (lambda: functional.multi_step_if(torch.tensor(1.0)), InputError, "T >= 1"),
        (
            lambda: functional.multi_step_if(torch.zeros(2, 3, dtype=torch.long)),
            InputError,
            r"x_seq\.float\(\)",
        ),
        (lambda: functional.multi_step_if(torch.zeros(2, 3), torch.zeros(4)), InputError, r"\[4\].*\[3\]"),
        (lambda: functional.multi_step_lif(torch.zeros(2, 3), tau=0.0), ConfigurationError, "tau"),
        (lambda: functional.multi_step_plif(torch.zeros(2, 3), torch.zeros(3)), InputError, "no dimension"),
        (
            lambda: functional.multi_step_if(torch.zeros(2, 3), charged=True, through_time=True),
            ConfigurationError,
            "use charged=False",
        ),
        (lambda: functional.multi_step_if(torch.zeros(2, 3), backend="cuda"), BackendError, "'auto'"),
    ],
)
def test_bad_input(call, error, message):
    with pytest.raises(error, match=message):
        call()


@pytest.mark.parametrize("v_reset", [None, 0.0])
@pytest.mark.parametrize("learnable", [False, True])
def test_factored_leak_differs_by_rounding_alone(learnable, v_reset):
    results = []
    for factored_leak in (False, True):
        x_seq = torch.linspace(-1, 3, 60, dtype=torch.float64).view(6, 10).requires_grad_()
        w = torch.tensor(0.3, dtype=torch.float64, requires_grad=True)
        options = {"decay_input": False, "factored_leak": factored_leak, "v_reset": v_reset}
        if learnable:
            s_seq, v = functional.multi_step_plif(x_seq, w, **options)
        else:
            s_seq, v = functional.multi_step_lif(x_seq, tau=1.1, **options)
        (s_seq.sum() + v.sin().sum()).backward()
        results.append([s_seq, v, x_seq.grad, *([w.grad] if learnable else [])])
    assert results[0][0].sum() > 0
    for factored, plain in zip(*results, strict=True):
        torch.testing.assert_close(factored, plain, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("options", [{"decay_input": True}, {"decay_input": False, "v_reset": 0.5}])
def test_factored_leak_where_there_is_none(options):
    with pytest.raises(ConfigurationError, match="factored_leak needs"):
        functional.multi_step_lif(torch.zeros(2, 3), factored_leak=True, **options)
