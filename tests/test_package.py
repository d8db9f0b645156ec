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
