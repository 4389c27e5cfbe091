"""The files in deploy/, checked against the program without running a container."""

import json
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import httpx
import pytest
import yaml

from engine.checkpoints.hub import FOLDER_VARIABLE
from server.__main__ import uvicorn_config
from server.app import ROUTES
from server.auth.keys import PREFIX, read_keys
from server.auth.keys import main as keys_command
from server.backends.fake import FakeBackend
from server.backends.process import STOP_SECONDS
from server.config import Config
from server.options import options_of

ROOT = Path(__file__).parents[2]
DEPLOY = ROOT / "deploy"
KUBERNETES = sorted((DEPLOY / "kubernetes").glob("*.yaml"))
CLOSING_SECONDS = 5 + 3 * STOP_SECONDS
"""uvicorn's patience with sockets, then the engine's way from a request over SIGTERM to SIGKILL."""

pytestmark = pytest.mark.anyio


def read(path: Path) -> Any:
    return yaml.safe_load(path.read_text())


# metrics


@pytest.fixture(scope="module")
async def exported() -> dict[str, set[tuple[str, str]]]:
    """What /metrics has on a fresh server: samples by name, and their labels with values."""
    settings, _ = uvicorn_config(Config(), FakeBackend())
    transport = httpx.ASGITransport(settings.app)
    async with httpx.AsyncClient(transport=transport, base_url="http://localhost") as client:
        text = (await client.get("/metrics")).text
    found: dict[str, set[tuple[str, str]]] = {}
    for name, labels in re.findall(r"(?m)^([a-z_]+)(?:\{(.*?)\})? \S+$", text):
        found.setdefault(name, set()).update(re.findall(r'(\w+)="([^"]*)"', labels))
    for name in re.findall(r"(?m)^# TYPE (\w+) histogram$", text):  # of those with labels not seen yet
        for end in ("_bucket", "_count"):
            found.setdefault(name + end, set())
    for name in re.findall(r"(?m)^# TYPE (\w+) (?:gauge|counter)$", text):
        found.setdefault(name, set())
    return found


def expressions() -> dict[str, str]:
    """Every query of the dashboard and of the alerts."""
    board = json.loads((DEPLOY / "grafana" / "livereel.json").read_text())
    found = {
        f"{panel['title']} {target['refId']}": target["expr"]
        for panel in board["panels"]
        for target in panel["targets"]
    }
    [group] = read(DEPLOY / "alerts.yml")["groups"]
    return found | {rule["alert"]: rule["expr"] for rule in group["rules"]}


@pytest.mark.parametrize("where", expressions())
async def test_queries_ask_for_what_there_is(where: str, exported: dict[str, set[tuple[str, str]]]) -> None:
    expression = expressions()[where]
    names = re.findall(r"\b(?:livereel|process)_\w+\b|\bup\b", expression)
    assert names
    for name in names:
        assert name in exported or name == "up"
    for name, selectors in re.findall(r"(\w+)\{(.*?)\}", expression):
        for label, value in re.findall(r'(\w+)="([^"]*)"', selectors):
            assert label == "job" or (label, value) in exported[name]
    assert expression.count("(") == expression.count(")")


async def test_every_figure_is_on_the_dashboard(exported: dict[str, set[tuple[str, str]]]) -> None:
    board = (DEPLOY / "grafana" / "livereel.json").read_text()
    families = {re.sub(r"_(bucket|count|sum|created)$", "", name) for name in exported if name.startswith("livereel_")}
    assert len(families) > 20
    assert {name for name in families if name not in board} == set()


def test_the_dashboard_is_laid_out() -> None:
    board = json.loads((DEPLOY / "grafana" / "livereel.json").read_text())
    places = [(panel["gridPos"]["x"], panel["gridPos"]["y"]) for panel in board["panels"]]
    assert len(set(places)) == len(places) == len({panel["id"] for panel in board["panels"]})
    source = read(DEPLOY / "grafana" / "datasource.yml")["datasources"][0]
    assert {panel["datasource"]["uid"] for panel in board["panels"]} == {source["uid"]}


def test_alerts_say_what_is_wrong() -> None:
    [group] = read(DEPLOY / "alerts.yml")["groups"]
    for rule in group["rules"]:
        assert rule["labels"]["severity"] in ("page", "warn")
        assert len(rule["annotations"]["summary"]) > 30
        assert re.fullmatch(r"\d+m", rule.get("for", "1m"))
    names = [rule["alert"] for rule in group["rules"]]
    assert len(set(names)) == len(names)
    prometheus = read(DEPLOY / "prometheus.yml")
    assert prometheus["rule_files"] == ["alerts.yml"]
    assert prometheus["scrape_configs"][0]["job_name"] == "livereel"


# the image


def instructions() -> list[tuple[str, str]]:
    """The Dockerfile's, continued lines joined."""
    text = re.sub(r"(?m)^#.*\n", "", (ROOT / "Dockerfile").read_text()).replace("\\\n", " ")
    return [(word, rest.strip()) for word, _, rest in (line.partition(" ") for line in text.splitlines() if line)]


