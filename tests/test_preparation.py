"""Images reach a compact network as they reached it in training: its folder and card say how, predict follows."""

import json
import stat

import numpy as np
import pytest
import torch
from PIL import Image
from torchvision.transforms import v2

from lit_prune import InputError, Preparation, load_compact, save_compact
from lit_prune.cli.main import main
from lit_prune.data import DigitsData
from lit_prune.data.augmentation import Normalisation
from lit_prune.data.sources import FileImages
from lit_prune.models import build_network
from lit_prune.predict import predict_compact, read_prepared
from lit_prune.preparation import Normalised
from lit_prune.structure import read_preparation
from lit_prune.structure.record import record_of

MEAN, STD = (0.4, 0.5, 0.6), (0.2, 0.25, 0.3)
ARGUMENTS = {"num_classes": 10, "in_channels": 3}


@pytest.fixture
def photograph(tmp_path):
    file = tmp_path / "photo.png"
    pixels = np.random.default_rng(0).integers(0, 256, (61, 93, 3), dtype=np.uint8)
    Image.fromarray(pixels).resize((186, 122)).save(file)
    return file


@pytest.mark.parametrize("resize", [32, 36])
def test_a_file_is_prepared_as_the_data_prepares_it(photograph, resize):
    preparation = Preparation(MEAN, STD, (32, 32), resize)
    source = FileImages((str(photograph),), torch.tensor([0]), 32, resize)
    expected = Normalisation(MEAN, STD)(source.image(0)[None])[0]
    torch.testing.assert_close(read_prepared(photograph, preparation), expected, atol=1e-6, rtol=0)
    steps = [v2.Resize(resize), v2.CenterCrop(32), v2.ToImage(), v2.ToDtype(torch.float32, scale=True)]
    other = v2.Compose([*steps, v2.Normalize(MEAN, STD)])(Image.open(photograph))
    torch.testing.assert_close(
        read_prepared(photograph, preparation), other.as_subclass(torch.Tensor), atol=1e-6, rtol=0
    )


@pytest.fixture
def folder(tmp_path):
    torch.manual_seed(0)
    network = build_network("cifar_resnet20", ARGUMENTS).eval()
    preparation = Preparation(MEAN, STD, (32, 32), 32, classes=tuple("abcdefghij"))
    report = {"dense": {"accuracy": 0.9, "macs": 40}, "compact": {"accuracy": 0.8, "macs": 20}}
    save_compact(
        tmp_path / "compact",
        network,
        backbone="cifar_resnet20",
        arguments=ARGUMENTS,
        input_shape=(3, 32, 32),
        report=report,
        preparation=preparation,
    )
    return tmp_path / "compact", network, preparation


def test_a_compact_folder_says_how_images_are_prepared_and_keeps_saying_it(folder, tmp_path):
    path, _, preparation = folder
    assert read_preparation(path) == preparation == record_of(load_compact(path)).preparation
    assert json.loads((path / "structure.json").read_text())["preparation"]["classes"][:2] == ["a", "b"]
    card = (path / "README.md").read_text()
    assert card.startswith("---\nlibrary_name: lit_prune\npipeline_tag: image-classification\n")
    assert "| multiply-adds | 40 | 20 |" in card and str(list(MEAN)) in card and "a, b, c" in card


def test_files_of_a_compact_folder_may_be_read_by_whoever_may_read_the_folder(folder):
    modes = {stat.S_IMODE(file.stat().st_mode) for file in folder[0].iterdir()}
    (folder[0].parent / "any").touch()
    assert modes == {stat.S_IMODE((folder[0].parent / "any").stat().st_mode)}


def test_predict_names_the_classes_that_the_network_gives(folder, photograph, capsys):
    path, network, preparation = folder
    guesses = predict_compact(path, [photograph], top=3)[str(photograph)]
    expected = network(read_prepared(photograph, preparation)[None]).softmax(1)[0]
    assert guesses[0].label == "abcdefghij"[expected.argmax()]
    assert guesses[0].probability == pytest.approx(expected.max().item(), abs=1e-6)
    main(["predict", "--compact", str(path), str(photograph), "--top", "2"])
    assert capsys.readouterr().out.startswith(f"{photograph}: {guesses[0].label} {guesses[0].probability:.1%}, ")


def test_predict_refuses_a_folder_that_does_not_say_it_and_a_file_that_is_no_image(folder, tmp_path):
    (tmp_path / "no.jpg").write_text("text")
    with pytest.raises(InputError, match=r"no\.jpg"):
        predict_compact(folder[0], [tmp_path / "no.jpg"])
    save_compact(
        tmp_path / "silent", folder[1], backbone="cifar_resnet20", arguments=ARGUMENTS, input_shape=(3, 32, 32)
    )
    with pytest.raises(InputError, match="does not say how images are prepared"):
        predict_compact(tmp_path / "silent", [tmp_path / "no.jpg"])


def test_a_network_that_normalises_itself_is_the_network_after_normalisation(folder):
    images = torch.rand(2, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    _, network, preparation = folder
    torch.testing.assert_close(Normalised(network, preparation).eval()(images), network(preparation.normalise(images)))


def test_grey_data_says_so_and_damaged_values_are_refused():
    data = DigitsData(resolution=8)
    data.setup("fit")
    said = data.preparation
    assert (said.channels, said.size, said.resize, said.classes[3]) == ("grey", (8, 8), 8, "3")
    assert Preparation.from_dict(json.loads(json.dumps(said.to_dict()))) == said
    for wrong in ({"std": [0.0]}, {"mean": "x"}, {"size": [8]}, {"surplus": 1}, {"resize": 0}, {"classes": [1]}):
        with pytest.raises(InputError):
            Preparation.from_dict({**said.to_dict(), **wrong})
