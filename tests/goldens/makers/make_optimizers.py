"""Writes optimizers.npz: parameters after each step of released optimisers on the gradients of `../inputs.py`.

  galore/SHAPE                  [steps, a, b], galore-torch's AdamW, std projection
  apollo/GRANULARITY/SHAPE      apollo-torch's AdamW, random projection, one draw
  badam                         [steps, L, a, b], badam's wrapper of AdamW, descending, every block for as many steps
  .../projection                [windows, ...], as draws and the signs of singular vectors are a library's own
The packages' other optimisers need GPU libraries, so the files are loaded without their packages' `__init__`.
"""

import importlib
import importlib.util
import sys
import types
from pathlib import Path

import numpy as np
import torch

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE.parent))
import inputs  # noqa: E402


def bare(package, module):
    """The module of a package whose `__init__` is not run."""
    spec = importlib.util.find_spec(package)
    made = types.ModuleType(package)
    made.__path__ = list(spec.submodule_search_locations)
    sys.modules[package] = made
    return importlib.import_module(f"{package}.{module}")


def run(optimizer_class, shape, **group):
    parameter = torch.nn.Parameter(torch.tensor(inputs.draw("optimizer/start", shape)))
    common = {"lr": inputs.OPTIMIZER["lr"], "eps": inputs.OPTIMIZER["eps"], "no_deprecation_warning": True}
    optimizer, seen, projections = optimizer_class([{"params": [parameter], **group}], **common), [], []
    for step in range(inputs.OPTIMIZER["steps"]):
        parameter.grad = torch.tensor(inputs.draw(f"optimizer/{step}", shape))
        optimizer.step()
        seen.append(parameter.detach().numpy().copy())
        if step % group["update_proj_gap"] == 0:
            projections.append(optimizer.state[parameter]["projector"].ortho_matrix.numpy().copy())
    return {"": np.stack(seen), "/projection": np.stack(projections)}


def run_badam():
    """The released first block is active one step less than the others: its counter starts one earlier here."""
    import badam

    settings, shape = inputs.OPTIMIZER, inputs.OPTIMIZER["layers"]
    start = inputs.draw("optimizer/start", shape)
    named = [(f"layers.{i}.w", torch.nn.Parameter(torch.tensor(start[i]))) for i in range(shape[0])]
    base = torch.optim.AdamW([p for _, p in named], lr=settings["lr"], eps=settings["eps"], weight_decay=0.0)
    options = {"switch_block_every": settings["gap"], "switch_mode": "descending"}
    optimizer = badam.BlockOptimizer(base, named, **options)
    optimizer.global_step, seen = -1, []
    for step in range(settings["steps"]):
        grads = torch.tensor(inputs.draw(f"optimizer/{step}", shape))
        for (_, p), grad in zip(named, grads):
            p.grad = grad if p.requires_grad else None
        optimizer.step()
        seen.append(torch.stack([p.detach() for _, p in named]).numpy().copy())
    return np.stack(seen)


def main():
    galore, apollo = bare("galore_torch", "adamw"), bare("apollo_torch", "apollo")
    settings, out = inputs.OPTIMIZER, {}
    for shape in settings["shapes"]:
        name = "x".join(map(str, shape))
        group = {"rank": settings["rank"], "proj_type": "std"}
        found = run(galore.AdamW, shape, **group, update_proj_gap=settings["gap"], scale=0.25)
        out |= {f"galore/{name}{end}": value for end, value in found.items()}
        for granularity in ("channel", "tensor"):
            drawn = {"proj": "random", "scale_type": granularity, "update_proj_gap": 1000, "scale": 4.0}
            found = run(apollo.AdamW, shape, **group, **drawn)
            out |= {f"apollo/{granularity}/{name}{end}": value for end, value in found.items()}
    out["badam"] = run_badam()
    np.savez_compressed(HERE.parent / "optimizers.npz", **out)


if __name__ == "__main__":
    main()
