"""PEFT finds SVF after ``import sigmix``, which imports neither torch nor PEFT."""

from __future__ import annotations

import subprocess
import sys

import pytest
from helpers_svf import randomise
from helpers_tiny import build_tiny
from peft import get_peft_model
from transformers import LlamaForCausalLM

from sigmix.svf.config import SVFConfig
from sigmix.svf.registration import _Mapping

LOAD = """
{imports}
from peft import AutoPeftModelForCausalLM, PeftModel
from transformers import AutoModelForCausalLM

base, adapter = sys.argv[1:]
for model in (
    PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), adapter),
    AutoPeftModelForCausalLM.from_pretrained(adapter),
):
    trained = [parameter for name, parameter in model.named_parameters() if ".svf_z." in name]
    assert len(trained) == 14
    assert all((z != 1).any() for z in trained)
"""


def python(code: str, *arguments: object) -> None:
    subprocess.run([sys.executable, "-c", "import sys\n" + code, *map(str, arguments)], check=True)


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    base, adapter = tmp_path_factory.mktemp("base"), tmp_path_factory.mktemp("adapter")
    build_tiny().save_pretrained(base)
    model = get_peft_model(LlamaForCausalLM.from_pretrained(base), SVFConfig())
    randomise(model)
    model.save_pretrained(adapter)
    return base, adapter


@pytest.mark.parametrize(
    "imports",
    [
        "import sigmix",
        "import peft, sigmix",
        pytest.param("import sigmix.models.multimodal", marks=pytest.mark.slow),  # imports PEFT, imported by the tuner
    ],
)
def test_peft_loads_an_svf_adapter(folders, imports):
    python(LOAD.format(imports=imports), *folders)


def test_importing_sigmix_imports_neither_torch_nor_peft():
    python("import sigmix\nassert not {'torch', 'peft', 'transformers', 'numpy'} & set(sys.modules)")


def test_an_unknown_type_is_a_key_error():
    with pytest.raises(KeyError):
        _Mapping()["NONE"]
    assert _Mapping(LORA=1)["LORA"] == 1
