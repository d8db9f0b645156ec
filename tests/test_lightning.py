import copy
import importlib
import os
import pickle
import subprocess
import sys
import warnings
from pathlib import Path

import networks
import oracle
import pytest
import torch
from spikingjelly.activation_based import layer, neuron
from torch import nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset

import sltt_ext

pl = pytest.importorskip("lightning.pytorch")
from sltt_ext.errors import (  # noqa: E402
    ConfigurationError,
    InputError,
    MissingDependencyError,
    SLTTWarning,
)
from sltt_ext.lightning import NetworkMonitor, OnlineModule  # noqa: E402

pytestmark = pytest.mark.usefixtures("bytes_alone")  # of two runs, the same calls
T = 3


class Module(OnlineModule):
    scheduler = None

    def configure_optimizers(self):
        optimizer = torch.optim.SGD(self.parameters(), 0.1, momentum=0.9)
        if self.scheduler is None:
            return optimizer
        make, options = self.scheduler
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": make(optimizer), **options}}


def module(options=None, **kwargs):
    net = sltt_ext.convert(networks.conv_net())
    return Module(sltt_ext.OnlineTrainer(net, F.cross_entropy, T, **(options or {})), **kwargs)


def loader(batch_size=4, images=16):
    return DataLoader(TensorDataset(*networks.images(images)), batch_size=batch_size)


def lightning_trainer(folder, **options):
    options = {"max_epochs": 1, "enable_checkpointing": False, "logger": False, **options}
    return pl.Trainer(
        default_root_dir=folder, accelerator="cpu", devices=1, enable_progress_bar=False,
        enable_model_summary=False, **options,
    )  # fmt: skip


def by_hand(epochs=1, clip=None, accumulate=1, scheduler=None, batches=None):
    net = sltt_ext.convert(networks.conv_net())
    optimizer = torch.optim.SGD(net.parameters(), 0.1, momentum=0.9)
    schedule = None if scheduler is None else scheduler(optimizer)
    online = sltt_ext.OnlineTrainer(
        net, F.cross_entropy, T, backward=lambda loss: (loss / accumulate).backward()
    )
    for _ in range(epochs):
        for i, (x, target) in enumerate(batches or loader()):
            online.forward_backward(x, target)
            if (i + 1) % accumulate == 0:
                if clip is not None:
                    torch.nn.utils.clip_grad_norm_(net.parameters(), clip)
                optimizer.step()
                optimizer.zero_grad()
                if schedule is not None:
                    schedule.step()
    return list(net.parameters())


def same(actual, expected):
    return oracle.relative_error(list(actual.net.parameters()), expected) < 1e-6


@pytest.mark.parametrize(
    "options", [{}, {"clip": 0.1}, {"accumulate": 2}, {"accumulate": 2, "clip": 0.1}], ids=str
)
def test_weights_are_those_of_the_loop_by_hand(tmp_path, options):
    actual = module(
        gradient_clip_val=options.get("clip"), accumulate_grad_batches=options.get("accumulate", 1)
    )
    lightning_trainer(tmp_path, max_epochs=2).fit(actual, loader())
    assert same(actual, by_hand(2, **options))


def halved(optimizer):
    return torch.optim.lr_scheduler.StepLR(optimizer, 1, gamma=0.5)


def test_schedulers_by_step_and_by_epoch(tmp_path):
    actual = module()
    actual.scheduler = (halved, {"interval": "step"})
    lightning_trainer(tmp_path).fit(actual, loader())
    assert same(actual, by_hand(scheduler=halved))
    actual = module()
    actual.scheduler = (halved, {"interval": "epoch"})
    lightning_trainer(tmp_path, max_epochs=3).fit(actual, loader())
    assert actual.optimizers().param_groups[0]["lr"] == pytest.approx(0.1 / 8)


def plateau(optimizer):
    return torch.optim.lr_scheduler.ReduceLROnPlateau(optimizer, mode="max", patience=0, factor=0.5)


