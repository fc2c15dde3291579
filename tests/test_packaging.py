"""Container, lock and CI hold together, as far as can be said without a container engine."""

import json
import os
import re
import subprocess
import sys
import tomllib
from pathlib import Path

from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from service.settings import settings_table

ROOT = Path(__file__).parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())
# Where the lock is for, not where the tests run.
IMAGE = {"python_version": "3.12", "python_full_version": "3.12.0", "sys_platform": "linux", "extra": ""}


# --- the lock --------------------------------------------------------------------------------------------------------


def _locked() -> dict[str, str]:
    pins = re.findall(
        r"^([A-Za-z0-9._-]+)==([^\s;]+) \\$", (ROOT / "deploy/requirements.lock").read_text(), re.MULTILINE
    )
    return {canonicalize_name(name): version for name, version in pins}


def test_the_lock_has_every_dependency_at_a_version_that_is_allowed() -> None:
    project = PROJECT["project"]
    wanted = [
        *project["dependencies"],
        *project["optional-dependencies"]["sandbox"],
        *project["optional-dependencies"]["cluster"],
        *PROJECT["build-system"]["requires"],
    ]
    locked = _locked()
    for requirement in map(Requirement, wanted):
        if requirement.marker is not None and not requirement.marker.evaluate(IMAGE):
            continue
        name = canonicalize_name(requirement.name)
        assert name in locked, f"deploy/requirements.lock lacks {name}: make it again, deploy/README.md says how"
        assert requirement.specifier.contains(locked[name]), f"{name} {locked[name]} is not {requirement.specifier}"


def test_the_lock_is_pins_and_hashes_and_names_no_place() -> None:
    for line in (ROOT / "deploy/requirements.lock").read_text().splitlines():
        assert re.fullmatch(r"[a-z0-9._-]+==\S+ \\|    --hash=sha256:[0-9a-f]{64}( \\)?|# .*", line), line
        assert "://" not in line


# --- the image -------------------------------------------------------------------------------------------------------


def _steps() -> list[tuple[str, str]]:
    text = re.sub(r"^\s*#.*\n", "", (ROOT / "Dockerfile").read_text(), flags=re.MULTILINE).replace("\\\n", " ")
    return [
        (word.upper(), " ".join(rest.split()))
        for word, _, rest in (line.partition(" ") for line in text.splitlines() if line)
    ]


def _last(word: str) -> str:
    return next(rest for name, rest in reversed(_steps()) if name == word)


def test_what_the_image_copies_is_there_and_not_ignored() -> None:
    kept = {
        line.removeprefix("!") for line in (ROOT / ".dockerignore").read_text().splitlines() if line.startswith("!")
    }
    copied = {
        source for word, rest in _steps() if word == "COPY" and "--from" not in rest for source in rest.split()[:-1]
    }
    assert copied == kept
    for source in copied:
        assert (ROOT / source).exists(), source


def test_the_image_installs_by_hash_and_runs_without_root() -> None:
    installs = [rest for word, rest in _steps() if word == "RUN" and "pip install" in rest]
    assert len(installs) == 2
    assert "--require-hashes" in installs[0]
    assert "--no-deps --no-build-isolation ." in installs[1]
    uid = _last("USER").partition(":")[0]
    assert uid.isdigit()
    assert uid != "0"
    after = [word for word, _ in _steps()]
    assert "RUN" not in after[after.index("USER") :]
    assert "VOLUME" not in after  # it would make a nameless volume of every container


def test_the_image_gets_its_signals_and_is_asked_without_a_shell() -> None:
    assert json.loads(_last("ENTRYPOINT")) == ["turnwire"]
    assert json.loads(_last("CMD")) == ["serve"]
    probe = json.loads(_last("HEALTHCHECK").partition("CMD ")[2])
    assert probe[0] == "python"
    compile(probe[2], "HEALTHCHECK", "exec")


def test_the_probe_of_the_image_fails_when_nobody_listens() -> None:
    probe = json.loads(_last("HEALTHCHECK").partition("CMD ")[2])
    command = [sys.executable, *probe[1:]]
    ended = subprocess.run(command, env={"TURNWIRE_PORT": "1"}, capture_output=True, check=False)
    assert ended.returncode == 1


def test_what_the_image_sets_are_settings() -> None:
    known = {row.name for row in settings_table()}
    assert set(re.findall(r"\b(TURNWIRE_\w+)=", _last("ENV"))) <= known


# --- CI --------------------------------------------------------------------------------------------------------------


def test_ci_ends_with_the_test_command_of_the_readme() -> None:
    line = next(line for line in (ROOT / "README.md").read_text().splitlines() if line.endswith("-m pytest"))
    lines = (ROOT / ".ci/run").read_text().splitlines()
    *_, venv, install, pytest = line.split(" && ")
    assert lines[-1] == pytest
    assert lines.index(venv) + 1 == lines.index(install)
    assert os.access(ROOT / ".ci/run", os.X_OK)
    subprocess.run(["bash", "-n", ".ci/run"], cwd=ROOT, check=True)


def test_the_files_of_delivery_name_no_package_host() -> None:
    for name in ("Dockerfile", "docker-compose.yml", ".ci/run", "pyproject.toml", "README.md", "deploy/README.md"):
        text = (ROOT / name).read_text()
        assert not re.search(r"--(extra-)?index-url|find-links=", text), name
        # Any address but this machine's and compose's own would be somebody's host.
        assert not re.search(r"https://|http://(?!localhost|127\.0\.0\.1|objects:8333)", text), name
