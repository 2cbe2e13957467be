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

Mode = Literal["healthy", "silent", "failing", "refusing", "forgetful", "unreadable"]
BIND_S = 20.0
ENTITY = "a-user"  # of every key


class Http(ThreadingHTTPServer):
    daemon_threads = True

    def handle_error(self, request: Any, client_address: Any) -> None:
        """Ignore it: clients that are killed are part of the tests."""


class WandbServer:
    """Answers at `url` until it is closed. `history` has the lines of each run in the order of their arrival, `names`
    the name of each run, `config` and `summary` what wandb shows beside its curves. It listens on `host` only.

    `mode`: "forgetful" takes no rows, "unreadable" takes them, but does not return which it has.
    `rewinds`: it can rewind a run that has ended, as W&B's own servers can and self-managed ones cannot.
    """

    def __init__(self, host: str = "127.0.0.1") -> None:
        self._mode: Mode = "healthy"
        self.stop_asked, self.rewinds = False, True
        self._ended: set[str] = set()
        self.history: dict[str, list[dict[str, Any]]] = {}
        self.names: dict[str, str] = {}
        self.config: dict[str, dict[str, Any]] = {}
        self.summary: dict[str, dict[str, Any]] = {}
        self.labels: dict[str, dict[str, Any]] = {}
        self.alerts: list[dict[str, Any]] = []
        self.views: list[dict[str, Any]] = []
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
            name, query = asked.path, ""
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
        broken = {"failing": True, "forgetful": "/file_stream" in asked.path, "unreadable": "History" in query}
        if broken.get(mode):
            _reply(asked, 500, {"error": "out of order"})
            return
        with self.changed:
            if asked.path.endswith("/graphql"):
                reply: Any = {"data": self._graphql(name, query, json.loads(body).get("variables") or {})}
            elif "/file_stream" in asked.path:
                reply = self._file_stream(asked.path.split("/")[-2], json.loads(body))
            else:
                reply = {}
            self.changed.notify_all()
        refused = isinstance(reply, dict) and "rewindRun" in (reply.get("data") or {}) and "errors" in reply["data"]
        _reply(asked, 400 if refused else 200, reply["data"] if refused else reply)

    def _file_stream(self, run: str, sent: dict[str, Any]) -> dict[str, Any]:
        lines = sent.get("files", {}).get("wandb-history.jsonl")
        if lines:
            history = self.history.setdefault(run, [])
            del history[lines["offset"] :]
            history += [json.loads(line) for line in lines["content"]]
        for line in sent.get("files", {}).get("wandb-summary.json", {}).get("content", []):
            self.summary[run] = json.loads(line)
        if sent.get("complete"):
            self._ended.add(run)
        return {"exitcode": None, "limits": {}, "stopped": self.stop_asked}

    def _graphql(self, name: str, query: str, given: dict[str, Any]) -> dict[str, Any]:
        run = str(given.get("name") or given.get("runName") or given.get("run") or "")
        lines = self.history.get(run, [])
        project = {"id": "project", "name": "hpcgpt", "entity": {"id": "entity", "name": ENTITY}}
        if "rewindRun" in query:
            return self._rewind(given, project)
        if "upsertView" in query:
            self.views.append(given)
            return {"upsertView": {"view": {"id": "view", "name": given["name"]}, "inserted": True}}
        if "notifyScriptableRunAlert" in query:
            self.alerts.append(given)
            return {"notifyScriptableRunAlert": {"success": True}}
        if "upsertBucket" in query:
            return self._upsert(run, given, project)
        if name == "RunResumeStatus":
            if run not in self.history:
                return {"model": {**project, "bucket": None}}
            return {"model": {**project, "bucket": _bucket(run, lines)}}
        if "sampledHistory" in query or "parquetHistory" in query:
            specs = [json.loads(spec) for spec in given.get("specs") or [given.get("spec") or "{}"]]
            found = [_sampled(lines, spec) for spec in specs]
            live = [line for line in lines if all(key in line for key in given.get("liveKeys") or [])]
            parquet = {"liveData": live, "parquetUrls": []}
            return {"project": {"run": {"sampledHistory": found, "parquetHistory": parquet}}}
        if "viewer" in query:
            return {"viewer": {"id": "viewer", "entity": ENTITY, "username": ENTITY, "flags": "{}",
                               "teams": {"edges": []}}}  # fmt: skip
        if "createRunFiles" in query:
            files = [{"name": file, "uploadUrl": f"{self.url}/storage/{file}"} for file in given["files"]]
            return {"createRunFiles": {"runID": run, "uploadHeaders": [], "files": files}}
        if "runStopped" in query or "stopped" in query:
            return {"project": {"run": {"stopped": self.stop_asked}}}
        return {"project": {**project, "internalId": "1", "run": _run(run, lines, self.stop_asked)}}

    def _upsert(self, run: str, given: dict[str, Any], project: dict[str, Any]) -> dict[str, Any]:
        """Make a run, or begin to continue it."""
        self._ended.discard(run)
        if given.get("config"):
            self.config[run] = {key: value["value"] for key, value in json.loads(given["config"]).items()}
        said = {key: given[key] for key in ("groupName", "tags", "notes") if given.get(key)}
        self.labels[run] = self.labels.get(run, {}) | said
        new = run not in self.history
        self.history.setdefault(run, [])
        self.names[run] = given["displayName"] or self.names.get(run, "")
        bucket = {"id": run, "name": run, "displayName": given["displayName"], "config": given["config"],
                  "project": project, "historyLineCount": len(self.history[run])}  # fmt: skip
        return {"upsertBucket": {"bucket": bucket, "inserted": new}}

    def _rewind(self, given: dict[str, Any], project: dict[str, Any]) -> dict[str, Any]:
        """Remove the lines after one of wandb's own steps; refuse that while the run has not ended."""
        run, last = str(given["runName"]), given["metricValue"]
        why = "" if run in self._ended else "cannot rewind a run that is not in a terminal state"
        if why or not self.rewinds:
            error = {"message": why or "rewind is not enabled", "path": ["rewindRun"]}
            return {"rewindRun": None, "errors": [error]}
        self.history[run] = lines = [line for line in self.history[run] if line["_step"] <= last]
        rewound = {"id": run, "name": run, "displayName": self.names.get(run, ""), "description": "", "config": "{}",
                   "sweepName": None, "project": project, "historyLineCount": len(lines)}  # fmt: skip
        return {"rewindRun": {"rewoundRun": rewound}}