def test_scheduler_that_reads_a_metric(tmp_path):
    actual = module(lr_monitor="train_loss")
    actual.scheduler = (plateau, {})
    lightning_trainer(tmp_path, max_epochs=4).fit(actual, loader())
    assert actual.optimizers().param_groups[0]["lr"] < 0.1
    actual = module()
    actual.scheduler = (plateau, {})
    with pytest.raises(ConfigurationError, match="lr_monitor=, one of train_loss"):
        lightning_trainer(tmp_path).fit(actual, loader())


def test_bfloat16(tmp_path):
    actual = module()
    lightning_trainer(tmp_path, precision="bf16-mixed", max_steps=1).fit(actual, loader())
    net = sltt_ext.convert(networks.conv_net())
    with torch.autocast("cpu", torch.bfloat16):
        sltt_ext.OnlineTrainer(net, F.cross_entropy, T).forward_backward(*next(iter(loader())))
    torch.optim.SGD(net.parameters(), 0.1).step()
    assert same(actual, list(net.parameters()))


def test_float16_goes_through_lightnings_scaler(tmp_path):
    """Lightning's own float16 plugin; the CPU computes in float16 as well."""
    from lightning.pytorch.plugins.precision import MixedPrecision

    scaler = torch.amp.GradScaler("cpu", init_scale=256.0)
    plugin = MixedPrecision("16-mixed", "cpu", scaler)
    actual = module(gradient_clip_val=0.1)
    trainer = lightning_trainer(tmp_path, plugins=plugin)
    trainer.fit(actual, loader())
    expected = by_hand(clip=0.1)
    assert oracle.relative_error(list(actual.net.parameters()), expected) < 1e-2
    assert scaler.get_scale() == 256.0


def test_loggers_checkpoints_and_monitor(tmp_path):
    pytest.importorskip("tensorboard")
    from lightning.pytorch.callbacks import ModelCheckpoint
    from lightning.pytorch.loggers import CSVLogger, TensorBoardLogger

    actual = module({"k": 2, "generator": torch.Generator().manual_seed(1)})
    actual.net.append(sltt_ext.convert(layer.Dropout(0.1)))  # carries a mask, and fires nothing
    loggers = [CSVLogger(tmp_path / "csv", version=0), TensorBoardLogger(tmp_path / "tensorboard", version=0)]
    checkpoint = ModelCheckpoint(tmp_path, monitor="val_accuracy", mode="max")
    trainer = lightning_trainer(
        tmp_path, logger=loggers, log_every_n_steps=1, enable_checkpointing=True,
        callbacks=[checkpoint, NetworkMonitor(every_n_batches=2)],
    )  # fmt: skip
    trainer.fit(actual, loader(), loader())
    header = next((tmp_path / "csv").rglob("metrics.csv")).read_text().splitlines()[0].split(",")
    assert {"train_loss", "val_loss", "val_accuracy", "batch_seconds"} <= set(header)
    assert {name for name in header if "firing_rate" in name} == {"firing_rate/1", "firing_rate/3"}
    assert 0 < trainer.callback_metrics["firing_rate/1"] < 1
    assert list((tmp_path / "tensorboard").rglob("events*"))
    assert not any(module._forward_hooks for module in actual.net.modules())
    saved = torch.load(checkpoint.best_model_path, weights_only=False)
    fresh = module({"k": 2, "generator": torch.Generator().manual_seed(9)})
    fresh.load_state_dict(saved["state_dict"])
    fresh.on_load_checkpoint(saved)
    assert torch.equal(fresh.online.generator.get_state(), actual.online.generator.get_state())


