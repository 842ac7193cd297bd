"""A local web server that serves what a test gives it, or fails. The fixture `server` starts one."""
import hashlib
import json
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

COMMIT = "0123456789abcdef" * 2 + "01234567"


class Server(ThreadingHTTPServer):
    """Serves `files` (path -> bytes), or fails as `fault` says. `asked` are the paths and ranges that it was asked for."""
    daemon_threads = True

    def __init__(self):
        self.files, self.fault, self.asked, self.go_on = {}, None, [], threading.Event()
        super().__init__(("127.0.0.1", 0), Answer)

    @property
    def url(self):
        return f"http://127.0.0.1:{self.server_port}"

    def handle_error(self, *_):  # of a client that has given up
        pass


class Answer(BaseHTTPRequestHandler):
    def do_GET(self):
        server, path, wanted = self.server, self.path.partition("?")[0], self.headers.get("Range", "bytes=0-")
        server.asked.append((path, wanted))
        fault, content = server.fault, server.files.get(path)
        if path.startswith("/api/") and isinstance(fault, str):
            fault = None  # it is a file that this happens to
        if isinstance(fault, int) or content is None:
            return self.send_error(fault if isinstance(fault, int) else 404)
        start = 0 if fault == "no ranges" else int(wanted.removeprefix("bytes=").rstrip("-"))
        if start > len(content) or start and start == len(content):
            return self.send_error(416)
        if fault == "corrupts":
            content = content[:-1] + bytes([content[-1] ^ 1])
        if fault == "too long":
            content += b"more"
        rest = content[start:]
        self.send_response(206 if start else 200)
        self.send_header("Content-Length", str(len(rest)))
        self.end_headers()
        if fault in ("breaks off", "stalls", "breaks off for good"):
            self.wfile.write(rest[:len(rest) // 2 + 1])
            self.wfile.flush()
            if fault == "breaks off for good":
                server.fault = 503
            if fault == "stalls":
                server.go_on.wait(20)
        else:
            self.wfile.write(rest)

    def log_message(self, *_):
        pass


def as_hub(server, files):
    """Serve {name: bytes} as the Hub serves the files of org/model."""
    siblings = []
    for name, content in files.items():
        server.files[f"/org/model/resolve/{COMMIT}/{name}"] = content
        git = hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()
        large = {"lfs": {"size": len(content), "sha256": hashlib.sha256(content).hexdigest(), "pointerSize": 134}}
        siblings.append({"rfilename": name, "size": len(content), "blobId": git} | (large if "model" in name else {}))
    server.files["/api/models/org/model"] = json.dumps({"id": "org/model", "sha": COMMIT, "siblings": siblings}).encode()
