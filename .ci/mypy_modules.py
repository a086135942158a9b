"""What mypy cannot know of torch: an attribute that no class declares may be anything, not a Tensor or a Module."""

from collections.abc import Callable

from mypy.plugin import AttributeContext, Plugin
from mypy.types import AnyType, Type, TypeOfAny

MODULE = "torch.nn.modules.module.Module."


class Modules(Plugin):
    """`layer.weight` of an `nn.Module` is Any where no class declares it; torch says `Tensor | Module` for all."""

    def get_attribute_hook(self, fullname: str) -> Callable[[AttributeContext], Type] | None:
        """Called for attributes; those that only `Module.__getattr__` answers are changed."""
        if not fullname.startswith(MODULE):
            return None
        return lambda context: _undeclared(context)


def _undeclared(context: AttributeContext) -> Type:
    found = str(context.default_attr_type)
    both = found == "torch._tensor.Tensor | torch.nn.modules.module.Module"
    return AnyType(TypeOfAny.special_form) if both else context.default_attr_type


def plugin(version: str) -> type[Plugin]:
    """For mypy."""
    return Modules
