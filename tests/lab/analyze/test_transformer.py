"""The two axes of a vision transformer: features of the class token at the output of each block's MLP."""

import numpy as np
import pytest
import torch
from torchvision.models import VisionTransformer

from lit_prune.lab.analyze.analysis import analyze
from lit_prune.lab.analyze.request import AnalyzeRequest
from lit_prune.measurement.protocol import Protocol

LAYERS = ("encoder.layers.*.mlp.3",)
WIDTH, BLOCKS = 24, 3


@pytest.fixture
def transformer():
    torch.manual_seed(0)
    net = VisionTransformer(16, 8, num_layers=BLOCKS, num_heads=2, hidden_dim=WIDTH, mlp_dim=48, num_classes=7)
    torch.nn.init.normal_(net.heads.head.weight)  # torchvision begins with zeros: no margin at all
    return net.eval()


@pytest.fixture
def batches():
    generator = torch.Generator().manual_seed(1)
    return [(torch.randn(40, 3, 16, 16, generator=generator), torch.arange(40) % 3) for _ in range(2)]


def test_channels_are_the_class_tokens_features_and_the_target_is_the_predicted_margin(transformer, batches):
    """The labels are of other classes than the network's and play no part."""
    request = AnalyzeRequest(
        extras=("groupings",), target="predicted_margin", layers=LAYERS, protocol=Protocol(token=0)
    )
    tables = analyze(transformer, batches, request)
    assert len(tables["layers"]) == BLOCKS and (tables["layers"]["channels"] == WIDTH).all()
    assert tables["layers"][["coupling", "rand_index", "null_95"]].notna().all(axis=None)
    kept = []
    layer = transformer.get_submodule("encoder.layers.encoder_layer_1.mlp.3")
    handle = layer.register_forward_hook(lambda module, inputs, output: kept.append(output[:, 0].detach().double()))
    with torch.no_grad():
        logits = torch.cat([transformer(images) for images, _ in batches]).double()
    handle.remove()
    features, best = torch.cat(kept).numpy(), logits.topk(2).values.numpy()
    power = features.var(0)
    rho = np.corrcoef(np.c_[best[:, 0] - best[:, 1], features].T)[0, 1:]
    rows = tables["channels"].query("depth == 1")
    np.testing.assert_allclose(rows["input_capture"], 0.5 * np.log1p(power / np.median(power)), rtol=1e-4)
    np.testing.assert_allclose(rows["task_information"], -0.5 * np.log(1 - rho**2), rtol=1e-3, atol=1e-7)
