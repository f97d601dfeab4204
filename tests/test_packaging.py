"""What is installed under which name, what `import bdu` pulls in, and no path of one machine."""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
from importlib.metadata import files, version
from pathlib import Path

import pytest

import bdu

ROOT = Path(__file__).parents[1]
PYPROJECT = (ROOT / "pyproject.toml").read_text()

# Put together here, so that this file does not match itself.
MACHINE_PATH = re.compile(r"(?<![\w.~$}-])/(?:" + "|".join(("work", "root", "tmp")) + r")/")


def in_a_fresh_interpreter(code, folder):
    return subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, cwd=folder, check=False
    )


@pytest.mark.parametrize("folder", ["kernels", "tests", "bench"])
def test_folders_that_are_no_packages_have_no_init_file(folder):
    assert not (ROOT / folder / "__init__.py").exists()


def test_kernels_are_installed_inside_the_package_only(tmp_path):
    # An editable install puts this folder on the path, where kernels/ can be seen as a namespace
    # package: it then has no code of its own, and an installed package of that name wins over it.
    # Looked for, not imported: triton need not be installed for this.
    code = (
        "import importlib.util as u, bdu\n"
        "assert u.find_spec('bdu.kernels.ewc_step') is not None\n"
        "spec = u.find_spec('kernels')\n"
        f"assert spec is None or not str(spec.origin).startswith({str(ROOT)!r}), spec\n"
    )
    done = in_a_fresh_interpreter(code, tmp_path)
    assert done.returncode == 0, done.stderr
    top_level = {Path(str(file)).parts[0] for file in files("bdu") or []}
    assert not top_level & {"kernels", "tests", "bench", "csrc"}
    assert 'wheel.packages = { "bdu" = "bdu", "bdu/kernels" = "kernels" }' in PYPROJECT


def test_version_is_the_same_everywhere():
    declared = re.search(r'^version = "(.+)"$', PYPROJECT, re.M)
    assert declared is not None
    assert declared.group(1) == bdu.__version__ == version("bdu")


def test_importing_bdu_pulls_in_nothing_heavy_or_optional(tmp_path):
    code = (
        "import sys, torch\n"
        "before = set(sys.modules)\n"
        "import bdu\n"
        "names = {name.split('.')[0] for name in set(sys.modules) - before}\n"
        "print(*sorted(names & {'triton', 'transformers', 'sklearn'}))\n"
    )
    done = in_a_fresh_interpreter(code, tmp_path)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == ""


def test_all_that_bdu_promises_is_there():
    assert [name for name in bdu.__all__ if not hasattr(bdu, name)] == []


def test_no_tracked_file_names_a_path_of_one_machine():
    if shutil.which("git") is None or not (ROOT / ".git").exists():
        pytest.skip("not a git checkout")
    listed = subprocess.run(
        ["git", "ls-files", "-z", "*.py", "*.md", "*.toml", "Makefile"],
        capture_output=True,
        text=True,
        cwd=ROOT,
        check=True,
    )
    tracked = [ROOT / name for name in listed.stdout.split("\0") if name]
    assert len(tracked) > 20
    found = [
        f"{file.relative_to(ROOT)}:{number}: {line.strip()}"
        for file in tracked
        if file.is_file()
        for number, line in enumerate(file.read_text().splitlines(), 1)
        if MACHINE_PATH.search(line)
    ]
    assert found == []


@pytest.mark.parametrize("name", ["work", "root", "tmp"])
def test_a_path_of_one_machine_would_be_found(name):
    assert MACHINE_PATH.search(f'open("/{name}/x.npz")')
    assert MACHINE_PATH.search(f"/{name}/x")
    assert not MACHINE_PATH.search(f"https://example.org/{name}/x and frame{name}/x")
