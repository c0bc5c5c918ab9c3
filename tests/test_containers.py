"""The files that containers are built and run from; docker/check.sh builds and runs them."""

import importlib.metadata
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

ROOT = Path(__file__).parents[1]
DOCKERFILE = (ROOT / "docker" / "Dockerfile").read_text()
COMPOSE: dict[str, Any] = yaml.safe_load((ROOT / "docker" / "compose.yaml").read_text())
COMPILERS = ("g++", "gcc", "nvcc", "ninja", "build-essential")


def stages() -> dict[str, str]:
    """The text of each stage of the Dockerfile without comments, by name, with that of the stages that it begins from."""
    plain = "\n".join(line for line in DOCKERFILE.splitlines() if not line.startswith("#"))
    texts: dict[str, str] = {}
    for base, name, content in re.findall(r"^FROM (\S+) AS (\S+)$(.*?)(?=^FROM|\Z)", plain, re.M | re.S):
        texts[name] = texts.get(base, "") + content
    return texts


STAGES = stages()


@pytest.mark.parametrize("target", ["cpu", "gpu", "mlflow"])
def test_a_runtime_target_has_no_compiler_and_no_root(target: str) -> None:
    text = STAGES[target]
    for compiler in COMPILERS:
        assert compiler not in text
    assert re.findall(r"^USER (.*)$", text, re.M)[-1] == "10001:0", "Kubernetes' runAsNonRoot needs a number"
    assert re.findall(r"^ENTRYPOINT (.*)$", text, re.M)[-1].startswith('["tini", "--", ')
    assert "HEALTHCHECK" in text


def test_the_development_target_has_what_compiles() -> None:
    assert "g++" in STAGES["gpu-dev"]
    assert re.findall(r"^USER (.*)$", STAGES["gpu-dev"], re.M)[-1] == "10001:0"


def test_requirements_are_those_of_setup(tmp_path: Path) -> None:
    # Where they are read, the image's build has these files and nothing else of the repository.
    (sources,) = re.findall(r"^COPY (.*) \./$", STAGES["build"], re.M)
    for source in sources.split():
        shutil.copy(ROOT / source, tmp_path)

    def printed(*words: str) -> set[str]:
        command = [sys.executable, "requirements.py", "setup.py", *words]
        done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=True)
        return set(done.stdout.split())

    required = [re.sub(r"\s", "", name) for name in importlib.metadata.requires("vaescale") or ()]
    own = {name for name in required if "extra==" not in name}
    server = {name.partition(";")[0] for name in required if name.endswith('extra=="mlflow-server"')}

    def parts(names: set[str]) -> set[tuple[str, ...]]:
        return {tuple(sorted(re.split(r"(?=[<>=\[])", name, maxsplit=1))) for name in names}

    assert len(own) > 15
    assert parts(printed()) == parts(own)
    assert parts(printed("--only", "mlflow-server")) == parts(server)


def test_what_the_image_is_built_from_is_named() -> None:
    """An image holds what is asked for: a new folder, a data set or a secret is not sent to the builder."""
    lines = [line for line in (ROOT / ".dockerignore").read_text().splitlines() if not line.startswith("#")]
    assert lines[0] == "*"
    for line in lines[1:]:
        assert line.startswith(("!", "**/"))
        assert not line.startswith("!") or (ROOT / line[1:]).exists(), line


def test_compose_has_no_password_and_a_health_check_for_each_service() -> None:
    services = COMPOSE["services"]
    targets = {name for name in STAGES if name in ("cpu", "gpu", "gpu-dev", "mlflow")}
    for name, service in services.items():
        for key, value in service.get("environment", {}).items():
            secret = re.search("PASSWORD|SECRET|TOKEN|ACCESS_KEY", key)
            assert not secret or str(value).startswith("/run/secrets/"), f"{name}: {key}"
        assert re.match(r"\$\{\w+:-[^}]+\}$", service["image"]), f"{name}: an image that can be pinned"
        if "build" in service:  # its image has its own
            assert re.sub(r"\$\{\w+:-(.+)\}", r"\1", service["build"]["target"]) in targets
        else:
            assert "test" in service["healthcheck"]
        for other, needs in service.get("depends_on", {}).items():
            one_shot = services[other].get("healthcheck", {}).get("disable", False)
            wanted = "service_completed_successfully" if one_shot else "service_healthy"
            assert needs["condition"] == wanted, f"{name} needs {other}"
    for secret in COMPOSE["secrets"].values():
        assert set(secret) == {"file"}


def test_the_check_says_what_it_lacks(tmp_path: Path) -> None:
    for program in ("bash", "dirname", "id"):
        (tmp_path / program).symlink_to(str(shutil.which(program)))
    done = subprocess.run(
        [str(ROOT / "docker" / "check.sh")],
        env={"PATH": str(tmp_path)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("docker/check.sh: skipped: ")
