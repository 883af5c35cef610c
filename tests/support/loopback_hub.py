"""A server on this machine that speaks as much of the Hugging Face hub's language as downloads need."""

import gzip
import hashlib
import re
import threading
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

COMMIT = "0123456789abcdef0123456789abcdef01234567"


class Hub(ThreadingHTTPServer):
    """Serves `files`, all of one repository; `log` holds (method, file, Range) of each request for bytes."""

    daemon_threads = True

    def __init__(self):
        super().__init__(("127.0.0.1", 0), Handler)
        self.files = {}
        self.etags = {}
        self.log = []
        self.break_after = None
        self.break_every = None
        """Bytes after which each answer breaks off."""
        self.refusals = []
        """Statuses with which the next requests are answered."""
        self.silent = False
        """Whether requests stay without an answer."""
        self.gzipped = False
        """Whether bytes are compressed, asked or not."""
        self.more = b""
        """What is sent beyond a file's end."""

    @property
    def url(self):
        return f"http://127.0.0.1:{self.server_port}"

    def etag(self, name):
        return self.etags.get(name) or hashlib.sha256(self.files[name]).hexdigest()


class Handler(BaseHTTPRequestHandler):
    """As the hub: a redirect that tells commit, hash and size, then the bytes, in ranges where asked."""

    protocol_version = "HTTP/1.1"

    def do_HEAD(self):
        self.answer()

    def do_GET(self):
        self.answer()

    def log_message(self, *_args):
        pass

    def answer(self):
        if self.server.silent:
            threading.Event().wait(1)
            self.close_connection = True
            return
        if self.server.refusals:
            self.reply(self.server.refusals.pop(0), {"Retry-After": "0"})
            return
        asked = re.fullmatch(r"/FoundationVision/var/(resolve/main|bytes)/(.+)", self.path)
        route, name = asked.groups() if asked else ("", self.path)
        if name not in self.server.files:
            self.reply(404, {"X-Error-Code": "EntryNotFound"})
        elif route == "bytes":
            self.send_bytes(name, self.server.files[name])
        else:
            facts = {"X-Repo-Commit": COMMIT, "X-Linked-Etag": f'"{self.server.etag(name)}"'}
            facts["X-Linked-Size"] = str(len(self.server.files[name]))
            self.reply(302, facts | {"Location": f"/FoundationVision/var/bytes/{name}"})

    def reply(self, status, headers, length=0):
        self.send_response(status)
        for key, value in headers.items():
            self.send_header(key, value)
        self.send_header("Content-Length", str(length))
        self.end_headers()

    def send_bytes(self, name, content):
        asked = self.headers.get("Range")
        facts = {"X-Repo-Commit": COMMIT, "ETag": f'"{self.server.etag(name)}"'}
        start = int(re.fullmatch(r"bytes=(\d+)-", asked).group(1)) if asked else 0
        if asked:
            facts["Content-Range"] = f"bytes {start}-{len(content) - 1}/{len(content)}"
        sent = content + self.server.more
        if self.server.gzipped and self.command == "GET":
            sent, facts["Content-Encoding"] = gzip.compress(sent), "gzip"
        self.reply(206 if asked else 200, facts, len(sent) - start)
        if self.command == "GET":
            self.server.log.append((name, asked))
            content, end = sent, len(sent)
            if self.server.break_every is not None:
                end, self.close_connection = start + self.server.break_every, True
            if self.server.break_after is not None:
                end, self.server.break_after, self.close_connection = start + self.server.break_after, None, True
            self.wfile.write(content[start:end])


@contextmanager
def running():
    server = Hub()
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True)
    thread.start()
    try:
        yield server
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
