import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import published
import pytest
import torch
from torch import nn

pytest.importorskip("lightning")
pytest.importorskip("jsonargparse")
from lightning.pytorch.callbacks import ModelCheckpoint

from sltt_ext.errors import CheckpointError, ConfigurationError, DataError
from sltt_ext.experiment import Experiment, main, run
from sltt_ext.experiment.settings import from_command_line
from sltt_ext.methods import Method

pytestmark = pytest.mark.usefixtures("bytes_alone")  # of two runs, the same calls
EXAMPLES = Path(__file__).parents[1] / "examples"
CONFIGS = sorted(EXAMPLES.glob("*/*.yaml"))
DIGITS = Experiment(
    data="digits", network="preact_resnet18", time_steps=2, epochs=1, batch_size=32, learning_rate=0.1,
    weight_decay=0.0, workers=0, accelerator="cpu", precision="32-true", width=4,
)  # fmt: skip


@pytest.fixture(autouse=True)
def _quiet(monkeypatch):
    monkeypatch.setenv("OMP_NUM_THREADS", "1")


def tiny_net(experiment, data):
    """Digits of 8 x 8 pixels are too small for the paper's networks."""
    from spikingjelly.activation_based import layer

    from sltt_ext.models import paper_lif

    return nn.Sequential(
        layer.Flatten(), layer.Linear(64, 50), paper_lif(), layer.Linear(50, data.num_classes)
    )


def digits(tmp_path, **settings):
    return replace(DIGITS, output=tmp_path, **settings)


def last(experiment):
    return torch.load(experiment.folder / "last.ckpt", weights_only=True)


@pytest.mark.parametrize(
    "settings", [{"method": "bptt"}, {"method": "sltt"}, {"method": "sltt-k", "k": 1}], ids=str
)
def test_each_method_learns(tmp_path, settings):
    assert run(digits(tmp_path, epochs=2, **settings), tiny_net)["val_accuracy"] > 0.5


def test_resumed_run_ends_with_the_weights_of_one_that_was_not_interrupted(tmp_path, monkeypatch):
    whole = digits(tmp_path / "whole", epochs=2, method="sltt-k", k=1)
    run(whole, tiny_net)
    broken = replace(whole, output=tmp_path / "broken")

    def interrupt(self, trainer, module):
        if trainer.current_epoch == 1:
            raise OSError("the machine was switched off")

    with monkeypatch.context() as patch:
        patch.setattr(ModelCheckpoint, "on_train_epoch_start", interrupt)
        with pytest.raises(OSError, match="switched off"):
            run(broken, tiny_net)
    run(replace(broken, resume=True), tiny_net)
    assert last(broken)["epoch"] == last(whole)["epoch"] == 1
    for name, value in last(whole)["state_dict"].items():
        torch.testing.assert_close(last(broken)["state_dict"][name], value, rtol=0, atol=0)


def test_evaluation_repeats_the_accuracy_of_training(tmp_path):
    experiment = digits(tmp_path)
    trained = run(experiment, tiny_net)
    evaluated = run(replace(experiment, evaluate=experiment.folder / "last.ckpt"), tiny_net)
    assert evaluated["val_accuracy"] == trained["val_accuracy"]


def test_pretrained_weights_of_another_number_of_steps_are_the_start(tmp_path):
    first = digits(tmp_path)
    run(first, tiny_net)
    second = replace(first, time_steps=3, learning_rate=0.0, pretrained=first.folder / "last.ckpt")
    run(second, tiny_net)
    for name, value in last(first)["state_dict"].items():
        assert torch.equal(last(second)["state_dict"][name], value)


def test_published_weights_are_evaluated(tmp_path):
    path = tmp_path / "published.pth"
    torch.save({"net": published.state("preact_resnet18", 8, 10, 3)}, path)
    experiment = replace(DIGITS, data="cifar10", smoke=True, output=tmp_path, evaluate=path, time_steps=1)
    assert 0 <= run(experiment)["val_accuracy"] <= 1


def test_checkpoint_of_another_network(tmp_path):
    run(digits(tmp_path), tiny_net)
    experiment = digits(tmp_path / "other", pretrained=digits(tmp_path).folder / "last.ckpt")

    def deeper(experiment, data):
        return tiny_net(experiment, data).append(nn.Linear(10, 10))

    with pytest.raises(CheckpointError, match=r"is from another network than Sequential: [\s\S]*Missing key"):
        run(experiment, deeper)


def test_run_that_is_there_is_not_overwritten(tmp_path):
    run(digits(tmp_path), tiny_net)
    with pytest.raises(CheckpointError, match="--resume continues it"):
        run(digits(tmp_path), tiny_net)


