"""The CUDA kernels on a device: what no compiler and no host can show.

Whatever has a meaning on the CPU runs there too, on small tensors, so that a test that perfect kernels cannot pass is
found without a device.
"""

import itertools
import threading

import devices
import products
import pytest
import torch
import variants
from devices import needs_cuda

from sltt_ext.errors import BackendError, InputError
from sltt_ext.functional import multi_step_if, multi_step_leaky, multi_step_lif, multi_step_plif
from sltt_ext.functional.lif_operator import lif_settings
from sltt_ext.functional.schema import flat
from sltt_ext.surrogate import SURROGATES, Surrogate

PARAMETERS = {
    "sigmoid": (4.0,),
    "leaky_k_relu": (0.1, 1.3),
    "sparse_fast_sigmoid": (5.0, -0.3),
    "spike_rate_escape": (1.2, 0.8),
}
DTYPES = pytest.mark.parametrize("dtype", variants.DTYPES, ids=str)
COMPILERS = {"cuda": "inductor", "cpu": "aot_eager"}
NEURONS = [
    "if",
    "if charged",
    "lif",
    "lif charged",
    "lif not decay_input",
    "plif",
    "plif not decay_input",
    "leaky",
    "leaky at once",
    *(
        f"{neuron} through time"
        for neuron in ("if", "lif", "plif", "plif not decay_input", "leaky", "leaky at once")
    ),
]


def surrogate(name):
    return Surrogate(name, PARAMETERS.get(name, (1.3,)))


def parameter_of(neuron, device, learn=True):
    """Beta, or w: of 0, whose sigmoid is 0.5 on every device, bit for bit."""
    return torch.tensor(0.8 if neuron.startswith("leaky") else 0.0, device=device, requires_grad=learn)


def call(neuron, x_seq, v, parameter, v_reset, **options):
    options["through_time"] = neuron.endswith("through time")
    if neuron.startswith("leaky"):
        mechanism = "subtract" if v_reset is None else "zero"
        return multi_step_leaky(
            x_seq,
            v,
            beta=parameter,
            reset_mechanism=mechanism,
            reset_delay="at once" not in neuron,
            **options,
        )
    options |= {"v_reset": v_reset, "charged": "charged" in neuron}
    v = None if v is None else v.clone()  # a charged one is overwritten
    if neuron.startswith("if"):
        return multi_step_if(x_seq, v, **options)
    options["decay_input"] = "not" not in neuron
    if neuron.startswith("lif"):
        return multi_step_lif(x_seq, v, tau=1.7, **options)
    return multi_step_plif(x_seq, parameter, v, **options)


def run(neuron, x_seq, v, v_reset=None, grads=None, learn=True, **options):
    """Spikes, state, gradient of x after that of ``v`` if it has one, and of the decay where there is one, on the CPU."""
    x_seq, v = x_seq.detach().requires_grad_(), v.detach().requires_grad_(neuron.endswith("through time"))
    parameter = parameter_of(neuron, x_seq.device, learn)
    s_seq, v_next = call(neuron, x_seq, v, parameter, v_reset, **options)
    torch.autograd.backward([s_seq, v_next], grads or [torch.ones_like(s_seq), torch.ones_like(v_next)])
    grad = x_seq.grad if v.grad is None else torch.cat([v.grad.unsqueeze(0).to(x_seq.dtype), x_seq.grad])
    results = [s_seq, v_next, grad, *([] if parameter.grad is None else [parameter.grad])]
    return [tensor.detach().cpu() for tensor in results]


def assert_match(got, want):
    (s, v, grad, *learned), (want_s, want_v, want_grad, *want_learned) = got, want
    assert torch.equal(s, want_s)
    assert torch.equal(v, want_v)
    eps = torch.finfo(grad.dtype).eps
    largest = want_grad.abs().max().item()
    torch.testing.assert_close(grad, want_grad, rtol=2 * eps, atol=max(1e-6, eps / 4) * largest)
    for pair in zip(learned, want_learned, strict=True):
        torch.testing.assert_close(*pair, rtol=1e-4, atol=1e-6 * want_grad.float().abs().sum().item())