def environment() -> dict[str, str]:
    """What the image sets."""
    return dict(pair for word, rest in instructions() if word == "ENV" for pair in re.findall(r"(\w+)=(\S+)", rest))


def test_the_image_runs_the_server_as_nobody_special() -> None:
    steps = instructions()
    words = [word for word, _ in steps]
    assert ("ENTRYPOINT", '["python", "-m", "server"]') in steps
    user = next(rest for word, rest in steps if word == "USER")
    assert re.fullmatch(r"[1-9]\d+:[1-9]\d+", user)
    assert words.index("USER") > max(k for k, word in enumerate(words) if word in ("COPY", "RUN"))
    assert words.count("FROM") == 4
    [check] = [rest for word, rest in steps if word == "HEALTHCHECK"]
    assert "/readyz" in check and "CMD [" in check
    assert not [rest for word, rest in steps if word == "ADD" or ":latest" in rest or "sudo" in rest]
    for word, rest in steps:
        if "apt-get install" in rest:
            assert "--no-install-recommends" in rest and "rm -rf /var/lib/apt/lists" in rest, word


def test_what_the_image_copies_is_there_and_is_let_through() -> None:
    let = [line[1:] for line in (ROOT / ".dockerignore").read_text().splitlines() if line.startswith("!")]
    for word, rest in instructions():
        if word == "COPY" and not rest.startswith("--from"):
            *sources, _ = rest.split()
            for source in sources:
                assert (ROOT / source).exists()
                assert source in let
    ignored = (ROOT / ".dockerignore").read_text().splitlines()
    assert "*" in ignored  # keys, .git and whatever else lies around


def test_what_the_image_copies_is_all_that_the_server_needs(tmp_path: Path) -> None:
    for word, rest in instructions():
        source, _, target = rest.partition(" ./")
        if word == "COPY" and (ROOT / source).is_dir():
            shutil.copytree(ROOT / source, tmp_path / target, ignore=shutil.ignore_patterns("weights", "__pycache__"))
    command = [sys.executable, "-m", "server", "--backend", "fake", "--port", "0"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, cwd=tmp_path) as server:
        try:
            assert server.stdout is not None
            line = server.stdout.readline()
            assert line.startswith("Livereel is ready")
            base = line.split()[-1].rstrip("/")
            for path in ("/", "/overlay/st_1", "/assets/overlay/overlay.js", "/assets/js/index.js"):
                assert httpx.get(base + path).status_code == 200, path
        finally:
            server.kill()


def test_both_kinds_of_image() -> None:
    text = (ROOT / "Dockerfile").read_text()
    for device in ("cpu", "cuda"):
        assert f"AS base-{device}" in text
        assert re.search(rf"(?m)^ +{device}\) index=https://", text)
    project = (ROOT / "pyproject.toml").read_text()
    for extra in ("engine", "otel"):
        assert re.search(rf"(?m)^{extra} = \[", project)
    wanted = re.search(r'"torch>=([\d.]+),<([\d.]+)"', project)
    version = re.search(r"(?m)^ARG TORCH=([\d.]+)$", text)
    assert wanted and version

    def number(text: str) -> list[int]:
        return [int(part) for part in text.split(".")]

    assert number(wanted[1]) <= number(version[1]) < number(wanted[2])


def test_settings_in_the_environment_are_settings(tmp_path: Path) -> None:
    compose = read(ROOT / "docker-compose.yml")["services"]["livereel"]["environment"]
    pod = read(DEPLOY / "kubernetes" / "deployment.yaml")["spec"]["template"]["spec"]["containers"][0]
    given = environment() | compose | {each["name"]: each.get("value", "") for each in pod["env"]}
    assert given.pop(FOLDER_VARIABLE).startswith("/var/lib/livereel/")  # the engine's: where weights are kept
    variables = {option.variable for option in options_of(Config)}
    assert {name for name in given if name.startswith("LIVEREEL_")} <= variables
    keys = tmp_path / "keys"
    keys.write_text('[[key]]\nname = "x"\nsha256 = "' + "0" * 64 + '"\n')
    keys.chmod(0o600)
    settings = {name: str(value) for name, value in given.items() if name.startswith("LIVEREEL_")}
    plain = {name: re.sub(r"\$\{\w+:-(.*?)\}", r"\1", value) for name, value in settings.items()}
    plain |= {"LIVEREEL_KEYS": str(keys), "LIVEREEL_PUBLIC_ADDRESS": "192.0.2.1"}
    config = Config.from_arguments(pod["args"], plain)
    assert (config.host, config.log, config.keys) == ("0.0.0.0", "json", keys)


# compose


