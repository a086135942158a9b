"""The model card of a compact folder: README.md in Hugging Face's form."""

from collections.abc import Mapping
from typing import Any

from lit_prune.preparation import Preparation

HEAD = """---
library_name: lit_prune
{task}tags:
- image-classification
- pruning
- structured-pruning
- compact
---

# {title}

A dense, physically smaller network (no masks), cut from `{backbone}` by lit_prune.

"""
USE = """## Use

```python
import lit_prune

network = lit_prune.load_compact("."{instance})
```

`lit-prune predict --compact . image.jpg` names the classes of an image, `lit-prune export --run_dir .` writes ONNX.
"""
ROWS = (
    ("multiply-adds", "macs", "{:,.0f}"),
    ("parameters", "params", "{:,.0f}"),
    ("latency, one image, ms", "latency_ms", "{:.3g}"),
    ("size, bytes", "bytes", "{:,.0f}"),
)


def model_card(structure: Mapping[str, Any], report: Mapping[str, Any], preparation: Preparation | None) -> str:
    """Text of README.md: what the network is, its figures beside the dense one's, its images, how to load it.

    Args:
        structure: content of structure.json.
        report: content of report.json; figures are left out where it has none.
        preparation: of the images; None where it is not known.
    """
    backbone = structure.get("backbone") or "a network of your own"
    task = "pipeline_tag: image-classification\n" if preparation is not None and preparation.classes else ""
    head = HEAD if task else HEAD.replace("- image-classification\n", "")
    parts = [head.format(task=task, title=f"{backbone}, compact", backbone=backbone), _figures(report)]
    parts.append(_images(preparation))
    return "".join(parts) + USE.format(instance="" if structure.get("backbone") else ", model=MyNetwork()")


def _figures(report: Mapping[str, Any]) -> str:
    dense, compact = (report.get(key) for key in ("dense", "compact"))
    if not (isinstance(dense, Mapping) and isinstance(compact, Mapping)):
        return ""
    name = (report.get("metric") or {}).get("name", "accuracy")
    rows = [(name, name, "{:.4g}"), *ROWS]
    lines = [
        f"| {title} | {form.format(dense[key])} | {form.format(compact[key])} |"
        for title, key, form in rows
        if all(isinstance(figures.get(key), int | float) for figures in (dense, compact))
    ]
    return "\n".join(["## Figures", "", "| | dense | compact |", "| --- | ---: | ---: |", *lines, "", ""])


def _images(preparation: Preparation | None) -> str:
    if preparation is None:
        return "## Images\n\nHow they are prepared was not recorded: as in the training of the dense network.\n\n"
    height, width = preparation.size
    names = (
        f"\nClasses, in the order of the outputs: {', '.join(preparation.classes)}.\n" if preparation.classes else ""
    )
    return (
        f"## Images\n\n{preparation.channels}; short side resized to {preparation.resize} "
        f"({preparation.interpolation}, antialiased), the centre of {height}×{width} cut out, scaled to 0..1, then "
        f"(x − mean) / std with mean {list(preparation.mean)} and std {list(preparation.std)}. `structure.json` has "
        f"the same under `preparation`.\n{names}\n"
    )