def test_resume_at_the_end_of_an_epoch_is_exact(tmp_path):
    def new():
        return module({"k": 2, "generator": torch.Generator().manual_seed(1)})

    whole = new()
    lightning_trainer(tmp_path, max_epochs=4).fit(whole, loader())
    first, second = new(), new()
    trainer = lightning_trainer(tmp_path, max_epochs=2)
    trainer.fit(first, loader())
    trainer.save_checkpoint(tmp_path / "half.ckpt")
    lightning_trainer(tmp_path, max_epochs=4).fit(second, loader(), ckpt_path=tmp_path / "half.ckpt")
    assert all(torch.equal(*pair) for pair in zip(whole.net.parameters(), second.net.parameters()))


def shuffled(images=16, **options):
    return DataLoader(TensorDataset(*networks.images(images)), batch_size=4, shuffle=True, **options)


def random_module():
    """Its order of the data, steps and dropout come from torch's default generator."""
    net = networks.conv_net()
    net.insert(2, layer.Dropout(0.3))
    return Module(sltt_ext.OnlineTrainer(sltt_ext.convert(net), F.cross_entropy, T, k=2))


def random_run(folder, epochs, resume=None, *, seed=0, validate=False, **options):
    from lightning.pytorch.callbacks import ModelCheckpoint

    torch.manual_seed(seed)
    actual = random_module()
    trainer = lightning_trainer(
        folder,
        max_epochs=epochs,
        enable_checkpointing=True,
        callbacks=[ModelCheckpoint(folder, save_last=True, save_on_train_epoch_end=not validate)],
    )
    trainer.fit(actual, shuffled(**options), shuffled() if validate else None, ckpt_path=resume)
    return list(actual.net.parameters())


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize(
    "validate", [False, True]
)  # Lightning saves at the end of validation, where there is one
def test_resume_goes_on_with_the_same_order_of_the_data(tmp_path, validate, workers):
    options = {"validate": validate, "num_workers": workers}
    whole = random_run(tmp_path / "whole", 3, **options)
    random_run(tmp_path / "broken", 1, **options)
    resumed = random_run(tmp_path / "broken", 3, tmp_path / "broken" / "last.ckpt", seed=9, **options)
    assert all(torch.equal(*pair) for pair in zip(whole, resumed))


def test_resume_with_a_data_module(tmp_path):
    pytest.importorskip("sklearn")
    from sltt_ext.data import DigitsData

    def run(folder, epochs, resume=None, seed=0):
        torch.manual_seed(seed)
        net = nn.Sequential(layer.Flatten(), layer.Linear(64, 10), neuron.LIFNode())
        actual = Module(sltt_ext.OnlineTrainer(sltt_ext.convert(net), F.cross_entropy, T, k=2))
        trainer = lightning_trainer(folder, max_epochs=epochs)
        trainer.fit(actual, DigitsData(batch_size=200, workers=1), ckpt_path=resume)
        trainer.save_checkpoint(folder / "end.ckpt")
        return list(net.parameters())

    whole = run(tmp_path / "whole", 3)
    run(tmp_path / "broken", 1)
    resumed = run(tmp_path / "broken", 3, tmp_path / "broken" / "end.ckpt", seed=9)
    assert all(torch.equal(*pair) for pair in zip(whole, resumed))


def of_an_earlier_version(content):
    del content["sltt_ext random"]


def of_two_processes(content):
    content["sltt_ext random"]["cpu"] = content["sltt_ext random"]["cpu"].repeat(2, 1)


@pytest.mark.parametrize("edit", [of_an_earlier_version, of_two_processes])
def test_a_checkpoint_without_this_runs_random_numbers(tmp_path, edit):
    random_run(tmp_path, 1)
    path = tmp_path / "last.ckpt"
    content = torch.load(path, weights_only=True)
    edit(content)
    torch.save(content, path)
    with pytest.warns(SLTTWarning, match="no random numbers for this run"):
        random_run(tmp_path, 2, path)


