"""A headless Chromium, spoken to over two pipes: pages as a reader sees them."""

import base64
import itertools
import json
import os
import shutil
import subprocess
import tempfile

NAMES = ("chromium", "chromium-browser", "google-chrome", "chrome")
CHROMIUM = next(filter(None, map(shutil.which, NAMES)), None)


class Browser:
    """One page. `told`: what the browser said of it, such as errors and requests, in its order."""

    def __enter__(self):
        (theirs, self.out), (self.into, answers) = os.pipe(), os.pipe()
        self.profile = tempfile.TemporaryDirectory(ignore_cleanup_errors=True)
        flags = ["--headless=new", "--no-sandbox", "--disable-gpu", "--remote-debugging-pipe", "--no-first-run"]
        flags += [f"--user-data-dir={self.profile.name}", "--disable-dev-shm-usage", "--hide-scrollbars"]

        def hand_over():  # Chromium reads from 3 and writes to 4
            spare = os.dup(theirs), os.dup(answers)
            for old, new in zip(spare, (3, 4)):
                os.dup2(old, new)

        self.process = subprocess.Popen(
            [CHROMIUM, *flags, "about:blank"],
            preexec_fn=hand_over,
            close_fds=False,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        os.close(theirs), os.close(answers)
        self.numbers, self.told, self.rest, self.session = itertools.count(1), [], b"", None
        target = self.call("Target.createTarget", url="about:blank")["targetId"]
        self.session = self.call("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]
        for domain in ("Page", "Runtime", "Log", "Network"):
            self.call(f"{domain}.enable")
        return self

    def __exit__(self, *_):
        os.close(self.out)
        self.process.terminate()
        self.process.wait(20)
        os.close(self.into)
        self.profile.cleanup()

    def call(self, method, **given):
        """The result of a command of the DevTools protocol."""
        number = next(self.numbers)
        message = {"id": number, "method": method, "params": given}
        message |= {"sessionId": self.session} if self.session else {}
        os.write(self.out, json.dumps(message).encode() + b"\0")
        while True:
            answer = self.read()
            if answer.get("id") == number:
                assert "error" not in answer, (method, answer["error"])
                return answer["result"]
            self.told.append(answer)

    def read(self):
        while b"\0" not in self.rest:
            more = os.read(self.into, 1 << 20)
            assert more, "Chromium has ended"
            self.rest += more
        message, _, self.rest = self.rest.partition(b"\0")
        return json.loads(message)

    def open(self, path, *, width=1000, height=800, media=()):
        """Show a file; `media`: features such as {"name": "prefers-color-scheme", "value": "dark"}."""
        self.call(
            "Emulation.setDeviceMetricsOverride", width=width, height=height, deviceScaleFactor=1, mobile=width < 500
        )
        self.call("Emulation.setEmulatedMedia", features=list(media))
        self.told.clear()
        self.call("Page.navigate", url=path.resolve().as_uri())
        while not any(each.get("method") == "Page.loadEventFired" for each in self.told):
            self.told.append(self.read())

    def run(self, script):
        """The value of a JavaScript expression."""
        result = self.call("Runtime.evaluate", expression=script, returnByValue=True, awaitPromise=True)
        assert "exceptionDetails" not in result, result
        return result["result"].get("value")

    def picture(self, path, *, full=True):
        """Save what is seen as a PNG."""
        data = self.call("Page.captureScreenshot", captureBeyondViewport=full)["data"]
        path.write_bytes(base64.b64decode(data))
