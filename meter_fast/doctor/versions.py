"""Which versions are installed, against what setup.py requires, and the state of this package. Imports none of them."""

import ast
import hashlib
import platform
import subprocess
from collections.abc import Iterator
from importlib import metadata
from pathlib import Path

from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet

import meter_fast
from meter_fast.doctor.finding import Asked, Finding, fine

ROOT = Path(meter_fast.__file__).parent.parent
DALI = "nvidia-dali-cuda"  # followed by the CUDA version that it is built for; any of them will do
SAME_EVERYWHERE = ("torch", "deepspeed", "triton", "transformers", "timm")  # elsewhere a difference is a remark


def this_package(asked: Asked) -> Iterator[Finding]:
    """Version, commit and a hash over the sources, which also tells changes that are in no commit."""
    total = hashlib.sha256()
    for folder in ("meter_fast", "kernels", "ds_configs"):
        for path in sorted((ROOT / folder).rglob("*")):
            if path.suffix in (".py", ".json"):
                total.update(f"{path.relative_to(ROOT)}\0".encode() + path.read_bytes())
    yield fine("meter_fast", f"{meter_fast.__version__}, {commit(ROOT)}, sources {total.hexdigest()[:12]}", "fails")


def commit(root: Path) -> str:
    """Of the checkout at `root`, in words."""
    try:
        done = subprocess.run(
            ["git", "-C", str(root), "rev-parse", "--short=12", "HEAD"], capture_output=True, text=True, timeout=10
        )
    except (OSError, subprocess.TimeoutExpired):
        return "commit not known"
    return f"commit {done.stdout.strip()}" if done.returncode == 0 else "no git checkout"


def packages(asked: Asked) -> Iterator[Finding]:
    """Python and everything that setup.py requires; of the extras those that training can use."""
    python, required, optional = requirements(ROOT / "setup.py")
    here = platform.python_version()
    if SpecifierSet(python).contains(here, prereleases=True):
        yield fine("python", here, "fails")
    else:
        yield Finding("python", "fails", f"{here}, {python} is required", "make the environment with a newer Python")
    for requirement in required:
        if requirement.marker is None or requirement.marker.evaluate():
            yield _package(requirement)
    for requirement in optional:
        found = _package(requirement)
        missing = found.level == "fails" and found.value.startswith("not installed")
        yield fine(requirement.name, "not installed; optional", "remark") if missing else found


def requirements(setup: Path) -> tuple[str, list[Requirement], list[Requirement]]:
    """(python_requires, install_requires, extra "gpu") as a setup.py says; it is read, not run. Raises OSError."""
    calls = (node for node in ast.walk(ast.parse(setup.read_text(encoding="utf-8"))) if isinstance(node, ast.Call))
    call = next(node for node in calls if getattr(node.func, "id", "") == "setup")
    said = {word.arg: word.value for word in call.keywords}
    needed, extras = ast.literal_eval(said["install_requires"]), ast.literal_eval(said["extras_require"])
    return ast.literal_eval(said["python_requires"]), [*map(Requirement, needed)], [*map(Requirement, extras["gpu"])]


def _package(requirement: Requirement) -> Finding:
    name, shown = requirement.name, requirement.name
    remedy = f"pip install '{name}{requirement.specifier}'"
    if name.startswith(DALI):
        name = next(iter(dali_distributions()), name)
        shown = "nvidia-dali"
    across = "fails" if requirement.name in SAME_EVERYWHERE else "remark"
    try:
        version = metadata.version(name)
    except metadata.PackageNotFoundError:
        version = None
    if version is None:
        return Finding(shown, "fails", f"not installed, {requirement.specifier} is required", remedy, across)
    if not requirement.specifier.contains(version, prereleases=True):
        return Finding(shown, "fails", f"{version}, {requirement.specifier} is required", remedy, across)
    return fine(shown, version, across)


def dali_distributions() -> list[str]:
    """Names of the DALI builds that are installed, "nvidia-dali-cuda130"."""
    names = (str(one.metadata["Name"]).lower().replace("_", "-") for one in metadata.distributions())
    return sorted({name for name in names if name.startswith(DALI)})


PROBES = (this_package, packages)
