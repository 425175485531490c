"""A hub on localhost with one model, which keeps the paths that it was asked for."""

import hashlib
import json
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

COMMIT = "c" * 40
MODEL = "owner/name"


@contextmanager
def local_hub(
    folder: Path,
    *,
    cut: str | None = None,
    edit: Callable[[dict[str, Any]], None] | None = None,
) -> Iterator[tuple[str, list[str]]]:
    """Serve a folder as MODEL; yield the endpoint and the list of files that were fetched.

    Args:
        cut: what a request asks for whose connection drops halfway: a file, perhaps with a range,
            or "listing".
        edit: changes the listing of the model before it is sent.
    """
    fetched: list[str] = []

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def log_message(self, *_: object) -> None:
            pass

        def do_HEAD(self) -> None:
            self._answer(with_body=False)

        def do_GET(self) -> None:
            self._answer(with_body=True)

        def _answer(self, *, with_body: bool) -> None:
            status, headers, data = self._find()
            asked = self.headers.get("range", "")
            if status == 200 and asked:
                first, last = asked.removeprefix("bytes=").split("-")
                status, data = 206, data[int(first) : int(last or len(data)) + 1]
            name = self.path.rpartition("/")[2]
            request = f"{name} {asked}".strip() if "/resolve/" in self.path else "listing"
            is_cut = with_body and request == cut
            if with_body and "/resolve/" in self.path:
                fetched.append(f"{name} {asked}".strip())
            self.send_response(status)
            for key, value in headers.items():
                self.send_header(key, value)
            self.send_header("Content-Length", str(len(data)))
            self.end_headers()
            if with_body:
                self.wfile.write(data[: len(data) // 2] if is_cut else data)
                self.close_connection = is_cut

        def _find(self) -> tuple[int, dict[str, str], bytes]:
            path = self.path.partition("?")[0]
            files = sorted(each for each in folder.iterdir() if each.is_file())
            if path.startswith(f"/api/models/{MODEL}"):
                if "/tree/" in path:
                    tree = [
                        {"type": "file", "path": f.name, "size": f.stat().st_size, "oid": "0" * 40}
                        for f in files
                    ]
                    return 200, {"Content-Type": "application/json"}, json.dumps(tree).encode()
                listed = [{"rfilename": f.name, "size": f.stat().st_size} for f in files]
                found: dict[str, Any] = {
                    "id": MODEL,
                    "modelId": MODEL,
                    "sha": COMMIT,
                    "siblings": listed,
                }
                if edit is not None:
                    edit(found)
                return 200, {"Content-Type": "application/json"}, json.dumps(found).encode()
            file = folder / path.rpartition("/")[2]
            if f"/{MODEL}/resolve/" not in path or not file.is_file():
                return 404, {}, b""
            data = file.read_bytes()
            tag = hashlib.sha1(data).hexdigest()
            return 200, {"ETag": f'"{tag}"', "X-Repo-Commit": COMMIT}, data

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_port}", fetched
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
