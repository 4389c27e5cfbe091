"""The npm package in clients/js: what it declares, what imports it, and its functions under Node where there is one."""

import json
import re
import shutil
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[3]
PACKAGE = ROOT / "clients" / "js"
NODE = shutil.which("node")
MODULES = sorted(PACKAGE.glob("*.js"))
WEB = ROOT / "clients" / "web"
STUDIO = sorted(WEB.glob("*.js"))
OVERLAY = ROOT / "clients" / "overlay" / "overlay.js"


def test_a_package_of_modules_without_dependencies_or_build() -> None:
    package = json.loads((PACKAGE / "package.json").read_text())
    assert (package["name"], package["type"], package["license"]) == ("livereel", "module", "Apache-2.0")
    assert not [key for key in package if key == "scripts" or key.lower().endswith("dependencies")]
    assert (PACKAGE / package["exports"]["."]).is_file()
    assert package["version"] in (ROOT / "pyproject.toml").read_text()


@pytest.mark.parametrize("path", [*MODULES, *STUDIO, OVERLAY], ids=lambda path: path.name)
def test_imports_lead_to_files(path: Path) -> None:
    """The server has the studio's modules under /assets and the package's under /assets/js."""
    for source in re.findall(r'(?m)^(?:import|export)\b(?:[^;]*\bfrom)? "([^"]+)"', path.read_text()):
        folder, _, name = source.rpartition("/")
        if path == OVERLAY:
            assert folder == "../js"
        else:
            assert folder in (".", "./js")
        beside = path.parent if folder == "." else PACKAGE
        assert (beside / name).is_file(), source


def test_index_exports_every_module() -> None:
    listed = set(re.findall(r'from "\./(.+)"', (PACKAGE / "index.js").read_text()))
    assert listed == {path.name for path in MODULES} - {"index.js"}


@pytest.mark.parametrize("path", [*STUDIO, OVERLAY], ids=lambda path: path.name)
def test_what_the_package_has_is_written_once(path: Path) -> None:
    text = path.read_text()
    for part in ("new RTCPeerConnection", "new WebSocket", "new MediaSource(", "createImageBitmap"):
        assert part not in text


CHECKS = """
import assert from "node:assert";
import { iceServers, mediaType, parseFrame, retryDelay, HEADER_BYTES } from "./index.js";

assert.deepEqual([0, 1, 2, 3, 4, 5].map((n) => retryDelay(n, 8000)), [500, 1000, 2000, 4000, 8000, 8000]);

const message = new Uint8Array([1, 1, 1, 0, 1, 0, 0, 0, 0, 0, 0, 1, 0, 0, 0, 2, 7, 8]).buffer;
const { pts, data } = parseFrame(message);
assert.equal(HEADER_BYTES, 16);
assert.equal(pts, 2 ** 32 + 2);
assert.deepEqual([...data], [7, 8]);

const link = '<stun:a.example>; rel="ice-server", <turn:b.example?transport=udp>; rel="ice-server"; ' +
  'username="u"; credential="c"; credential-type="password"';
assert.deepEqual(iceServers({ headers: new Headers({ Link: link }) }), [
  { urls: "stun:a.example", username: undefined, credential: undefined },
  { urls: "turn:b.example?transport=udp", username: "u", credential: "c" },
]);
assert.deepEqual(iceServers({ headers: new Headers() }), []);

const init = new Uint8Array([0, 0, 0, 9, ...new TextEncoder().encode("avcC"), 1, 0x42, 0xc0, 0x15, 0xff]);
assert.equal(mediaType(init), 'video/mp4; codecs="avc1.42c015"');
assert.throws(() => mediaType(init.subarray(0, 11)), /init segment/);
"""


@pytest.mark.skipif(NODE is None, reason="needs Node.js")
def test_functions_that_need_no_browser() -> None:
    assert NODE is not None
    command = [NODE, "--input-type=module", "--eval", CHECKS]
    result = subprocess.run(command, check=False, capture_output=True, text=True, cwd=PACKAGE, timeout=60)
    assert result.returncode == 0, result.stderr