def test_compose() -> None:
    compose = read(ROOT / "docker-compose.yml")
    services = compose["services"]
    assert services.keys() == {"livereel", "coturn", "prometheus", "grafana"}
    for name, service in services.items():
        assert ("profiles" in service) == (name != "livereel")
        assert re.search(r":[\w.${}:-]+$", service["image"]) and not service["image"].endswith(":latest")
        assert set(service.get("secrets", [])) <= compose["secrets"].keys()
        for volume in service.get("volumes", []):
            source = volume.split(":")[0]
            assert source in compose["volumes"] or (ROOT / source).is_file()
        for port in service.get("ports", []):
            # What has no key of ours in front of it is for this machine alone.
            assert name == "livereel" or port.startswith("127.0.0.1:")
    server = services["livereel"]
    drain = float(server["environment"]["LIVEREEL_DRAIN_TIMEOUT"])
    assert float(server["stop_grace_period"].removesuffix("s")) > drain + CLOSING_SECONDS
    first, last = server["sysctls"]["net.ipv4.ip_local_port_range"].split()
    assert f"{first}-{last}:{first}-{last}/udp" in server["ports"]
    assert environment()["LIVEREEL_KEYS"] == "/run/secrets/livereel-keys"


def test_no_password_has_a_default() -> None:
    text = (ROOT / "docker-compose.yml").read_text()
    for name, fallback in re.findall(r"\$\{(\w*(?:SECRET|PASSWORD|KEY)\w*):-(.*?)\}", text):
        assert fallback == "" or name.endswith("_FILE")
    assert "admin" not in text.replace("ADMIN_PASSWORD__FILE", "").lower()
    [shell] = [step for step in read(ROOT / "docker-compose.yml")["services"]["coturn"]["entrypoint"] if "exec" in step]
    assert shell.index('test -n "$$LIVEREEL_TURN_SECRET"') < shell.index("exec turnserver")
    assert "--denied-peer-ip=127.0.0.0-127.255.255.255" in shell and "--denied-peer-ip=169.254" in shell


# Kubernetes


@pytest.mark.parametrize("path", KUBERNETES, ids=lambda path: path.name)
def test_manifests_are_objects(path: Path) -> None:
    manifest = read(path)
    assert {"apiVersion", "kind"} <= manifest.keys()
    listed = read(DEPLOY / "kubernetes" / "kustomization.yaml")["resources"]
    assert path.name in listed or manifest["kind"] == "Kustomization"
    if manifest["kind"] in ("Service", "PodDisruptionBudget"):
        labels = read(DEPLOY / "kubernetes" / "deployment.yaml")["spec"]["template"]["metadata"]["labels"]
        selector = manifest["spec"]["selector"]
        assert selector.get("matchLabels", selector) == labels


def test_the_pod() -> None:
    pod = read(DEPLOY / "kubernetes" / "deployment.yaml")["spec"]["template"]["spec"]
    [server] = pod["containers"]
    paths = {route.path for route in ROUTES}
    probes = {name: server[f"{name}Probe"]["httpGet"] for name in ("startup", "liveness", "readiness")}
    assert {name: probe["path"] for name, probe in probes.items()} == {
        "startup": "/livez",
        "liveness": "/livez",
        "readiness": "/readyz",
    }
    assert {probe["path"] for probe in probes.values()} <= paths
    assert {probe["port"] for probe in probes.values()} == {port["name"] for port in server["ports"]}
    command, seconds = server["lifecycle"]["preStop"]["exec"]["command"]
    assert command == "sleep"
    drain = next(float(each["value"]) for each in server["env"] if each["name"] == "LIVEREEL_DRAIN_TIMEOUT")
    assert pod["terminationGracePeriodSeconds"] > float(seconds) + drain + CLOSING_SECONDS
    assert server["resources"]["limits"]["nvidia.com/gpu"] == "1"
    user = next(rest for word, rest in instructions() if word == "USER").split(":")
    security = pod["securityContext"]
    assert security["runAsNonRoot"] and [str(security["runAsUser"]), str(security["runAsGroup"])] == user
    assert {mount["name"] for mount in server["volumeMounts"]} == {volume["name"] for volume in pod["volumes"]}
    keys = next(volume for volume in pod["volumes"] if volume["name"] == "keys")["secret"]
    mount = next(mount for mount in server["volumeMounts"] if mount["name"] == "keys")["mountPath"]
    assert f"{mount}/{keys['items'][0]['path']}" == environment()["LIVEREEL_KEYS"]
    assert keys["defaultMode"] & 0o027 == 0  # the server refuses a file that others can read or the group can write


def test_the_commands_of_the_readme(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    text = (DEPLOY / "README.md").read_text()
    commands = re.findall(r"(?m)^python -m server (keys .*?)(?: +[>#].*)?$", text)
    assert len(commands) == 2
    file = tmp_path / "keys.toml"
    for command in commands:
        assert keys_command(command.replace("keys.toml", str(file)).split()[1:], {}) == 0
        assert capsys.readouterr().out.strip().startswith(PREFIX)
    assert [sorted(key.scopes) for key in read_keys(file)] == [["control", "view"], ["metrics"]]
    for name in re.findall(r"`(LIVEREEL_\w+)[=`]", text):
        assert name in (ROOT / "docker-compose.yml").read_text()
