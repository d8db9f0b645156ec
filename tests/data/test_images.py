import pickle

import pytest
import torch

pytest.importorskip("lightning")
from PIL import Image
from torchvision import transforms

from sltt_ext.data import CIFAR10Data, CIFAR100Data, ImageFolderData, ImageNetData, write_tiny
from sltt_ext.data.images import Cutout, small_image_transform
from sltt_ext.errors import DataError, SLTTWarning

FIRST = {"cifar10": "cifar-10-batches-py/data_batch_1", "cifar100": "cifar-100-python/train"}


def grey_image(size=32):
    return Image.new("RGB", (size, size), (7, 7, 7))


def rectangle(image):
    """Rows, columns and colours of what Cutout painted over the grey."""
    pixels = transforms.PILToTensor()(image)
    painted = (pixels != 7).any(0)
    return painted.any(1).sum().item(), painted.any(0).sum().item(), pixels[:, painted].T.tolist()


def test_cutout_paints_one_rectangle_from_black_to_red_on_half_of_the_images():
    painted = [rectangle(Cutout()(grey_image())) for _ in range(400)]
    found = [(rows, columns, colours) for rows, columns, colours in painted if rows]
    assert 150 < len(found) < 250
    for rows, columns, colours in found:
        assert rows * columns == len(colours)
        assert 0.01 <= rows * columns / 32**2 <= 0.4
        assert 0.3 <= rows / columns <= 3.5
        assert colours == [[colours[0][0], 0, 0]] * len(colours)


def test_cutout_reaches_every_edge():
    painted = torch.zeros(32, 32, dtype=torch.bool)
    for _ in range(400):
        painted |= (transforms.PILToTensor()(Cutout()(grey_image())) != 7).any(0)
    assert all(edge.any() for edge in (painted[0], painted[-1], painted[:, 0], painted[:, -1]))


@pytest.mark.parametrize(
    ("module", "classes", "mean", "std"),
    [
        (CIFAR10Data, 10, (0.4914, 0.4822, 0.4465), (0.2023, 0.1994, 0.2010)),
        (CIFAR100Data, 100, (0.5071, 0.4867, 0.4408), (0.2675, 0.2565, 0.2761)),
    ],
)
def test_cifar_pickles(tmp_path, module, classes, mean, std):
    name = module.__name__.lower().removesuffix("data")
    data = module(tmp_path, **write_tiny(name, tmp_path))
    with (tmp_path / FIRST[name].replace("data_batch_1", "test_batch").replace("train", "test")).open(
        "rb"
    ) as file:
        row = torch.tensor(pickle.load(file)["data"][5]).float().view(3, 32, 32) / 255
    image, label = data.test_set[5]
    expected = (row - torch.tensor(mean).view(3, 1, 1)) / torch.tensor(std).view(3, 1, 1)
    torch.testing.assert_close(image, expected)
    assert (label, data.num_classes) == (5, classes)
    assert next(iter(data.train_dataloader()))[0].shape == (100 if classes == 10 else 128, 3, 32, 32)


def test_training_images_are_padded_cropped_cut_and_flipped():
    steps = small_image_transform(True, 32, (0, 0, 0), (1, 1, 1)).transforms
    names = ["RandomCrop", "Cutout", "RandomHorizontalFlip", "ToTensor", "Normalize"]
    assert [type(step).__name__ for step in steps] == names
    assert (steps[0].size, steps[0].padding) == ((32, 32), 4)


def test_imagenet_transforms():
    train = str(ImageNetData().transform(True))
    assert "RandomResizedCrop(size=(224, 224)" in train
    assert "RandomHorizontalFlip" in train
    test = ImageNetData().transform(False)
    assert test(grey_image(300)).shape == (3, 224, 224)
    assert "Resize(size=256" in str(test)
    assert "mean=[0.485, 0.456, 0.406], std=[0.229, 0.224, 0.225]" in str(test).replace("(", "[").replace(
        ")", "]"
    )


