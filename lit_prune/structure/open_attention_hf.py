"""The attention of Hugging Face's ViT and DeiT, whose heads have one stated width; see `opened`."""

import sys
from typing import Any

from torch import Tensor, nn

from lit_prune.structure.opened import OPENED

FAMILIES = ("vit", "deit")


class _OpenProjections(nn.Module):
    """Three projections of tokens; `scaling` stays."""

    @staticmethod
    def opened_attributes(module: nn.Module) -> dict[str, int]:
        """What changes when a layer is opened: it states the width of its values too."""
        return {"value_dim": module.head_dim}

    def forward(self, hidden_states: Tensor, attention_mask: Tensor | None = None, **kwargs: Any) -> tuple[Tensor, Any]:
        """Tokens [B, L, C] to tokens of the same shape, and the weights where the implementation gives them."""
        layers = (self.q_proj, self.k_proj, self.v_proj)
        q, k, v = (f(hidden_states).unflatten(-1, (self.num_attention_heads, -1)).transpose(1, 2) for f in layers)
        source = sys.modules[type(self).__mro__[2].__module__]
        attend = source.ALL_ATTENTION_FUNCTIONS.get_interface(
            self.config._attn_implementation,  # noqa: SLF001
            source.eager_attention_forward,
        )
        dropout = self.attention_dropout if self.training else 0.0
        output, weights = attend(self, q, k, v, attention_mask, dropout=dropout, scaling=self.scaling, **kwargs)
        return self.o_proj(output.flatten(2)), weights


def open_families() -> None:
    """Registers the attention of the families that have been imported, where it is written as is known here."""
    for family in FAMILIES:
        source = sys.modules.get(f"transformers.models.{family}.modeling_{family}")
        for kind in [value for value in vars(source or object).values() if isinstance(value, type)]:
            known = kind.__name__.lower() == f"{family}attention" and hasattr(source, "ALL_ATTENTION_FUNCTIONS")
            if known and kind not in OPENED and "q_proj" in vars(kind)["forward"].__code__.co_names:
                name = f"Open{kind.__name__}"
                OPENED[kind] = type(name, (_OpenProjections, kind), {"__module__": __name__})
                globals()[name] = OPENED[kind]
