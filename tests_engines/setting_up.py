"""What the comparisons with others have in common: environments of their own, our exported draft, the commit."""

import shutil
import subprocess
import sys
from pathlib import Path

from dvirl.runs.errors import DvirlError

HERE = Path(__file__).parent


def installed(folder: Path, *requirements: str) -> Path:
    """The Python of an environment that has these packages; what it lacks is installed from the package registry.

    Raises:
        DvirlError: if that does not work; the message has pip's last line.
    """
    python = folder / "bin/python"
    record = folder / "installed.txt"
    there = record.read_text().split() if record.exists() else []
    lacking = [name for name in requirements if name not in there]
    if not lacking:
        return python
    names = ", ".join(lacking)
    print(f"installing {names} into {folder}", flush=True)
    subprocess.run([sys.executable, "-m", "venv", folder], check=True)
    # What is there already is named again, so that its version stays.
    pip = [python, "-m", "pip", "--disable-pip-version-check", "install", "-q", *there, *lacking]
    made = subprocess.run(pip, capture_output=True, text=True)
    if made.returncode:
        last = (made.stderr.strip().splitlines() or ["pip gave no reason"])[-1]
        raise DvirlError(f"could not install {names} from the package registry: {last}")
    record.write_text("\n".join([*there, *lacking]))
    return python


def export_draft(drafter: str, out: Path, to: str, dtype: str) -> Path:
    """Export the drafter as a user would, in place of an earlier export."""
    if out.is_dir():
        shutil.rmtree(out)
    out.unlink(missing_ok=True)
    command = [sys.executable, "-m", "dvirl.cli", "export", drafter, out, "--to", to, "--dtype", dtype]
    subprocess.run(command, check=True)
    return out


def commit() -> str:
    """The commit that is checked out, as git describes it."""
    describe = ["git", "describe", "--always", "--dirty"]
    return subprocess.run(describe, cwd=HERE, capture_output=True, text=True).stdout.strip()
