import copy

import pytest
import timm
import torch
import torch.nn.functional as F

from lit_prune.errors import InputError
from lit_prune.replace.heads import attention_with_heads, head_columns, measure_heads, remove_heads

NAME = "blocks.1.attn"


@pytest.fixture(scope="module")
def net():
    torch.manual_seed(0)
    sizes = {"img_size": 16, "patch_size": 8, "embed_dim": 24, "depth": 2, "num_heads": 4, "num_classes": 5}
    net = timm.create_model("vit_tiny_patch16_224", **sizes).double().eval()
    for parameter in net.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    return net


@pytest.fixture(scope="module")
def batches():
    generator = torch.Generator().manual_seed(1)
    images = torch.randn(12, 3, 16, 16, generator=generator, dtype=torch.float64)
    return [(images, torch.randint(5, (12,), generator=generator))]


def intervened(net, images, removed, constants):
    """The network with the heads' outputs replaced where the projection reads them."""
    net = copy.deepcopy(net)
    columns = head_columns(removed, 6)

    def hook(module, args):
        values = args[0].clone()
        values[..., columns] = 0.0 if constants is None else constants[columns]
        return values

    attention_with_heads(net, NAME).proj.register_forward_pre_hook(hook)
    return net(images)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("objective", [None, "distortion", "loss"])
def test_folded_heads_equal_the_intervened_ones(net, batches, objective, dtype):
    net, images = copy.deepcopy(net).to(dtype), batches[0][0].to(dtype)
    constants = None
    if objective is not None:
        constants = measure_heads(net, NAME, [(images, batches[0][1])]).foldable_constants(objective)
    smaller = remove_heads(net, NAME, [1, 3], constants)
    assert attention_with_heads(smaller, NAME).qkv.weight.shape == (36, 24)
    wanted = intervened(net, images, [1, 3], None if constants is None else constants.to(dtype))
    exact = {"rtol": 0, "atol": 1e-10} if dtype == torch.float64 else {"rtol": 1e-5, "atol": 1e-5}
    torch.testing.assert_close(smaller(images), wanted, **exact)


def test_scores_are_the_second_order_rise_of_the_loss_in_the_head(net, batches):
    images, labels = batches[0]
    moments = measure_heads(net, NAME, batches)
    attention, seen = attention_with_heads(net, NAME), {}
    hook = attention.proj.register_forward_pre_hook(lambda module, args: seen.update(values=args[0]))
    logits = net(images)
    hook.remove()
    loss = F.cross_entropy(logits, labels, reduction="sum")
    (gradient,) = torch.autograd.grad(loss, seen["values"], retain_graph=True)
    p = logits.softmax(1).detach()
    curvature = torch.zeros_like(gradient)
    for k in range(5):
        (g,) = torch.autograd.grad(F.log_softmax(logits, 1)[:, k].sum(), seen["values"], retain_graph=True)
        curvature += p[:, k, None, None] * g.square()
    a = seen["values"].detach()
    for constants, found in (
        (torch.zeros(24).double(), moments.removal_scores()),
        (moments.foldable_constants(), moments.risk(moments.foldable_constants())),
    ):
        change = constants - a
        rise = (gradient * change + 0.5 * curvature * change**2).sum((0, 1)).view(4, 6).sum(1) / 12
        torch.testing.assert_close(found, rise)
    flat = moments.curvature == 0
    alone = (moments.mixed - moments.gradient) / torch.where(flat, 1, moments.curvature)  # equation 28
    best = moments.risk(torch.where(flat, moments.mean, alone))
    assert (best <= moments.risk(moments.foldable_constants()) + 1e-12).all()
    assert (moments.risk(moments.foldable_constants()) <= moments.removal_scores() + 1e-12).all()


def test_variance_of_heads_is_that_of_their_outputs(net, batches):
    moments, attention, seen = measure_heads(net, NAME, batches), attention_with_heads(net, NAME), {}
    hook = attention.proj.register_forward_pre_hook(lambda module, args: seen.update(values=args[0].detach()))
    net(batches[0][0])
    hook.remove()
    flat = seen["values"].flatten(0, 1)
    spread = flat.var(0, correction=0) * seen["values"].shape[1]
    torch.testing.assert_close(moments.variance(), spread.view(4, 6).sum(1))


def test_bad_heads_are_named(net):
    with pytest.raises(InputError, match="at least one must stay"):
        remove_heads(net, NAME, range(4))
    with pytest.raises(InputError, match="blocks.0.attn"):
        remove_heads(net, "blocks.0.mlp", [0])
