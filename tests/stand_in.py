"""A stand-in of the Hugging Face hub on this machine: as much of it as pushing a folder takes.

It answers what the hub's client asks: to make a repository, to check a card, which files go where (`preupload`), to
take large files by git LFS, and to commit. What was committed lies in `files`.
"""

import base64
import hashlib
import json
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer


class Hub:
    """`files`: {repository: {path: bytes}}; `private`: {repository: whether}; `asked`: the paths of all requests."""

    def __init__(self, token="hf_secret"):
        self.token, self.files, self.private, self.stored, self.asked = token, {}, {}, {}, []
        self.broken = ()  # parts of paths that are answered with an error of the server
        hub = self

        class Handler(BaseHTTPRequestHandler):
            def log_message(self, *arguments):
                pass

            def answer(self):
                content = self.rfile.read(int(self.headers.get("Content-Length") or 0))
                status, reply = hub.answer(self.command, self.path, content, self.headers)
                body = json.dumps(reply).encode()
                self.send_response(status)
                self.send_header("Content-Type", "application/json")
                self.send_header("Content-Length", str(len(body)))
                self.end_headers()
                self.wfile.write(body)

            do_GET = do_POST = do_PUT = do_HEAD = answer

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.address = f"http://127.0.0.1:{self.server.server_port}"
        threading.Thread(target=self.server.serve_forever, daemon=True).start()

    def close(self):
        self.server.shutdown()
        self.server.server_close()

    def answer(self, method, path, content, headers):
        """(status, reply) to a request."""
        path = path.partition("?")[0]
        self.asked.append(f"{method} {path}")
        if any(part in path for part in self.broken):
            return 403, {"error": "You are not allowed to do that"}
        if path.startswith("/stored/"):  # an address of LFS, which says itself that it may be used
            self.stored[path.removeprefix("/stored/")] = content
            return 200, {}
        if headers.get("Authorization") != f"Bearer {self.token}":
            return 401, {"error": "Invalid username or password."}
        if path == "/api/repos/create":
            asked = json.loads(content)
            repository = f"{asked['organization'] or 'me'}/{asked['name']}"
            reply = {"url": f"{self.address}/{repository}"}
            if repository in self.files:
                return 409, reply
            self.files[repository], self.private[repository] = {}, asked.get("visibility") == "private"
            return 200, reply
        if path == "/api/validate-yaml":
            return 200, {"errors": [], "warnings": []}
        if path.endswith(".git/info/lfs/objects/batch"):
            objects = json.loads(content)["objects"]
            return 200, {
                "objects": [
                    each | {"actions": {"upload": {"href": f"{self.address}/stored/{each['oid']}"}}} for each in objects
                ]
            }
        owner, name, *rest = path.removeprefix("/api/models/").split("/")
        files = self.files.get(f"{owner}/{name}")
        if files is None:
            return 404, {"error": "Repository not found"}
        if rest and rest[0] == "preupload":
            modes = {True: "lfs", False: "regular"}
            return 200, {
                "files": [
                    {
                        "path": each["path"],
                        "uploadMode": modes[each["path"].endswith(".safetensors")],
                        "shouldIgnore": False,
                        "oid": None,
                    }
                    for each in json.loads(content)["files"]
                ]
            }
        if rest and rest[0] == "commit":
            for line in map(json.loads, content.splitlines()):
                value = line["value"]
                if line["key"] == "file":
                    files[value["path"]] = base64.b64decode(value["content"])
                elif line["key"] == "lfsFile":
                    files[value["path"]] = self.stored[value["oid"]]
                    assert hashlib.sha256(files[value["path"]]).hexdigest() == value["oid"]
                elif line["key"] == "deletedFile":
                    del files[value["path"]]
            return 200, {"commitUrl": f"{self.address}/{owner}/{name}/commit/0", "commitOid": "0" * 40}
        if rest and rest[0] == "tree":
            return 200, [{"type": "file", "path": each, "size": len(files[each]), "oid": "0"} for each in files]
        return 200, {"id": f"{owner}/{name}", "sha": "0" * 40, "siblings": [{"rfilename": each} for each in files]}
