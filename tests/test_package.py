import subprocess
import sys

import sltt_ext


def test_import_needs_torch_alone():
    code = (
        "import sys, sltt_ext;"
        "optional = {'spikingjelly', 'snntorch', 'cupy', 'torchvision', 'matplotlib', 'sklearn', 'rich'};"
        "sys.exit(', '.join(optional & set(sys.modules)) or 0)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (0, "")


def test_public_names_exist():
    assert all(hasattr(sltt_ext, name) for name in sltt_ext.__all__)


def test_rooms_are_imported_when_they_are_used():
    code = (
        "import sys, sltt_ext;"
        "sltt_ext.snntorch.Stateful, sltt_ext.analysis.peak_activation_bytes;"
        "assert not hasattr(sltt_ext, 'tensorflow');"
        "sys.exit(not {'snntorch', 'analysis'} <= set(dir(sltt_ext)))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
