"""Write hqq_reference.json: the errors of the ``hqq`` package on a matrix that a seed makes.

    pip install --no-deps --target /tmp/hqq hqq termcolor
    PYTHONPATH=/tmp/hqq DISABLE_CUDA=1 python tests/oracle/make_hqq_reference.py

Only hqq/core/{quantize,optimize,bitpack,utils}.py run; the quantizer is taken from its file so that the rest of the
package, which needs a GPU stack, is not imported.
"""

from __future__ import annotations

import importlib
import importlib.metadata
import importlib.util
import json
import sys
import types
from pathlib import Path

import torch

SEED, ROWS, COLUMNS = 3, 64, 512
GROUPS = (32, 64, 128)


def reference_matrix(spread: float) -> torch.Tensor:
    """float32 [64, 512]: Student-t with 4 degrees of freedom, times ``spread``."""
    generator = torch.Generator().manual_seed(SEED)
    normal = torch.randn(ROWS, COLUMNS, generator=generator)
    chi2 = torch.randn(4, ROWS, COLUMNS, generator=generator).square().sum(0)
    return spread * normal / (chi2 / 4).sqrt()


def load_quantizer() -> type:
    """``hqq.core.quantize.Quantizer`` without running the package's ``__init__`` files."""
    spec = importlib.util.find_spec("hqq")
    assert spec is not None, "hqq is not installed"
    assert spec.submodule_search_locations is not None
    root = Path(spec.submodule_search_locations[0])
    for name, folder in (("hqq", root), ("hqq.core", root / "core")):
        package = types.ModuleType(name)
        package.__path__ = [str(folder)]
        sys.modules[name] = package
    return importlib.import_module("hqq.core.quantize").Quantizer


def main() -> None:
    quantizer = load_quantizer()
    cases = []
    for spread in (0.02, 2.0):  # that of trained weights; and one where the shrinkage acts
        weight = reference_matrix(spread)
        for bits in (4, 8):
            for group in GROUPS:
                w_q, meta = quantizer.quantize(
                    weight, nbits=bits, group_size=group, axis=1, optimize=True, bitpack=False, device="cpu"
                )
                restored = quantizer.dequantize(w_q, {**meta, "compute_dtype": torch.float32})
                error = (restored - weight).double()
                cases.append(
                    {
                        "spread": spread,
                        "bits": bits,
                        "group": group,
                        "relative_l2": float(error.norm() / weight.double().norm()),
                        "mean_abs": float(error.abs().mean()),
                    }
                )
    result = {
        "command": "PYTHONPATH=/tmp/hqq DISABLE_CUDA=1 python tests/oracle/make_hqq_reference.py",
        "hqq": importlib.metadata.version("hqq"),
        "torch": torch.__version__,
        "seed": SEED,
        "shape": [ROWS, COLUMNS],
        "cases": cases,
    }
    path = Path(__file__).with_name("hqq_reference.json")
    path.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    print(f"wrote {len(cases)} cases to {path}")


if __name__ == "__main__":
    main()
