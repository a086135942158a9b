"""What seconds buy: resumed curves are equal, what is there is not made again, the folders hold the networks."""

import pandas as pd
import pytest
import torch

from lit_prune import InputError, compress, load_compact
from lit_prune.cli.main import main
from lit_prune.lab.curve import CurveRequest, curve
from lit_prune.lab.curve import table as curve_table
from lit_prune.lab.curve.figures import draw_curve
from lit_prune.lab.judging import Judge
from lit_prune.report.run_folder import RunFolder
from lit_prune.task import Classification

FIGURES = ["macs_ratio", "params_ratio", "figure", "loss", "agreement", "dense"]


@pytest.fixture
def labelled(tiny_net):
    """The tiny network, and batches labelled as it decides."""
    images = torch.randn(96, 3, 8, 8, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        labels = tiny_net(images).argmax(1)
    return tiny_net, list(zip(images.split(24), labels.split(24), strict=True))


def test_rows_say_what_the_networks_in_the_folders_are_worth(labelled, tmp_path):
    net, batches = labelled
    before = {name: value.clone() for name, value in net.state_dict().items()}
    table = curve(net, batches, CurveRequest(keep=(0.6, 0.8), repair=(0, 0.2)), folder=tmp_path)
    assert all(torch.equal(value, net.state_dict()[name]) for name, value in before.items())
    assert table[["keep", "repair"]].to_numpy().tolist() == [[0.8, 0.0], [0.8, 0.2], [0.6, 0.0], [0.6, 0.2]]
    judge = Judge(net, batches, Classification())
    for row in table.itertuples():
        assert row.macs_ratio <= row.keep and row.dense == 1.0 and row.loss == 1 - row.figure
        assert (row.steps > 0) == (row.repair > 0)
        small = load_compact(tmp_path / f"keep={row.keep:g}_repair={row.repair:g}", net)
        assert judge(small)["figure"] == row.figure
    seconds = table["seconds"] - table["compress_seconds"]
    assert seconds[table["repair"] == 0].eq(0).all() and seconds[table["repair"] > 0].between(0.2, 20).all()


def test_a_curve_that_was_stopped_goes_on_and_equals_one_that_was_not(labelled, tmp_path, monkeypatch):
    net, batches = labelled
    request = CurveRequest(keep=(0.8, 0.6), repair=(0,))
    whole = curve(net, batches, request, folder=tmp_path / "whole")
    with monkeypatch.context() as patch:
        made = []

        def once(*args, **kwargs):
            if made:
                raise KeyboardInterrupt
            made.append(args)
            return compress(*args, **kwargs)

        compress = curve_table.compress
        patch.setattr(curve_table, "compress", once)
        with pytest.raises(KeyboardInterrupt):
            curve(net, batches, request, folder=tmp_path / "stopped")
    resumed = curve(net, batches, request, folder=tmp_path / "stopped")
    pd.testing.assert_frame_equal(resumed[FIGURES], whole[FIGURES])


def test_what_is_there_is_not_made_again_unless_network_or_samples_are_others(labelled, tmp_path, monkeypatch):
    net, batches = labelled
    request = CurveRequest(keep=(0.6,), repair=(0,))
    first = curve(net, batches, request, folder=tmp_path)
    monkeypatch.setattr(curve_table, "compress", lambda *a, **k: pytest.fail("made again"))
    pd.testing.assert_frame_equal(curve(net, batches, request, folder=tmp_path), first)
    grown = curve(net, batches, CurveRequest(keep=(0.6,), repair=(0, 0.1)), folder=tmp_path)
    pd.testing.assert_frame_equal(grown[:1], first)
    (images, labels), (further, others) = batches[0], batches[-1]
    changed = [[batch, *batches[1:]] for batch in ((images + 1, labels), (images, labels + 1))]
    changed += [[*batches[:-1], batch] for batch in ((further + 1, others), (further, others + 1))]
    for samples in changed:
        with pytest.raises(pytest.fail.Exception, match="made again"):
            curve(net, samples, request, folder=tmp_path)
    with torch.no_grad():
        net.conv1.weight.mul_(1.5)
    with pytest.raises(pytest.fail.Exception, match="made again"):
        curve(net, batches, request, folder=tmp_path)


def test_without_a_folder_each_budget_is_compressed_once(labelled, monkeypatch):
    net, batches = labelled
    made, compress = [], curve_table.compress
    monkeypatch.setattr(curve_table, "compress", lambda *a, **k: made.append(a[2]) or compress(*a, **k))
    table = curve(net, batches, CurveRequest(keep=(0.8, 0.6), repair=(0.1, 0.2)))
    assert made == [0.8, 0.6] and table.groupby("keep")["compress_seconds"].nunique().eq(1).all()


def test_a_curve_of_a_network_that_was_cut_before_goes_on_after_a_stop_during_repair(labelled, tmp_path, monkeypatch):
    net, batches = labelled
    small, _ = compress(net, batches, 0.8)
    request = CurveRequest(keep=(0.7,), repair=(0, 0.1))
    with monkeypatch.context() as patch:
        patch.setattr(curve_table, "distil", lambda *a, **k: exec("raise KeyboardInterrupt"))
        with pytest.raises(KeyboardInterrupt):
            curve(small, batches, request, folder=tmp_path)
    table = curve(small, batches, request, folder=tmp_path)
    for row in table.itertuples():
        found = load_compact(tmp_path / f"keep={row.keep:g}_repair={row.repair:g}", net)
        assert Judge(small, batches, Classification())(found)["figure"] == row.figure


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({"keep": (1.0,)}, "shares"),
        ({"keep": ()}, "shares"),
        ({"repair": (-1.0,)}, "seconds"),
        ({"budget": "flops"}, "flops"),
        ({"images": 0}, "images"),
        ({"evaluation_images": 0}, "evaluation_images"),
    ],
)
def test_wrong_requests_are_refused_in_a_line(given, said):
    with pytest.raises(InputError, match=said) as caught:
        CurveRequest(**given)
    assert "\n" not in str(caught.value)


def test_the_verb_writes_table_record_networks_and_figure(make_run, tmp_path):
    trainer, module, data = make_run(tmp_path / "dense", stages=(), max_epochs=1)
    trainer.fit(module, data)
    run_dir = tmp_path / "run"
    weights = str(tmp_path / "dense" / "checkpoints" / "last.ckpt")
    asked = ["--request.keep", "[0.7, 0.5]", "--request.repair", "[0, 0.5]"]
    model = ["--model.backbone", "cifar_resnet20", "--model.weights", weights]
    images = ["--data", "lit_prune.data.DigitsData", "--data.resolution", "8", "--data.calibration_size", "32"]
    main(["curve", *images, *model, *asked, "--run_dir", str(run_dir)])
    table = pd.read_parquet(run_dir / "curve.parquet")
    assert len(table) == 4 and table["figure"].between(0, 1).all()
    for row in table.itertuples():
        load_compact(run_dir / "curve" / f"keep={row.keep:g}_repair={row.repair:g}")
    run = RunFolder(run_dir)
    assert run.protocol["curve"]["keep"] == [0.7, 0.5]
    lines = draw_curve(run).figure.axes[0].lines
    assert [len(line.get_xdata()) for line in lines] == [2, 2, 2]