def _reply(asked: BaseHTTPRequestHandler, status: int, reply: Any) -> None:
    content = json.dumps(reply).encode()
    asked.send_response(status)
    asked.send_header("Content-Type", "application/json")
    asked.send_header("Content-Length", str(len(content)))
    asked.end_headers()
    asked.wfile.write(content)


def _bucket(run: str, lines: list[dict[str, Any]]) -> dict[str, Any]:
    """Return what a client gets of a run that it resumes."""
    tail = json.dumps([json.dumps(line) for line in lines[-1:]])
    return {"id": run, "name": run, "summaryMetrics": "{}", "displayName": run, "logLineCount": 0,
            "historyLineCount": len(lines), "eventsLineCount": 0, "historyTail": tail, "eventsTail": "[]",
            "config": "{}", "tags": [], "notes": "", "wandbConfig": json.dumps({"t": 1})}  # fmt: skip


def _run(run: str, lines: list[dict[str, Any]], stopped: bool) -> dict[str, Any]:
    """Return what a client gets of a run that it reads."""
    last = max((line.get("_step", -1) for line in lines), default=-1)
    now = "2026-01-01T00:00:00Z"
    return {"id": run, "name": run, "projectId": "1", "displayName": run, "state": "running", "tags": [],
            "group": None, "config": "{}", "summaryMetrics": "{}", "historyKeys": {"lastStep": last}, "createdAt": now,
            "heartbeatAt": now, "historyLineCount": len(lines), "lastHistoryStep": last, "user": {"name": ENTITY,
            "username": ENTITY}, "systemMetrics": "{}", "sweepName": None, "jobType": None, "readOnly": False,
            "description": "", "notes": "", "commit": None, "stopped": stopped}  # fmt: skip


def _sampled(lines: list[dict[str, Any]], spec: dict[str, Any]) -> list[dict[str, Any]]:
    keys, least, most = spec.get("keys", []), spec.get("minStep", 0), spec.get("maxStep", 1 << 60)
    picked = [line for line in lines if all(key in line for key in keys) and least <= line["_step"] <= most]
    return [{key: line[key] for key in keys} for line in picked[: spec.get("samples", 500)]]
