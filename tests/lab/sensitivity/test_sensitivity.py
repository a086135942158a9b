"""One group at a time: an idle group costs nothing, a needed one does, solved readers do not make it worse."""

import pandas as pd
import pytest
import torch

from lit_prune import InputError
from lit_prune.cli.main import main
from lit_prune.lab.sensitivity import Asked, sensitivity
from lit_prune.lab.sensitivity.figures import draw_sensitivity
from lit_prune.report.run_folder import RunFolder


@pytest.fixture
def labelled(tiny_net):
    """The tiny network with a group half of which does nothing, and images labelled as it decides."""
    with torch.no_grad():
        tiny_net.conv2.weight[:, 4:] = 0  # the readers of conv1's last four channels
        tiny_net.conv1.weight[4:] *= 1e-3
    images = torch.randn(96, 3, 8, 8, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        labels = tiny_net(images).argmax(1)
    return tiny_net, [(images, labels)]


def test_a_group_whose_rest_does_nothing_loses_nothing_and_the_network_is_left_alone(labelled):
    net, batches = labelled
    before = {name: value.clone() for name, value in net.state_dict().items()}
    table = sensitivity(net, batches, Asked(keep=(0.5, 0.25)))
    assert all(torch.equal(value, net.state_dict()[name]) for name, value in before.items())
    idle = table[(table["layer"] == "conv1") & (table["keep"] == 0.5)].iloc[0]
    assert (idle.kept, idle.units, idle.loss, idle.agreement) == (4, 8, 0.0, 1.0) and idle.macs_ratio < 1
    other = table[(table["layer"] != "conv1") & (table["keep"] == 0.25)].iloc[0]
    assert other.loss > 0 and other.figure == pytest.approx(1 - other.loss)
    assert set(table["group"].value_counts()) == {2}
    assert table["loss_refit"].mean() <= table["loss"].mean()


def test_wrong_shares_and_groups_are_refused(labelled):
    net, batches = labelled
    for keep in ((), (0.0,), (1.0,)):
        with pytest.raises(InputError, match="shares"):
            Asked(keep=keep)
    with pytest.raises(InputError, match="nowhere"):
        sensitivity(net, batches, Asked(groups=("nowhere",)))


def test_the_verb_writes_table_record_and_figure(make_run, tmp_path):
    trainer, module, data = make_run(tmp_path / "dense", stages=(), max_epochs=1)
    trainer.fit(module, data)
    run_dir = tmp_path / "run"
    weights = str(tmp_path / "dense" / "checkpoints" / "last.ckpt")
    asked = ["--request.keep", "[0.5]", "--request.refit", "false", "--request.images", "64"]
    model = ["--model.backbone", "cifar_resnet20", "--model.weights", weights]
    images = ["--data", "lit_prune.data.DigitsData", "--data.resolution", "8", "--data.calibration_size", "32"]
    main(["sensitivity", *images, *model, *asked, "--run_dir", str(run_dir)])
    table = pd.read_parquet(run_dir / "sensitivity.parquet")
    assert set(table["keep"]) == {0.5} and len(table) > 5 and table["figure"].between(0, 1).all()
    run = RunFolder(run_dir)
    assert run.protocol["sensitivity"]["score"] == "magnitude"
    assert len(draw_sensitivity(run).figure.axes[0].lines) == 3
