"""Our ids in a program that knows nothing of us but their names."""

import subprocess
import sys


def test_a_module_in_the_id_registers_our_environments_without_loading_pytorch():
    code = (
        "import sys, gymnasium as gym\n"
        "assert not any(name.startswith('totalprop') for name in sys.modules)\n"
        "env = gym.make('totalprop.envs:totalprop/CartPoleSwingUp-v0')\n"
        "assert env.reset(seed=0)[0].shape == (4,)\n"
        "assert gym.spec('dmc/walker-walk-v0').kwargs == {'domain': 'walker', 'task': 'walk'}\n"
        "assert 'torch' not in sys.modules\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