def compare_with_the_cpu(device, backend, neuron, x_seq, v_reset=None, **options):
    v = torch.randn_like(x_seq[0], dtype=torch.float32)
    grads = [torch.randn_like(x_seq), torch.randn_like(v)]
    want = run(neuron, x_seq, v, v_reset, grads, backend="torch", **options)
    grads = [tensor.to(device) for tensor in grads]
    got = run(neuron, x_seq.to(device), v.to(device), v_reset, grads, backend=backend, **options)
    assert_match(got, want)


@pytest.mark.parametrize(("name", "dtype"), products.spread(SURROGATES, variants.DTYPES))
def test_every_variant_on_the_device(name, dtype, device, backend):
    elements = 8 * 2**16 if device == "cuda" else 8 * 2**5
    for neuron, v_reset in itertools.product(NEURONS, [None, 0.0]):
        x_seq = 2 * torch.randn(2, elements).to(dtype)
        compare_with_the_cpu(device, backend, neuron, x_seq, v_reset, surrogate=surrogate(name))


@DTYPES
@pytest.mark.parametrize("elements", [1, 37, 255, 257, 4095, 2**18 + 2, 2**18 + 4])
def test_odd_sizes_variant(dtype, elements, device, backend):
    if device == "cpu":
        elements = min(elements, 512 + elements % 8)
    for neuron in NEURONS:
        x_seq = 2 * torch.randn(3, elements).to(dtype)
        compare_with_the_cpu(device, backend, neuron, x_seq, surrogate=surrogate("atan"))


@pytest.mark.parametrize("neuron", NEURONS)
def test_memory_layouts(neuron, device, backend):
    base = 2 * torch.randn(3, 4, 6, 8, 2)
    for x_seq in (
        base.permute(0, 1, 4, 2, 3),
        base.transpose(0, 1),
        base[:, :, ::2],
        base[:1].expand_as(base),
    ):
        compare_with_the_cpu(device, backend, neuron, x_seq)
        on_device = x_seq.to(device)
        s_seq, _ = multi_step_lif(on_device, backend=backend)
        assert s_seq.stride() == torch.empty_like(on_device).stride()


@needs_cuda
def test_the_default_is_cupy_where_it_can_be_used():
    launcher = next(launcher for launcher in devices.LAUNCHERS.values() if launcher.problem(0) is None)
    launcher._loaded.clear()
    multi_step_lif(torch.randn(3, 1000, device="cuda"))
    assert len(launcher._loaded) == 1


def test_learned_gradients_do_not_change_from_run_to_run(device, backend):
    elements = 2**20 if device == "cuda" else 2**10
    x_seq, v = torch.randn(4, elements, device=device), torch.zeros(elements, device=device)
    for neuron in ("plif", "leaky"):
        sums = [run(neuron, x_seq, v, backend=backend)[-1] for _ in range(5)]
        assert all(torch.equal(sums[0], other) for other in sums)


def test_side_stream(cuda_backend):
    x_seq = torch.randn(4, 2**20)
    v = torch.zeros(2**20)
    want = run("lif", x_seq, v, backend="torch")
    run("lif", x_seq.cuda(), v.cuda(), backend=cuda_backend)  # compiled
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        late = torch.zeros(4, 2**20, device="cuda")
        torch.cuda._sleep(50_000_000)  # on another stream the kernel would see the zeros
        late.copy_(x_seq.cuda())
        got = run("lif", late, v.cuda(), backend=cuda_backend)
    assert_match(got, want)