@pytest.mark.parametrize(("module", "name"), [(ImageNetData, "imagenet"), (ImageFolderData, "image_folder")])
def test_image_folders(tmp_path, module, name):
    data = module(tmp_path, batch_size=16, **write_tiny(name, tmp_path))
    size = 224 if name == "imagenet" else 32
    x, labels = next(iter(data.test_dataloader()))
    assert x.shape == (16, 3, size, size)
    assert labels.tolist() == [i // 4 for i in range(16)]
    assert data.num_classes == (4 if name == "imagenet" else 10)


def test_options_of_an_image_folder(tmp_path):
    write_tiny("image_folder", tmp_path)
    data = ImageFolderData(tmp_path, image_size=20, mean=(0.5, 0.5, 0.5), std=(0.5, 0.5, 0.5))
    image, _ = data.test_set[0]
    assert image.shape == (3, 20, 20)
    original = Image.open(tmp_path / "test" / "class_00" / "0.jpg").resize(
        (20, 20), Image.Resampling.BILINEAR
    )
    torch.testing.assert_close(image, transforms.ToTensor()(original) * 2 - 1)


@pytest.mark.parametrize(
    ("module", "advice"),
    [
        (CIFAR10Data, r"https://www.cs.toronto.edu/~kriz/cifar-10-python.tar.gz and unpack it in .*/there"),
        (CIFAR100Data, r"https://www.cs.toronto.edu/~kriz/cifar-100-python.tar.gz and unpack it in .*/there"),
        (
            ImageNetData,
            r"https://image-net.org/download.php.*images are in .*/there/train/CLASS/ and .*/there/val",
        ),
        (ImageFolderData, r"images are in .*/there/train/CLASS/ and .*/there/test/CLASS/"),
    ],
)
def test_an_absent_set(tmp_path, module, advice):
    data = module(tmp_path / "there")
    with pytest.raises(DataError, match=advice):
        data.train_dataloader()


def test_what_is_missing_is_named(tmp_path):
    write_tiny("cifar10", tmp_path)
    (tmp_path / "cifar-10-batches-py" / "data_batch_3").unlink()
    with pytest.raises(DataError, match=r"\(data_batch_3 missing from"):
        CIFAR10Data(tmp_path).setup()


@pytest.mark.parametrize("name", ["cifar10", "cifar100"])
def test_a_damaged_pickle_is_named(tmp_path, name):
    options = write_tiny(name, tmp_path)
    path = tmp_path / FIRST[name]
    path.write_bytes(path.read_bytes()[:-100])
    module = CIFAR10Data if name == "cifar10" else CIFAR100Data
    with pytest.raises(DataError, match=rf"{path.name} cannot be read"):
        module(tmp_path, **options).setup()
    with pytest.raises(DataError, match=rf"{path.name} is not the published file"):
        module(tmp_path).setup()


def test_a_pickle_of_something_else(tmp_path):
    options = write_tiny("cifar10", tmp_path)
    (tmp_path / FIRST["cifar10"]).write_bytes(pickle.dumps({"labels": []}))
    with pytest.raises(DataError, match=rf"{tmp_path} cannot be read \(KeyError: 'data'\)"):
        CIFAR10Data(tmp_path, **options).setup()


def test_labels_and_images_that_do_not_match(tmp_path):
    options = write_tiny("cifar100", tmp_path)
    path = tmp_path / FIRST["cifar100"]
    content = pickle.loads(path.read_bytes())
    path.write_bytes(pickle.dumps({**content, "fine_labels": content["fine_labels"][1:]}))
    with pytest.raises(DataError, match="200 images, 199 labels"):
        CIFAR100Data(tmp_path, **options).setup()


def test_a_class_count_that_differs_from_the_sets(tmp_path):
    write_tiny("imagenet", tmp_path)
    with pytest.raises(
        DataError, match="has 4 classes, not 1000: give the network 4 outputs and num_classes=4"
    ):
        ImageNetData(tmp_path).setup()


def test_class_folders_that_differ(tmp_path):
    write_tiny("image_folder", tmp_path)
    (tmp_path / "test" / "class_03").rename(tmp_path / "test" / "class_33")
    with pytest.raises(DataError, match=r"different class folders \(class_03, class_33"):
        ImageFolderData(tmp_path).setup()


def test_an_empty_class_folder(tmp_path):
    write_tiny("image_folder", tmp_path)
    for path in (tmp_path / "train" / "class_03").iterdir():
        path.unlink()
    with pytest.raises(DataError, match="class_03"):
        ImageFolderData(tmp_path).setup()


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize(
    "damage", [lambda content: content[:400], lambda content: b"", lambda content: b"no image"]
)
def test_a_corrupt_image_in_the_middle_of_an_epoch(tmp_path, damage, workers):
    options = write_tiny("imagenet", tmp_path)
    path = tmp_path / "val" / "class_01" / "2.JPEG"
    path.write_bytes(damage(path.read_bytes()))
    options |= {"batch_size": 4, "workers": workers}
    with pytest.raises(DataError, match=rf"{path}.*on_corrupt='skip'"):
        list(ImageNetData(tmp_path, **options).test_dataloader())
    with pytest.warns(SLTTWarning, match=rf"skipped: {path} cannot be read"):
        batches = list(ImageNetData(tmp_path, on_corrupt="skip", **options).test_dataloader())
    assert [len(labels) for _, labels in batches] == [4, 3, 4, 4]


def test_download_asks_torchvision(tmp_path, monkeypatch):
    def download(self):
        write_tiny("cifar10", self.root)

    monkeypatch.setattr("torchvision.datasets.CIFAR10.download", download)
    data = CIFAR10Data(tmp_path, download=True, checksums=False)
    data.prepare_data()
    assert len(CIFAR10Data(tmp_path, checksums=False).train_set) == 100
