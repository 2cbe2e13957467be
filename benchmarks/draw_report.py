"""Take the pictures of a page of `hpcgpt report` in docs/: wide and narrow, light and dark.

    python benchmarks/draw_report.py report.html docs/ [--chromium chromium] [--height 1500]

It needs Chromium on PATH, and nothing else: the browser is driven through a pipe, with its DevTools protocol
(https://chromedevtools.github.io/devtools-protocol/). Pictures become palettes of 128 colours if pngquant is on PATH.
"""

from __future__ import annotations

import argparse
import base64
import json
import os
import shutil
import subprocess
import tempfile
from pathlib import Path
from typing import Any

WIDTHS = {1200: "wide", 390: "phone"}


class Browser:
    """A headless Chromium, for one page."""

    def __init__(self, program: str, profile: str) -> None:
        to_browser, self._out = os.pipe()
        self._in, from_browser = os.pipe()
        flags = ["--headless=new", "--no-sandbox", "--disable-gpu", "--hide-scrollbars", f"--user-data-dir={profile}"]
        # Chromium reads from descriptor 3 and writes to 4.
        script = f'exec "$@" 3<&{to_browser} 4>&{from_browser}'
        command = ["sh", "-c", script, "sh", program, *flags, "--remote-debugging-pipe", "about:blank"]
        pass_fds = (to_browser, from_browser)
        self._process = subprocess.Popen(command, pass_fds=pass_fds, stderr=subprocess.DEVNULL)
        os.close(to_browser)
        os.close(from_browser)
        self._waiting, self._number, self._session = b"", 0, ""
        targets = self.ask("Target.getTargets")["targetInfos"]
        page = next(target["targetId"] for target in targets if target["type"] == "page")
        self._session = self.ask("Target.attachToTarget", targetId=page, flatten=True)["sessionId"]

    def ask(self, method: str, **parameters: Any) -> dict[str, Any]:
        """Send a command and return its result; events are skipped."""
        self._number += 1
        message = {"id": self._number, "method": method, "params": parameters}
        if self._session:
            message["sessionId"] = self._session
        os.write(self._out, json.dumps(message).encode() + b"\0")
        while True:
            answer = self._read()
            if answer.get("id") == self._number:
                if "error" in answer:
                    raise RuntimeError(f"{method}: {answer['error']}")
                return dict(answer["result"])

    def wait_for(self, event: str) -> None:
        while self._read().get("method") != event:
            pass

    def _read(self) -> dict[str, Any]:
        while b"\0" not in self._waiting:
            piece = os.read(self._in, 1 << 20)
            if not piece:
                raise RuntimeError("Chromium has ended")
            self._waiting += piece
        line, _, self._waiting = self._waiting.partition(b"\0")
        return dict(json.loads(line))

    def close(self) -> None:
        self._process.terminate()
        self._process.wait()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("PAGE", type=Path)
    parser.add_argument("FOLDER", type=Path)
    parser.add_argument("--chromium", default="chromium")
    parser.add_argument("--height", type=int, default=1500, help="of the pictures; 0: the whole page")
    parser.add_argument("--top", type=int, default=0, help="where the pictures begin")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as profile:
        browser = Browser(options.chromium, profile)
        try:
            for width, name in WIDTHS.items():
                for theme in ("light", "dark"):
                    path = options.FOLDER / f"report_{name}_{theme}.png"
                    path.write_bytes(picture(browser, options.PAGE, width, theme, options.top, options.height))
                    if quantizer := shutil.which("pngquant"):
                        subprocess.run([quantizer, "--force", "--output", str(path), "128", str(path)], check=True)
                    print(path, f"{path.stat().st_size / 1000:.0f} kB")
        finally:
            browser.close()


def picture(browser: Browser, page: Path, width: int, theme: str, top: int, height: int) -> bytes:
    """Return a PNG of the page's upper `height` pixels below `top`; the whole page with height 0."""
    browser.ask("Page.enable")
    browser.ask("Emulation.setDeviceMetricsOverride", width=width, height=900, deviceScaleFactor=1, mobile=width < 700)
    browser.ask("Emulation.setEmulatedMedia", features=[{"name": "prefers-color-scheme", "value": theme}])
    browser.ask("Page.navigate", url=page.absolute().as_uri())
    browser.wait_for("Page.loadEventFired")
    whole = browser.ask("Page.getLayoutMetrics")["cssContentSize"]
    if whole["width"] > width:
        print(f"{page} is {whole['width']} pixels wide in a window of {width}")
    clip = {"x": 0, "y": top, "width": width, "height": height or whole["height"], "scale": 1}
    shot = browser.ask("Page.captureScreenshot", format="png", clip=clip, captureBeyondViewport=True)
    return base64.b64decode(shot["data"])


if __name__ == "__main__":
    main()
