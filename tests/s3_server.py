"""A server of S3 on loopback, in a process of its own: `S3Server`. It is the package `moto`, with one bucket.

What lines of its standard input do: `stop` closes the port and `start` opens it again, with what it held; `fail N`
answers the next N requests with 503; `overlook` makes it overlook conditions, as servers do that do not know them;
`lock` asks for credentials that it knows, of which there are none, until `unlock`.
"""

import contextlib
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator

BUCKET = "islands"


class S3Server:
    """What tests hold of it: `url` of the bucket, `environment` for those who speak to it, the process itself."""

    def __init__(self, process: subprocess.Popen, port: int):
        self.process, self.url = process, f"s3://{BUCKET}"
        self.environment = {
            "AWS_ENDPOINT_URL": f"http://127.0.0.1:{port}",
            "AWS_ACCESS_KEY_ID": "somebody",
            "AWS_SECRET_ACCESS_KEY": "something",
        }

    def tell(self, line: str) -> None:
        """Returns when it is done."""
        print(line, file=self.process.stdin, flush=True)
        assert self.process.stdout.readline() == f"{line}\n"


@contextlib.contextmanager
def s3_server() -> Iterator[S3Server]:
    command = [sys.executable, "-W", "ignore", __file__]
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": subprocess.DEVNULL}
    with subprocess.Popen(command, text=True, **pipes) as process:
        try:
            yield S3Server(process, int(process.stdout.readline()))
        finally:
            process.kill()


class Application:
    """moto's, which fails when it is told to. One request at a time: it looks for a key, then writes it."""

    def __init__(self, inner: Callable):
        self.inner, self.to_fail, self.overlooks, self.lock = inner, 0, False, threading.Lock()

    def __call__(self, environment, start):
        if self.to_fail > 0:
            self.to_fail -= 1
            start("503 Slow Down", [("Content-Type", "text/plain")])
            return [b"SlowDown"]
        if self.overlooks:
            environment.pop("HTTP_IF_NONE_MATCH", None)
        with self.lock:
            return list(self.inner(environment, start))


def main() -> None:
    from moto import settings
    from moto.moto_server.werkzeug_app import DomainDispatcherApplication, create_backend_app
    from moto.s3.models import s3_backends
    from werkzeug.serving import make_server

    s3_backends["123456789012"]["aws"].create_bucket(BUCKET, "us-east-1")
    application, port, server = Application(DomainDispatcherApplication(create_backend_app)), 0, None

    def start():
        found = make_server("127.0.0.1", port, application, threaded=True)
        threading.Thread(target=found.serve_forever, daemon=True).start()
        return found

    server = start()
    port = server.server_port
    print(port, flush=True)
    for line in sys.stdin:
        word, *number = line.split()
        if word == "stop":
            server.shutdown()
            server.server_close()
        elif word == "start":
            server = start()
        elif word == "fail":
            application.to_fail = int(number[0])
        elif word == "overlook":
            application.overlooks = True
        elif word == "lock":
            settings.INITIAL_NO_AUTH_ACTION_COUNT = 0
        elif word == "unlock":
            settings.INITIAL_NO_AUTH_ACTION_COUNT = float("inf")
        print(line, end="", flush=True)


if __name__ == "__main__":
    main()
