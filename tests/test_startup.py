import os
import subprocess
import sys

import pytest

from tdro_cli.cli import keep_few_kernels, let_threads_wait

HEAVY = {"torch", "transformers", "deepspeed", "peft", "numpy", "pyarrow", "scipy", "faiss", "jnius"}


def imported(*arguments: str) -> set[str]:
    """The top-level modules that `tdro ARGUMENTS` has imported when it ends."""
    code = (
        "import sys, atexit\n"
        "from tdro_cli.cli import main\n"
        f"sys.argv = ['tdro', *{list(arguments)!r}]\n"
        "atexit.register(lambda: print('\\nmodules:', *sorted({name.split('.')[0] for name in sys.modules})))\n"
        "main()\n"
    )
    told = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    return set(told.rpartition("modules:")[2].split())


@pytest.mark.parametrize("arguments", [["--help"], ["transfer", "--help"], ["recipe", "--help"]])
def test_help_imports_nothing_heavy(arguments):
    modules = imported(*arguments)
    assert "tdro_cli" in modules
    assert not modules & HEAVY


def test_threads_wait_as_the_user_says_else_shortly():
    waiting = {}
    let_threads_wait(waiting)
    assert waiting == {"OMP_WAIT_POLICY": "PASSIVE", "GOMP_SPINCOUNT": "1000"}
    for own in ({"OMP_WAIT_POLICY": "ACTIVE"}, {"OMP_WAIT_POLICY": "PASSIVE", "GOMP_SPINCOUNT": "7"}):
        let_threads_wait(own)
        assert own["OMP_WAIT_POLICY"] in ("ACTIVE", "PASSIVE") and own.get("GOMP_SPINCOUNT") in (None, "7")
    spinning = {"GOMP_SPINCOUNT": "7"}
    let_threads_wait(spinning)
    assert spinning["GOMP_SPINCOUNT"] == "7"


KERNELS = """
import os, re
from pathlib import Path
from tdro_cli.cli import keep_few_kernels
keep_few_kernels(os.environ)
import torch
layer, used = torch.nn.Linear(256, 256), []
with torch.inference_mode(), torch.autocast("cpu", dtype=torch.bfloat16):
    for rows in range(8, 608):
        layer(torch.ones(rows, 256))
        if rows % 200 == 7:
            used.append(int(re.search(r"RssAnon:\\s+(\\d+)", Path("/proc/self/status").read_text())[1]) // 1024)
print(used[-1] - used[0])
"""


def test_kernels_of_many_shapes_do_not_pile_up():
    environment = {name: value for name, value in os.environ.items() if not name.endswith("_CACHE_CAPACITY")}
    told = subprocess.run([sys.executable, "-c", KERNELS], capture_output=True, text=True, check=True, env=environment)
    assert int(told.stdout) < 50  # MiB for 400 shapes more; some 240 on a processor with bfloat16 units otherwise
    own = {"LRU_CACHE_CAPACITY": "7"}
    keep_few_kernels(own)
    assert own == {"LRU_CACHE_CAPACITY": "7", "ONEDNN_PRIMITIVE_CACHE_CAPACITY": "64"}


def test_checking_and_listing_import_no_model_and_no_jvm():
    for arguments in (["recipe", "list"], ["recipe", "schema"], ["plugins"]):
        assert not imported(*arguments) & {"torch", "transformers", "deepspeed", "peft", "jnius", "pyserini"}


def test_the_version_is_the_distributions():
    from importlib.metadata import version

    told = subprocess.run([sys.executable, "-m", "tdro_cli", "--version"], capture_output=True, text=True, check=True)
    assert told.stdout == f"tdro {version('tdro')}\n"
