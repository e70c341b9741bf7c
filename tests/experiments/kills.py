"""Kill programs at work, and see what they left unfinished."""

import signal
import time


def unfinished(folder):
    """Checkpoints that were begun and have no seal."""
    return [
        p for p in folder.glob("*") if p.is_dir() and not p.with_name(f"{p.name}.seal").exists()
    ]


def wait_for(condition, process, seconds=120):
    end = time.monotonic() + seconds
    while not condition() and process.poll() is None and time.monotonic() < end:
        time.sleep(0.0005)


def killed(process):
    """Kill a process, and tell whether it was still at work."""
    process.send_signal(signal.SIGKILL)
    process.communicate()
    return process.returncode == -signal.SIGKILL
