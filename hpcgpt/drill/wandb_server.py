"""A stand-in for a W&B server: as much of its GraphQL and file stream as wandb's client uses.

The drill, the benchmark of tracking and the tests send their runs to it. It keeps the history lines that it receives,
by run, and can fail in the ways that real servers do:

    healthy     answers
    silent      accepts connections and never answers
    failing     answers 500 to everything
    refusing    nothing listens at its port
    forgetful   answers, but accepts no history: 500 for the file stream alone
"""

from __future__ import annotations

import gzip
import json
import re
import threading
import time
from collections.abc import Callable
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any, Literal

Mode = Literal["healthy", "silent", "failing", "refusing", "forgetful"]
BIND_S = 20.0


class WandbServer:
    """Answers at `url` until it is closed. `history` has the lines of each run in the order of their arrival, `names`
    the name of each run. It listens on `host` only."""

    def __init__(self, host: str = "127.0.0.1") -> None:
        self._mode: Mode = "healthy"
        self.stop_asked = False
        self.history: dict[str, list[dict[str, Any]]] = {}
        self.names: dict[str, str] = {}
        self.requests: list[str] = []
        self.authorizations: set[str] = set()
        self.changed = threading.Condition()
        self._closed = threading.Event()
        server = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def log_message(self, *args: Any) -> None:
                """Print nothing: the client's errors are part of the tests."""

            def do_GET(self) -> None:
                server.answer(self)

            do_POST = do_PUT = do_GET  # noqa: N815

        class Http(ThreadingHTTPServer):
            daemon_threads = True

            def handle_error(self, request: Any, client_address: Any) -> None:
                """Ignore it: clients that are killed are part of the tests."""

        self._listener: Callable[[tuple[str, int]], ThreadingHTTPServer] = lambda address: Http(address, Handler)
        self._http: ThreadingHTTPServer | None = None
        self._address = (host, 0)
        self._listen()
        self.url = f"http://{host}:{self._address[1]}"

    @property
    def mode(self) -> Mode:
        return self._mode

    @mode.setter
    def mode(self, wanted: Mode) -> None:
        self._mode = wanted
        if wanted == "refusing":
            self._close_listener()
        elif self._http is None:
            self._listen()

    def _listen(self) -> None:
        """Listen on the port again; the first time, on any free one."""
        deadline = time.monotonic() + BIND_S
        while True:
            try:
                self._http = self._listener(self._address)
                break
            except OSError:  # another program's outgoing connection may use the port meanwhile
                if time.monotonic() > deadline:
                    raise
                time.sleep(0.1)
        self._address = (self._address[0], int(self._http.server_address[1]))
        threading.Thread(target=self._http.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True).start()

    def _close_listener(self) -> None:
        if self._http is not None:
            self._http.shutdown()
            self._http.server_close()
            self._http = None

    def close(self) -> None:
        self._closed.set()
        self._close_listener()

    def environ(self) -> dict[str, str]:
        """Return the variables that make wandb send a run here, whatever the user's settings are."""
        return {"WANDB_BASE_URL": self.url, "WANDB_API_KEY": "k" * 40, "WANDB_MODE": "online", "WANDB_SILENT": "true",
                "NO_PROXY": "*", "no_proxy": "*"}  # fmt: skip

    def steps(self, run: str) -> list[int]:
        """Return the steps of a run's rows, without its samples, in the order of their arrival."""
        return [line["step"] for line in self.history.get(run, []) if "train/loss" in line]

    def wait(self, what: Callable[[], bool], limit_s: float = 120) -> bool:
        """Wait until `what` is true after a request; False if it is not within `limit_s`."""
        with self.changed:
            return self.changed.wait_for(what, limit_s)

    def answer(self, asked: BaseHTTPRequestHandler) -> None:
        body = asked.rfile.read(int(asked.headers.get("Content-Length") or 0))
        if asked.headers.get("Content-Encoding") == "gzip":
            body = gzip.decompress(body)
        with self.changed:
            self.authorizations.add(asked.headers.get("Authorization") or "")
            name = asked.path
            if asked.path.endswith("/graphql"):
                query = json.loads(body)["query"]
                found = re.search(r"(?:query|mutation)\s+(\w+)", query)
                name = found.group(1) if found else query.split("{")[1].split("(")[0].strip()
            self.requests.append(name)
            mode = self.mode
            self.changed.notify_all()
        if mode in ("silent", "refusing"):
            if mode == "silent":
                self._closed.wait()
            asked.close_connection = True  # opened before the outage
            return
        if mode == "failing" or (mode == "forgetful" and "/file_stream" in asked.path):
            self._reply(asked, 500, {"error": "out of order"})
            return
        with self.changed:
            if asked.path.endswith("/graphql"):
                reply: Any = {"data": self._graphql(name, query, json.loads(body).get("variables") or {})}
            elif "/file_stream" in asked.path:
                reply = self._file_stream(asked.path.split("/")[-2], json.loads(body))
            else:
                reply = {}
            self.changed.notify_all()
        self._reply(asked, 200, reply)

    def _reply(self, asked: BaseHTTPRequestHandler, status: int, reply: Any) -> None:
        content = json.dumps(reply).encode()
        asked.send_response(status)
        asked.send_header("Content-Type", "application/json")
        asked.send_header("Content-Length", str(len(content)))
        asked.end_headers()
        asked.wfile.write(content)

    def _file_stream(self, run: str, sent: dict[str, Any]) -> dict[str, Any]:
        lines = sent.get("files", {}).get("wandb-history.jsonl")
        if lines:
            history = self.history.setdefault(run, [])
            del history[lines["offset"] :]
            history += [json.loads(line) for line in lines["content"]]
        return {"exitcode": None, "limits": {}, "stopped": self.stop_asked}

    def _graphql(self, name: str, query: str, given: dict[str, Any]) -> dict[str, Any]:
        run = str(given.get("name") or given.get("runName") or given.get("run") or "")
        lines = self.history.get(run, [])
        project = {"id": "project", "name": "hpcgpt", "entity": {"id": "entity", "name": "somebody"}}
        if "upsertBucket" in query:
            new = run not in self.history
            self.history.setdefault(run, [])
            self.names[run] = given["displayName"] or self.names.get(run, "")
            bucket = {"id": run, "name": run, "displayName": given["displayName"], "config": given["config"],
                      "project": project, "historyLineCount": len(lines)}  # fmt: skip
            return {"upsertBucket": {"bucket": bucket, "inserted": new}}
        if name == "RunResumeStatus":
            if run not in self.history:
                return {"model": {**project, "bucket": None}}
            tail = json.dumps([json.dumps(line) for line in lines[-1:]])
            bucket = {"id": run, "name": run, "summaryMetrics": "{}", "displayName": run, "logLineCount": 0,
                      "historyLineCount": len(lines), "eventsLineCount": 0, "historyTail": tail, "eventsTail": "[]",
                      "config": "{}", "tags": [], "notes": "", "wandbConfig": json.dumps({"t": 1})}  # fmt: skip
            return {"model": {**project, "bucket": bucket}}
        if "sampledHistory" in query or "parquetHistory" in query:
            specs = [json.loads(spec) for spec in given.get("specs") or [given.get("spec") or "{}"]]
            found = [self._sampled(lines, spec) for spec in specs]
            live = [line for line in lines if all(key in line for key in given.get("liveKeys") or [])]
            parquet = {"liveData": live, "parquetUrls": []}
            return {"project": {"run": {"sampledHistory": found, "parquetHistory": parquet}}}
        if "viewer" in query:
            return {"viewer": {"id": "viewer", "entity": "somebody", "username": "somebody", "flags": "{}",
                               "teams": {"edges": []}}}  # fmt: skip
        if "createRunFiles" in query:
            files = [{"name": file, "uploadUrl": f"{self.url}/storage/{file}"} for file in given["files"]]
            return {"createRunFiles": {"runID": run, "uploadHeaders": [], "files": files}}
        if "runStopped" in query or "stopped" in query:
            return {"project": {"run": {"stopped": self.stop_asked}}}
        last = max((line.get("_step", -1) for line in lines), default=-1)
        now = "2026-01-01T00:00:00Z"
        return {"project": {**project, "internalId": "1", "run": {
            "id": run, "name": run, "projectId": "1", "displayName": run, "state": "running", "tags": [], "group": None,
            "config": "{}", "summaryMetrics": "{}", "historyKeys": {"lastStep": last}, "createdAt": now,
            "heartbeatAt": now, "historyLineCount": len(lines), "lastHistoryStep": last, "user": {"name": "somebody",
            "username": "somebody"}, "systemMetrics": "{}", "sweepName": None, "jobType": None, "readOnly": False,
            "description": "", "notes": "", "commit": None, "stopped": self.stop_asked}}}  # fmt: skip

    @staticmethod
    def _sampled(lines: list[dict[str, Any]], spec: dict[str, Any]) -> list[dict[str, Any]]:
        keys, least, most = spec.get("keys", []), spec.get("minStep", 0), spec.get("maxStep", 1 << 60)
        picked = [line for line in lines if all(key in line for key in keys) and least <= line["_step"] <= most]
        return [{key: line[key] for key in keys} for line in picked[: spec.get("samples", 500)]]