@pytest.mark.parametrize(
    ("settings", "error", "message"),
    [
        ({"data": "mnist"}, ConfigurationError, "data must be one of cifar10"),
        ({"network": "resnet18"}, ConfigurationError, "network must be one of nf_resnet34"),
        ({"network": "nf_resnet34", "dropout": 0.1}, ConfigurationError, "nf_resnet34 has no dropout"),
        ({"method": "sltt-k", "k": 3}, ConfigurationError, "k must be an integer from 1 to time_steps=2"),
        ({"resume": True}, CheckpointError, "nothing to resume"),
        ({"pretrained": Path("nothing.pth")}, CheckpointError, "there is no file nothing.pth"),
        ({"data": "cifar10", "data_dir": Path("nowhere")}, DataError, "CIFAR-10 is not in nowhere"),
    ],
    ids=str,
)
def test_settings_that_cannot_work(tmp_path, settings, error, message):
    with pytest.raises(error, match=message):
        run(digits(tmp_path, **settings))


def test_network_with_another_number_of_outputs(tmp_path):
    with pytest.raises(ConfigurationError, match=r"has 7 outputs, .* has 10 classes"):
        run(digits(tmp_path), lambda experiment, data: tiny_net(experiment, data).append(nn.Linear(10, 7)))


def test_user_errors_end_the_command_with_their_message(tmp_path):
    config = EXAMPLES / "cifar" / "cifar10.yaml"
    with pytest.raises(SystemExit, match=r"DataError: CIFAR-10 is not in .*download"):
        main("", arguments=["--config", str(config), "--data_dir", str(tmp_path), "--output", str(tmp_path)])


def test_help_names_every_setting(capsys):
    with pytest.raises(SystemExit):
        main("What this script is for.", arguments=["--help"])
    shown = capsys.readouterr().out
    assert "What this script is for." in shown
    assert all(f"--{name}" in shown for name in vars(DIGITS))


PAPER = {  # rows of the paper's settings: T, batch, lr, weight decay, epochs, lambda, K, dropout
    "cifar10": ("preact_resnet18", 6, 128, 0.1, 5e-5, 200, 0.05, None, 0.0),
    "cifar100": ("preact_resnet18", 6, 128, 0.1, 5e-4, 200, 0.05, None, 0.0),
    "cifar10_dvs": ("vgg11_bn", 10, 128, 0.05, 5e-4, 300, 0.05, 2, 0.3),
    "dvs_gesture": ("vgg11_bn", 20, 16, 0.1, 5e-4, 300, 0.05, 4, 0.4),
    **{
        f"nf_resnet{depth}_stage1": (f"nf_resnet{depth}", 1, 256, 0.1, 1e-5, 100, 0.0, None, 0.0)
        for depth in (34, 50, 101)
    },
    **{
        f"nf_resnet{depth}_stage2": (f"nf_resnet{depth}", 6, 256, 0.001, 0.0, 30, 0.0, 2, 0.0)
        for depth in (34, 50, 101)
    },
}


@pytest.mark.parametrize("config", CONFIGS, ids=lambda config: config.stem)
def test_configurations_are_the_papers_rows(config):
    e = from_command_line("", ["--config", str(config)])
    network, steps, batch, rate, decay, epochs, mse_weight, k, dropout = PAPER[config.stem]
    assert (e.network, e.time_steps, e.batch_size, e.learning_rate, e.weight_decay, e.epochs) == (
        network, steps, batch, rate, decay, epochs,
    )  # fmt: skip
    assert (e.mse_weight, e.dropout) == (mse_weight, dropout)
    assert k is None or e.k == k
    assert (e.mse_target == "one_hot") == (config.stem == "cifar10_dvs")


def test_the_schedule_on_the_command_line_reaches_the_method():
    arguments = ["--config", str(CONFIGS[0]), "--method", "sltt-k", "--k", "2", "--schedule", "stratified"]
    plan = {"chunk": "auto", "pack_spikes": "auto", "cache_invariant": "auto"}
    assert from_command_line("", arguments).chosen_method == Method(
        "sltt", k=2, schedule="stratified", **plan
    )


def test_every_row_has_a_configuration():
    assert {config.stem for config in CONFIGS} == set(PAPER)


@pytest.mark.slow
@pytest.mark.parametrize("method", ["sltt", "sltt-k"])
@pytest.mark.parametrize("config", CONFIGS, ids=lambda config: config.stem)
def test_smoke_run_writes_a_checkpoint_and_resumes_from_it(config, method, tmp_path):
    arguments = ["--config", str(config), "--method", method, "--output", str(tmp_path), "--smoke"]
    metrics = main("", arguments=arguments)
    (checkpoint,) = tmp_path.rglob("last.ckpt")
    steps = torch.load(checkpoint, weights_only=True)["global_step"]
    main("", arguments=[*arguments, "--resume"])
    assert torch.load(checkpoint, weights_only=True)["global_step"] == 2 * steps > 0
    assert {"train_loss", "val_accuracy"} <= set(metrics)


@pytest.mark.slow
@pytest.mark.parametrize("method", ["sltt", "bptt"])
def test_smoke_run_in_two_processes(method, tmp_path):
    script, config = EXAMPLES / "cifar" / "train.py", EXAMPLES / "cifar" / "cifar10.yaml"
    command = [
        sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", script, "--config", config, "--smoke",
        "--devices", "2", "--method", method, "--output", tmp_path,
    ]  # fmt: skip
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert len(list(tmp_path.rglob("last.ckpt"))) == 1
