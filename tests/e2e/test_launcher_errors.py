"""What stands at the end of a job that ended in an error of ours."""

from __future__ import annotations

from pathlib import Path

from tests.e2e.launching import launch

SCRIPT = """
from transformers import LlamaConfig, LlamaForCausalLM

from hf_veomni import prepare_omni

config = LlamaConfig(hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=2, vocab_size=32)
prepare_omni(LlamaForCausalLM(config), "dp_shard=1,sp=2,ep=2")
"""


def test_the_last_lines_name_value_rule_and_way_out_once(tmp_path: Path) -> None:
    script = tmp_path / "script.py"
    script.write_text(SCRIPT)
    status, output = launch("cpu_sp2.yaml", str(script), check=False)
    assert status == 1
    assert output.count("line 7, in <module>") == 1, output  # of the script: one traceback for two ranks
    last = "\n".join(output.splitlines()[-6:])
    assert "UnsupportedError: `ep_size` (2) needs experts" in last and "Use ep_size=1." in last, output
