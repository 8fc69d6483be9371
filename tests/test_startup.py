import subprocess
import sys

import pytest

from tdro_cli.cli import let_threads_wait

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


def test_checking_and_listing_import_no_model_and_no_jvm():
    for arguments in (["recipe", "list"], ["recipe", "schema"], ["plugins"]):
        assert not imported(*arguments) & {"torch", "transformers", "deepspeed", "peft", "jnius", "pyserini"}


def test_the_version_is_the_distributions():
    from importlib.metadata import version

    told = subprocess.run([sys.executable, "-m", "tdro_cli", "--version"], capture_output=True, text=True, check=True)
    assert told.stdout == f"tdro {version('tdro')}\n"
