"""A server on this machine that answers W&B's client as far as an online run needs it."""

import json
import re
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any


class WandbServer:
    """Collects what a client sends; a run that was sent before can be resumed.

    Attributes:
        url: What WANDB_BASE_URL should be.
        requests: Each request, as its path or the name of its query.
        runs: For each id the variables of its last upsert.
        history: For each id the rows of history.
        summary: For each id the summary.
        artifacts: What artifacts were created with.
        refuses: Whether artifacts are refused.
    """

    def __init__(self) -> None:
        self.requests: list[str] = []
        self.runs: dict[str, dict[str, Any]] = {}
        self.history: dict[str, list[dict[str, Any]]] = {}
        self.summary: dict[str, dict[str, Any]] = {}
        self.artifacts: list[dict[str, Any]] = []
        self.refuses = False
        self._server = _Quiet(("127.0.0.1", 0), _handler(self))
        self.url = f"http://127.0.0.1:{self._server.server_port}"
        self._thread = threading.Thread(target=self._server.serve_forever, args=(0.01,))
        self._thread.start()

    def close(self) -> None:
        self._server.shutdown()
        self._server.server_close()
        self._thread.join()

    def answer(self, path: str, body: bytes) -> Any:
        if path == "/graphql":
            query = json.loads(body)
            found = re.search(r"(?:query|mutation)\s+(\w+)", query["query"])
            name = found[1] if found else ""
            self.requests.append(name)
            return {"data": self._graphql(name, query.get("variables") or {})}
        self.requests.append(path)
        if path.endswith("/file_stream"):
            self._file_stream(path.split("/")[-2], json.loads(body)["files"])
        return {}

    def _graphql(self, name: str, values: dict[str, Any]) -> dict[str, Any]:
        entity = {"id": "e", "name": "me"}
        if name == "Viewer":
            teams: dict[str, Any] = {"edges": []}
            user = {"id": "u", "entity": "me", "username": "me", "flags": "{}", "teams": teams}
            return {"viewer": user}
        if name == "RunResumeStatus":
            bucket = self._bucket(values["name"]) if values["name"] in self.runs else None
            return {"model": {"id": "p", "name": "p", "entity": entity, "bucket": bucket}}
        if name == "UpsertBucket":
            self.runs[values["name"]] = values
            project = {"id": "p", "name": values["project"], "entity": entity}
            bucket = self._bucket(values["name"]) | {"sweepName": None, "project": project}
            return {"upsertBucket": {"bucket": bucket, "inserted": True}}
        if name == "CreateRunFiles":
            files = [{"name": f, "uploadUrl": f"{self.url}/file/{f}"} for f in values["files"]]
            return {"createRunFiles": {"runID": "b", "uploadHeaders": [], "files": files}}
        if name == "ArtifactType" and not self.refuses:
            return {"project": {"artifact": None}}
        if name == "CreateArtifact":
            self.artifacts.append(values["input"])
            sequence = {"id": "s", "latestArtifact": None}
            found = {"id": "a", "state": "PENDING", "artifactSequence": sequence}
            return {"createArtifact": {"artifact": found}}
        if name in ("CreateArtifactManifest", "UpdateArtifactManifest"):
            file = self._file("manifest.json")
            key = name[0].lower() + name[1:]
            return {key: {"artifactManifest": {"id": "m", "file": file}}}
        if name == "CreateArtifactFiles":
            nodes = [{"node": self._file(f["name"])} for f in values["input"]["artifactFiles"]]
            return {"createArtifactFiles": {"files": {"edges": nodes}}}
        if name == "CommitArtifact":
            return {"commitArtifact": {"artifact": {"id": "a", "digest": "d"}}}
        return {}

    def _file(self, name: str) -> dict[str, Any]:
        return {
            "id": "f",
            "name": name,
            "displayName": name,
            "storagePath": name,
            "uploadUrl": f"{self.url}/artifact/{name}",
            "uploadHeaders": [],
            "uploadMultipartUrls": None,
            "artifact": {"id": "a"},
        }

    def _bucket(self, run_id: str) -> dict[str, Any]:
        rows = self.history.get(run_id, [])
        return {
            "id": f"b-{run_id}",
            "name": run_id,
            "displayName": self.runs[run_id].get("displayName") or "named-by-server",
            "summaryMetrics": json.dumps(self.summary.get(run_id, {})),
            "historyLineCount": len(rows),
            "historyTail": json.dumps([json.dumps(row) for row in rows[-1:]]),
            "eventsLineCount": 0,
            "eventsTail": "[]",
            "logLineCount": 0,
            "config": "{}",
            "tags": [],
            "notes": None,
            "wandbConfig": json.dumps({"t": 1}),
            "description": "",
        }

    def _file_stream(self, run_id: str, files: dict[str, Any]) -> None:
        rows = files.get("wandb-history.jsonl", {"content": []})["content"]
        self.history.setdefault(run_id, []).extend(json.loads(row) for row in rows)
        for summary in files.get("wandb-summary.json", {"content": []})["content"]:
            self.summary[run_id] = json.loads(summary)


class _Quiet(ThreadingHTTPServer):
    daemon_threads = True

    def handle_error(self, request: Any, client_address: Any) -> None:
        """A client that is gone is no error."""


def _handler(server: WandbServer) -> type[BaseHTTPRequestHandler]:
    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def _answer(self) -> None:
            body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
            data = json.dumps(server.answer(self.path, body)).encode()
            self.send_response(200)
            self.send_header("Content-Type", "application/json")
            self.send_header("Content-Length", str(len(data)))
            self.end_headers()
            self.wfile.write(data)

        do_GET = do_POST = do_PUT = _answer

        def log_message(self, *_: Any) -> None:
            """Nothing is printed."""

    return Handler