def test_in_a_thread_of_its_own(cuda_backend):
    """It has no context when it starts, as those of autograd."""
    x_seq, got = torch.randn(4, 2**12), []
    want = run("lif", x_seq, torch.zeros(2**12), backend="torch")
    given = x_seq.cuda(), torch.zeros(2**12, device="cuda")
    run("lif", *given, backend=cuda_backend)  # compiled
    thread = threading.Thread(target=lambda: got.extend(run("lif", *given, backend=cuda_backend)))
    thread.start()
    thread.join()
    assert_match(got, want)


def step_of(neuron, x_seq, backend):
    """A function from what ``x_seq`` holds to spikes, state and gradients: the same whenever it is called."""
    v, parameter = torch.zeros_like(x_seq[0], requires_grad=False), parameter_of(neuron, x_seq.device)

    def step():
        s_seq, v_next = call(neuron, x_seq, v, parameter, None, backend=backend)
        leaves = [x_seq] if neuron.startswith(("if", "lif")) else [x_seq, parameter]
        return [s_seq, v_next, *torch.autograd.grad(s_seq.sum() + v_next.sum(), leaves)]

    return step


@pytest.mark.parametrize("neuron", NEURONS)
def test_a_step_is_the_same_whenever_it_is_called(neuron, device, backend):
    step = step_of(neuron, torch.randn(4, 64, device=device, requires_grad=True), backend)
    for first, again in zip(step(), step(), strict=True):
        assert torch.equal(first, again)


@pytest.mark.parametrize("neuron", NEURONS)
def test_cuda_graph(neuron, cuda_backend):
    x_seq = torch.randn(4, 4096, device="cuda", requires_grad=True)
    step = step_of(neuron, x_seq, cuda_backend)
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(3):
            step()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = step()
    with torch.no_grad():
        x_seq.copy_(3 * torch.randn(4, 4096))
    graph.replay()
    torch.cuda.synchronize()
    for got, want in zip(captured, step(), strict=True):
        assert torch.equal(got, want)


def test_capture_before_the_first_run_is_refused(cuda_backend):
    x_seq = torch.randn(4, 4096, device="cuda")
    multi_step_lif(x_seq, backend=cuda_backend)
    devices.LAUNCHERS[cuda_backend]._loaded.clear()
    with (
        pytest.raises(BackendError, match="once before the capture"),
        torch.cuda.graph(torch.cuda.CUDAGraph()),
    ):
        multi_step_lif(x_seq, backend=cuda_backend)


@pytest.mark.parametrize("kind", ["lif", "plif"])
@pytest.mark.parametrize("charged", [False, True])
def test_opcheck(kind, charged, device, backend):
    decay = torch.tensor(0.4, device=device, requires_grad=True) if kind == "plif" else None
    x_seq = torch.randn(3, 64, device=device, requires_grad=True)
    settings = lif_settings(
        tau=2.0 if decay is None else None, decay_input=True, v_threshold=1.0, v_reset=0.0, detach_reset=False,
        charged=charged, surrogate=surrogate("atan"),
    )  # fmt: skip
    for v in (None, torch.randn(64, device=device)):
        arguments = (x_seq, v, 0.2, decay, *flat(settings), True, decay is not None, backend)
        torch.library.opcheck(torch.ops.sltt_ext.lif.default, arguments)


def test_opcheck_leaky(device, backend):
    x_seq = torch.randn(3, 64, device=device, requires_grad=True)
    beta, threshold = (torch.tensor(value, device=device, requires_grad=True) for value in (0.9, 1.0))
    rest = ("subtract", True, False, "atan", (2.0,), True, True, backend)
    arguments = (x_seq, torch.randn(64, device=device), beta, threshold, *rest)
    torch.library.opcheck(torch.ops.sltt_ext.leaky.default, arguments)


