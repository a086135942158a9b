"""Outputs of modules averaged over positions, image by image."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from lit_prune.errors import InputError
from lit_prune.measurement.layers import Batches, position_view, removing
from lit_prune.running import undisturbed
from lit_prune.task import Task, settle


def pooled_outputs(
    model: nn.Module,
    modules: Sequence[str],
    batches: Batches,
    limit: int = 5000,
    token: int | None = None,
    task: Task | str | None = None,
) -> tuple[dict[str, Tensor], Tensor]:
    """Outputs of the named modules averaged over positions, image by image, with what says which kind an image is.

    Feature maps [B, C, H, W] are averaged over H and W, tokens [B, T, C] over T unless `token` picks one.

    Args:
        model: any network; left as found.
        modules: qualified names, of any module type that returns one tensor.
        batches: read until `limit` images are there.
        limit: most images to keep.
        token: index of the token, or None for the mean.
        task: what a batch and an output mean; None recognises it.

    Returns:
        Name to float32 [n, C] on the CPU (modules that never ran are absent), and the task's `kinds` [n].
    """
    kept: dict[str, list[Tensor]] = {}
    kinds: list[Tensor] = []
    task, batches = settle(task, model, batches)

    def keeper(name: str):
        def hook(module: nn.Module, inputs: tuple, output: Tensor) -> None:
            values = position_view(module, output, token).mean(1, dtype=torch.float32)
            kept.setdefault(name, []).append(values.cpu())

        return hook

    handles = [model.get_submodule(name).register_forward_hook(keeper(name)) for name in modules]
    seen = 0
    with removing(handles), undisturbed(model):
        for batch in batches:
            for piece in task.pieces(batch):
                piece = task.to(piece, model)
                kinds.append(task.kinds(task.run(model, piece), piece).cpu())
                seen += len(kinds[-1])
            if seen >= limit:
                break
    if not seen:
        raise InputError("batches: there is no batch in it; give at least one")
    return {name: torch.cat(parts)[:limit] for name, parts in kept.items()}, torch.cat(kinds)[:limit]
