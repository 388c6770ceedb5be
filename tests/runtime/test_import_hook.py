"""`import condft` is light, and CondFT is in PEFT's tables whichever of the two is imported first."""

import subprocess
import sys

import pytest

import condft


def run(code: str) -> str:
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


HEAVY = "sorted({'torch', 'numpy', 'transformers', 'peft', 'accelerate', 'datasets', 'matplotlib'} & set(sys.modules))"


@pytest.mark.parametrize("code", ["import condft", "import condft.cli"])
def test_nothing_heavy_is_imported(code):
    assert run(f"import sys; {code}; print({HEAVY})") == "[]"


@pytest.mark.parametrize(
    "code",
    [
        "import condft, peft",
        "import peft, condft",
        "import condft; from peft.utils import PeftType",
        "import condft, importlib.util; importlib.util.find_spec('peft'); import peft",
        "import condft, importlib, peft; importlib.reload(condft); importlib.reload(peft)",
        "import condft.tuner",
    ],
)
def test_registered_in_any_order(code):
    output = run(
        f"import sys; {code}; import peft\n"
        "print(peft.PeftType('CONDFT').value, peft.mapping.PEFT_TYPE_TO_CONFIG_MAPPING['CONDFT'].__name__,\n"
        "      any(type(f).__module__ == 'condft.runtime.import_hook' for f in sys.meta_path),\n"
        "      type(peft.__spec__.loader).__name__, type(peft.__loader__).__name__)"
    )
    assert output == "CONDFT CondFTConfig False SourceFileLoader SourceFileLoader"


def test_threads_that_import_peft_at_once():
    # Only the package itself: PEFT's own submodules cannot be imported by several threads at once.
    code = (
        "import condft, threading\n"
        "def go(name):\n"
        "    gate.wait(); __import__(name); done.append(name)\n"
        "names = ['peft', 'peft', 'condft.report']\n"
        "gate, done = threading.Barrier(len(names)), []\n"
        "threads = [threading.Thread(target=go, args=(n,)) for n in names]\n"
        "[t.start() for t in threads]; [t.join() for t in threads]\n"
        "import peft; print(len(done), peft.PeftType('CONDFT').value, condft.CondFTConfig(num_tensors=3).num_tensors)"
    )
    assert run(code) == "3 CONDFT 3"


def test_a_failed_import_of_the_package_is_tried_again(tmp_path):
    (tmp_path / "fickle.py").write_text("import os\nif 'FICKLE' not in os.environ: raise ImportError('not yet')\n")
    output = run(
        f"import sys, os; sys.path.insert(0, {str(tmp_path)!r})\n"
        "from condft.runtime.import_hook import when_imported\n"
        "when_imported('fickle', lambda: print('acted'))\n"
        "try:\n    import fickle\nexcept ImportError as error: print(error)\n"
        "os.environ['FICKLE'] = '1'; import fickle; import fickle"
    )
    assert output.splitlines() == ["not yet", "acted"]


def test_a_pickled_config_brings_its_method_along():
    import pickle

    text = pickle.dumps(condft.CondFTConfig(num_tensors=7)).hex()
    assert run(f"import pickle; print(pickle.loads(bytes.fromhex({text!r})).num_tensors)") == "7"


def test_public_names():
    for name in condft.__all__:
        assert getattr(condft, name).__name__ == name
    assert set(condft.__all__) <= set(dir(condft))
    with pytest.raises(AttributeError, match="analyzed"):
        condft.analyzed  # noqa: B018
    with pytest.raises(ImportError):
        from condft import analyzed  # noqa: F401