@pytest.mark.parametrize("neuron", NEURONS)
def test_compiled_without_graph_break(neuron, device, backend):
    def loss(x_seq, parameter):
        s_seq, v_next = call(neuron, x_seq, None, parameter, None, backend=backend)
        return (s_seq * x_seq.detach()).sum() + v_next.sum()

    results = []
    for way in (loss, torch.compile(loss, backend=COMPILERS[device], fullgraph=True)):
        torch.manual_seed(0)
        x_seq = torch.randn(3, 4, 5, 6, 7, device=device).permute(0, 1, 4, 2, 3).requires_grad_()
        way(x_seq, parameter_of(neuron, device, learn=False)).backward()
        results.append(x_seq.grad)
    torch.testing.assert_close(*results)


def test_compiled_network(device, backend):
    pytest.importorskip("spikingjelly")
    import networks
    from modules import FUNCTIONAL_FORM
    from spikingjelly.activation_based import functional

    import sltt_ext

    net = sltt_ext.convert(networks.conv_net(step_mode="m"), backend=backend).to(device)
    x, _ = networks.images()
    x_seq = x.to(device).repeat(4, 1, 1, 1, 1)
    results = []
    # 0.0.0.0.14's layers break the graph
    for way in (net, torch.compile(net, backend=COMPILERS[device], fullgraph=FUNCTIONAL_FORM)):
        functional.reset_net(net)
        net.zero_grad()
        way(x_seq).square().sum().backward()
        results.append([parameter.grad.clone() for parameter in net.parameters()])
    torch.testing.assert_close(results[0], results[1], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_autocast(dtype, device, backend):
    layer = torch.nn.Linear(64, 64, device=device)
    x_seq = torch.randn(4, 32, 64, device=device)
    results = []
    for used in ("torch", backend):
        layer.zero_grad()
        with torch.autocast(device, dtype):
            s_seq, v = multi_step_lif(layer(x_seq), backend=used)
        assert (s_seq.dtype, v.dtype) == (dtype, torch.float32)
        (s_seq.float().sum() + v.sum()).backward()
        results.append((s_seq, layer.weight.grad.clone()))
    assert torch.equal(results[0][0], results[1][0])
    torch.testing.assert_close(results[0][1], results[1][1], rtol=1e-2, atol=1e-2)


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two CUDA devices")
def test_the_device_of_the_tensor_counts_not_the_current_one(cuda_backend):
    x_seq, v = torch.randn(4, 4096), torch.zeros(4096)
    want = run("plif", x_seq, v, backend="torch")
    with torch.cuda.device(0):
        assert_match(run("plif", x_seq.to("cuda:1"), v.to("cuda:1"), backend=cuda_backend), want)
        assert torch.cuda.current_device() == 0


def test_tensors_on_different_devices_and_other_dtypes_are_refused(cuda_backend):
    x_seq = torch.randn(3, 8, device="cuda")
    with pytest.raises(InputError, match="v is on cpu, x_seq on cuda"):
        multi_step_lif(x_seq, torch.zeros(8))
    with pytest.raises(InputError, match="w is on cpu"):
        multi_step_plif(x_seq, torch.tensor(0.0))
    with pytest.raises(InputError, match="beta is on cpu"):
        multi_step_leaky(x_seq, beta=torch.tensor(0.9))
    with pytest.raises(InputError, match="float64"):
        multi_step_lif(x_seq.double(), backend=cuda_backend)
    assert multi_step_lif(x_seq.double())[0].dtype == torch.float64


def test_more_elements_than_32_bits_count(cuda_backend):
    elements = 2**31 + 16
    if torch.cuda.mem_get_info()[0] < 16 * elements:
        pytest.skip("needs 35 GB of device memory")
    x_seq = torch.zeros(1, elements, dtype=torch.float16, device="cuda")
    places = [0, 2**31 - 1, 2**31, elements - 1]
    x_seq[0, places] = 2.0
    s_seq, v = multi_step_if(x_seq, v_reset=None, backend=cuda_backend)
    assert s_seq[0, places].tolist() == [1.0] * 4
    assert v[places].tolist() == [1.0] * 4
    assert s_seq.sum(dtype=torch.float32).item() == 4
