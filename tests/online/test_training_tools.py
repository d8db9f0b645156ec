"""A network over time inside the training tools people have: trained as the same tool trains the original, in one graph."""

from functools import partial

import networks
import numpy
import oracle
import pytest
import torch
from spikingjelly.activation_based import neuron
from torch import nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset

import sltt_ext

T, BATCH = 4, 4
X, TARGET = networks.images(6 * BATCH)
BATCHES = list(zip(X.split(BATCH), TARGET.split(BATCH)))
LOADER = DataLoader(TensorDataset(X, TARGET), BATCH)


def sgd(net):
    return torch.optim.SGD(net.parameters(), 0.05, momentum=0.9)


def error(train, make=networks.conv_net):
    """How far that which ``train`` does to a network over time is from what it does to the original one."""
    original, net = make(), make()
    train(oracle.StepByStep(original, T))
    train(sltt_ext.over_time(net, T))
    return error_of_updates(net, original, make())


def error_of_updates(net, original, before):
    updates = [
        [after.detach() - start.detach() for after, start in zip(one.parameters(), before.parameters())]
        for one in (net, original)
    ]
    return oracle.relative_error(*updates)


def accumulation_and_clipping(net):
    optimizer = sgd(net)
    for i, (x, target) in enumerate(BATCHES):
        (F.cross_entropy(net(x), target) / 2).backward()
        if i % 2:
            nn.utils.clip_grad_norm_(net.parameters(), 0.5)
            optimizer.step()
            optimizer.zero_grad()


def gradients_by_function(net):
    weights = list(net.parameters())
    for x, target in BATCHES:
        gradients = torch.autograd.grad(F.cross_entropy(net(x), target), weights)
        assert all(weight.grad is None for weight in weights)
        with torch.no_grad():
            torch._foreach_add_(weights, gradients, alpha=-0.05)


def timm_tools(net):
    pytest.importorskip("timm")
    from timm.data import Mixup
    from timm.loss import SoftTargetCrossEntropy
    from timm.optim import create_optimizer_v2
    from timm.utils import ModelEmaV3, NativeScaler

    numpy.random.seed(0)
    optimizer = create_optimizer_v2(net, "sgd", lr=0.05, weight_decay=1e-3)
    average, scaler = ModelEmaV3(net, decay=0.5), NativeScaler("cpu")
    mixup = Mixup(mixup_alpha=0.8, cutmix_alpha=1.0, label_smoothing=0.1, num_classes=5)
    for i, (images, labels) in enumerate(BATCHES):
        x, target = mixup(images.clone(), labels)
        loss = SoftTargetCrossEntropy()(net(x), target) / 2
        scaler(loss, optimizer, clip_grad=0.5, parameters=net.parameters(), need_update=i % 2 == 1)
        if i % 2:
            optimizer.zero_grad()
            average.update(net)
    weights, averages = (list(one.parameters()) for one in (net, average.module))
    assert 0 < oracle.relative_error(averages, weights) < 0.1
    with torch.no_grad():
        assert average(X).shape == (len(X), 5)
        for weight, moving in zip(weights, averages):  # the average is what is compared
            weight.copy_(moving)


def accelerated(net):
    accelerate = pytest.importorskip("accelerate")
    accelerator = accelerate.Accelerator(cpu=True, gradient_accumulation_steps=2)
    prepared, optimizer, loader = accelerator.prepare(net, sgd(net), LOADER)
    for x, target in loader:
        with accelerator.accumulate(prepared):
            accelerator.backward(F.cross_entropy(prepared(x), target))
            if accelerator.sync_gradients:
                accelerator.clip_grad_norm_(prepared.parameters(), 0.5)
            optimizer.step()
            optimizer.zero_grad()


def lightning_automatic(net):
    pl = pytest.importorskip("lightning.pytorch")

    class Module(pl.LightningModule):
        def __init__(self):
            super().__init__()
            self.net = net

        def training_step(self, batch, batch_idx):
            x, target = batch
            return F.cross_entropy(self.net(x), target)

        def configure_optimizers(self):
            return sgd(self)

    trainer = pl.Trainer(
        max_epochs=1, accelerator="cpu", devices=1, logger=False, enable_checkpointing=False, enable_progress_bar=False,
        enable_model_summary=False, accumulate_grad_batches=2, gradient_clip_val=0.5,
    )  # fmt: skip
    trainer.fit(Module(), LOADER)


TOOLS = [
    accumulation_and_clipping, gradients_by_function, timm_tools, accelerated, lightning_automatic,
]  # fmt: skip


@pytest.mark.parametrize("train", TOOLS, ids=lambda train: train.__name__)
def test_trains_as_the_original(train):
    assert error(train) < 1e-5


def scaled(net, dtype, scale):
    optimizer, scaler = sgd(net), torch.amp.GradScaler("cpu", init_scale=scale)
    for x, target in BATCHES:
        with torch.autocast("cpu", dtype):
            loss = F.cross_entropy(net(x), target)
        scaler.scale(loss).backward()
        scaler.unscale_(optimizer)
        nn.utils.clip_grad_norm_(net.parameters(), 0.5)
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad()
    return scaler.get_scale()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_mixed_precision_with_a_scaler(dtype):
    """Neurons of the generic rule compute in half precision, as the original ones do; sums are rounded in another order."""
    make = partial(networks.conv_net, neuron.QIFNode, v_c=0.5, v_threshold=0.8)
    assert error(lambda net: scaled(net, dtype, 2.0**12), make) < 0.03


