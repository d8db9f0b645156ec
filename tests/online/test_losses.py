import pytest
import torch
from torch.nn import functional as F

from sltt_ext import CrossEntropyMSELoss
from sltt_ext.errors import ConfigurationError

OUTPUT, TARGET = torch.randn(6, 4), torch.tensor([0, 1, 2, 3, 0, 1])


def test_constant_target():
    expected = 0.95 * F.cross_entropy(OUTPUT, TARGET) + 0.05 * ((OUTPUT - 1.0) ** 2).mean()
    torch.testing.assert_close(CrossEntropyMSELoss()(OUTPUT, TARGET), expected)


def test_one_hot_target():
    one_hot = torch.eye(4)[TARGET]
    expected = 0.7 * F.cross_entropy(OUTPUT, TARGET) + 0.3 * ((OUTPUT - one_hot) ** 2).mean()
    torch.testing.assert_close(CrossEntropyMSELoss(0.3, "one_hot")(OUTPUT, TARGET), expected)


def test_without_squared_error():
    assert torch.equal(CrossEntropyMSELoss(0.0)(OUTPUT, TARGET), F.cross_entropy(OUTPUT, TARGET))


@pytest.mark.parametrize("options", [{"mse_weight": 1.5}, {"mse_target": "label"}])
def test_bad_options(options):
    with pytest.raises(ConfigurationError):
        CrossEntropyMSELoss(**options)
