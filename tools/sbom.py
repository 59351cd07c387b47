"""What an image holds, as a CycloneDX document: every Python distribution and every package of its system.

    python -m tools.sbom IMAGE --output sbom.cdx.json

The Python part is what `cyclonedx-py environment` (cyclonedx-bom, a development tool that the image does not hold)
finds when it runs in a container of the image; the system's part is what dpkg says there. Then the document is held
against `requirements.lock`: what is locked and not in the image, or in another version, is named, and the exit code
is 1. The same image gives the same bytes.

Not covered: files that belong to no package, and the licences of the system's packages.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import re
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from cyclonedx.schema import SchemaVersion
from cyclonedx.validation.json import JsonStrictValidator
from packageurl import PackageURL
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from runner import __version__

ROOT = Path(__file__).resolve().parent.parent
LOCK = ROOT / "requirements.lock"
TOOL = "/sbom-tool"
# The interpreter that is looked at is started by the tool, without the tool's own folder on its path.
_PYTHON = f"""
import runpy, sys
sys.path.insert(0, {TOOL!r})
sys.argv = ["cyclonedx-py", "environment", "--output-reproducible", "--no-validate", "--sv", "1.6", sys.executable]
runpy.run_module("cyclonedx_py", run_name="__main__")
"""
_DPKG = "command -v dpkg-query >/dev/null || exit 0; dpkg-query -W -f '${Package}\\t${Version}\\t${Architecture}\\n'"


class SbomError(Exception):
    """The image cannot be looked into; the text says why."""


def make_bom(image: str) -> dict[str, Any]:
    """Return the document of an image, CycloneDX 1.6.

    Raises:
        SbomError: the image cannot be run, or the document is not valid.
    """
    bom: dict[str, Any] = json.loads(_in_container(image, "python3", "-c", _PYTHON, mount=_tool_folder()))
    system = [_system_package(line) for line in _in_container(image, "sh", "-c", _DPKG).splitlines()]
    bom["components"] = [*bom.get("components", []), *system]
    bom.setdefault("metadata", {})["component"] = {
        "type": "container",
        "bom-ref": "image",
        "name": "lora-merge-action",
        "version": __version__,
        "properties": [{"name": "image:id", "value": _image_id(image)}],
    }
    if problem := JsonStrictValidator(SchemaVersion.V1_6).validate_str(json.dumps(bom)):
        raise SbomError(f"The document of {image} is not valid: {problem}")
    return bom


def missing(bom: Mapping[str, Any], lock: str) -> list[str]:
    """Return what is locked (for this kind of machine) and not in the document with that version; and torch.

    Args:
        bom: the document.
        lock: text of requirements.lock.
    """
    found: dict[str, str] = {
        canonicalize_name(component["name"]): component["version"]
        for component in bom["components"]
        if component.get("purl", "").startswith("pkg:pypi/")
    }
    problems = [] if "torch" in found else ["torch is not in the image"]
    for name, version in locked(lock).items():
        if name not in found:
            problems.append(f"{name} {version} is locked and not in the image")
        elif found[name] != version:
            problems.append(f"{name} is locked as {version}, and the image has {found[name]}")
    return problems


def locked(lock: str) -> dict[str, str]:
    """Return name → version of every requirement of a lock that applies to this kind of machine."""
    lines = re.sub(r"\\\n", " ", lock).splitlines()
    stated = [
        line.partition(" --hash")[0].strip() for line in lines if line and not line.lstrip().startswith(("#", "-"))
    ]
    requirements = [Requirement(line) for line in stated if line]
    return {
        canonicalize_name(one.name): str(one.specifier).removeprefix("==")
        for one in requirements
        if one.marker is None or one.marker.evaluate()
    }


def _system_package(line: str) -> dict[str, Any]:
    name, version, architecture = line.split("\t")
    purl = str(PackageURL("deb", "debian", name, version, {"arch": architecture}))
    return {"type": "library", "bom-ref": purl, "name": name, "version": version, "purl": purl}


def _tool_folder() -> Path:
    """Return the folder in which this Python has the tool."""
    spec = importlib.util.find_spec("cyclonedx_py")
    if spec is None or spec.origin is None:
        raise SbomError("cyclonedx-bom is not installed: run `make setup`.")
    return Path(spec.origin).resolve().parent.parent


def _image_id(image: str) -> str:
    return _docker("image", "inspect", "--format", "{{.Id}}", image).strip()


def _in_container(image: str, program: str, *arguments: str, mount: Path | None = None) -> str:
    mounts = [] if mount is None else ["-v", f"{mount}:{TOOL}:ro"]
    return _docker("run", "--rm", "--network", "none", *mounts, "--entrypoint", program, image, *arguments)


def _docker(*arguments: str) -> str:
    done = subprocess.run(["docker", *arguments], capture_output=True, text=True, check=False)
    if done.returncode:
        raise SbomError(f"docker {arguments[0]} failed: {done.stderr.strip()[-500:]}")
    return done.stdout


def main(arguments: Sequence[str]) -> int:
    """Write the document; return 1 where something that is locked is not in the image."""
    parser = argparse.ArgumentParser(prog="python -m tools.sbom", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("image", help="name or id of an image of this action")
    parser.add_argument("--output", type=Path, default=Path("sbom.cdx.json"))
    parser.add_argument("--lock", type=Path, default=LOCK, help="what the image must hold")
    options = parser.parse_args(arguments)
    try:
        bom = make_bom(options.image)
    except SbomError as error:
        print(f"tools.sbom: {error}", file=sys.stderr)
        return 2
    options.output.write_text(json.dumps(bom, indent=2, sort_keys=True) + "\n", "utf-8")
    problems = missing(bom, options.lock.read_text("utf-8"))
    for problem in problems:
        print(f"tools.sbom: {problem}", file=sys.stderr)
    print(f"{options.output}: {len(bom['components'])} components")
    return 1 if problems else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
