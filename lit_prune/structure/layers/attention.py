"""PyTorch's own attention, as a whole; its heads are found by `structure.heads`."""

from typing import TYPE_CHECKING, Any

from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from lit_prune.structure import reasons
from lit_prune.structure.layers.base import LayerCost, LayerType, register_layer

if TYPE_CHECKING:
    from lit_prune.structure.following import Follower


@register_layer("attention")
class WholeAttention(LayerType):
    """`nn.MultiheadAttention`: queries, keys and values are read alike and the projection writes."""

    modules = (nn.MultiheadAttention,)
    sort = "closed"
    counts = True

    def channel_dim(self, module: Any, values: Tensor) -> int:
        """The last."""
        return values.dim() - 1

    def obstacle(self, module: Any, name: str) -> str:
        """Attention."""
        return reasons.ATTENTION

    def follow(self, follower: "Follower", name: str, module: Any, args: tuple, output: Any) -> None:
        """One width for what is read, written and stated."""
        if module.in_proj_weight is not None:
            parts = ((f"{name}.in_proj_weight", "dim:1"), (f"{name}.out_proj", "out"), (name, "attribute:embed_dim"))
            own, out, stated = (follower.labels.axis(*part, module.embed_dim) for part in parts)
            follower.labels.tie(own, out)
            follower.labels.tie(own, stated)
            for tensor in args[:3]:
                self.read(follower, module, tensor, own)
            self.write(follower, module, output[0], out)
            return
        found = [labels for t in tree_leaves(args) if isinstance(t, Tensor) and (labels := follower.of(t)) is not None]
        follower.labels.keep(found, reasons.ATTENTION)
        for tensor in tree_leaves(output):
            if isinstance(tensor, Tensor):
                follower.put(tensor, follower.fixed[2].expand(tensor.shape))

    def count(self, module: Any, args: tuple, kwargs: dict, output: Any) -> LayerCost:
        """Four projections and two products; query [.., L, ..], key [.., S, ..] for one image."""
        inputs = (*args, *(kwargs[key] for key in ("query", "key", "value") if key in kwargs))
        query, key, value = inputs[:3]
        params = sum(parameter.numel() for parameter in module.parameters())
        queries, keys = query.numel() // query.shape[-1], key.numel() // key.shape[-1]  # L, S
        inner, width = module.num_heads * module.head_dim, module.out_proj.out_features
        read = module.out_proj.in_features  # values of all heads
        projections = inner * (queries * query.shape[-1] + keys * key.shape[-1]) + read * keys * value.shape[-1]
        macs = projections + queries * read * width + queries * keys * (inner + read)
        return LayerCost(macs, params, width, width, queries, "attention")
