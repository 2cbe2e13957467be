"""An HTTP proxy that accepts CONNECT and acts as the HTTPS server at the other end, whose name need not resolve."""

from __future__ import annotations

import socket
import ssl
import subprocess
import threading
from contextlib import suppress
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import urlsplit


class ConnectProxy:
    """Forwards to `server` (http://HOST:PORT) what arrives by TLS for the host `name`.

    `tunnels` are the requested addresses; `certificate` is what a client has to trust.
    """

    def __init__(self, folder: Path, name: str, server: str) -> None:
        self.certificate, key = folder / "certificate.pem", folder / "key.pem"
        command: list[str | Path] = [
            "openssl", "req", "-x509", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1", "-nodes",
            "-keyout", key, "-out", self.certificate, "-subj", f"/CN={name}", "-addext", f"subjectAltName=DNS:{name}",
        ]  # fmt: skip
        subprocess.run(command, check=True, capture_output=True)
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        context.load_cert_chain(self.certificate, key)
        target = urlsplit(server)
        self.tunnels: set[str] = set()
        tunnels = self.tunnels

        class Handler(BaseHTTPRequestHandler):
            def log_message(self, *args: object) -> None:
                """Print nothing."""

            def do_CONNECT(self) -> None:
                tunnels.add(self.path)
                self.send_response(200)
                self.end_headers()
                with (
                    suppress(OSError),
                    context.wrap_socket(self.connection, server_side=True) as client,
                    socket.create_connection((target.hostname or "", target.port or 0)) as end,
                ):
                    back = threading.Thread(target=_pass_on, args=(end, client), daemon=True)
                    back.start()
                    _pass_on(client, end)
                    back.join()

        self._http = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self._http.daemon_threads = True
        self.url = f"http://127.0.0.1:{self._http.server_address[1]}"
        threading.Thread(target=self._http.serve_forever, daemon=True).start()

    def close(self) -> None:
        self._http.shutdown()
        self._http.server_close()


def _pass_on(source: socket.socket, target: socket.socket) -> None:
    with suppress(OSError):
        while chunk := source.recv(1 << 16):
            target.sendall(chunk)
    with suppress(OSError):
        target.shutdown(socket.SHUT_WR)
