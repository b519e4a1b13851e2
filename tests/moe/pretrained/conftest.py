"""The golden language models, and checkpoints of them on disk."""

import importlib.util
from pathlib import Path

import pytest

GOLDENS = Path(__file__).parents[2] / "goldens"


def load_golden():
    spec = importlib.util.spec_from_file_location("golden_language_models", GOLDENS / "language_models.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


golden_module = load_golden()
# One case of each family, with what is most easily read wrong; the others are slow.
FEW = ("llama_llama3_released", "qwen2_window", "qwen3_tied", "mixtral_window", "olmoe_clip", "qwen2_moe_mixed",
       "qwen3_moe_raw", "deepseek_v3_released", "gpt_oss")  # fmt: skip


def pytest_generate_tests(metafunc):
    """`golden_case` is every golden case, `family_case` one of each family."""
    if "golden_case" in metafunc.fixturenames:
        cases = [pytest.param(case, marks=[] if case in FEW else pytest.mark.slow) for case in golden_module.CASES]
        metafunc.parametrize("golden_case", cases)
    if "family_case" in metafunc.fixturenames:
        metafunc.parametrize("family_case", FEW)


@pytest.fixture(scope="session")
def golden():
    return golden_module


@pytest.fixture
def checkpoint(golden, tmp_path):
    """`checkpoint(case, shards=1)` writes a case into a new folder."""

    def write(case, shards=1, name="released"):
        golden.write_checkpoint(case, tmp_path / name, shards)
        return tmp_path / name

    return write