@pytest.mark.parametrize(
    "options",
    [{"num_workers": 1, "persistent_workers": True}, {"generator": torch.Generator()}],
    ids=["workers", "generator"],
)
def test_a_loader_whose_random_numbers_are_in_no_checkpoint(tmp_path, options):
    with warnings.catch_warnings():
        warnings.simplefilter("error", SLTTWarning)
        random_run(tmp_path, 1, **options)
    with pytest.warns(SLTTWarning, match="no checkpoint has its random numbers"):
        random_run(tmp_path, 2, tmp_path / "last.ckpt", **options)


def test_weights_of_a_checkpoint_are_loaded_without_its_random_numbers(tmp_path):
    random_run(tmp_path, 1)
    actual = random_module()
    images = DataLoader(
        TensorDataset(*networks.images()), generator=torch.Generator()
    )  # draws nothing from torch's
    state = torch.get_rng_state()
    lightning_trainer(tmp_path).validate(actual, images, ckpt_path=tmp_path / "last.ckpt", verbose=False)
    assert torch.equal(torch.get_rng_state(), state)


class Named(Module):
    def unpack(self, batch):
        return batch["x"], batch["y"]


def test_batches_that_are_no_pair(tmp_path):
    x, target = networks.images(8)
    triples = DataLoader(TensorDataset(x, target, torch.arange(8)), batch_size=4)
    dicts = DataLoader([{"x": a, "y": b} for a, b in zip(x, target)], batch_size=4)
    for data, got in ((triples, "a list of 3"), (dicts, "a dict of 2")):
        for fit in (True, False):
            trainer = lightning_trainer(tmp_path)
            run = trainer.fit if fit else trainer.test
            with pytest.raises(InputError, match=rf"got {got}: override unpack\(self, batch\)"):
                run(module(), data)
    net = sltt_ext.convert(networks.conv_net())
    actual = Named(sltt_ext.OnlineTrainer(net, F.cross_entropy, T))
    lightning_trainer(tmp_path).fit(actual, dicts, dicts)
    assert same(actual, by_hand(batches=list(loader(images=8))))


def both_heads(output):
    return {"classes": output, "scaled": 2 * output}


def test_several_outputs(tmp_path):
    net = sltt_ext.convert(networks.conv_net())

    def loss_fn(outputs, target):
        return F.cross_entropy(outputs["classes"], target) + 0 * outputs["scaled"].sum()

    actual = Module(sltt_ext.OnlineTrainer(net, loss_fn, T, output=both_heads))
    trainer = lightning_trainer(tmp_path)
    trainer.fit(actual, loader(), loader())
    assert same(actual, by_hand())
    assert "val_loss" in trainer.callback_metrics
    assert "val_accuracy" not in trainer.callback_metrics


def test_predict_is_the_mean_output():
    actual = module()
    x, _ = networks.images()
    assert torch.equal(actual(x), copy.deepcopy(actual.online).predict(x))


def test_a_module_goes_through_pickle():
    """As ``ddp_spawn`` sends it."""
    sent = pickle.loads(pickle.dumps(module({"k": 2})))
    assert sent.online.net is sent.net
    assert sent.online.backward.__self__ is sent
    x, _ = networks.images()
    assert torch.equal(sent(x), module()(x))


def test_options_that_are_lightnings():
    net = sltt_ext.convert(networks.conv_net())
    for options in ({"backward": torch.Tensor.backward}, {"on_step": print}):
        with pytest.raises(ConfigurationError, match="without backward= and on_step="):
            OnlineModule(sltt_ext.OnlineTrainer(net, F.cross_entropy, T, **options))
    with pytest.raises(ConfigurationError, match="positive"):
        NetworkMonitor(0)


def in_two_processes(script, argument):
    here = Path(__file__).parent
    environment = {
        **os.environ,
        "OMP_NUM_THREADS": "1",
        "PYTHONPATH": os.pathsep.join([str(here), str(here.parent)]),
    }
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
    command = [*launcher, here / script, argument]
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=environment)
    assert done.returncode == 0, done.stderr


