"""Hooks that a LightningModule puts on its network: those that change it stay over a cut, others are named."""

import pytest
import torch

from lit_prune import load_compact


def test_hooks_that_change_the_network_stay_over_a_cut_and_watchers_are_named(tmp_path, make_run):
    trainer, module, data = make_run(tmp_path, stages=[("mid", 1)], max_epochs=2)
    seen = []

    def halved(layer, args, output):
        return output / 2

    def watch(layer, args, output) -> None:
        seen.append(output)

    module.backbone.bn1.register_forward_hook(halved)
    module.backbone.conv1.register_forward_hook(watch)
    before = module.backbone
    with pytest.warns(UserWarning, match="hooks") as warned:
        trainer.fit(module, datamodule=data)
    assert module.backbone is not before
    lines = {str(one.message) for one in warned if "hooks" in str(one.message)}
    assert sorted(line.split("hooks of")[0].split(";")[0] for line in lines) == [
        "save_compact: a folder has no hooks",
        "the smaller copy does not run the ",
    ]
    assert any("conv1 (" in line and "watch)" in line for line in lines) and not any("\n" in line for line in lines)
    assert list(module.backbone.bn1._forward_hooks.values()) == [halved] and not module.backbone.conv1._forward_hooks
    images = next(iter(data.val_dataloader()))[0]
    compact = load_compact(tmp_path / "compact").to(images.device).eval()
    compact.bn1.register_forward_hook(halved)
    torch.testing.assert_close(compact(images), module.backbone.eval()(images))
