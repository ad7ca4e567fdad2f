"""The dependency rule over `#include` lines, and that the check itself sees a breach."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "scripts"))

from check_layering import breaches, breaches_of  # noqa: E402


def test_the_tree_keeps_the_rule():
    assert breaches(ROOT) == []


@pytest.mark.parametrize(
    ("path", "text", "message"),
    [
        ("src/kernels/a.cc", '#include "moe/router.h"\n', "kernels may include base, kernels"),
        ("src/kernels/a.cc", '#include "io/gguf.h"\n', "includes io/gguf.h"),
        ("src/base/a.h", '\n#include "kernels/gemm.h"\n', "src/base/a.h:2: "),
        ("src/train/a.cc", '#include "engine/sampler.h"\n', "includes engine/sampler.h"),
        ("src/engine/a.cc", "#include <torch/torch.h>\n", "may name torch"),
        ("src/engine/a.cc", "at::Tensor x;\n", "names at::"),
        ("src/bindings/engine_module.cc", '#include "train/trainer.h"\n', "only train_module.cc"),
        ("include/coterie/a.h", '#include "base/dtype.h"\n', "std and coterie/ only"),
        ("examples/a.cc", '#include "engine/sequence.h"\n', "examples/ includes std and coterie/ only"),
        ("src/novel/a.cc", "", "has no place"),
    ],
)
def test_a_planted_breach_is_found(path: str, text: str, message: str):
    found = breaches_of(path, text)
    assert len(found) == 1
    assert message in found[0]


@pytest.mark.parametrize(
    ("path", "text"),
    [
        ("src/kernels/a.cc", '#include "base/dtype.h"\n#include "kernels/gemm.h"\n#include "coterie/error.h"\n'),
        ("src/moe/a.cc", '#include "kernels/gemm.h"\n#include <nlohmann/json.hpp>\n'),
        ("src/train/a.cc", "#include <ATen/ops/empty.h>\nat::Tensor x;\n"),
        ("src/bindings/train_module.cc", '#include <torch/csrc/utils/pybind.h>\n#include "train/trainer.h"\n'),
        ("benches/train_a_bench.cc", "#include <ATen/ATen.h>\n"),
        ("src/engine/a.cc", "// a twin of torch::matmul\n"),
    ],
)
def test_lawful_includes_pass(path: str, text: str):
    assert breaches_of(path, text) == []