def test_a_scaler_skips_an_update_that_overflows():
    net = sltt_ext.over_time(networks.conv_net(), T)
    assert scaled(net, torch.float16, 2.0**60) == 2.0 ** (60 - len(BATCHES))
    assert all(map(torch.equal, net.parameters(), networks.conv_net().parameters()))


class Classifier(nn.Module):
    """As Hugging Face's trainer has it: named inputs, the loss among the outputs."""

    def __init__(self, net):
        super().__init__()
        self.net = net

    def forward(self, pixel_values, labels=None):
        logits = self.net(pixel_values)
        outputs = {"logits": logits}
        return outputs if labels is None else {"loss": F.cross_entropy(logits, labels), **outputs}


class EachStep(oracle.StepByStep):
    """The mean over time of a loss that each step has."""

    def forward(self, pixel_values, labels):
        sequence = self.steps(pixel_values=pixel_values, labels=labels)
        return {name: torch.stack([step[name] for step in sequence]).mean(0) for name in sequence[0]}


def hugging_face(model, folder, **options):
    transformers = pytest.importorskip("transformers")
    arguments = transformers.TrainingArguments(
        folder, per_device_train_batch_size=BATCH, per_device_eval_batch_size=BATCH, num_train_epochs=1, learning_rate=0.05,
        gradient_accumulation_steps=2, max_grad_norm=0.5, use_cpu=True, report_to="none", save_strategy="no", disable_tqdm=True,
        lr_scheduler_type="constant", optim="sgd", seed=0, **options,
    )  # fmt: skip
    data = [{"pixel_values": x, "labels": label} for x, label in zip(X, TARGET)]
    trainer = transformers.Trainer(model, arguments, train_dataset=data, eval_dataset=data)
    trainer.train()
    return trainer.evaluate()["eval_loss"]


MODELS = {
    "loss of the mean": (
        lambda: Classifier(oracle.StepByStep(networks.conv_net(), T)),
        lambda: Classifier(sltt_ext.over_time(networks.conv_net(), T)),
    ),
    "loss of each step": (
        lambda: EachStep(Classifier(networks.conv_net()), T),
        lambda: sltt_ext.over_time(Classifier(networks.conv_net()), T),
    ),
}


@pytest.mark.parametrize("models", MODELS)
def test_hugging_face_trainer(models, tmp_path):
    original, net = (make() for make in MODELS[models])
    losses = [hugging_face(model, tmp_path) for model in (original, net)]
    assert losses[1] == pytest.approx(losses[0], rel=1e-5)
    assert error_of_updates(net, original, networks.conv_net()) < 1e-5


def test_accelerate_in_mixed_precision_and_unwrapped():
    """What it puts around forward, it takes off again; and nothing else."""
    accelerate = pytest.importorskip("accelerate")
    accelerate.state.AcceleratorState._reset_state(reset_partial_state=True)  # one setting for a process
    accelerator = accelerate.Accelerator(cpu=True, mixed_precision="bf16")
    net = accelerator.prepare(sltt_ext.over_time(networks.conv_net(), T))
    assert net(X).dtype == torch.float32
    accelerator.backward(F.cross_entropy(net(X), TARGET))
    expected = sltt_ext.over_time(networks.conv_net(), T)
    with torch.autocast("cpu", torch.bfloat16):
        output = expected(X)
    F.cross_entropy(output.float(), TARGET).backward()
    assert oracle.relative_error(oracle.gradients(net), oracle.gradients(expected)) < 1e-2
    unwrapped = accelerator.unwrap_model(net, keep_fp32_wrapper=False)
    assert torch.equal(unwrapped(X), sltt_ext.over_time(networks.conv_net(), T)(X))
    accelerate.state.AcceleratorState._reset_state(reset_partial_state=True)


def test_hugging_face_model_is_saved_as_what_it_is(tmp_path):
    transformers = pytest.importorskip("transformers")

    class Config(transformers.PretrainedConfig):
        model_type = "spiking"

    class Model(transformers.PreTrainedModel):
        config_class = Config

        def __init__(self, config):
            super().__init__(config)
            self.net = networks.conv_net()
            self.post_init()

        def forward(self, pixel_values, labels=None):
            logits = self.net(pixel_values)
            loss = None if labels is None else F.cross_entropy(logits, labels)
            return transformers.modeling_outputs.ImageClassifierOutput(loss=loss, logits=logits)

    torch.manual_seed(3)
    net = sltt_ext.over_time(Model(Config()), T)
    output = net(pixel_values=X, labels=TARGET)
    assert type(output) is transformers.modeling_outputs.ImageClassifierOutput
    output.loss.backward()
    assert all(parameter.grad is not None for parameter in net.parameters())
    net.save_pretrained(tmp_path)
    assert '"Model"' in (tmp_path / "config.json").read_text()
    loaded = sltt_ext.over_time(Model.from_pretrained(tmp_path), T)
    assert torch.equal(loaded(X).logits, output.logits)