@pytest.mark.slow
def test_ddp_resumes_the_random_numbers_of_each_process(tmp_path):
    in_two_processes("lightning_ddp_resume.py", tmp_path)
    result = torch.load(tmp_path / "result.pt")
    assert all(torch.equal(value, result["resumed"][name]) for name, value in result["whole"].items())


def test_ddp_averages_once_an_update(tmp_path):
    """Two processes, two batches of each to an update: as one process with the joined batches."""
    in_two_processes("lightning_ddp_run.py", tmp_path / "result.pt")
    result = torch.load(tmp_path / "result.pt")
    net = sltt_ext.convert(networks.conv_net())
    optimizer = torch.optim.SGD(net.parameters(), 0.1)
    online = sltt_ext.OnlineTrainer(net, F.cross_entropy, 4)
    for batch in loader(batch_size=8):  # the samplers take turns: 4 images each are two batches of two
        online.forward_backward(*batch)
        optimizer.step()
        optimizer.zero_grad()
    assert result["reduced"] == 2
    actual = list(result["weights"].values())
    assert oracle.relative_error(actual, list(net.state_dict().values())) < 1e-6


@pytest.mark.slow
def test_ddp_with_automatic_optimisation(tmp_path):
    """A network over time in an ordinary LightningModule: as the original one in one process with the joined batches."""
    in_two_processes("lightning_ddp_automatic.py", tmp_path / "result.pt")
    result = torch.load(tmp_path / "result.pt")
    net = networks.conv_net()
    optimizer, original = torch.optim.SGD(net.parameters(), 0.1), oracle.StepByStep(net, 4)
    for x, target in loader(batch_size=8):
        F.cross_entropy(original(x), target).backward()
        torch.nn.utils.clip_grad_norm_(net.parameters(), 0.5)
        optimizer.step()
        optimizer.zero_grad()
    assert result["reduced"] == 2
    actual = list(result["weights"].values())
    assert oracle.relative_error(actual, list(net.state_dict().values())) < 1e-6


def test_without_lightning(monkeypatch):
    monkeypatch.setitem(sys.modules, "lightning", None)
    monkeypatch.delitem(sys.modules, "sltt_ext.lightning")
    with pytest.raises(MissingDependencyError, match=r"pip install 'sltt-ext\[train\]'"):
        importlib.import_module("sltt_ext.lightning")


@pytest.mark.slow
def test_the_digits_example(tmp_path):
    root = Path(__file__).parent.parent
    command = [sys.executable, root / "examples" / "digits" / "train.py", "--epochs", "1", "--k", "1"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(root)}
    done = subprocess.run(
        [*command, "--logs", tmp_path],
        capture_output=True,
        text=True,
        check=False,
        env=environment,
        cwd=tmp_path,
    )
    assert done.returncode == 0, done.stderr
    assert "test_accuracy" in done.stdout


def test_the_learning_rate_finder(tmp_path):
    """It sees the losses, and leaves the weights as they were."""
    from lightning.pytorch.tuner import Tuner

    lightning_module = module()
    lightning_module.lr = 0.1
    before = [parameter.clone() for parameter in lightning_module.parameters()]
    finder = Tuner(lightning_trainer(tmp_path)).lr_find(
        lightning_module, loader(), num_training=8, early_stop_threshold=None, update_attr=False
    )
    losses = torch.tensor(finder.results["loss"])
    assert len(losses) >= 4
    assert losses.isfinite().all()
    assert all(map(torch.equal, before, lightning_module.parameters()))


def test_validation_with_a_target_for_each_step(tmp_path):
    x, _ = networks.images(8)
    data = DataLoader(TensorDataset(x, torch.zeros(8, T, dtype=torch.long)), batch_size=4)
    with pytest.raises(ConfigurationError, match="override validation_step"):
        lightning_trainer(tmp_path).fit(module({"target_time_dim": 1}), data, data)
